"""What a user sees when something is wrong: what, where, a hint, an exit code; no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import HEAVY, SLOW, refused, stemtune, stemtune_here, write_stubs

VERBS = ["init", "check", "train", "eval", "chat", "serve", "env"]
GOOD_ROWS = "".join(json.dumps({"context": f"q{i}", "target": "a"}) + "\n" for i in range(8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file and rows, nothing wrong with either but that there is no such base."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(GOOD_ROWS)
    (folder / "run.yaml").write_text("data:\n  path: rows.jsonl\nmodel:\n  base: ./nowhere\n")
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "-h"]])
def test_help_imports_nothing_heavy(folder: Path, arguments: list[str]) -> None:
    outcome = stemtune(*arguments, cwd=folder, without=HEAVY)
    assert (outcome.code, outcome.err) == (0, "")
    if arguments == ["--help"]:
        assert all(f" {verb} " in outcome.out for verb in VERBS)


def test_the_stubs_do_stop_an_import(tmp_path: Path) -> None:
    """Else the tests with `light` would prove nothing."""
    environment = {**os.environ, "PYTHONPATH": str(write_stubs(tmp_path, HEAVY))}
    for name in HEAVY:
        command = [sys.executable, "-c", f"import {name}"]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert result.stderr.strip() == f"{name} was imported"


def test_the_console_script_is_the_same_command(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "stemtune"
    result = subprocess.run(
        [script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == stemtune("--version", cwd=tmp_path).out == "0.1.0\n"


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_wrong_run_file_is_told_before_torch(folder: Path, verb: str) -> None:
    (folder / "run.yaml").write_text("data:\n  path: rows.jsonl\ntrian:\n  seed: 1\n")
    outcome = stemtune(verb, "run.yaml", cwd=folder, without=HEAVY)
    refused(outcome, 2, "unknown key `trian`", "run.yaml:3")


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("data:\n  path: rows.jsonl\ntrian:\n  seed: 1\n", "unknown key `trian`", 3),
        ("data:\n  path: rows.jsonl\n  pth: x\n", "unknown key `data.pth`", 3),
        ("data:\n  path: rows.jsonl\ntrain:\n  seed: x\n", "`train.seed` can't be 'x'", 4),
        ("data:\n  path: rows.jsonl\n bad\n", "not valid YAML", 3),
        ("data:\n  path: rows.jsonl\n  path: b\n", "`data.path` stands twice", 3),
        ("data:\n  path: rows.jsonl\nmodel: !!python/name:os.system\n", "not a plain YAML", 3),
    ],
)
def test_a_wrong_run_file(folder: Path, verb: str, text: str, what: str, line: int) -> None:
    (folder / "run.yaml").write_text(text)
    refused(stemtune_here(verb, "run.yaml", cwd=folder), 2, what, f"run.yaml:{line}")


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_wrong_override(folder: Path, verb: str) -> None:
    outcome = stemtune_here(verb, "run.yaml", "train.seed=x", cwd=folder)
    refused(outcome, 2, "`train.seed` can't be 'x'", "the override 'train.seed=x'")


@pytest.mark.parametrize("verb", ["check", "train"])
def test_no_run_file(tmp_path: Path, verb: str) -> None:
    outcome = stemtune_here(verb, "run.yaml", cwd=tmp_path)
    refused(outcome, 2, "there is no such run file", "run.yaml")


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_bad_row_is_told_before_torch(folder: Path, verb: str) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text(GOOD_ROWS + '{"context": "q", "target": null}\n')
    outcome = stemtune(verb, "run.yaml", cwd=folder, without=SLOW)
    where = f"{rows}:9 (byte {len(GOOD_ROWS)})"
    refused(outcome, 2, "`target` should be text, found null", where)


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b'{"context": "q"\n', "not valid JSON"),
        (b'{"context": "\xff", "target": "a"}\n', "not UTF-8"),
        (b'{"context": "q", "target": ""}\n', "`target` is blank"),
        (b'{"context": "q", "target": "a", "target": "b"}\n', "not valid JSON: the key 'target'"),
    ],
)
def test_a_bad_row(folder: Path, verb: str, bad: bytes, what: str) -> None:
    (folder / "rows.jsonl").write_bytes(GOOD_ROWS.encode() + bad)
    outcome = stemtune_here(verb, "run.yaml", cwd=folder)
    where = f"{folder / 'rows.jsonl'}:9 (byte {len(GOOD_ROWS)})"
    refused(outcome, 2, what, where)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("verb", ["check", "train"])
def test_no_rows(folder: Path, verb: str) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text("")
    outcome = stemtune_here(verb, "run.yaml", cwd=folder)
    refused(outcome, 2, "the file holds no rows", str(rows))
    rows.unlink()
    outcome = stemtune_here(verb, "run.yaml", cwd=folder)
    refused(outcome, 2, "there is no such file", str(rows))


@pytest.mark.parametrize("verb", ["eval", "chat", "serve"])
def test_no_run(tmp_path: Path, verb: str) -> None:
    outcome = stemtune_here(verb, "nowhere", cwd=tmp_path)
    assert outcome.code in (2, 3)
    refused(outcome, outcome.code, "", outcome.err.splitlines()[1].removeprefix("  at "))
    assert "nowhere" in outcome.err


@pytest.mark.parametrize(
    ("base", "what", "where"),
    [("./nowhere", "no model here", None), ("no such name", "unknown base", "model.base")],
)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_an_unknown_base(folder: Path, verb: str, base: str, what: str, where: str | None) -> None:
    outcome = stemtune_here(verb, "run.yaml", f"model.base={base}", cwd=folder)
    refused(outcome, 3, what, where or str(folder / "nowhere"))
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "run.yaml"]


def test_an_output_folder_that_cannot_be(folder: Path, tiny_base: Path) -> None:
    output = folder / "rows.jsonl" / "run"
    arguments = [f"output.dir={output}", f"model.base={tiny_base}"]
    outcome = stemtune_here("train", "run.yaml", *arguments, cwd=folder)
    refused(outcome, 7, "the output folder can't be written", str(output))
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "run.yaml"]
    assert (folder / "rows.jsonl").read_text() == GOOD_ROWS


def test_a_row_that_is_too_long_leaves_no_folder(folder: Path, tiny_base: Path) -> None:
    arguments = [f"model.base={tiny_base}", "data.max_length=5", "output.dir=out"]
    outcome = stemtune_here("train", "run.yaml", *arguments, cwd=folder)
    assert outcome.code == 2
    assert "but data.max_length is 5" in outcome.err and "Traceback" not in outcome.err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["nosuch"], ["check"], ["check", "run.yaml", "--nosuch"], ["check", "--show=-1"]]
)
def test_usage(folder: Path, arguments: list[str]) -> None:
    outcome = stemtune_here(*arguments, cwd=folder)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage" in outcome.err and "Traceback" not in outcome.err


def test_debug_shows_where_it_was_raised(folder: Path) -> None:
    (folder / "run.yaml").write_text("data: {path: x}\ndta: 1\n")
    for arguments in (["--debug", "check", "run.yaml"], ["check", "run.yaml", "--debug"]):
        outcome = stemtune(*arguments, cwd=folder, without=HEAVY)
        assert outcome.code == 2
        assert outcome.err.startswith("Traceback") and "unknown key `dta`" in outcome.err


def test_env(tmp_path: Path) -> None:
    outcome = stemtune_here("env", "--json", cwd=tmp_path)
    assert outcome.code == 0
    assert "torch" in outcome.out and isinstance(json.loads(outcome.out), dict)


def test_no_memory_for_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise MemoryError

    monkeypatch.setattr("stemtune.environment.environment", full)
    outcome = stemtune_here("env", cwd=tmp_path)
    assert outcome.code == 8
    assert "out of memory" in outcome.err and "bug" not in outcome.err
