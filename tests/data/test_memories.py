"""Which passages a prompt is reminded of, and where they stand. BM25 is written out anew."""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stemtune
from stemtune import chat as chat_module
from stemtune.chat import Chat
from stemtune.config import Data, Memories, Source
from stemtune.data.memories import (
    Memory,
    MemoryBook,
    exchanges,
    memory_lines,
    read_memories,
)
from stemtune.data.prepare import Prepared, prepare
from stemtune.data.records import Dialogue, Message, Place
from stemtune.data.render import Renderer
from stemtune.data.survey import survey
from stemtune.errors import ConfigError, DataError
from stemtune.generate import Sampling
from tests.data.rows import data_of, prepared_of, write_rows
from tests.models import tiny_tokenizer
from tests.runs import IGNORED, make_config

pytestmark = IGNORED
Tokens = list[str]  # English words, and single Chinese characters

ENGLISH = ["virtue", "sea", "lamp", "oil", "night", "bell", "horse", "city"]
CHINESE = list("学而时习之不亦说乎有朋")
VOCABULARY = [*ENGLISH, *CHINESE]
token_lists = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=12)
FREE: dict[str, Any] = {"count": 1000, "max_characters": 10**6}


def spelled(tokens: Tokens, seed: int = 0) -> str:
    """With capitals, punctuation and spaces that make no difference."""
    draw = random.Random(seed)
    text = draw.choice(["", "“", "- ", "\t"])
    for token in tokens:
        gap = draw.choice([" ", ", ", "\n", "... ", " – ", "; ", "。", "！", "」 "])
        close = draw.choice(["", "", gap]) if token in CHINESE else gap
        text += draw.choice([token, token.upper(), token.title()]) + close
    return text


def terms_of(tokens: Tokens) -> list[str]:
    """English words, and bigrams of Chinese characters that follow each other; a lone one stays."""
    terms: list[str] = []
    runs: list[Tokens] = [[]]
    for token in tokens:
        if token in CHINESE:
            runs[-1].append(token)
        else:
            terms.append(token)
            runs.append([])
    for run in runs:
        terms += [a + b for a, b in pairwise(run)] if len(run) > 1 else run
    return terms


def bm25(
    corpus: list[list[str]], query: list[str], k1: float = 1.5, b: float = 0.75
) -> list[float]:
    """Lucene's variant, in float64: idf = ln(1 + (N - df + ½) / (df + ½))."""
    mean = sum(len(terms) for terms in corpus) / len(corpus)
    found = Counter(term for terms in corpus for term in set(terms))
    scores = []
    for terms in corpus:
        count, score = Counter(terms), 0.0
        for term in query:
            idf = math.log(1 + (len(corpus) - found[term] + 0.5) / (found[term] + 0.5))
            norm = k1 * (1 - b + b * len(terms) / mean)
            score += idf * count[term] / (count[term] + norm)
        scores.append(score)
    return scores


def book_of(texts: list[str], count_tokens: Any = None, **settings: Any) -> MemoryBook:
    memories = [Memory(text) for text in texts]
    return MemoryBook(memories, Memories(**{**FREE, **settings}), count_tokens)


def count_words(text: str) -> int:
    return len(text.split())


# -- which ------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    corpus=st.lists(token_lists, min_size=1, max_size=12),
    query=token_lists,
    seed=st.integers(0, 9),
)
def test_the_likest_come_first(corpus: list[Tokens], query: Tokens, seed: int) -> None:
    texts = [f"{spelled(tokens, seed + i)} ({i})" for i, tokens in enumerate(corpus)]
    expected = bm25(
        [[*terms_of(tokens), str(i)] for i, tokens in enumerate(corpus)], terms_of(query)
    )
    chosen = [texts.index(text) for text in book_of(texts).choose(spelled(query, seed))]
    assert set(chosen) == {i for i, score in enumerate(expected) if score > 0}
    for one, other in pairwise(chosen):
        assert expected[one] > expected[other] - 1e-5
        if corpus[one] == corpus[other]:  # equally like: in the order of the file
            assert one < other


def test_the_scores_are_bm25s() -> None:
    draw = random.Random(7)
    corpus = [draw.choices(VOCABULARY, k=draw.randint(1, 30)) for _ in range(300)]
    book = book_of([spelled(tokens) for tokens in corpus])
    terms = [terms_of(tokens) for tokens in corpus]
    for _ in range(20):
        query = draw.choices(VOCABULARY, k=draw.randint(1, 15))
        found = book.likeness(spelled(query))
        np.testing.assert_allclose(found, bm25(terms, terms_of(query)), rtol=1e-4, atol=1e-5)


def test_what_shares_no_word_is_not_chosen() -> None:
    book = book_of(["the sea", "学而时习之", "…"])
    assert book.choose("lamp oil") == []
    assert book.choose("…?!") == []
    assert book.choose("") == []
    assert book.choose("有朋") == []
    assert book.choose("THE lamp") == ["the sea"]
    assert book.choose("时习") == ["学而时习之"]


def test_memories_without_a_word() -> None:
    assert book_of(["…", "!"]).choose("virtue") == []
    assert book_of([]).choose("virtue") == []


def test_the_same_memory_is_used_once() -> None:
    memories = [Memory("the sea", 1), Memory("the sea", 2), Memory("sea and lamp", 3)]
    chosen = MemoryBook(memories, Memories(**FREE)).choose("sea")
    assert sorted(chosen) == ["sea and lamp", "the sea"]


@settings(max_examples=100)
@given(
    corpus=st.lists(token_lists, min_size=1, max_size=12),
    query=token_lists,
    count=st.integers(1, 5),
    most=st.integers(1, 120),
    tokens=st.none() | st.integers(1, 30),
)
def test_caps(
    corpus: list[Tokens], query: Tokens, count: int, most: int, tokens: int | None
) -> None:
    texts = [f"{' '.join(part)} ({i})" for i, part in enumerate(corpus)]
    ranked = book_of(texts).choose(" ".join(query))
    settings: dict[str, Any] = {"count": count, "max_characters": most, "max_tokens": tokens}
    chosen = book_of(texts, count_words, **settings).choose(" ".join(query))

    def fits(some: list[str]) -> bool:
        characters, words = len("\n".join(some)), sum(map(count_words, some))
        return characters <= most and (tokens is None or words <= tokens)

    assert len(chosen) <= count
    assert fits(chosen) or not chosen
    assert chosen == [text for text in ranked if text in chosen]
    for number, text in enumerate(ranked):  # what was passed over did not fit
        likelier = [c for c in chosen if ranked.index(c) < number]
        assert text in chosen or len(likelier) == count or not fits([*likelier, text])


def test_what_fits_exactly_is_kept() -> None:
    texts = ["sea sea bell", "the sea and more"]
    both = len("sea sea bell\nthe sea and more")
    assert book_of(texts, max_characters=both).choose("sea") == texts
    assert book_of(texts, max_characters=both - 1).choose("sea") == texts[:1]
    assert book_of(texts, count_words, max_tokens=7).choose("sea") == texts
    assert book_of(texts, count_words, max_tokens=6).choose("sea") == texts[:1]
    # One that does not fit makes room for those that do.
    assert book_of(texts, max_characters=15).choose("bell, and more of the sea") == texts[:1]
    assert book_of([*texts, "a sea"], count_words, max_tokens=5).choose("sea") == [
        "sea sea bell",
        "a sea",
    ]


# -- which never ------------------------------------------------------------------------------


def holds(one: Tokens, other: Tokens) -> bool:
    return any(one[i : i + len(other)] == other for i in range(len(one) - len(other) + 1))


@settings(max_examples=200)
@given(
    before=st.lists(st.sampled_from(VOCABULARY), max_size=5),
    answer=token_lists,
    after=st.lists(st.sampled_from(VOCABULARY), max_size=5),
    other=token_lists,
    seed=st.integers(0, 99),
)
def test_a_memory_that_holds_the_answer_is_never_used(
    before: Tokens, answer: Tokens, after: Tokens, other: Tokens, seed: int
) -> None:
    """However it is written; nor one that the answer holds. Any other one is."""
    holding = spelled([*before, *answer, *after], seed)
    part = spelled(answer[: len(answer) // 2 + 1], seed + 1)
    third = f"{spelled(other, seed + 2)}"
    # Every memory shares a word with it: bigrams, or a character that stands alone.
    everything = " sea ".join([*ENGLISH, *CHINESE, spelled(answer), holding, part, third])
    chosen = book_of([holding, part, third]).choose(everything, spelled(answer, seed + 3))
    free = not holds(other, answer) and not holds(answer, other)
    assert chosen == ([third] if free else [])


@pytest.mark.parametrize(
    ("memory", "answer"),
    [
        ("Q\nI know not.", "I know not."),
        ("I KNOW\n\n not", "“I know not!”"),
        ("I *know* **not**", "I know not"),
        ("I _know_ not", "I know not"),
        ("I know not", "__I know not__"),
        ("I don’t know", "I don't know."),
        ("不亦说乎", "不亦 说乎？"),
        ("學而：「不亦说乎？」", "不亦，说乎"),
        ("Ｉ ｋｎｏｗ", "i know"),
        ("cafe\u0301 noir", "Café noir"),
        ("I", "I know not."),
        ("No.", "no"),
    ],
)
def test_the_answer_in_other_clothes(memory: str, answer: str) -> None:
    book = book_of([memory, "I know the sea, 不亦 cafe noir"])
    query = f"{memory} {answer} sea"
    assert memory not in book.choose(query, answer)
    assert memory in book.choose(query, "something else")


@pytest.mark.parametrize(("memory", "answer"), [("another", "an"), ("art", "the arts"), ("a", "…")])
def test_a_part_of_a_word_is_no_answer(memory: str, answer: str) -> None:
    assert book_of([memory]).choose(memory, answer) == [memory]


@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=8), own=st.integers(0, 3))
def test_a_memory_of_the_same_group_is_never_used(groups: list[int], own: int) -> None:
    memories = [Memory(f"sea {i}", group) for i, group in enumerate(groups)]
    chosen = MemoryBook(memories, Memories(**FREE)).choose("sea", "lamp", own)
    free = [m.text for m in memories if m.group != own or not own]
    assert sorted(chosen) == sorted(free)


Rows = list[list[tuple[str, str]]]


@st.composite
def row_lists(draw: st.DrawFn) -> Rows:
    """Dialogues that all speak of the sea; some begin with the same exchange, some open."""
    rows: Rows = []
    for number in range(draw(st.integers(2, 7))):
        row = [("A", "the sea opens")] if draw(st.booleans()) else []
        kin = draw(st.sampled_from(["", "", "kin1", "kin2"])) or f"only{number}"
        for turn in range(draw(st.integers(1, 4))):
            tag = kin if turn == 0 else f"r{number}t{turn}"
            row += [("B", f"sea asked{tag}"), ("A", f"sea said{tag}")]
        rows.append(row)
    return rows


def write_dialogues(path: Path, rows: Rows) -> Path:
    return write_rows(
        path, *[{"dialogue": [{"role": r, "text": t} for r, t in row]} for row in rows]
    )


@settings(max_examples=20)
@given(rows=row_lists(), fraction=st.sampled_from([0.0, 0.4]), position=st.booleans())
def test_memories_come_from_other_training_dialogues(
    rows: Rows, fraction: float, position: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never from the same dialogue or group, and never from a held-out one."""
    path = write_dialogues(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "character": "A",
        "samples": "turn",
        "eval_fraction": fraction,
        "memories": {"position": "before_history" if position else "after_history", **FREE},
    }
    prepared = prepared_of(path, tokenizer, **settings)
    # By hand: which dialogues are held out, and which share their first exchange.
    first = ["\n".join(text for role, text in row if role == "B").split("\n")[0] for row in rows]
    opened = [row[0][0] == "A" for row in rows]
    kin = [(opened[i], first[i]) for i in range(len(rows))]
    held_out = {prepared.eval.place(i).line - 1 for i in range(len(prepared.eval))}
    told = {
        f"{asked[1]}\n{said[1]}": {
            kin[i] for i, row in enumerate(rows) if i not in held_out and said in row
        }
        for number, row in enumerate(rows)
        if number not in held_out
        for asked, said in pairwise(row)
        if said[0] == "A"
    }
    assert {memory.text for memory in prepared.memories} == set(told)
    assert bool(held_out) == bool(fraction and len(set(kin)) > 1)
    for part in (prepared.train, prepared.eval):
        for number in range(len(part)):
            (sequence,) = part.sequences[number]
            row = part.place(number).line - 1
            answer = str(tokenizer.decode(sequence.input_ids[sequence.is_target]))
            prompt = str(tokenizer.decode(sequence.input_ids[~sequence.is_target]))
            inside = prompt.partition("(You remember:\n")[2].partition(")")[0]
            lines = inside.split("\n") if inside else []
            found = {f"{a}\n{b}" for a, b in zip(lines[::2], lines[1::2], strict=True)}
            said = answer.removesuffix("<|im_end|>")
            expected = {
                text
                for text, groups in told.items()
                if groups - {kin[row]} and f"\n{said}" not in text
            }
            assert found == expected


def test_what_is_left_out_of_training_is_no_memory(tmp_path: Path) -> None:
    """Half of the groups of a source, drawn by its weight: the others are not trained on."""
    rows: Rows = [[("B", f"sea q{i}"), ("A", f"sea a{i}")] for i in range(12)]
    path = write_dialogues(tmp_path / "rows.jsonl", rows)
    source = Source(path=str(path), weight=0.5)
    data = Data(
        path=source, eval_fraction=0.0, character="A", samples="turn", memories=Memories(**FREE)
    )
    prepared = prepare(survey(data, 0), tiny_tokenizer(), data)
    trained = {prepared.train.place(i).line - 1 for i in range(len(prepared.train))}
    assert 0 < len(trained) < 12
    assert {m.text for m in prepared.memories} == {f"sea q{i}\nsea a{i}" for i in trained}


def test_exchanges() -> None:
    def texts(*roles: str, trained: tuple[int, ...]) -> list[str]:
        messages = tuple(Message(role, f"{role}{i}") for i, role in enumerate(roles))
        return list(exchanges(Dialogue(("0",), Place(Path("x"), 1), messages, trained)))

    assert texts("user", "assistant", trained=(1,)) == ["user0\nassistant1"]
    assert texts("user", "assistant", "assistant", trained=(1, 2)) == [
        "user0\nassistant1",
        "assistant2",
    ]


# -- where ------------------------------------------------------------------------------------

SYSTEM, Q1, A1, Q2 = (
    Message("system", "S"),
    Message("user", "Q1"),
    Message("assistant", "A1"),
    Message("user", "Q2"),
)


def test_after_the_history() -> None:
    book = book_of(["x"], template="<{memories}>")
    assert book.put([SYSTEM, Q1, A1, Q2], ["m1", "m2"]) == [
        SYSTEM,
        Q1,
        A1,
        Message("user", "<m1\nm2>\n\nQ2"),
    ]
    assert book.put([Q1], ["m"]) == [Message("user", "<m>\n\nQ1")]


def test_before_the_history() -> None:
    book = book_of(["x"], template="<{memories}>", position="before_history")
    rest = [Q1, A1, Q2]
    assert book.put([SYSTEM, *rest], ["m1", "m2"]) == [
        Message("system", "S\n\n<m1\nm2>"),
        *rest,
    ]
    assert book.put(rest, ["m"]) == [Message("system", "<m>"), *rest]


@pytest.mark.parametrize("position", ["after_history", "before_history"])
def test_nothing_remembered_changes_nothing(position: str) -> None:
    book = book_of(["x"], position=position)
    for messages in ([SYSTEM, Q1, A1, Q2], [Q1]):
        assert book.put(messages, []) == messages


def test_a_memory_that_looks_like_a_template() -> None:
    book = book_of(["x"])
    put = book.put([Q1], ["{memories} \\1 {0}", "m2"])
    assert put[0].content == "(You remember:\n{memories} \\1 {0}\nm2)\n\nQ1"


def prefix_nodes(prepared: Prepared) -> int:
    prefixes = set()
    for sequence in prepared.train.flat:
        ids = sequence.input_ids.tolist()
        prefixes |= {tuple(ids[: i + 1]) for i in range(len(ids))}
    return len(prefixes)


def test_windows_share_their_history_behind_it(tmp_path: Path) -> None:
    """`after_history`: each window goes on where the one before it was, up to its query."""
    draw = random.Random(3)
    rows: Rows = [
        [("BA"[i % 2], f"{' '.join(draw.sample(ENGLISH, 3))} turn{n}x{i}") for i in range(20)]
        for n in range(4)
    ]
    path = write_dialogues(tmp_path / "rows.jsonl", rows)
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {"character": "A", "samples": "turn", "system": "P"}
    after, before = (
        prepared_of(path, tokenizer, **options, memories={"position": position, "count": 2})
        for position in ("after_history", "before_history")
    )
    bare = prepared_of(path, tokenizer, **options)
    for plain, reminded in zip(bare.train.flat, after.train.flat, strict=True):
        # The same text up to where the query begins, and from there on the memories.
        texts = [str(tokenizer.decode(s.input_ids)) for s in (plain, reminded)]
        query = texts[0].rindex("<|im_start|>user\n") + len("<|im_start|>user\n")
        assert texts[0][:query] == texts[1][:query]
        assert texts[1][query:].startswith("(You remember:\n")
        assert texts[1].endswith(f")\n\n{texts[0][query:]}")
    assert prefix_nodes(after) < 0.75 * prefix_nodes(before)


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_of_paragraphs(newline: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "memories.txt"
    text = "\n\nOne\nof two lines.\n\n \t\n学而时习之\n \n\n\nThree. \n"
    path.write_bytes((mark + text.replace("\n", newline)).encode())
    assert read_memories(path) == [
        Memory("One\nof two lines."),
        Memory("学而时习之"),
        Memory("Three."),
    ]


def test_a_file_of_rows(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "m.jsonl", {"text": "One\n\nmemory.", "id": 3}, {"text": "学而\u2028时习之"}
    )
    assert read_memories(path) == [Memory("One\n\nmemory."), Memory("学而\u2028时习之")]


@given(texts=st.lists(st.text(min_size=1).filter(lambda t: bool(t.strip())), min_size=1))
def test_what_an_adapter_keeps_is_read_again(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("memories") / "memories.jsonl"
    path.write_text(memory_lines([Memory(text, 7) for text in texts]), encoding="utf-8", newline="")
    assert [memory.text for memory in read_memories(path)] == texts


@pytest.mark.parametrize(
    ("name", "content", "what", "line"),
    [
        ("m.txt", None, "can't be read", ""),
        ("m.jsonl", None, "can't be read", ""),
        ("m.txt", b"", "holds no memories", ""),
        ("m.txt", b" \n\n\t\n", "holds no memories", ""),
        ("m.jsonl", b"", "holds no memories", ""),
        ("m.jsonl", b"\n\n", "holds no memories", ""),
        ("m.txt", "学而时习".encode("gbk"), "can't be read", ""),
        ("m.jsonl", b'{"text": "x"}\n{"text": ', "not valid JSON", ":2"),
        ("m.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "the field `text` is missing", ":2"),
        ("m.jsonl", b'{"text": 3}\n', "`text` should be text", ":1"),
        ("m.jsonl", b"[1]\n", "expected a JSON object", ":1"),
    ],
)
def test_files_that_cannot_be_right(
    name: str, content: bytes | None, what: str, line: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_memories(path)
    assert what in caught.value.what
    assert caught.value.where.startswith(f"{path}{line}")
    assert caught.value.hint


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_memories(tmp_path)


def test_memories_of_a_file(tmp_path: Path) -> None:
    """A file has no group: it is for every dialogue; the answer stays hidden all the same."""
    path = write_dialogues(
        tmp_path / "rows.jsonl", [[("B", "What of the sea?"), ("A", "It is deep.")]]
    )
    memories = tmp_path / "m.txt"
    memories.write_text("The sea!\n\nThe sea: IT IS\ndeep\n\nA lamp.", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    prepared = prepared_of(
        path, tokenizer, character="A", samples="turn", memories={"path": str(memories)}
    )
    (sequence,) = prepared.train.flat
    assert tokenizer.decode(sequence.input_ids) == (
        "<|im_start|>user\n(You remember:\nThe sea!)\n\nWhat of the sea?<|im_end|>\n"
        "<|im_start|>assistant\nIt is deep.<|im_end|>"
    )


# -- embeddings -------------------------------------------------------------------------------


def test_embeddings_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError) as caught:
        book_of(["x"], by="owner/model")
    assert "'owner/model' needs sentence-transformers" in caught.value.what
    assert caught.value.where == "data.memories.by"
    assert caught.value.hint == "pip install sentence-transformers, or use bm25"


class Model:
    """Embeds a text as how often it has each vowel."""

    def __init__(self, name: str) -> None:
        if name != "vowels":
            raise OSError("no such model\nat all")

    def encode(self, texts: list[str], normalize_embeddings: bool) -> Any:
        assert normalize_embeddings
        counts = np.array([[text.count(vowel) for vowel in "aeiou"] for text in texts], float)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def test_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    book = book_of(["o", "ai", "aaai", "aa"], by="vowels")
    assert book.choose("a") == ["aa", "aaai", "ai"]  # cosines of 1, 3/√10 and 1/√2; none for "o"
    assert book.choose("a", "AA!") == ["aaai", "ai"]
    with pytest.raises(ConfigError) as caught:
        book_of(["x"], by="other")
    assert caught.value.what == "can't load the embedding model 'other': no such model"
    assert caught.value.where == "data.memories.by"


# -- chat -------------------------------------------------------------------------------------

TRAINED: Rows = [
    [("B", "What lies under the sea? "), ("A", "A bell lies there. \n")],
    [("B", "\n Who keeps the lamp?"), ("A", "My brother keeps it."), ("B", "Why?"), ("A", "Oil.")],
    [("A", "Welcome."), ("B", "学而时习之"), ("A", "不亦说乎")],
    [("B", "Is virtue a horse?"), ("A", "Who says so, of a lamp and a bell?")],
]
HELD_OUT: Rows = [
    [
        ("B", "Tell me of the lamp and the sea."),
        ("A", "Hush."),
        ("B", "Then, who keeps the bell under the horse?"),
        ("A", "Nobody at all."),
        ("B", "时习？"),
        ("A", "走。"),
    ]
]


@pytest.mark.parametrize("position", ["after_history", "before_history"])
@pytest.mark.parametrize("source", ["dialogues", "paragraphs"])
@pytest.mark.parametrize("count", [2, 8])
def test_chat_reminds_as_training_did(
    position: str,
    source: str,
    count: int,
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A conversation that training has as held-out turns: the same ids, turn by turn."""
    config = make_config(tmp_path, tiny_base, "train.max_steps=1")
    write_dialogues(tmp_path / "rows.jsonl", TRAINED)
    held_out = write_dialogues(tmp_path / "held-out.jsonl", HELD_OUT)
    memories: dict[str, Any] = {"position": position, "count": count}
    if source == "paragraphs":
        (tmp_path / "m.txt").write_text(
            "The sea.\n\nThe lamp\nis lit. \n\n时习\n", encoding="utf-8"
        )
        memories["path"] = str(tmp_path / "m.txt")
    settings: dict[str, Any] = {
        "character": "A",
        "samples": "turn",
        "system": "You are a keeper.",
        "memories": memories,
        "eval_path": str(held_out),
    }
    data = data_of(tmp_path / "rows.jsonl", **settings)
    config = config.model_copy(update={"data": data})
    adapter = stemtune.train(config).adapter_dir

    tokenizer = tiny_tokenizer()
    prepared = prepared_of(tmp_path / "rows.jsonl", tokenizer, **settings)
    prompts = [s.input_ids[~s.is_target].tolist() for s in prepared.eval.flat]
    assert len(prompts) == 3
    assert all("(You remember:" in str(tokenizer.decode(prompt)) for prompt in prompts)

    asked: list[list[int]] = []
    answers = iter([text for role, text in HELD_OUT[0] if role == "A"])

    def reply(
        _model: Any, renderer: Renderer, messages: list[Message], *_: Any, **__: Any
    ) -> Iterator[str]:
        asked.append(renderer.prompt(messages))
        yield next(answers)

    monkeypatch.setattr(chat_module, "stream_reply", reply)
    chat = Chat(adapter, Sampling(max_new_tokens=4))
    for role, text in HELD_OUT[0]:
        if role == "B":
            list(chat.say(text))
    assert [tokenizer.decode(ids) for ids in asked] == [tokenizer.decode(ids) for ids in prompts]
    assert asked == prompts


@pytest.mark.parametrize("position", ["after_history", "before_history"])
def test_the_prompt_of_chat_is_that_of_training(position: str) -> None:
    """By the parts that both use: what is put before a model is the record without its answer."""
    renderer = Renderer(tiny_tokenizer(), "chat")
    memories = [Memory("The sea is deep.", 5), Memory("A lamp.", 6), Memory("sea and lamp", 7)]
    book = MemoryBook(memories, Memories(position=position, count=2), renderer.count)  # type: ignore[arg-type]
    messages = (SYSTEM, Q1, A1, Message("user", "sea, lamp?"), Message("assistant", "It is."))
    reminded = book.remind(Dialogue(("0",), Place(Path("x"), 1), messages, (4,)), 9)
    assert isinstance(reminded, Dialogue)
    shown = book.put(messages[:4], book.choose("sea, lamp?"))
    assert renderer.prompt(shown) == renderer.prompt(reminded.messages[: reminded.trained[0]])
    assert reminded.messages[-1] == messages[-1]
    assert "A lamp." in renderer.tokenizer.decode(renderer.prompt(shown))  # type: ignore[operator]


def test_chat_keeps_what_was_said_alone(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tiny_base, "train.max_steps=1")
    write_dialogues(tmp_path / "rows.jsonl", TRAINED)
    data = data_of(tmp_path / "rows.jsonl", character="A", samples="turn", memories={})
    adapter = stemtune.train(config.model_copy(update={"data": data})).adapter_dir
    lines = (adapter / "memories.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    assert json.loads(lines[-1])["text"].startswith("Is virtue a horse?")
    monkeypatch.setattr(chat_module, "stream_reply", lambda *_, **__: (p for p in ["Yes."]))
    chat = Chat(adapter, Sampling(max_new_tokens=4))
    list(chat.say("And the lamp of the sea?"))
    assert chat.messages == [
        Message("user", "And the lamp of the sea?"),
        Message("assistant", "Yes."),
    ]


def test_nobody_is_reminded_without_memories(tmp_path: Path) -> None:
    path = write_dialogues(tmp_path / "rows.jsonl", TRAINED)
    prepared = prepared_of(path, tiny_tokenizer(), character="A", samples="turn")
    assert prepared.memories == ()
    assert survey(data_of(path, character="A"), 0).ledger.num_refused == 0


def test_jax_is_not_woken_on_a_gpu(tmp_path: Path) -> None:
    """bm25s wakes JAX where it is installed, which takes most of a GPU's memory unless told."""
    (tmp_path / "jax").mkdir()
    fake = "import os; print('woken on', os.environ.get('JAX_PLATFORMS')); raise ImportError"
    (tmp_path / "jax" / "__init__.py").write_text(fake, encoding="utf-8")
    code = "from stemtune.data.memories import Bm25; print('imported'); Bm25(['a word'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == ["imported", "woken on cpu"]
