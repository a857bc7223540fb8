"""`stemtune check` on a file small enough to count by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import stemtune_here
from tests.models import tiny_tokenizer
from tests.runs import write_rows

ROWS: list[Any] = [
    {"context": "To be", "target": "or not"},
    {
        "messages": [
            {"role": "user", "content": "学而时习之"},
            {"role": "assistant", "content": "乐"},
        ]
    },
    {"context": 3, "target": "x"},
    {"context": "To be", "target": "or not to be"},
    {"context": "", "target": "x"},
]


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        f"model:\n  base: {tiny_base}\n  dtype: float32\n  device: cpu\n"
        "train:\n  batch_size: 2\n  num_train_epochs: 3\n"
        "data:\n  path: rows.jsonl\n  on_bad_row: skip\n  eval_fraction: 0\n"
    )
    return tmp_path


def texts() -> list[tuple[str, str]]:
    """Prompt and answer of the three good rows, in ChatML."""
    pairs = [("To be", "or not"), ("学而时习之", "乐"), ("To be", "or not to be")]
    return [
        (f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", f"{a}<|im_end|>")
        for q, a in pairs
    ]


def histogram(lengths: list[int]) -> list[list[int]]:
    """Bins of five tokens: twelve bins of two would not do."""
    assert 24 < max(lengths) <= 60
    ends = range(5, max(lengths) + 5, 5)
    return [[end, sum(end - 5 < length <= end for length in lengths)] for end in ends]


def test_the_figures(folder: Path) -> None:
    outcome = stemtune_here("check", "run.yaml", "--json", "--show", 0, cwd=folder)
    assert (outcome.code, outcome.err) == (0, "")
    tokenizer = tiny_tokenizer()
    ids = [(tokenizer(p)["input_ids"], tokenizer(a)["input_ids"]) for p, a in texts()]
    lengths = sorted(len(prompt) + len(answer) for prompt, answer in ids)
    rows = folder / "rows.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    second, third, fifth = (len(b"".join(lines[:n])) for n in (1, 2, 4))
    found = json.loads(outcome.out)
    sharing, spread = found.pop("sharing"), found.pop("step_sharing")
    sharings = found.pop("sharings")
    assert found.pop("memory")["fits"]
    assert sum(count for _, count in sharings) == 2, "steps of the first epoch"
    assert found == {
        "memory_sharing": {},
        "rows": 5,
        "formats": {"context_target": 2, "messages": 1},
        "num_refused": 2,
        "refused": [
            {
                "place": f"{rows}:3 (byte {third})",
                "what": "`context` should be text, found a number",
                "hint": "every row of this format has `context`",
            },
            {
                "place": f"{rows}:5 (byte {fifth})",
                "what": "`context` is blank",
                "hint": "fill it in, or leave such rows out with data.on_bad_row: skip",
            },
        ],
        "notes": [],
        "findings": {},
        "train_records": 3,
        "eval_records": 0,
        "groups": 2,
        "sequences": 3,
        "tokens": sum(lengths),
        "targets": sum(len(answer) for _, answer in ids),
        "length": {"min": lengths[0], "median": lengths[1], "p95": lengths[2], "max": lengths[2]},
        "lengths": histogram(lengths),
        "longest": {"place": f"{rows}:2 (byte {second})", "tokens": lengths[-1]},
        "max_length": 2048,
        "batching": "dialogue",
        "batch_size": 2,
        "steps": 6,
        "steps_per_epoch": 2,
        "samples": [],
    }
    # By dialogue, the two rows that ask the same are in one step, and the third is in the other.
    sequences = [(*prompt, *answer) for prompt, answer in ids]
    steps = [[sequences[0], sequences[2]], [sequences[1]]]
    distinct = sum(
        len({ids[:end] for ids in step for end in range(1, len(ids) + 1)}) for step in steps
    )
    assert sharing["dialogue"] == round(sum(lengths) / distinct, 2)
    assert sharing["dialogue"] >= sharing["record"] >= 1.0
    assert spread["min"] == 1.0 and spread["max"] > sharing["dialogue"]
    assert set(sharing) == {"record", "dialogue", "persona"}


def test_samples_say_which_text_is_trained(folder: Path) -> None:
    outcome = stemtune_here("check", "run.yaml", "--json", "--show", 9, cwd=folder)
    samples = json.loads(outcome.out)["samples"]
    assert [sample["place"].rpartition(" (")[0] for sample in samples] == [
        f"{folder / 'rows.jsonl'}:{line}" for line in (1, 2, 4)
    ]
    for sample, (prompt, answer) in zip(samples, texts(), strict=True):
        pieces = sample["pieces"]
        assert sample["role"] == "answer"
        assert "".join(piece["text"] for piece in pieces if not piece["trained"]) == prompt
        assert "".join(piece["text"] for piece in pieces if piece["trained"]) == answer
        special = {piece["text"] for piece in pieces if piece["special"]}
        assert special == {"<|im_start|>", "<|im_end|>"}


def test_what_a_person_sees(folder: Path) -> None:
    outcome = stemtune_here("check", "run.yaml", cwd=folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert "5 read (2 context_target, 1 messages), 2 refused" in outcome.out
    assert "3 to train on, 0 held out" in outcome.out
    assert "6 of 2 records, 2 an epoch" in outcome.out
    assert "`context` is blank" in outcome.out
    assert "<|im_start|>assistant\n⟦or not<|im_end|>⟧\n" in outcome.out
    assert "学而时习之" in outcome.out
    assert "or not to be" not in outcome.out  # two records are shown, and this is the third


@pytest.mark.parametrize("name", ["[bold]", "a[/b]"])
def test_brackets_in_a_path(folder: Path, name: str) -> None:
    rows = folder / name / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    (folder / "rows.jsonl").rename(rows)
    outcome = stemtune_here("check", "run.yaml", f"data.path='{name}/rows.jsonl'", cwd=folder)
    assert outcome.code == 0
    assert f"{name}/rows.jsonl:3" in outcome.out.split("──")[0].replace("\n", "")


def test_brackets_in_a_text(folder: Path) -> None:
    row = {"context": "[bold]a[/bold] [/x]", "target": "[red]b [/]"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    outcome = stemtune_here("check", "run.yaml", cwd=folder)
    assert outcome.code == 0
    assert "[bold]a[/bold] [/x]" in outcome.out and "⟦[red]b [/]<|im_end|>⟧" in outcome.out


def test_nothing_is_written(folder: Path) -> None:
    stemtune_here("check", "run.yaml", cwd=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "run.yaml"]


def test_what_is_too_long_is_counted_beyond_what_is_kept(folder: Path) -> None:
    rows = [{"context": f"q{n}", "target": "or not to be " * 20} for n in range(1100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, ROWS[0]]))
    outcome = stemtune_here("check", "run.yaml", "data.max_length=60", cwd=folder)
    assert outcome.code == 2
    assert "refused: 1,100 rows" in outcome.out
    assert "(and 1,099 more of 1,101 rows)" in outcome.err


def test_the_sharing_of_both_places_for_memories(tmp_path: Path, tiny_base: Path) -> None:
    """Windows of one dialogue share their history only where memories stand behind it."""
    words = ["sea", "lamp", "rope", "gull", "sand", "tide"]
    turns = [
        {"role": role, "text": f"{word} {role} {number} and more of it"}
        for number, word in enumerate(words)
        for role in ("A", "B")
    ]
    write_rows(tmp_path / "rows.jsonl", [{"dialogue": turns}, {"dialogue": turns[::-1]}])
    (tmp_path / "lore.txt").write_text("\n\n".join(f"the {word} of old" for word in words))
    (tmp_path / "run.yaml").write_text(
        f"model: {{base: {tiny_base}, dtype: float32}}\n"
        "data:\n  path: rows.jsonl\n  eval_fraction: 0\n"
        "  character: B\n  samples: turn\n  memories: {path: lore.txt, count: 1}\n"
    )
    shown: dict[str, Any] = {}
    for position in ("after_history", "before_history"):
        more = f"data.memories.position={position}"
        outcome = stemtune_here("check", "run.yaml", more, "--json", "--show", 0, cwd=tmp_path)
        assert (outcome.code, outcome.err) == (0, "")
        shown[position] = json.loads(outcome.out)
        assert next(iter(shown[position]["memory_sharing"])) == position
        mine = shown[position]["memory_sharing"][position]
        assert mine == shown[position]["sharing"]["dialogue"]
    ours, theirs = (shown[position]["memory_sharing"] for position in shown)
    assert ours == theirs, "the one that is set makes no difference to what either shares"
    assert ours["after_history"] > 1.5 * ours["before_history"]
    outcome = stemtune_here("check", "run.yaml", "--show", 0, cwd=tmp_path)
    assert "memories" in outcome.out and "before_history" in outcome.out
