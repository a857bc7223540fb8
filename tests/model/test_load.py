"""Loading a base: what it is afterwards, and every complaint in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import stemtune as st
from stemtune.config import Model
from stemtune.errors import ConfigError, ModelError
from stemtune.model import load
from stemtune.model.load import choose_device, choose_dtype, load_tokenizer, require_base
from tests.runs import IGNORED, make_config, write_run_file

pytestmark = IGNORED


@pytest.fixture
def base(tmp_path: Path, tiny_base: Path) -> Path:
    """A base that may be spoiled."""
    shutil.copytree(tiny_base, tmp_path / "base")
    return tmp_path / "base"


def config(base: Path, **values: Any) -> Model:
    return Model(**{"base": str(base), "device": "cpu", "dtype": "float32", **values})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_frozen_base(tiny_base: Path, dtype: str) -> None:
    model, tokenizer = st.load_model(config(tiny_base, dtype=dtype))
    assert model.dtype == getattr(torch, dtype) and model.device.type == "cpu"
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("What is virtue?")["input_ids"]) == "What is virtue?"


def test_it_computes_what_transformers_computes(tiny_base: Path) -> None:
    ids = torch.arange(40).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="eager")
    model, _ = st.load_model(config(tiny_base))
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        theirs = plain(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-4)


def test_a_base_of_the_hub(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fetched once, by its revision; what is loaded is its folder. Weights are of the commit
    that the rest came from."""
    asked: list[tuple[str, str | None, bool]] = []

    def fetch(wanted: Model, *, weights: bool = True) -> Path:
        asked.append((wanted.base, wanted.revision, weights))
        return tiny_base

    monkeypatch.setattr(load.hub, "fetch", fetch)
    wanted = Model(base="some/model", revision="abc", device="cpu", dtype="float32")
    model, _ = st.load_model(wanted)
    assert asked == [("some/model", "abc", False), ("some/model", tiny_base.name, True)]
    assert model.name_or_path == str(tiny_base)
    assert load.commit_of(wanted) == tiny_base.name
    assert load.commit_of(config(tiny_base)) is None


@pytest.mark.parametrize("name", ["smollm3", "a/b/c", ""])
def test_a_name_that_is_no_base(name: str) -> None:
    with pytest.raises(ModelError, match="unknown base"):
        require_base(Model(base=name))


def test_a_base_of_the_hub_that_can_not_be_trained_on(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are not even downloaded; a check says it, too."""
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "awq"}
    (base / "config.json").write_text(json.dumps(values))

    def fetch(_wanted: Model, *, weights: bool = True) -> Path:
        assert not weights
        return base

    monkeypatch.setattr(load.hub, "fetch", fetch)
    with pytest.raises(ModelError, match="comes quantized by awq"):
        st.load_model(Model(base="some/awq-model", device="cpu"))


def test_a_folder_that_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as raised:
        require_base(config(tmp_path))
    assert raised.value.exit_code == 3 and raised.value.where == str(tmp_path)


def test_bases_that_may_be_there(tiny_base: Path) -> None:
    require_base(config(tiny_base))
    require_base(Model(base="Qwen/Qwen3-0.6B"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nonsense(path: Path) -> None:
    path.write_bytes(b"\x80\x02nonsense" * 50)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", [cut, empty, nonsense, Path.unlink])
def test_a_spoiled_base(base: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(base / name)
    with pytest.raises(ModelError, match=r"can't load|there are no weights here") as raised:
        st.load_model(config(base))
    assert raised.value.exit_code == 3 and raised.value.hint
    said = raised.value.what.removeprefix(f"can't load {str(base)!r}: ")
    assert said and "\n" not in said


def without_a_weight(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 31)


@pytest.mark.parametrize("change", [without_a_weight, of_another_shape])
def test_weights_that_are_not_all_there(base: Path, change: Callable[[Any], None]) -> None:
    """Transformers would draw them at random."""
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight|size mismatch"):
        st.load_model(config(base))


def in_two_files(base: Path) -> Path:
    """The base's weights in two files with an index; returns the second."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, mine in parts.items():
        save_file({n: tensors[n] for n in mine}, base / file, metadata={"format": "pt"})
    weight_map = {name: file for file, mine in parts.items() for name in mine}
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("damage", [cut, empty, nonsense, Path.unlink])
def test_a_spoiled_shard_is_named(base: Path, damage: Callable[[Path], None]) -> None:
    second = in_two_files(base)
    assert st.load_model(config(base))
    damage(second)
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        st.load_model(config(base))


def test_a_base_without_a_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as found:
        st.load_model(config(base))
    assert "\n" not in found.value.what and not found.value.what.endswith(":")


def test_more_ids_than_embeddings(tmp_path: Path, base: Path) -> None:
    """What matters is whether the data has them: converted bases often know a token too many."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["gadfly"])
    tokenizer.save_pretrained(base)
    with pytest.raises(ModelError) as found:
        st.Trainer(make_config(tmp_path / "some", base))
    assert found.value.what == "the data has the token 'gadfly' (400), the embeddings 400 rows"
    rows = [{"context": "Who?", "target": "I know not."}]
    write_run_file(tmp_path / "none", base, rows)
    st.Trainer(st.load_config(tmp_path / "none" / "run.yaml")).folder.release()


def test_an_unknown_architecture(base: Path) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "tomorrow"}))
    with pytest.raises(ModelError, match="tomorrow"):
        st.load_model(config(base))


CANARY = """
from pathlib import Path
Path({path!r}).write_text("it ran")
raise RuntimeError
"""


def test_code_of_a_base_is_never_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (base / "evil.py").write_text(CANARY.format(path=str(canary)))
    values = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (base / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    with pytest.raises(ModelError):
        st.load_model(config(base))
    assert not canary.exists()


class Evil:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_run_nothing(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"weight": Evil(tmp_path / "canary")}, base / "pytorch_model.bin")
    for allowed, said in ((False, "pickled"), (True, "can't load")):
        with pytest.raises(ModelError, match=said):
            st.load_model(config(base, allow_pickled=allowed))
    with pytest.raises(ModelError) as found:
        st.load_model(config(base, allow_pickled=True))
    assert "nothing of them was run" in str(found.value)
    assert "weights_only" not in str(found.value)  # torch advises to switch that off
    assert not (tmp_path / "canary").exists()


# -- device and dtype -------------------------------------------------------------------------


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(ConfigError, match=f"no {name} on this machine"):
            choose_device(name)


def test_the_first_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.8, "float32"), (1.2, "float32"), (2.0, "bfloat16")]
)
def test_bfloat16_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, ratio: float, expected: str
) -> None:
    seconds = {torch.float32: ratio, torch.bfloat16: 1.0}
    monkeypatch.setattr(load, "_matmul_seconds", seconds.__getitem__)
    assert choose_dtype("auto", torch.device("cpu")) == getattr(torch, expected)


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [("cuda", True, "bfloat16"), ("cuda", False, "float16"), ("mps", False, "float32")],
)
def test_dtypes_of_other_devices(
    monkeypatch: pytest.MonkeyPatch, device: str, bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert choose_dtype("auto", torch.device(device)) == getattr(torch, expected)
    assert choose_dtype("float16", torch.device(device)) == torch.float16


def test_the_tokenizer_alone(tiny_base: Path, tmp_path: Path) -> None:
    for path in tiny_base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    assert load_tokenizer(config(tmp_path)).eos_token == "<|im_end|>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [6, 5, 1])
def test_a_fingerprint_misses_no_value(dtype: torch.dtype, size: int) -> None:
    model: Any = torch.nn.Linear(size, 300, dtype=dtype)
    found = {load.fingerprint(model)}
    with torch.no_grad():
        for row in (0, 17, 299):
            model.weight[row, size - 1] += 1
            found.add(load.fingerprint(model))
        if size > 1:
            model.weight[[20, 21]] = model.weight[[21, 20]]
            found.add(load.fingerprint(model))
    assert len(found) == (5 if size > 1 else 4)


def test_a_fingerprint_of_a_part_of_a_memory() -> None:
    """It depends on the values alone."""
    model: Any = torch.nn.Linear(4, 3)
    whole = torch.zeros(13)
    whole[1:] = model.weight.detach().flatten()
    other: Any = torch.nn.Linear(4, 3)
    other.weight.data, other.bias.data = whole[1:].view(3, 4), model.bias.detach()
    assert load.fingerprint(other) == load.fingerprint(model)
