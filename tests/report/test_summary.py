"""Figures of a small data set, counted by hand and by a Python set of prefixes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import stemtune as st
from stemtune.config import Config, Data, Source, Train
from stemtune.data.prepare import Part, Prepared
from stemtune.data.records import Finding, Ledger, Refusal
from stemtune.data.sources import File
from stemtune.data.store import Store, to_batch, write
from stemtune.data.survey import Survey
from stemtune.report.summary import Piece, _sharings, pieces, summarise
from tests.models import tiny_tokenizer
from tests.trees import spell


def prepared(*records: tuple[str, str, str], held_out: int = 0) -> Prepared:
    """Records as (group, persona, words): a word is a sequence, its capitals are targets. The
    first `held_out` ones are evaluated on as well."""
    sequences = [
        _of_record(spell(word), number)
        for number, (_, _, words) in enumerate(records)
        for word in words.split()
    ]
    sink = pa.BufferOutputStream()
    write(iter([to_batch(sequences)]), sink)
    store = Store(sink.getvalue())
    count = len(records)
    numbers = np.arange(count)
    names = {name: n for n, name in enumerate(dict.fromkeys(x for r in records for x in r[:2]))}
    found = Survey(
        files=[File(Path("rows.jsonl"), "jsonl", Source(path="rows.jsonl"))],
        row_file=np.zeros(count, np.int64),
        row_line=numbers + 1,
        row_offset=numbers * 10,
        row_records=np.ones(count, np.int64),
        group=np.array([names[group] for group, _, _ in records], np.uint64),
        persona=np.array([names[persona] for _, persona, _ in records], np.uint64),
        is_eval=np.zeros(count, np.bool_),
        repeats=np.ones(count, np.int64),
        ledger=Ledger(),
    )
    ledger = Ledger(
        rows=99,
        refused=[Refusal("f:1", "bad", "mend")],
        num_refused=1,
        formats={"messages": 98},
        notes=["n"],
        findings={"exact duplicates": Finding(2, [("f:2", "")])},
    )
    parts = Part(store, found, numbers), Part(store, found, numbers[:held_out])
    return Prepared(*parts, ledger, fingerprint="")


def _of_record(sequence: st.Sequence, record: int) -> st.Sequence:
    return st.Sequence(sequence.input_ids, sequence.is_target, record=record)


def config(batching: str = "dialogue", **train: Any) -> Config:
    return Config(data=Data(path="x", batching=batching), train=Train(**train))


def test_the_figures() -> None:
    data = prepared(("g", "p", "abcDE abcF"), ("g", "p", "abcG"), ("h", "p", "xY"), held_out=2)
    found = summarise(data, config(batch_size=2, num_train_epochs=1.5)).to_json()
    # Step by step: {abcDE, abcF, abcG} has 7 distinct of 13 tokens, {xY} has 2 of 2.
    assert found.pop("sharing")["dialogue"] == round(15 / 9, 2)
    assert found == {
        "rows": 99,
        "formats": {"messages": 98},
        "num_refused": 1,
        "refused": [{"place": "f:1", "what": "bad", "hint": "mend"}],
        "notes": ["n"],
        "findings": {
            "exact duplicates": {
                "count": 2,
                "examples": [("f:2", "")],
                "remedy": "they count as often as they stand there; keep one",
            }
        },
        "train_records": 3,
        "eval_records": 2,
        "groups": 2,
        "sequences": 4,
        "tokens": 5 + 4 + 4 + 2,
        "targets": 2 + 1 + 1 + 1,
        "length": {"min": 2, "median": 4, "p95": 5, "max": 5},
        "lengths": [(1, 0), (2, 1), (3, 0), (4, 2), (5, 1)],
        "longest": {"place": "rows.jsonl:1 (byte 0)", "tokens": 5},
        "max_length": 2048,
        "step_sharing": {"min": 1.0, "median": 1.0, "p95": 1.86, "max": 1.86},
        "sharings": [(end / 10, int(end in (11, 19))) for end in range(11, 20)],
        "memory_sharing": {},
        "batching": "dialogue",
        "batch_size": 2,
        "steps": 3,
        "steps_per_epoch": 2,
    }


def test_max_steps_decides_how_many() -> None:
    data = prepared(("g", "p", "aB"), ("h", "p", "aB"))
    assert summarise(data, config(batch_size=1, max_steps=7)).steps == 7


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_sharing_is_all_tokens_over_distinct_ones(batch_size: int) -> None:
    """Four records of one group in a row: by dialogue they share what a step can share."""
    words = ["abcdE", "abcdF", "abcdG", "abcdH"]
    data = prepared(*[("g", "p", word) for word in words])
    distinct = (4 // batch_size) * (4 + batch_size)
    sharing = summarise(data, config(batch_size=batch_size)).sharing
    assert sharing == dict.fromkeys(("record", "dialogue", "persona"), round(20 / distinct, 2))


def test_wider_batching_shares_more() -> None:
    """Groups of two that share 6 tokens; the groups of a persona share 3 of them."""
    records = [
        (f"{persona}{group}", persona, f"{persona * 3}{group * 3}{answer}")
        for persona in "abcdefgh"
        for group in "ijkl"
        for answer in "XY"
    ]
    sharing = summarise(prepared(*records), config(batch_size=8)).sharing
    assert 1 < sharing["record"] < sharing["dialogue"] < sharing["persona"]
    # Eight records of one persona: 3 + 4 · 3 + 8 distinct tokens of 56.
    assert sharing["persona"] == round(56 / 23, 2)


def test_pieces_are_cut_at_masks_and_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("<|im_start|>user\nTo be?<|im_end|>")["input_ids"]
    answer = tokenizer("不亦说乎<|im_end|>")["input_ids"]
    rest = tokenizer("\n")["input_ids"]
    mask = [False] * len(prompt) + [True] * len(answer) + [False] * len(rest)
    assert pieces(st.Sequence(prompt + answer + rest, mask), tokenizer) == [
        Piece("<|im_start|>", trained=False, special=True),
        Piece("user\nTo be?", trained=False, special=False),
        Piece("<|im_end|>", trained=False, special=True),
        Piece("不亦说乎", trained=True, special=False),
        Piece("<|im_end|>", trained=True, special=True),
        Piece("\n", trained=False, special=False),
    ]


def test_a_length_far_from_the_others_is_shown() -> None:
    """Eleven words of four to six letters, one of 120 and one of a single token more than none."""
    words = ["abcD", "abcdE", "abcdeF"] * 4
    data = prepared(*(("g", "p", word) for word in [*words[:11], "a" * 119 + "B", words[11]]))
    summary = summarise(data, config())
    found = summary.findings["length outlier"]
    assert found["count"] == 1
    assert found["examples"] == [("rows.jsonl:12 (byte 110)", "120 tokens")]
    assert found["remedy"]


def test_lengths_that_are_nearly_alike_have_no_outliers() -> None:
    data = prepared(*(("g", "p", word) for word in ["abcD"] * 20 + ["abcdE", "abC"]))
    assert "length outlier" not in summarise(data, config()).findings


@pytest.mark.parametrize(
    ("ratios", "width"),
    [
        ([1.0, 1.0], 0.1),
        ([1.0, 1.05, 1.1, 1.15, 2.2], 0.1),
        ([1.0, 1.5, 7.0], 0.5),
        ([1.0, 24.9, 3.3], 2.0),
    ],
)
def test_how_sharing_spreads(ratios: list[float], width: float) -> None:
    found = _sharings(ratios)
    assert len(found) <= 12
    for number, (end, count) in enumerate(found):
        assert end == pytest.approx(1 + (number + 1) * width)
        start = end - width if number else 0.0  # what shares nothing is in the first bin
        assert count == sum(start + 1e-6 < ratio <= end + 1e-6 for ratio in ratios)
    assert found[-1][1] > 0
