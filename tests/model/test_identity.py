"""An adapter belongs on the base that it was trained on, and on no other of the same shape."""

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stemtune as st
from stemtune.errors import ModelError
from stemtune.export.gguf import read_run as read_for_gguf
from stemtune.export.merge import merge
from stemtune.export.serve import Address, serve_command
from stemtune.export.serve import read_run as read_for_server
from stemtune.model import weights as files
from stemtune.model.identity import identity
from stemtune.model.save import load_adapter
from tests.models import save_tiny_model
from tests.runs import IGNORED, make_config

pytestmark = IGNORED
WAYS = {
    "chat": lambda run, to: load_adapter(run / "adapter", "cpu"),
    "merge": merge,
    "export": lambda run, to: read_for_gguf(run),
    "serve": lambda run, to: serve_command(
        read_for_server(run), "vllm", {"vllm": "vllm"}, Address("127.0.0.1", 8000)
    ),
}


def change(base: Path, named: str, how: float = 1.01) -> None:
    """All values of the first weight with such a name."""
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if named in name)
    weights[name] = weights[name] * how
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def as_it_was(*paths: Path) -> Generator[None]:
    """Whatever is done to these files is undone behind it."""
    kept = {path: path.read_bytes() for path in paths}
    try:
        yield
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a run."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny_model(folder / "base")
    st.train(make_config(folder, folder / "base", "train.max_steps=1"))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_another_base_of_the_same_shape_is_refused(
    trained: Path, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, weights = trained / "run", trained / "base" / "model.safetensors"
    WAYS[way](run, tmp_path / "first")  # the right one is taken
    with as_it_was(weights):
        change(trained / "base", "norm")
        with pytest.raises(ModelError, match="not those that this adapter was trained on") as found:
            WAYS[way](run, tmp_path / "second")
    assert str(trained / "base") in str(found.value) and "stemtune.json" in str(found.value)
    assert not (tmp_path / "second").exists()
    assert "weights are others" not in caplog.text


@pytest.mark.parametrize("named", ["embed_tokens", "q_proj", "down_proj", "norm"])
def test_each_weight_counts(tmp_path: Path, named: str) -> None:
    save_tiny_model(tmp_path)
    model = st.Config.model_validate(
        {"data": {"path": "rows"}, "model": {"base": str(tmp_path)}}
    ).model
    before = identity(model)
    for other in ("dtype", "quantization"):  # how it is held does not
        held = {"dtype": "bfloat16", "quantization": "nf4"}[other]
        assert identity(model.model_copy(update={other: held})) == before
    change(tmp_path, named)
    assert identity(model)["rows"] != before["rows"]


def test_how_the_weights_are_split_does_not_count(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    names = sorted(whole)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    save_tiny_model(tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").unlink()
    for file, some in parts.items():
        part = {name: whole[name] for name in some}
        save_file(part, tmp_path / "two" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    text = json.dumps(index)
    (tmp_path / "two" / "model.safetensors.index.json").write_text(text, encoding="ascii")
    found = [
        identity(st.Config.model_validate({"data": {"path": "r"}, "model": {"base": str(b)}}).model)
        for b in (tmp_path / "one", tmp_path / "two")
    ]
    assert found[0]["rows"] == found[1]["rows"] != ""


@pytest.mark.parametrize("way", ["chat", "merge", "export"])
def test_a_damaged_base(trained: Path, tmp_path: Path, way: str) -> None:
    weights = trained / "base" / "model.safetensors"
    with as_it_was(weights):
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            WAYS[way](trained / "run", tmp_path / "merged")


def test_an_index_that_leads_out_of_its_folder(trained: Path, tmp_path: Path) -> None:
    weights = trained / "base" / "model.safetensors"
    index = trained / "base" / "model.safetensors.index.json"
    name = next(iter(load_file(weights)))
    index.write_text(json.dumps({"weight_map": {name: "../base/model.safetensors"}}))
    try:
        with pytest.raises(ModelError, match="it names the file"):
            merge(trained / "run", tmp_path / "merged")
    finally:
        index.unlink()


def test_a_base_that_somebody_named_is_taken_and_said(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path / "other")
    change(tmp_path / "other", "norm")
    path = trained / "run" / "adapter" / "stemtune.json"
    with as_it_was(path), caplog.at_level(logging.WARNING, "stemtune"):
        prompt = json.loads(path.read_text(encoding="utf-8"))
        prompt["model"]["base"] = str(tmp_path / "other")
        path.write_text(json.dumps(prompt), encoding="utf-8")
        load_adapter(path.parent, "cpu")
    assert "trained on base, whose weights are others" in caplog.text


def test_an_adapter_that_does_not_say(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of an earlier version: it runs on what is there."""
    path, weights = trained / "run/adapter/stemtune.json", trained / "base/model.safetensors"
    with as_it_was(path, weights):
        prompt = json.loads(path.read_text(encoding="utf-8"))
        del prompt["base"]
        path.write_text(json.dumps(prompt), encoding="utf-8")
        change(trained / "base", "norm")
        model, _, _ = load_adapter(path.parent, "cpu")
        changed = load_file(weights)
    name = next(name for name in changed if "norm" in name)
    assert torch.equal(model.get_base_model().state_dict()[name].float(), changed[name])
    assert "weights are others" not in caplog.text


@pytest.mark.parametrize("said", ['"x"', "[1]", "7"])
def test_an_adapter_that_says_nonsense(trained: Path, said: str) -> None:
    path = trained / "run" / "adapter" / "stemtune.json"
    with as_it_was(path):
        prompt = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**prompt, "base": json.loads(said)}), encoding="utf-8")
        with pytest.raises(ModelError, match="not what a run wrote"):
            load_adapter(path.parent, "cpu")


def test_going_on_with_an_adapter_of_another_base(trained: Path, tmp_path: Path) -> None:
    start = f"adapter.init_from={trained / 'run'}"
    with as_it_was(trained / "base" / "model.safetensors"):
        change(trained / "base", "q_proj")
        with pytest.raises(ModelError, match="not those that this adapter was trained on"):
            st.Trainer(make_config(tmp_path, trained / "base", start))


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"nothing that torch wrote")
    with pytest.raises(ModelError, match=r"\.bin files are damaged|can't load"):
        dict(files.tensors(path))
