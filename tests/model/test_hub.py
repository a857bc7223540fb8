"""Bases of the Hub: what is fetched, what is retried, and every fault in one line."""

import os
from pathlib import Path

import pytest

from stemtune import network
from stemtune.config import Model
from stemtune.errors import ModelError
from stemtune.model import hub
from tests.fakehub import TAG, Faults, Repos, run_python, serve

NAME = "someone/tiny"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
    "modeling_evil.py": b"raise SystemExit('run')",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"# nothing that a model needs",
}
CODE = """
import time
time.sleep = lambda _: None  # the Hub's own client waits for seconds between its tries
from stemtune.config import Model
from stemtune.errors import StemtuneError
from stemtune import network
from stemtune.model import hub
network.TRYING = 1.0
try:
    folder = hub.fetch(Model(base="someone/tiny", {settings}), weights={weights})
    print(folder.name, *sorted(path.name for path in folder.iterdir()))
except StemtuneError as error:
    print(f"exit {{error.exit_code}}: {{error}}")
"""
FETCHED = "config.json model.safetensors tokenizer.json"


def fetch(
    folder: Path,
    faults: Faults | None = None,
    settings: str = "",
    weights: bool = True,
    **variables: str,
) -> tuple[str, list[str]]:
    """What a process prints that fetches the base, and the paths that it asked for."""
    asked: list[str] = []
    repos: Repos = {NAME: FILES}
    with serve(repos, faults, asked) as endpoint:
        hangs = "hang" in str(faults)
        patience = "1" if hangs else "60"  # s; a loaded machine's answers take more than one
        times = {"HF_HUB_DOWNLOAD_TIMEOUT": patience, "HF_HUB_ETAG_TIMEOUT": patience}
        done = run_python(
            CODE.format(settings=settings, weights=weights),
            folder,
            HF_ENDPOINT=endpoint,
            **times,
            **variables,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), asked


def test_what_is_fetched(tmp_path: Path) -> None:
    said, asked = fetch(tmp_path)
    commit, files = said.split(" ", 1)
    assert len(commit) == 40 and files == FETCHED
    assert not [path for path in asked if path.endswith((".py", ".bin", ".md"))]


def test_without_weights(tmp_path: Path) -> None:
    said, asked = fetch(tmp_path, weights=False)
    assert said.split(" ", 1)[1] == "config.json tokenizer.json"
    assert not [path for path in asked if path.endswith(".safetensors")]


def test_what_was_asked_for(tmp_path: Path) -> None:
    said, _ = fetch(tmp_path, settings="allow_pickled=True")
    assert "pytorch_model.bin" in said and "modeling_evil.py" not in said


@pytest.mark.parametrize("status", ["503", "429", "500", "hang"])
def test_a_fault_that_passes(tmp_path: Path, status: str) -> None:
    said, _ = fetch(tmp_path, {"model.safetensors": [status]})
    assert said.endswith(FETCHED)


def test_a_body_that_is_cut(tmp_path: Path) -> None:
    said, _ = fetch(tmp_path, {"model.safetensors": ["short"]})
    assert said.endswith(FETCHED)


def test_a_download_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client keeps what it has in pieces of 10 MB."""
    monkeypatch.setitem(FILES, "model.safetensors", bytes(range(256)) * 98_304)
    said, asked = fetch(tmp_path, {"model.safetensors": ["short"]})
    assert said.endswith(FETCHED)
    assert f"from {10 * 2**20}" in asked


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"model.safetensors": ["503+"]}, "answered 503"),
        ({"model.safetensors": ["429+"]}, "answered 429"),
        ({"/main": ["401+"]}, "hf auth login"),
        ({"/main": ["gated+"]}, "is gated"),
        ({"model.safetensors": ["gated+"]}, "is gated"),
    ],
)
def test_a_fault_that_stays(tmp_path: Path, faults: Faults, said: str) -> None:
    found, asked = fetch(tmp_path, faults)
    assert found.startswith("exit 3: ") and said in found and "hint: " in found
    assert len(asked) < 200


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with serve({}) as endpoint:
        done = run_python(CODE.format(settings="", weights=True), tmp_path, HF_ENDPOINT=endpoint)
    assert done.stdout.startswith("exit 3: there is no base 'someone/tiny' on the Hub")


def test_an_unknown_revision(tmp_path: Path) -> None:
    said, _ = fetch(tmp_path, settings='revision="nothing"')
    assert said.startswith("exit 3: 'someone/tiny' has no revision 'nothing'")
    assert fetch(tmp_path, settings=f'revision="{TAG}"')[0].endswith(FETCHED)


def test_other_bytes_than_promised(tmp_path: Path) -> None:
    said, _ = fetch(tmp_path, {"model.safetensors": ["wrong"]})
    assert said.startswith("exit 3: model.safetensors is not what the Hub promised")
    assert fetch(tmp_path)[0].endswith(FETCHED)


def test_a_small_file_with_other_bytes(tmp_path: Path) -> None:
    said, _ = fetch(tmp_path, {"config.json": ["wrong"]})
    assert said.startswith("exit 3: config.json is not what the Hub promised")


def test_without_a_network(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code = CODE.format(settings="", weights=True)
    done = run_python(code, tmp_path, **nowhere)
    assert done.stdout.startswith("exit 3: the Hub can't be reached"), done.stdout + done.stderr
    done = run_python(code, tmp_path, HF_HUB_OFFLINE="1", **nowhere)
    assert "HF_HUB_OFFLINE is set" in done.stdout
    cached, _ = fetch(tmp_path)
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run_python(code, tmp_path, **nowhere, **variables)
        assert done.stdout.strip() == cached, done.stdout + done.stderr


def test_a_name_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    evil = {**FILES, "../../evil.json": b"{}"}
    with serve({NAME: evil}) as endpoint:
        run_python(CODE.format(settings="", weights=True), tmp_path, HF_ENDPOINT=endpoint)
    names = list(tmp_path.rglob("*evil.json"))
    inside = tmp_path / "hf/hub/models--someone--tiny"
    assert all(inside in path.parents for path in names)


class Clock:
    """Time that passes by waiting, and by calls that take some."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, list[float]()

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def read(self) -> float:
        return self.now


def test_waits_grow_and_are_bounded() -> None:
    clock = Clock()

    def call() -> None:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        network.retried(call, clock.wait, clock.read)
    assert len(clock.waits) > 5 and max(clock.waits) <= network.LONGEST
    assert network.TRYING - network.LONGEST <= clock.now <= network.TRYING


def test_a_download_that_gets_on_is_not_given_up() -> None:
    clock, calls = Clock(), list[int]()

    def call() -> str:
        calls.append(1)
        clock.now += 100
        if len(calls) < 10:
            raise ConnectionError("reset")
        return "done"

    assert network.retried(call, clock.wait, clock.read) == "done"


def test_what_does_not_pass_is_not_tried_again() -> None:
    clock = Clock()

    def call() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        network.retried(call, clock.wait, clock.read)
    assert not clock.waits


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_weights_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{name}"}}}}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="it names the file"):
        hub.require_plain_weights(tmp_path, allow_pickled=False)


def test_pickled_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled") as found:
        hub.require_plain_weights(tmp_path, allow_pickled=False)
    assert "model.allow_pickled" in found.value.hint
    hub.require_plain_weights(tmp_path, allow_pickled=True)


def test_pickled_weights_that_were_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights here") as found:
        hub.require_plain_weights(tmp_path, allow_pickled=False)
    assert "model.allow_pickled" in found.value.hint


def test_code_of_a_base_needs_a_pinned_revision() -> None:
    for revision in (None, "main", "v1", "0" * 39):
        with pytest.raises(ValueError, match="40 hexadecimal"):
            Model(base=NAME, revision=revision, trust_remote_code=True)
    assert Model(base=NAME, revision="0" * 40, trust_remote_code=True).trust_remote_code


def test_a_full_cache_is_the_disks_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(Exception, match="No space left") as found:
        hub.fetch(Model(base=NAME))
    assert getattr(found.value, "exit_code", 0) == 7
