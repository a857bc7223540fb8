"""A model larger than the memory that may be taken is merged, file by file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

WIDTH, INNER, LAYERS, RANK, VOCABULARY = 1024, 2816, 16, 8, 256
ALLOWED = 450 * 2**20  # over what the imports take; the model has 820 MiB
NAMES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
SCRIPT = """
import resource, sys
from pathlib import Path
import psutil
from stemtune.export.merge import merge
from transformers import AutoModelForCausalLM, LlamaForCausalLM
adapter, target, base, allowed = sys.argv[1:]
limit = psutil.Process().memory_info().vms + int(allowed)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
assert merge(Path(adapter), Path(target)) is None, "there was memory to compare"
try:
    AutoModelForCausalLM.from_pretrained(base)
except Exception as error:
    print("as a whole:", type(error).__name__)
"""


def layer(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    stem = f"model.layers.{number}"
    weights = {
        f"{stem}.{name}.weight": torch.randn(shape, generator=generator) * 0.02
        for name, shape in NAMES.items()
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    return weights | {f"{stem}.{name}.weight": torch.ones(WIDTH) for name in norms}


def write_base(folder: Path) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ends = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH) * 0.02,
        "model.norm.weight": torch.ones(WIDTH),
    }
    shards = [f"model-{number:05d}-of-{LAYERS + 1:05d}.safetensors" for number in range(LAYERS + 1)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        tensors = layer(number) if number < LAYERS else ends
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def write_adapter(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(99)
    tensors: dict[str, torch.Tensor] = {}
    for number in range(LAYERS):
        for name, (outer, inner) in NAMES.items():
            stem = f"base_model.model.model.layers.{number}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outer, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(lora), encoding="utf-8")
    prompt = {"model": {"base": str(base)}}
    (folder / "stemtune.json").write_text(json.dumps(prompt), encoding="utf-8")
    return tensors


@pytest.mark.skipif(sys.platform != "linux", reason="limits of addresses are Linux's")
def test_merge_within_half_of_its_size(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "base")
    paths = [str(tmp_path / name) for name in ("adapter", "merged", "base")]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *paths, str(ALLOWED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "as a whole:" in done.stdout, "the limit did not bite"
    for number in (0, LAYERS - 1):
        before = layer(number)
        with safe_open(
            tmp_path / "merged" / f"model-{number:05d}-of-{LAYERS + 1:05d}.safetensors", "pt"
        ) as file:
            for name, weight in before.items():
                found = file.get_tensor(name).double()
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                if "norm" in name:
                    assert torch.equal(found, weight.double())
                    continue
                a, b = (adapter[f"{stem}.lora_{part}.weight"].double() for part in "AB")
                expected = weight.double() + 4 / RANK * b @ a
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
