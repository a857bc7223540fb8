"""A token goes to the Hub, in a header, and nowhere else."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from tests.pushhub import TOKEN, PushHub
from tests.runs import write_run_file

NAME = "me/canary"


@pytest.fixture
def hub(httpserver: HTTPServer) -> Iterator[PushHub]:
    found = PushHub(httpserver.url_for("").rstrip("/"))
    httpserver.expect_request(re.compile("/.*")).respond_with_handler(found)
    yield found


def run(*arguments: str, folder: Path, hub: PushHub) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the canary in its environment."""
    names = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
    environment = {
        **dict.fromkeys(names, TOKEN),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(folder),
        "NO_COLOR": "1",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(path for path in sys.path if path),
    }
    return subprocess.run(
        [sys.executable, "-m", "stemtune", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_unheard(folder: Path, *told: subprocess.CompletedProcess[str]) -> None:
    """Not in any file, nor in anything that was said."""
    assert not [done for done in told if TOKEN in done.stdout + done.stderr]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 1
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_run_and_its_push(hub: PushHub, tmp_path: Path, tiny_base: Path) -> None:
    write_run_file(tmp_path, tiny_base)
    hub.faults = {"/repos/create": ["403"], "/commit/main": ["401"]}
    settings = ["train.max_steps=1", "tracking.trackers=[tensorboard]"]
    trained = run(
        "train", "run.yaml", *settings, f"output.push_to_hub={NAME}", folder=tmp_path, hub=hub
    )
    assert trained.returncode == 0, trained.stderr
    assert "not pushed: this login may not write there (403)" in trained.stderr
    failed = run("push", "run", NAME, "--debug", folder=tmp_path, hub=hub)
    assert failed.returncode == 3 and "Traceback" in failed.stderr
    pushed = run("push", "run", NAME, folder=tmp_path, hub=hub)
    assert pushed.stdout == f"{hub.url}/{NAME}\n", pushed.stderr
    assert TOKEN in hub.tokens  # it was there to be told
    assert not [name for name, text in hub.files(NAME).items() if TOKEN.encode() in text]
    assert_unheard(tmp_path, trained, failed, pushed)


@pytest.mark.parametrize(
    "setting",
    [
        f"tracking.project={TOKEN}",
        f"train.learning_rate={TOKEN}",
        f"output.hub_token={TOKEN}",
        f"output.push_to_hub={TOKEN}",
        TOKEN,
    ],
)
def test_a_token_in_a_setting(hub: PushHub, tmp_path: Path, tiny_base: Path, setting: str) -> None:
    write_run_file(tmp_path, tiny_base)
    told = [
        run("train", "run.yaml", setting, *debug, folder=tmp_path, hub=hub)
        for debug in ([], ["--debug"])
    ]
    assert [done.returncode for done in told] == [2, 2], told[1].stderr
    assert "Traceback" in told[1].stderr and not hub.asked
    assert_unheard(tmp_path, *told)
