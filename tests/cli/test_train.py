"""`stemtune train`, as a person types it: what it prints, how it ends, and signals."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stemtune as st
from stemtune import checkpoint, cli
from stemtune.objectives import OBJECTIVES
from tests.runs import (
    IGNORED,
    Spy,
    adapter_of,
    make_config,
    metrics_of,
    run_info,
    steps_of,
    write_run_file,
)

pytestmark = IGNORED
SHORT = ["train.max_steps=4", "train.batch_size=4"]


@pytest.fixture(autouse=True)
def tidy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command changes for its whole process is put back."""
    logger = logging.getLogger("stemtune")
    handlers, level = list(logger.handlers), logger.level
    monkeypatch.setattr(cli, "quieten_libraries", lambda: None)
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def stemtune(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process: its exit code."""

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["stemtune", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            assert isinstance(end.code, int) or end.code is None
            return end.code or 0
        return 0

    return run


def test_done(
    tmp_path: Path,
    tiny_base: Path,
    stemtune: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = stemtune("train", write_run_file(tmp_path, tiny_base), *SHORT)
    said = capsys.readouterr()
    assert code == 0
    assert said.out == f"{tmp_path / 'run' / 'adapter'}\n"
    assert "step 4/4" in said.err and "next: stemtune chat" in said.err
    assert len(steps_of(tmp_path / "run")) == 4


def nonsense_row(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("[]\n")


def no_base(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(path.read_text().replace("tiny-base", "no-base"))


def nothing(_folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "arguments", "code", "what"),
    [
        (nothing, ["train.learnin_rate=1"], 2, "unknown key `train.learnin_rate`"),
        (nonsense_row, [], 2, "expected a JSON object, found a list"),
        (no_base, [], 3, "no model here"),
        (nothing, ["--resume"], 5, "no usable checkpoint"),
    ],
)
def test_refused(
    tmp_path: Path,
    tiny_base: Path,
    stemtune: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], None],
    arguments: list[str],
    code: int,
    what: str,
) -> None:
    run_file = write_run_file(tmp_path, tiny_base)
    prepare(tmp_path)
    assert stemtune("train", run_file, *arguments) == code
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert any(line.startswith("error: ") and what in line for line in lines)
    assert any(line.startswith("hint: ") for line in lines)
    assert "Traceback" not in said.err


def test_a_second_run_in_the_folder_and_a_changed_one(
    tmp_path: Path,
    tiny_base: Path,
    stemtune: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_file = write_run_file(tmp_path, tiny_base)
    assert stemtune("train", run_file, *SHORT) == 0
    assert stemtune("train", run_file, *SHORT) == 6
    changed = [*SHORT, "train.learning_rate=1e-5"]
    capsys.readouterr()
    assert stemtune("train", run_file, *changed, "--resume") == 2
    assert "train.learning_rate: 0.002 → 1e-05" in capsys.readouterr().err
    assert stemtune("train", run_file, *SHORT, "--resume") == 0


def test_diverged(
    tmp_path: Path,
    tiny_base: Path,
    stemtune: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def nan(logps: Tensor, *_: Any) -> Any:
        return (logps * float("nan")).sum(), {}

    monkeypatch.setitem(OBJECTIVES, "sft", (nan, "targets"))
    assert stemtune("train", write_run_file(tmp_path, tiny_base), *SHORT) == 4
    assert "rows.jsonl:" in capsys.readouterr().err


# -- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(
    tmp_path: Path,
    tiny_base: Path,
    stemtune: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setitem(
        OBJECTIVES, "sft", (Spy(3, lambda: os.kill(os.getpid(), number)), "targets")
    )
    assert stemtune("train", write_run_file(tmp_path, tiny_base), *SHORT) == 75
    said = capfd.readouterr().err
    assert f"{number.name}: stopping after this step" in said
    assert "interrupted: stopped at step 3 of 4; it is saved" in said
    assert "--resume" in said
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert run_info(tmp_path / "run")["state"] == "interrupted"


def test_a_second_signal_stops_at_once(
    tmp_path: Path,
    tiny_base: Path,
    stemtune: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setitem(OBJECTIVES, "sft", (Spy(3, twice), "targets"))
    run_file = write_run_file(tmp_path, tiny_base)
    assert stemtune("train", run_file, *SHORT, "train.save_steps=1") == 130
    assert "Traceback" not in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 2]
    assert run_info(tmp_path / "run")["state"] == "interrupted"


def test_a_real_process(tmp_path: Path, tiny_base: Path, stemtune: Callable[..., int]) -> None:
    """SIGTERM, as a scheduler sends it; with --resume the run ends as if nothing had been."""
    overrides = [*SHORT, "train.max_steps=60", "adapter.dropout=0.05"]
    expected = st.train(make_config(tmp_path / "whole", tiny_base, *overrides)).adapter_dir
    write_run_file(tmp_path, tiny_base)
    command = [sys.executable, "-m", "stemtune", "train", "run.yaml", *overrides]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=tmp_path, **pipes)
    run = tmp_path / "run"
    while child.poll() is None and (not metrics_of(run) or metrics_of(run)[-1]["step"] < 5):
        time.sleep(0.001)
    child.send_signal(signal.SIGTERM)
    out, said = child.communicate()
    assert (child.returncode, out) == (75, ""), said
    assert "Traceback" not in said
    stopped = metrics_of(run)[-1]["step"]
    assert 5 <= stopped < 60
    assert not [path for path in run.rglob("*") if path.stat().st_mode & 0o077]
    assert checkpoint.steps(run / "checkpoints")[-1] == stopped
    assert stemtune("train", tmp_path / "run.yaml", *overrides, "--resume") == 0
    ours, theirs = adapter_of(run / "adapter"), adapter_of(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
