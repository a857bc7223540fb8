"""Merged = unmerged, by transformers and PEFT alone; and what can go wrong on the way."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import stemtune as st
from stemtune.errors import ConfigError, ModelError
from stemtune.export import merge as merging
from stemtune.export.merge import merge
from stemtune.model.save import load_adapter
from tests.models import save_tiny_model
from tests.runs import IGNORED, make_config
from tests.trees import largest_error

pytestmark = IGNORED
IDS = torch.tensor([[5, 9, 11, 200, 3, 77, 21]])
VARIANTS = [
    [],
    ["adapter.use_rslora=true"],
    ["adapter.use_dora=true"],
    ["adapter.init_weights=pissa"],
    ["adapter.modules_to_save=[lm_head]"],
    ["adapter.modules_to_save=[norm, embed_tokens]"],
    ["adapter.layers=1"],
    ["model.quantization=nf4"],
    ["model.quantization=int8"],
]


def train(folder: Path, base: Path, *overrides: str) -> Path:
    settings = ["train.max_steps=4", "train.learning_rate=0.02", *overrides]
    return st.train(make_config(folder, base, *settings)).output_dir


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_merged_is_unmerged(tmp_path: Path, tiny_base: Path, overrides: list[str]) -> None:
    run = train(tmp_path, tiny_base, *overrides)
    said = merge(run, tmp_path / "merged")
    expected = logits(tiny_base, run / "adapter")
    found = logits(tmp_path / "merged")
    assert largest_error(found, expected) < 1e-4 and said is not None and said.difference < 1e-4
    assert largest_error(found, logits(tiny_base)) > 0.05
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_base).chat_template


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_was_trained_whole(tmp_path: Path, tied: bool) -> None:
    save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    run = train(tmp_path, tmp_path / "base", "adapter.modules_to_save=[lm_head]")
    merge(run, tmp_path / "merged")
    expected = logits(tmp_path / "base", run / "adapter")
    assert largest_error(logits(tmp_path / "merged"), expected) < 1e-4


@pytest.mark.parametrize("double", [True, False])
def test_loftq_belongs_on_the_rounded_base(tmp_path: Path, tiny_base: Path, double: bool) -> None:
    overrides = ["model.quantization=nf4", f"model.double_quantization={double}"]
    run = train(tmp_path, tiny_base, *overrides, "adapter.init_weights=loftq")
    said = merge(run, tmp_path / "merged")
    assert said is not None and said.difference < 1e-4
    model, _, _ = load_adapter(run / "adapter", "cpu")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert largest_error(logits(tmp_path / "merged"), expected) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, tiny_base: Path, dtype: str) -> None:
    run = train(tmp_path, tiny_base)
    said = merge(run, tmp_path / "merged", dtype)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == getattr(torch, dtype)
    expected = logits(tiny_base, run / "adapter")
    error = largest_error(logits(tmp_path / "merged"), expected)
    assert error < 0.1 * largest_error(logits(tiny_base), expected)
    assert said is not None and 0 < said.difference < 0.5 < 2 < said.largest
    shown = f"logits differ by {said.difference:.1e} at most, and are up to {said.largest:.3g}"
    assert str(said) == f"merged and unmerged {shown}"


def split(folder: Path, parts: int) -> None:
    """The weights in several files with an index, as larger bases come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(parts):
        name = f"model-{number + 1:05}-of-{parts:05}.safetensors"
        mine = {n: t for i, (n, t) in enumerate(sorted(tensors.items())) if i % parts == number}
        save_file(mine, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_base_in_several_files(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    run = train(tmp_path, tmp_path / "base", "adapter.modules_to_save=[lm_head]")
    expected = logits(tmp_path / "base", run / "adapter")
    split(tmp_path / "base", 3)
    merge(run, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 3
    assert largest_error(logits(tmp_path / "merged"), expected) < 1e-4


def test_a_pickled_base(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    run = train(tmp_path, tmp_path / "base", "model.allow_pickled=true")
    expected = logits(tmp_path / "base", run / "adapter")
    path = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(path), tmp_path / "base" / "pytorch_model.bin")
    path.unlink()
    merge(run, tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]
    assert largest_error(logits(tmp_path / "merged"), expected) < 1e-4


# -- refused ----------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "merged" in path.name]


def test_a_folder_that_is_there(tmp_path: Path, tiny_base: Path) -> None:
    run = train(tmp_path, tiny_base)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="the folder is there already"):
        merge(run, tmp_path / "merged")


@pytest.mark.parametrize("shape", [{"num_hidden_layers": 1}, {"hidden_size": 64}], ids=str)
def test_another_base(tmp_path: Path, shape: dict[str, int]) -> None:
    save_tiny_model(tmp_path / "base")
    run = train(tmp_path, tmp_path / "base")
    save_tiny_model(tmp_path / "base", **shape)
    with pytest.raises(ModelError, match=r"the base has no weight model\.layers") as found:
        merge(run, tmp_path / "merged")
    assert found.value.hint == "is it the base that the adapter was trained on?"
    assert not left_behind(tmp_path)


def test_an_adapter_of_experts(tmp_path: Path, tiny_base: Path) -> None:
    """Training may have gone on with one that others made."""
    run = train(tmp_path, tiny_base)
    file = run / "adapter" / "adapter_config.json"
    values = {**json.loads(file.read_text()), "target_parameters": ["gate_up_proj"]}
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="experts of a mixture"):
        merge(run, tmp_path / "merged")


def test_an_update_that_rounding_would_lose(tmp_path: Path, tiny_base: Path) -> None:
    run = train(tmp_path, tiny_base, "train.learning_rate=1e-4", "train.max_steps=2")
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    small = {n: t * 0.1 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(small, run / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="merged and unmerged logits differ") as found:
        merge(run, tmp_path / "merged", "bfloat16")
    assert "--dtype float32" in found.value.hint
    assert not left_behind(tmp_path)
    said = merge(run, tmp_path / "merged", "float32")
    assert said is not None and said.difference < 1e-4


def test_where_there_is_no_memory_to_compare(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, tiny_base)
    monkeypatch.setattr(merging, "free_memory", lambda _device: 1000)
    assert merge(run, tmp_path / "merged") is None
    assert largest_error(logits(tmp_path / "merged"), logits(tiny_base, run / "adapter")) < 1e-4


@pytest.mark.parametrize("name", ["stemtune.json", "adapter_model.safetensors"])
def test_a_damaged_adapter(tmp_path: Path, tiny_base: Path, name: str) -> None:
    run = train(tmp_path, tiny_base)
    (run / "adapter" / name).write_bytes(b"\x00\x01")
    with pytest.raises(ModelError, match="no adapter of stemtune's here"):
        merge(run, tmp_path / "merged")
    assert not left_behind(tmp_path)
