"""Pushes to a Hub on this machine: what arrives, every fault, and what is said of it."""

import json
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from huggingface_hub import constants
from pytest_httpserver import HTTPServer

import stemtune as st
from stemtune import network
from stemtune.errors import ConfigError, StemtuneError
from stemtune.export.files import files_to_push, push_folder
from stemtune.export.hub import login, push
from tests.cli.command import stemtune_here
from tests.pushhub import OLD_WAYS, TOKEN, PushHub, push_hub
from tests.runs import IGNORED, make_config, run_info, write_run_file

pytestmark = [*IGNORED, OLD_WAYS]
NAME = "me/hamlet"
CARD = "---\nlicense: apache-2.0\nbase_model: someone/tiny\n---\n\n# Hamlet\n"
WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def hub(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Generator[PushHub]:
    with push_hub(httpserver, monkeypatch) as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as far as a push is concerned: what belongs to others and what does not."""
    base = "/home/somebody/models/tiny"
    texts = {
        "adapter/README.md": CARD,
        "adapter/adapter_config.json": json.dumps({"r": 4, "base_model_name_or_path": base}),
        "adapter/stemtune.json": json.dumps({"model": {"base": base}, "system": "Speak."}),
        "adapter/tokenizer_config.json": "{}",
        "adapter/.hidden": "not for others",
        "adapter/optimizer.safetensors": "not for others",
        "adapter/checkpoints/step-000001/state.json": "{}",
        "run.json": "{}",
        "log.txt": "/home/somebody",
        "checkpoints/step-000001/adapter.safetensors": "not for others",
    }
    for name, text in texts.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    (tmp_path / "run/adapter/adapter_model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "run/adapter/link.txt").symlink_to(tmp_path / "run/log.txt")
    return tmp_path / "run"


PUSHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "stemtune.json",
    "tokenizer_config.json",
}


def refused(run: Path, name: str = NAME, **options: Any) -> StemtuneError:
    """A push that fails, with no patience."""
    with patch.object(network, "TRYING", -1), pytest.raises(StemtuneError) as found:
        push(run, name, **options)
    assert TOKEN not in str(found.value) and found.value.hint
    return found.value


# -- what arrives -----------------------------------------------------------------------------


def test_an_adapter_arrives(hub: PushHub, run: Path) -> None:
    assert push(run, NAME) == f"{hub.url}/{NAME}"
    files = hub.files(NAME)
    assert set(files) == PUSHED
    assert files["README.md"] == CARD.encode() and files["adapter_model.safetensors"] == WEIGHTS
    assert hub.repos[NAME].private and hub.repos[NAME].messages == ["Adapter by stemtune"]
    assert hub.tokens == {TOKEN, ""}  # none goes to where large files are kept


def test_names_of_folders_stay_here(hub: PushHub, run: Path) -> None:
    push(run, NAME)
    files = hub.files(NAME)
    assert not [name for name, content in files.items() if b"somebody" in content]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny"
    assert json.loads(files["stemtune.json"]) == {"model": {"base": "tiny"}, "system": "Speak."}
    local = json.loads((run / "adapter/stemtune.json").read_text())
    assert local["model"]["base"] == "/home/somebody/models/tiny"


def test_our_own_name_of_a_base_stays(run: Path) -> None:
    path = run / "adapter/stemtune.json"
    path.write_text(json.dumps({"model": {"base": "smollm2"}}))
    found = {upload.name: upload.content for upload in files_to_push(run / "adapter")}
    content = found["stemtune.json"]
    assert isinstance(content, bytes) and json.loads(content) == {"model": {"base": "smollm2"}}


def test_a_base_in_the_cache_has_a_name(hub: PushHub, run: Path) -> None:
    base = "/home/somebody/hub/models--Qwen--Qwen3-0.6B/snapshots/0123456789abcdef"
    path = run / "adapter/adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": base}))
    push(run, NAME)
    told = json.loads(hub.files(NAME)["adapter_config.json"])
    assert told == {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}


def test_a_name_alone_is_of_whoever_is_logged_in(hub: PushHub, run: Path) -> None:
    assert push(run, "hamlet", private=False) == f"{hub.url}/{NAME}"
    assert not hub.repos[NAME].private


def test_again_without_changes(hub: PushHub, run: Path) -> None:
    push(run, NAME)
    commits = len(hub.repos[NAME].commits)
    assert push(run, NAME) == f"{hub.url}/{NAME}"
    assert len(hub.repos[NAME].commits) == commits


def test_a_branch_and_a_message(hub: PushHub, run: Path) -> None:
    hub.make(NAME)
    url = push(run, NAME, revision="draft", commit_message="A first try")
    assert url == f"{hub.url}/{NAME}/tree/draft"
    assert set(hub.files(NAME, "draft")) == PUSHED and not hub.files(NAME)
    assert hub.repos[NAME].messages == ["A first try"]
    push(run, NAME, revision="draft")  # which is there now


def test_a_pull_request(hub: PushHub, run: Path) -> None:
    assert push(run, NAME, create_pr=True) == f"{hub.url}/{NAME}/discussions/1"
    assert set(hub.files(NAME, "refs/pr/1")) == PUSHED and not hub.files(NAME)


def test_patterns(hub: PushHub, run: Path) -> None:
    push(run, NAME, include=["*.json", "*.safetensors"], exclude=["token*"])
    expected = {"adapter_config.json", "adapter_model.safetensors", "stemtune.json"}
    assert set(hub.files(NAME)) == expected
    assert "no file is left" in refused(run, include=["*.nothing"]).what


def test_what_a_path_stands_for(tmp_path: Path, run: Path) -> None:
    assert push_folder(run) == push_folder(run / "adapter") == run / "adapter"
    for mark in ("merged/config.json", "gguf/hamlet.gguf"):
        (tmp_path / mark).parent.mkdir()
        (tmp_path / mark).write_text("{}")
        assert push_folder((tmp_path / mark).parent) == (tmp_path / mark).parent
    file = tmp_path / "gguf/hamlet.gguf"
    assert [upload.name for upload in files_to_push(push_folder(file))] == ["hamlet.gguf"]
    for nothing in (tmp_path, run / "checkpoints", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="nothing to push here"):
            push_folder(nothing)


# -- repositories that are there --------------------------------------------------------------


def test_a_repository_that_is_there(hub: PushHub, run: Path) -> None:
    hub.make(NAME).put("main", {"notes.txt": b"mine"})
    push(run, NAME)
    assert set(hub.files(NAME)) == {*PUSHED, "notes.txt"}


def test_a_public_repository_is_no_place_for_what_is_private(hub: PushHub, run: Path) -> None:
    hub.make(NAME, private=False)
    error = refused(run)
    assert "everybody can read it" in error.what and "--public" in error.hint
    assert not hub.files(NAME)
    push(run, NAME, private=False)
    assert set(hub.files(NAME)) == PUSHED


def test_without_making_one(hub: PushHub, run: Path) -> None:
    assert "there is no such repository" in refused(run, create=False).what
    assert not hub.repos
    hub.make(NAME)
    push(run, NAME, create=False)
    assert "no such branch" in refused(run, create=False, revision="draft").what


def test_someone_elses_name(hub: PushHub, run: Path) -> None:
    error = refused(run, "others/hamlet")
    assert "may not write there (403)" in error.what and "namespace 'others'" in error.what
    assert error.exit_code == 3 and "huggingface.co/settings/tokens" in error.hint


# -- faults -----------------------------------------------------------------------------------

COMMIT, LARGE = "/commit/main", "/lfs/objects/batch"


@pytest.mark.parametrize(
    ("path", "faults"),
    [
        ("/whoami-v2", ["500"]),
        ("/repos/create", ["429"]),
        ("/repos/create", ["page"]),
        ("/validate-yaml", ["page", "500"]),
        ("/preupload/main", ["503"]),
        (LARGE, ["500", "cut"]),
        ("", ["cut", "cut"]),
        (COMMIT, ["409"]),
        (COMMIT, ["429", "500"]),
        (COMMIT, ["lost"]),
        ("/paths-info", ["500"]),
    ],
)
def test_a_fault_that_passes(hub: PushHub, run: Path, path: str, faults: list[str]) -> None:
    hub.faults = {path: faults}
    assert push(run, NAME) == f"{hub.url}/{NAME}"
    assert set(hub.files(NAME)) == PUSHED
    assert len(hub.repos[NAME].commits) == 2  # the first one, and one with everything


@pytest.mark.parametrize(
    ("path", "fault", "said"),
    [
        ("/whoami-v2", "401", "does not know the token of HF_TOKEN (401)"),
        ("/repos/create", "403", "may not write there (403): what the server says of 403"),
        (COMMIT, "403", "may not write there (403)"),
        (COMMIT, "409", "somebody else is writing to it (409)"),
        (COMMIT, "429", "asks for fewer requests (429)"),
        ("/preupload/main", "500", "the Hub answered 500: what the server says of 500"),
        ("/preupload/main", "cut", "can't be reached"),
        ("/validate-yaml", "page", "can't be reached"),
        ("/repos/create", "418", "the Hub answered 418"),
    ],
)
def test_a_fault_that_stays(hub: PushHub, run: Path, path: str, fault: str, said: str) -> None:
    hub.faults = {path: [f"{fault}+"]}
    error = refused(run)
    assert error.exit_code == 3 and said in error.what
    assert not hub.repos.get(NAME) or not hub.files(NAME)


def digest_path(hub: PushHub) -> str:
    """Where the weights are sent to."""
    return next(asked.split()[1] for asked in hub.asked if asked.startswith("PUT"))


def test_a_connection_that_is_cut_in_a_file(hub: PushHub, run: Path) -> None:
    push(run, NAME)
    path = digest_path(hub)
    hub.objects.clear()
    hub.repos.clear()
    hub.faults = {path: ["cut+"]}
    assert "can't be reached" in refused(run).what and not hub.objects
    hub.faults = {path: ["cut", "500"]}
    push(run, NAME)
    assert hub.files(NAME)["adapter_model.safetensors"] == WEIGHTS


def test_what_arrived_is_not_sent_twice(hub: PushHub, run: Path) -> None:
    hub.faults = {COMMIT: ["403+"]}
    refused(run)
    hub.faults = {}
    hub.asked.clear()
    push(run, NAME)
    assert not [asked for asked in hub.asked if asked.startswith("PUT")]
    assert set(hub.files(NAME)) == PUSHED


def test_large_files_are_sent_one_by_one(
    hub: PushHub, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stemtune.export.hub.LARGE", 1000)
    hub.faults = {LARGE: ["cut"], COMMIT: ["lost"]}
    with caplog.at_level(logging.INFO, "stemtune"):
        push(run, NAME)
    assert "uploaded adapter_model.safetensors (102.4 kB)" in caplog.messages
    assert len([asked for asked in hub.asked if asked.startswith("PUT")]) == 1
    assert set(hub.files(NAME)) == PUSHED and len(hub.repos[NAME].commits) == 2


def test_other_bytes_than_were_sent(hub: PushHub, run: Path) -> None:
    push(run, NAME)
    path = digest_path(hub)
    hub.objects.clear()
    hub.repos.clear()
    hub.faults = {path: ["wrong"]}
    error = refused(run)
    assert error.what == "adapter_model.safetensors did not arrive as it lies here"


def test_a_second_pull_request_is_not_opened(hub: PushHub, run: Path) -> None:
    hub.faults = {COMMIT: ["lost"]}
    refused(run, create_pr=True)
    assert len([asked for asked in hub.asked if asked.endswith(COMMIT)]) == 1


def test_a_card_that_the_hub_refuses(hub: PushHub, run: Path) -> None:
    (run / "adapter/README.md").write_text("---\nlicense: my own\n---\n")
    error = refused(run)
    assert error.what.startswith("the Hub refuses the card: ") and "license" in error.what
    assert not hub.files(NAME)


# -- refused here -----------------------------------------------------------------------------


def test_without_a_login(
    hub: PushHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert login() == "HF_TOKEN"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert login() == "" and "no login" in refused(run).what
    (tmp_path / "token").write_text(TOKEN)
    assert login() == "hf auth login" and push(run, NAME)


def test_offline(hub: PushHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refused(run).what and not hub.asked


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/ham let", "me/-x-", "../x", ""])
def test_a_name_that_can_not_be(hub: PushHub, run: Path, name: str) -> None:
    error = refused(run, name)
    assert error.exit_code == 2 and not hub.asked


@pytest.mark.parametrize("file", ["README.md", "stemtune.json", "memories.jsonl", "Modelfile"])
def test_a_token_in_a_file(hub: PushHub, run: Path, file: str) -> None:
    (run / "adapter" / file).write_text(json.dumps({"model": {"base": "x"}, "note": TOKEN}))
    error = refused(run)
    assert error.what == "this file holds a token of the Hub" and error.where.endswith(file)
    assert not hub.asked


def test_a_damaged_adapter(run: Path) -> None:
    (run / "adapter/stemtune.json").write_text("{")
    assert refused(run).what == "this is not what a run wrote"


# -- the command ------------------------------------------------------------------------------


def test_the_command(hub: PushHub, run: Path, tmp_path: Path) -> None:
    done = stemtune_here("push", "run", NAME, "-m", "Mine", cwd=tmp_path)
    assert (done.code, done.out) == (0, f"{hub.url}/{NAME}\n"), done.err
    assert "as me" in done.err and TOKEN not in done.err
    assert hub.repos[NAME].messages == ["Mine"]
    done = stemtune_here("push", "run", NAME, "--pr", "--json", cwd=tmp_path)
    told = json.loads(done.out)
    assert told["url"] == f"{hub.url}/{NAME}"  # nothing changed: nothing to propose
    assert {file["path"] for file in told["files"]} == PUSHED


def test_a_dry_run(hub: PushHub, run: Path, tmp_path: Path) -> None:
    done = stemtune_here("push", "run", NAME, "--dry-run", "--exclude", "*.md", cwd=tmp_path)
    assert done.code == 0 and not hub.asked
    names = {line.split()[-1] for line in done.out.splitlines()}
    assert names == PUSHED - {"README.md"}
    assert "102.4 kB  adapter_model.safetensors" in done.out
    done = stemtune_here("push", "run", NAME, "--dry-run", "--json", cwd=tmp_path)
    sizes = {file["path"]: file["size"] for file in json.loads(done.out)["files"]}
    assert sizes["adapter_model.safetensors"] == len(WEIGHTS) and not hub.asked


def test_what_the_command_says_of_a_fault(hub: PushHub, run: Path, tmp_path: Path) -> None:
    hub.faults = {"/repos/create": ["403+"]}
    done = stemtune_here("push", "run", NAME, cwd=tmp_path)
    lines = done.err.splitlines()
    assert (done.code, done.out) == (3, "")
    assert lines[-3].startswith("error: this login may not write there (403)")
    assert lines[-2] == f"  at {NAME}" and lines[-1].startswith("hint: ")
    done = stemtune_here("push", "run", NAME, "--debug", cwd=tmp_path)
    assert done.code == 3 and "Traceback" in done.err and TOKEN not in done.err


def test_env_knows_of_the_login(hub: PushHub, tmp_path: Path) -> None:
    done = stemtune_here("env", "--json", cwd=tmp_path)
    told = json.loads(done.out)
    assert (told["hub"], told["hub_login"]) == (hub.url, "HF_TOKEN") and not hub.asked
    done = stemtune_here("env", "--whoami", "--json", cwd=tmp_path)
    assert json.loads(done.out)["hub_account"] == "me" and TOKEN not in done.out + done.err
    hub.faults = {"/whoami-v2": ["401+"]}
    done = stemtune_here("env", "--whoami", cwd=tmp_path)
    assert done.code == 3 and "does not know the token" in done.err


# -- with a run -------------------------------------------------------------------------------

SHORT = ["train.max_steps=1", "train.batch_size=2"]


def test_a_run_that_is_pushed(hub: PushHub, tmp_path: Path, tiny_base: Path) -> None:
    settings = [*SHORT, f"output.push_to_hub={NAME}", "output.license=mit"]
    run = st.train(make_config(tmp_path, tiny_base, *settings)).output_dir
    files = hub.files(NAME)
    assert {"adapter_model.safetensors", "generation_config.json", "README.md"} <= files.keys()
    assert files["README.md"] == (run / "adapter/README.md").read_bytes()
    assert hub.repos[NAME].private and run_info(run)["state"] == "done"
    for name, content in files.items():
        for local in (str(tmp_path), str(tiny_base), str(Path.home()), str(Path.cwd())):
            assert local.encode() not in content, name


@pytest.mark.parametrize("fault", ["403+", "500+", "interrupt"])
def test_a_push_that_fails_is_no_failed_run(
    hub: PushHub, tmp_path: Path, tiny_base: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults = {"/repos/create": [fault]}
    monkeypatch.setattr(network, "TRYING", -1)
    if fault == "interrupt":

        def interrupt(*_arguments: object, **_options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("stemtune.handover.push", interrupt)
    write_run_file(tmp_path, tiny_base)
    settings = [*SHORT, f"output.push_to_hub={NAME}", "output.hub_private_repo=false"]
    done = stemtune_here("train", "run.yaml", *settings, cwd=tmp_path)
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "run/adapter"))
    assert run_info(tmp_path / "run")["state"] == "done"
    command = f"stemtune push {tmp_path / 'run'} {NAME} --public"
    said = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert said[-2].startswith("warning: the run is done, but not pushed: ")
    assert said[-1] == f"warning: to push it: {command}"


def test_from_python(hub: PushHub, tmp_path: Path, tiny_base: Path) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT))
    with pytest.raises(ConfigError, match="nothing to push"):
        trainer.push_to_hub(NAME)
    trainer.train()
    url = trainer.push_to_hub(NAME, commit_message="By hand", exclude=["*.png"])
    assert url == f"{hub.url}/{NAME}" and hub.repos[NAME].messages == ["By hand"]


def test_no_login_is_said_at_the_start(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with caplog.at_level(logging.WARNING, "stemtune"):
        trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT, f"output.push_to_hub={NAME}"))
    trainer.folder.release()
    assert "there is no login yet" in caplog.text


def test_stages_are_pushed_once(tmp_path: Path, tiny_base: Path) -> None:
    path = write_run_file(tmp_path, tiny_base)
    stages = "stages: [{name: a}, {name: b}]\n"
    path.write_text(path.read_text() + stages)
    configs = st.load_stages(path, [f"output.push_to_hub={NAME}"])
    assert [config.output.push_to_hub for config in configs] == [None, NAME]


def test_a_bad_repository_in_a_run_file(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        make_config(tmp_path, tiny_base, "output.push_to_hub=a/b/c")
    with pytest.raises(ConfigError) as found:
        make_config(tmp_path, tiny_base, f"output.hub_token={TOKEN}")
    assert TOKEN not in str(found.value) and "hf auth login" in found.value.hint
