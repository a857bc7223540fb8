"""`stemtune serve`: the command that it prints is the one that it runs."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.cli.command import Outcome, refused, stemtune_here
from tests.export.test_serve import write_run

ENGINE = """#!{python}
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
shown = [os.environ.get(name) for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "MINE")]
print(json.dumps([sys.argv[1:], shown]), flush=True)
while "--wait" in sys.argv:
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


def environment(engines: Path) -> dict[str, str]:
    return {"PATH": f"{engines}{os.pathsep}{os.environ['PATH']}", "MINE": "1"}


def serve(engines: Path, *arguments: object) -> Outcome:
    """What ends before an engine begins."""
    with patch.dict(os.environ, environment(engines)):
        return stemtune_here("serve", *arguments, cwd=engines.parent)


def test_it_becomes_the_engine(engines: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", {})
    arguments = [run, "--", "--max-model-len", "4096", "--wait"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stemtune", "serve", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, **environment(engines)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    given, (quiet, mine) = json.loads(process.stdout.readline())
    assert given[-3:] == ["--max-model-len", "4096", "--wait"]
    assert (quiet, mine) == (None, "1")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    (printed,) = [line for line in err.splitlines() if line.startswith("vllm ")]
    assert shlex.split(printed) == ["vllm", *given]
    assert serve(engines, "--dry-run", *arguments).out == printed + "\n"


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
