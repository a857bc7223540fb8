"""A base from a GGUF file: dequantized once, and every complaint in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stemtune as st
from stemtune.config import Model
from stemtune.errors import DiskError, ModelError
from stemtune.model import gguf, load
from tests.models import CHAT_TEMPLATE, SHAPE, tiny_model, tiny_tokenizer
from tests.runs import IGNORED, make_config

pytest.importorskip("gguf", reason="no gguf: pip install 'stemtune[gguf]'")
pytestmark = IGNORED
IDS = torch.arange(40)[None]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEMTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def llama_cpp_rows(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp keeps the two halves of a head's rows interleaved."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, *, quantized: bool = False, architecture: str = "llama") -> Any:
    """A tiny Llama as llama.cpp writes it; returns the model."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    writer = GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if i in special else 1 for i in range(len(names))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.state_dict().items():
        rows = weight
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            rows = llama_cpp_rows(rows, SHAPE[heads]) if part in name else rows
        values = rows.numpy().astype(np.float32)
        if quantized and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            weight.copy_(
                torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))
            )
            packed = quants.quantize(values, kind)  # row by row: whatever the order of rows
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
            continue
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def config(file: Path) -> Model:
    return Model(base=str(file), device="cpu", dtype="float32")


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("quantized", [False, True])
def test_it_computes_what_the_file_holds(tmp_path: Path, quantized: bool) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", quantized=quantized)
    load.require_base(config(tmp_path / "tiny.gguf"))
    model, tokenizer = st.load_model(config(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(logits_of(model), logits_of(expected), atol=1e-5, rtol=1e-5)
    text = "What is virtue?"
    assert tokenizer(text)["input_ids"][-5:] == tiny_tokenizer()(text)["input_ids"][-5:]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_it_is_converted_once_and_anew_for_another_file(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    first = load.base_source(config(file))
    assert load.base_source(config(file)) == first
    assert [path.name for path in cache.iterdir()] == [first.name]
    write_gguf(file, quantized=True)
    assert load.base_source(config(file)) != first


def test_training_by_a_path_beside_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a" / "tiny.gguf")
    run = st.train(make_config(tmp_path / "a", Path("tiny.gguf"), "train.max_steps=1"))
    assert (run.adapter_dir / "adapter_model.safetensors").is_file()
    wanted = make_config(tmp_path / "a", Path("tiny.gguf")).model
    assert wanted.base == str(tmp_path / "a" / "tiny.gguf")
    assert (load.commit_of(wanted), load.hashes_of(wanted)) == (None, {})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "no such GGUF file"),
        (lambda file: file.write_bytes(b""), "no GGUF file"),
        (lambda file: file.write_bytes(b"\x80\x02nonsense" * 50), "no GGUF file"),
        (cut, "can't be read"),
        (cut_short, "can't be read"),
        (lambda file: write_gguf(file, architecture="tomorrow"), "tomorrow"),
    ],
)
def test_a_spoiled_file(
    tmp_path: Path, cache: Path, spoil: Callable[[Path], None], said: str
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    spoil(file)
    with pytest.raises(ModelError, match=said) as found:
        st.load_model(config(file))
    assert found.value.where == str(file) and found.value.hint and "\n" not in found.value.what
    assert not list(cache.iterdir())


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="needs the package gguf"):
        load.require_base(config(tmp_path / "tiny.gguf"))


def test_a_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("STEMTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match="can't keep"):
        st.load_model(config(tmp_path / "tiny.gguf"))
