"""Pairs from several answers, and the ROUGE-L that stands in for scores."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemtune.config import Data, Pairs
from stemtune.data.candidates import ranked_pairs, reference_scores
from stemtune.data.formats import to_records
from stemtune.data.overlap import rouge_l
from stemtune.data.records import Place, Preference
from stemtune.errors import DataError
from tests.data.rows import prepared_of, write_rows
from tests.models import tiny_tokenizer

PLACE = Place(Path("rows.jsonl"), 4, 44)
MODES = ["best_worst", "best_all", "all"]


def row_of(*scored: tuple[str, Any], **more: Any) -> dict[str, Any]:
    candidates = [{"text": text, "score": score} for text, score in scored]
    return {"query": "Where?", "candidates": candidates, **more}


def preference(row: dict[str, Any], **pairs: Any) -> Preference:
    name, (record,) = to_records(row, PLACE, Data(path="rows.jsonl", pairs=Pairs(**pairs)))
    assert name == "candidates"
    assert isinstance(record, Preference)
    return record


def named_pairs(record: Preference) -> set[tuple[str, str]]:
    return {(record.answers[a].content, record.answers[b].content) for a, b in record.pairs}


def refusal(row: dict[str, Any], **pairs: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        preference(row, **pairs)
    assert caught.value.where == "rows.jsonl:4 (byte 44)"
    assert caught.value.hint
    return caught.value


# -- pairs ------------------------------------------------------------------------------------

SCORED = [("C", 0.5), ("A", 0.9), ("D", 0.1), ("B", 0.8)]


@pytest.mark.parametrize(
    ("mode", "margin", "expected"),
    [
        ("best_worst", 0.0, {"AD"}),
        ("best_all", 0.0, {"AB", "AC", "AD"}),
        ("all", 0.0, {"AB", "AC", "AD", "BC", "BD", "CD"}),
        ("best_worst", 0.2, {"AD"}),
        ("best_all", 0.2, {"AC", "AD"}),
        ("all", 0.2, {"AC", "AD", "BC", "BD", "CD"}),
        ("all", 0.5, {"AD", "BD"}),
    ],
)
def test_modes_and_margins(mode: str, margin: float, expected: set[str]) -> None:
    record = preference(row_of(*SCORED), mode=mode, margin=margin)
    assert {a + b for a, b in named_pairs(record)} == expected
    assert len(record.pairs) == len(expected)
    everything = {a + b for a, _ in SCORED for b, _ in SCORED if a < b}
    assert record.is_ranking == (expected in ({"AD"}, everything))


def test_scores_that_differ_by_the_margin_are_tied() -> None:
    row = row_of(("A", 1.0), ("B", 0.5))
    assert preference(row, margin=0.49).pairs
    assert "tied" in refusal(row, margin=0.5).what


scored_lists = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", " c", "d\n", "d"]),
        st.integers(-8, 8).map(lambda n: n / 4),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=200)
@given(scored=scored_lists, mode=st.sampled_from(MODES), margin=st.sampled_from([0.0, 0.25, 1.0]))
def test_pairs_are_what_the_mode_says(
    scored: list[tuple[str, float]], mode: Any, margin: float
) -> None:
    texts, scores = [text for text, _ in scored], [score for _, score in scored]
    found = ranked_pairs(texts, scores, Pairs(mode=mode, margin=margin))
    every = {
        (a, b)
        for a in range(len(texts))
        for b in range(len(texts))
        if scores[a] - scores[b] > margin and texts[a].strip() != texts[b].strip()
    }
    assert len(set(found)) == len(found)
    assert set(found) <= every
    best = max(scores)
    if mode == "all":
        assert set(found) == every
    elif mode == "best_all":
        (top,) = {a for a, _ in found} or {scores.index(best)}
        assert scores[top] == best
        assert set(found) == {(a, b) for a, b in every if a == top}
    else:
        assert len(found) <= 1
        for a, b in found:  # the worst of those that say something else
            others = [s for t, s in scored if t.strip() != texts[a].strip()]
            assert scores[a] == best and scores[b] == min(others)
        assert bool(found) == any(a == scores.index(best) for a, _ in every)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "scored",
    [
        [("A", 1.0)],
        [("A", 1.0), ("B", 1.0)],
        [("A", 1), ("B", 1), ("C", 1.0)],
        [("A", 1.0), ("A", 0.0)],
        [("A", 1.0), (" A\n", 0.0)],
    ],
)
def test_nothing_to_prefer_is_refused(mode: str, scored: list[tuple[str, float]]) -> None:
    assert "tied" in refusal(row_of(*scored), mode=mode).what


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", range(6))
def test_the_best_answer_has_the_best_score(mode: str, order: int) -> None:
    """What is trained where answers are not compared."""
    scored = list(SCORED)
    random.Random(order).shuffle(scored)
    record = preference(row_of(*scored), mode=mode)
    assert record.answers[record.best].content == "A"


@pytest.mark.parametrize("mode", MODES)
def test_the_best_answer_is_the_best_within_the_margin_too(mode: str) -> None:
    record = preference(row_of(("B", 0.8), ("A", 0.9), ("C", 0.1)), mode=mode, margin=0.2)
    assert record.answers[record.best].content == "A"


@pytest.mark.parametrize("mode", MODES)
def test_the_best_answer_is_trained(mode: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row_of(*SCORED))
    tokenizer = tiny_tokenizer()
    prepared = prepared_of(path, tokenizer, pairs={"mode": mode})
    (sequence,) = prepared.train.flat
    assert tokenizer.decode(sequence.input_ids[sequence.is_target]) == "A<|im_end|>"


@pytest.mark.parametrize(
    ("mode", "margin", "roles"),
    [
        ("best_worst", 0.0, {"A": "chosen", "D": "rejected"}),
        ("best_all", 0.0, {"A": "chosen", "B": "rejected", "C": "rejected", "D": "rejected"}),
        ("best_all", 0.2, {"A": "chosen", "C": "rejected", "D": "rejected"}),
        ("all", 0.0, {"A": "chosen", "B": "chosen", "C": "chosen", "D": "rejected"}),
    ],
)
def test_an_answer_without_a_pair_is_not_rejected(
    mode: str, margin: float, roles: dict[str, str], tmp_path: Path
) -> None:
    """Those between best and worst, or tied with the best, are on neither side."""
    path = write_rows(tmp_path / "rows.jsonl", row_of(*SCORED))
    tokenizer = tiny_tokenizer()
    pairs = {"mode": mode, "margin": margin}
    prepared = prepared_of(path, tokenizer, pairs=pairs, answers="pairs")
    found = {
        str(tokenizer.decode(s.input_ids[s.is_target])).removesuffix("<|im_end|>"): s.role
        for s in prepared.train.flat
        if s.role in ("chosen", "rejected")
    }
    assert found == roles


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, True, False, "0.9", [1], {}])
def test_scores_are_finite_numbers(score: Any) -> None:
    error = refusal(row_of(("A", 1.0), ("B", score)))
    assert error.what.startswith("`candidates[1].score` should be a number")


def test_nothing_tells_which_is_better() -> None:
    row = {"query": "q", "candidates": [{"text": "A"}, {"text": "B", "score": 1.0}]}
    assert refusal(row).what == "nothing tells which candidate is better"
    row["candidates"] = []
    assert "empty list" in refusal(row).what
    row["candidates"] = [{"text": " "}, {"text": "B"}]
    assert refusal(row).what == "`candidates[0].text` is blank"


@pytest.mark.parametrize("key", ["answer", "response", "output", "reference"])
def test_a_reference_ranks_them(key: str) -> None:
    texts = ["To be.", "To be or not to be, that is it!", "Not."]
    row = {
        "prompt": "Speak.",
        "candidates": [{"text": text} for text in texts],
        key: "To be, or not to be: that is the question.",
    }
    record = preference(row, mode="all")
    assert named_pairs(record) == {(texts[1], texts[0]), (texts[1], texts[2]), (texts[0], texts[2])}


def test_scores_go_before_a_reference() -> None:
    record = preference(row_of(("near", 0.1), ("far", 0.9), answer="near"))
    assert named_pairs(record) == {("far", "near")}


def test_candidates_that_are_equally_like_the_reference_are_tied() -> None:
    row = {"query": "q", "answer": "x y", "candidates": [{"text": "x"}, {"text": "y"}]}
    assert "tied" in refusal(row).what


# -- ROUGE-L ----------------------------------------------------------------------------------


def lcs(ours: list[str], theirs: list[str]) -> int:
    """By the table of Wagner and Fischer."""
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, one in enumerate(ours, 1):
        for j, other in enumerate(theirs, 1):
            above, left = table[i - 1][j], table[i][j - 1]
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(above, left)
    return table[-1][-1]


def expected_rouge(ours: list[str], theirs: list[str]) -> float:
    common = lcs(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


TOKENS = ["to", "be", "or", "not", "virtue", "学", "而", "时", "习", "之", "の", "ก", "7"]
token_lists = st.lists(st.sampled_from(TOKENS), max_size=14)


def spelled(tokens: list[str], seed: int) -> str:
    """With spaces, punctuation and capitals that make no difference."""
    draw = random.Random(seed)
    text = ""
    for token in tokens:
        text += draw.choice([token, token.upper(), token.title()])
        text += draw.choice([" ", ", ", "! ", "\n", " — ", "。", "，"])
    return text


@settings(max_examples=200)
@given(ours=token_lists, theirs=token_lists, seed=st.integers(0, 9))
def test_rouge_l(ours: list[str], theirs: list[str], seed: int) -> None:
    found = rouge_l(spelled(ours, seed), spelled(theirs, seed + 1))
    assert found == pytest.approx(expected_rouge(ours, theirs), abs=1e-12)
    assert 0 <= found <= 1


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # Lin 2004, section 3: precision 3/4, recall 3/4; 2/4 and 2/4.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("学而时习之", "学而时习之，不亦说乎？", 2 * 5 / (5 + 9)),
        ("他说 hello world", "他 说hello", 2 * 3 / (4 + 3)),
        ("…", "…", 0.0),
        ("", "a", 0.0),
        ("Straße", "STRASSE", 1.0),
        ("ﬁne", "fine", 1.0),
    ],
)
def test_rouge_l_by_hand(text: str, reference: str, expected: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(expected)


def test_reference_scores_are_in_order() -> None:
    assert reference_scores(["a b", "c", "a"], "a b") == pytest.approx([1.0, 0.0, 2 / 3])
