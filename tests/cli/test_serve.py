"""`stemtune serve`: the command that it prints is the one that it runs."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import Outcome, refused
from tests.export.test_serve import write_run

ENGINE = """#!{python}
import json, os, signal, sys, time
if "--fail" in sys.argv:
    sys.exit(7)
shown = [os.environ.get(name) for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "MINE")]
print(json.dumps([sys.argv[1:], shown]), flush=True)
if "--wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    while True:
        time.sleep(60)
"""


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A folder of programs: an engine that tells what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "vllm").write_text(ENGINE.format(python=sys.executable))
    (folder / "vllm").chmod(0o755)
    return folder


def start(engines: Path, *arguments: object) -> subprocess.Popen[str]:
    path = f"{engines}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "stemtune", "serve", *map(str, arguments)],
        cwd=engines.parent,
        env={**os.environ, "PATH": path, "MINE": "1", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def serve(engines: Path, *arguments: object) -> Outcome:
    process = start(engines, *arguments)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


def test_it_becomes_the_engine(engines: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", {})
    process = start(engines, run, "--", "--max-model-len", "4096", "--wait")
    assert process.stdout is not None
    given, (quiet, mine) = json.loads(process.stdout.readline())
    assert given[-3:] == ["--max-model-len", "4096", "--wait"]
    assert (quiet, mine) == (None, "1")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    (printed,) = [line for line in err.splitlines() if line.startswith("vllm ")]
    assert shlex.split(printed) == ["vllm", *given]
    planned = serve(engines, run, "--dry-run", "--", "--max-model-len", "4096", "--wait")
    assert planned.out == printed + "\n"


def test_its_exit_code_is_passed_on(engines: Path, tmp_path: Path) -> None:
    assert serve(engines, write_run(tmp_path / "run", {}), "--", "--fail").code == 7


def test_refused(engines: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"use_dora": True})
    outcome = serve(engines, "run", "--engine", "vllm")
    refused(outcome, 2, "vLLM does not load this adapter: DoRA", "run")
    assert outcome.err.splitlines()[2] == "hint: stemtune merge run"
    assert run.is_dir()
    outcome = serve(engines, "run", "--engine", "vllm", "--gguf", "x.gguf")
    refused(outcome, 2, "GGUF files are for llama.cpp", "--gguf")
    outcome = serve(engines, "nowhere")
    refused(outcome, 3, "no adapter of stemtune's here", "nowhere/adapter")
