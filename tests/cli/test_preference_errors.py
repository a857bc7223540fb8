"""What a user sees when preferences, or their objective, are wrong; and what `check` shows of them.

Every mistake is said before weights are loaded, and leaves nothing behind.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from tests.cli.command import Outcome, stemtune_here
from tests.models import tiny_tokenizer
from tests.runs import IGNORED, write_rows

pytestmark = IGNORED
VERBS = ["check", "train"]
DPO = {"type": "dpo"}
KTO = {"type": "kto"}
RANKING = {"type": "plackett_luce"}


def pair(number: int) -> dict[str, Any]:
    return {
        "prompt": f"What is {number}?",
        "chosen": f"It is {number}, my friend.",
        "rejected": f"It is {number} or less",
    }


def candidates(*scores: float) -> dict[str, Any]:
    listed = [{"text": f"To be {'or not ' * n}", "score": s} for n, s in enumerate(scores)]
    return {"query": "Where?", "candidates": listed}


def labelled(number: int, label: Any) -> dict[str, Any]:
    return {"prompt": f"Who is {number}?", "completion": f"Somebody {number}", "label": label}


PAIRS = [pair(number) for number in range(6)]
LABELS = [labelled(number, number % 2 == 0) for number in range(6)]
GOOD_ANSWERS = [labelled(number, True) for number in range(6)]
DIALOGUE = {
    "messages": [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A gadfly."},
    ]
}


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which weights can't be loaded."""

    def no_weights(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("stemtune.trainer.load_model", no_weights)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    (tmp_path / "base").symlink_to(tiny_base)
    return tmp_path


def write(folder: Path, rows: list[Any], objective: Any, **more: dict[str, Any]) -> list[str]:
    """Rows and run file; the lines of the latter."""
    write_rows(folder / "rows.jsonl", rows)
    values: dict[str, Any] = {
        "model": {"base": "./base", "device": "cpu", "dtype": "float32"},
        "output": {"dir": "out"},
        "data": {"path": "rows.jsonl", "eval_fraction": 0.0, **more.get("data", {})},
        "train": {"max_steps": 1, "batch_size": 2, **more.get("train", {})},
        "tracking": {"trackers": []},
        "objective": objective,
    }
    text = yaml.safe_dump(values, sort_keys=False)
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return text.splitlines()


def assert_refused(outcome: Outcome, folder: Path, what: str, where: str, hint: str) -> None:
    """Three lines on stderr, nothing on stdout, nothing new in the folder."""
    lines = outcome.err.splitlines()
    if outcome.code != 2 or len(lines) != 3:
        pytest.fail(f"exit code {outcome.code}:\n{outcome.err}")
    assert outcome.out == ""
    assert lines[0].startswith("error: ") and what in lines[0]
    assert lines[1] == f"  at {where}"
    assert lines[2].startswith("hint: ") and hint in lines[2]
    assert sorted(path.name for path in folder.iterdir()) == ["base", "rows.jsonl", "run.yaml"]


def test_weights_would_be_loaded_if_nothing_were_wrong(folder: Path) -> None:
    """Else the tests with `folder` would not show that a mistake is said before."""
    write(folder, PAIRS, DPO)
    outcome = stemtune_here("train", "run.yaml", cwd=folder)
    assert outcome.code == 1 and "weights were loaded" in outcome.err
    outcome = stemtune_here("check", "run.yaml", "--json", cwd=folder)
    assert (outcome.code, outcome.err) == (0, "")


# -- rows -------------------------------------------------------------------------------------

# Good rows, the bad one behind them, the objective, other settings; the error and its hint.
BAD_ROWS: dict[str, tuple[list[Any], Any, Any, dict[str, Any], str, str]] = {
    "no rejected": (PAIRS, {"prompt": "q", "chosen": "a"}, DPO, {}, "rejected", ""),
    "no rejected, of a named format": (
        PAIRS,
        {"prompt": "q", "chosen": "a"},
        DPO,
        {"format": "preference"},
        "the field `rejected` is missing",
        "`rejected`",
    ),
    "rejected is null": (
        PAIRS,
        {"prompt": "q", "chosen": "a", "rejected": None},
        DPO,
        {},
        "`rejected` should be text, found null",
        "`rejected`",
    ),
    "rejected is blank": (
        PAIRS,
        {"prompt": "q", "chosen": "a", "rejected": " \n"},
        DPO,
        {},
        "`rejected` is blank",
        "data.on_bad_row: skip",
    ),
    "tied candidates": (PAIRS, candidates(1, 1), DPO, {}, "tied: their scores are 1, 1", "margin"),
    "tied by the margin": (
        PAIRS,
        candidates(1, 0.8),
        DPO,
        {"pairs": {"margin": 0.5}},
        "tied: their scores are 1, 0.8",
        "data.pairs.margin",
    ),
    "identical answers": (
        PAIRS,
        {"prompt": "q", "chosen": "the same", "rejected": "the same"},
        DPO,
        {},
        "chosen and rejected are the same: the same",
        "take the row out",
    ),
    "answers that are equal after trimming": (
        PAIRS,
        {"prompt": "q", "chosen": "the same", "rejected": "\tthe same \n"},
        DPO,
        {},
        "chosen and rejected are the same: the same",
        "take the row out",
    ),
    "a long chosen answer": (
        PAIRS,
        {"prompt": "q", "chosen": "0" * 90, "rejected": "a"},
        DPO,
        {"max_length": 80},
        "tokens (91 of them the answer), but data.max_length is 80",
        "data.max_length",
    ),
    "a long rejected answer": (
        PAIRS,
        {"prompt": "q", "chosen": "a", "rejected": "0" * 90},
        DPO,
        {"max_length": 80},
        "tokens (91 of them the answer), but data.max_length is 80",
        "data.max_length",
    ),
    "a long answer that trimming can't help": (
        PAIRS,
        {"prompt": "q", "chosen": "a", "rejected": "0" * 90},
        DPO,
        {"max_length": 80, "on_too_long": "trim_context"},
        "but data.max_length is 80",
        "raise data.max_length, or choose drop",
    ),
    "no label for kto": (
        LABELS,
        {"prompt": "q", "completion": "a"},
        KTO,
        {},
        "nothing says whether this answer is good",
        "`label: true` or `false`",
    ),
    "a dialogue for kto": (LABELS, DIALOGUE, KTO, {}, "nothing says whether", "`label: true`"),
    "a label that is a number": (
        LABELS,
        labelled(9, 1),
        KTO,
        {},
        "`label` is a number, not true or false",
        "data.format: prompt_completion",
    ),
    "a label that is text": (LABELS, labelled(9, "true"), KTO, {}, "`label` is text, not", ""),
    "a label that is null": (LABELS, labelled(9, None), KTO, {}, "`label` is null, not", ""),
    "a bad answer for sft": (
        GOOD_ANSWERS,
        labelled(9, False),
        {"type": "sft"},
        {},
        "this answer is labelled as bad",
        "objective.type: kto",
    ),
    "a dialogue for dpo": (
        PAIRS,
        DIALOGUE,
        DPO,
        {},
        "there is only one answer, and none to compare",
        "rows need `chosen` and `rejected`, or candidates; or set objective.type: sft",
    ),
    "a label for dpo": (PAIRS, labelled(9, True), DPO, {}, "there is only one answer", "`chosen`"),
    "no ranking, for two of three are tied": (
        PAIRS,
        candidates(1, 2, 2),
        RANKING,
        {"pairs": {"mode": "all"}},
        "the answers are not ranked from best to worst",
        "data.pairs.margin",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row(folder: Path, verb: str, name: str) -> None:
    good, bad, objective, data, what, hint = BAD_ROWS[name]
    write(folder, [*good, bad], objective, data=data)
    lines = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    where = f"{folder / 'rows.jsonl'}:{len(lines)} (byte {len(b''.join(lines[:-1]))})"
    outcome = stemtune_here(verb, "run.yaml", cwd=folder)
    assert_refused(outcome, folder, what, where, hint)


def test_every_bad_row_is_listed_by_check(folder: Path) -> None:
    """Those that only the tokenizer or the objective finds, as well as those that a row tells."""
    bad = [DIALOGUE, {"prompt": "q", "chosen": "a", "rejected": "0" * 90}]
    write(folder, [PAIRS[0], *bad, PAIRS[1]], DPO, data={"max_length": 80})
    outcome = stemtune_here("check", "run.yaml", "--json", cwd=folder)
    assert outcome.code == 2
    found = json.loads(outcome.out)
    assert (found["rows"], found["num_refused"]) == (4, 2)
    assert [refusal["place"].partition(" ")[0] for refusal in found["refused"]] == [
        f"{folder / 'rows.jsonl'}:{line}" for line in (2, 3)
    ]
    assert "there is only one answer" in outcome.err and "(and 1 more of 4 rows)" in outcome.err


def test_bad_rows_may_be_skipped(folder: Path) -> None:
    rows = [*PAIRS, DIALOGUE, candidates(1, 1), {"prompt": "q", "chosen": "a"}]
    write(folder, rows, DPO, data={"on_bad_row": "skip"})
    outcome = stemtune_here("check", "run.yaml", "--json", cwd=folder)
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert (found["rows"], found["train_records"], found["num_refused"]) == (9, 6, 3)


# -- the run file -----------------------------------------------------------------------------

# The objective, other settings; the line at fault begins so; the error and its hint.
BAD_SETTINGS: dict[str, tuple[Any, dict[str, Any], str, str, str]] = {
    "beta of 0": ({"type": "dpo", "beta": 0}, {}, "  beta:", "`objective.beta` can't be 0", "0"),
    "beta below 0": (
        {"type": "kto", "beta": -0.1},
        {},
        "  beta:",
        "`objective.beta` can't be -0.1",
        "greater than 0",
    ),
    "a field of another objective": (
        {"type": "dpo", "gamma": 1.0},
        {},
        "  gamma:",
        "unknown key `objective.gamma`",
        "dpo has ",
    ),
    "an unknown type": ({"type": "dop"}, {}, "  type:", "`objective.type` can't be 'dop'", "dpo?"),
    "another unknown type": (
        {"type": "plackett-luce"},
        {},
        "  type:",
        "`objective.type` can't be 'plackett-luce'",
        "did you mean plackett_luce?",
    ),
    "a type like no other": (
        {"type": "zzz"},
        {},
        "  type:",
        "`objective.type` can't be 'zzz'",
        "one of sft, dpo, ",
    ),
    "no type": ({"beta": 0.1}, {}, "objective:", "`objective.type` is missing", "dpo"),
    "a batch of one for kto": (
        KTO,
        {"train": {"batch_size": 1}},
        "  batch_size:",
        "train.batch_size is at least 2",
        "",
    ),
    "a ranking of the best and the worst": (
        RANKING,
        {"data": {"pairs": {"mode": "best_worst"}}},
        "    mode:",
        "it needs data.pairs.mode: all",
        "",
    ),
    "a ranking of pairs": (RANKING, {}, "objective:", "it needs data.pairs.mode: all", ""),
    "dpo and kto": ([DPO, KTO], {}, "objective:", "kto takes answers one by one", ""),
    "kto and a ranking": ([RANKING, KTO], {}, "objective:", "kto takes answers one by one", ""),
    "robust without noise": (
        {"type": "dpo", "robust": True},
        {},
        "objective:",
        "`robust` needs a `label_smoothing`",
        "",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting(folder: Path, verb: str, name: str) -> None:
    objective, more, line, what, hint = BAD_SETTINGS[name]
    lines = write(folder, LABELS if "kto" in name else PAIRS, objective, **more)
    (number,) = (n for n, text in enumerate(lines, 1) if text.startswith(line))
    outcome = stemtune_here(verb, "run.yaml", cwd=folder)
    assert_refused(outcome, folder, what, f"run.yaml:{number}", hint)


def test_the_hint_names_what_an_objective_has(folder: Path) -> None:
    """All of its own fields, and none of another one's."""
    fields = {
        "dpo": ["beta", "reference", "label_smoothing", "divergence", "sft_weight", "length"],
        "simpo": ["beta", "gamma", "label_smoothing", "sft_weight"],
        "kto": ["beta", "reference", "desirable_weight", "undesirable_weight"],
    }
    for kind, own in fields.items():
        write(folder, PAIRS, {"type": kind, "lambda": 1.0})
        hint = stemtune_here("check", "run.yaml", cwd=folder).err.splitlines()[2]
        named = hint.removeprefix(f"hint: {kind} has ").split(", ")
        assert set(own) <= set(named) and {"type", "weight"} <= set(named)
        others = {field for fields_of in fields.values() for field in fields_of} - set(own)
        assert others and not others & set(named)


@pytest.mark.parametrize("verb", VERBS)
def test_a_bad_setting_of_an_override(folder: Path, verb: str) -> None:
    write(folder, PAIRS, DPO)
    override = "objective=[{type: dpo, gamma: 1}, {type: sft}]"
    outcome = stemtune_here(verb, "run.yaml", override, cwd=folder)
    where = f"the override {override!r}"
    assert_refused(outcome, folder, "unknown key `objective.gamma`", where, "dpo has ")


# -- check ------------------------------------------------------------------------------------


def asked(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


Told = list[tuple[int, str, str, str]]  # line, role, prompt, answer


def told_of(rows: list[dict[str, Any]]) -> Told:
    """What should be shown of pairs, and of candidates of which all are compared."""
    told: Told = []
    for line, row in enumerate(rows, 1):
        if "chosen" in row:
            for role in ("chosen", "rejected"):
                told.append((line, role, asked(row["prompt"]), f"{row[role]}<|im_end|>"))
        elif "label" in row:
            role = "chosen" if row["label"] else "rejected"
            told.append((line, role, asked(row["prompt"]), f"{row['completion']}<|im_end|>"))
        else:
            worst = min(candidate["score"] for candidate in row["candidates"])
            for candidate in row["candidates"]:
                role = "rejected" if candidate["score"] == worst else "chosen"
                told.append((line, role, asked(row["query"]), f"{candidate['text']}<|im_end|>"))
    return told


CHECKED: dict[str, tuple[list[dict[str, Any]], Any, dict[str, int]]] = {
    "dpo": ([*PAIRS, candidates(3, 1, 2)], DPO, {"preference": 6, "candidates": 1}),
    "ranking": ([*PAIRS, candidates(1, 4, 2, 3)], RANKING, {"preference": 6, "candidates": 1}),
    "kto": ([*LABELS, PAIRS[0]], KTO, {"labelled": 6, "preference": 1}),
}


@pytest.mark.parametrize("name", CHECKED)
def test_check(folder: Path, name: str) -> None:
    rows, objective, formats = CHECKED[name]
    write(folder, rows, objective, data={"pairs": {"mode": "all"}}, train={"max_steps": 5})
    outcome = stemtune_here("check", "run.yaml", "--json", "--show", len(rows), cwd=folder)
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    expected = told_of(rows)
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(prompt)["input_ids"] for _, _, prompt, _ in expected]
    answers = [tokenizer(answer)["input_ids"] for _, _, _, answer in expected]
    lengths = [len(a) + len(b) for a, b in zip(ids, answers, strict=True)]
    wanted = {
        "rows": len(rows),
        "formats": formats,
        "num_refused": 0,
        "notes": [],
        "train_records": len(rows),
        "eval_records": 0,
        "groups": len({prompt for _, _, prompt, _ in expected}),
        "sequences": len(expected),
        "tokens": sum(lengths),
        "targets": sum(map(len, answers)),
        "steps": 5,
        "batch_size": 2,
        "steps_per_epoch": 4,
    }
    assert {key: found[key] for key in wanted} == wanted
    assert found["length"]["max"] == max(lengths) == found["longest"]["tokens"]
    if name != "kto":  # the answers to a prompt share it
        assert min(found["sharing"].values()) > 1.5
    shown = [
        (
            int(sample["place"].partition(" ")[0].rpartition(":")[2]),
            sample["role"],
            "".join(piece["text"] for piece in sample["pieces"] if not piece["trained"]),
            "".join(piece["text"] for piece in sample["pieces"] if piece["trained"]),
        )
        for sample in found["samples"]
    ]
    assert sorted(shown) == sorted(expected)
    assert {role for _, role, _, _ in shown} == {"chosen", "rejected"}


def test_check_shows_both_answers_to_a_person(folder: Path) -> None:
    write(folder, PAIRS, DPO)
    outcome = stemtune_here("check", "run.yaml", "--show", 1, cwd=folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert "6 read (6 preference), 0 refused" in outcome.out
    page = outcome.out.replace("\n", "")
    first, second = page.index("rows.jsonl:1 (byte 0), chosen"), page.index("(byte 0), rejected")
    assert first < second
    assert "⟦It is 0, my friend.<|im_end|>⟧" in page[first:second]
    assert "⟦It is 0 or less<|im_end|>⟧" in page[second:]
    assert "It is 1" not in page, "only one record was to be shown"


def test_check_of_an_sft_run_shows_the_best_answer(folder: Path) -> None:
    rows = [*PAIRS, candidates(3, 1, 2)]
    write(folder, rows, {"type": "sft"})
    outcome = stemtune_here("check", "run.yaml", "--json", "--show", 9, cwd=folder)
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert (found["train_records"], found["sequences"]) == (7, 7)
    assert any("of 7 preferences the best answer is trained" in note for note in found["notes"])
    trained = [
        "".join(piece["text"] for piece in sample["pieces"] if piece["trained"])
        for sample in found["samples"]
    ]
    chosen = [row["chosen"] for row in PAIRS] + ["To be "]
    assert trained == [f"{text}<|im_end|>" for text in chosen]
