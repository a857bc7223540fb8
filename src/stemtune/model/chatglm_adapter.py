"""Adapters that were trained on ChatGLM's own layers, for the same base as transformers' `glm`.

Exact: the parts of a fused layer share its input and so its A; each has its rows of B.
"""

import json
import re
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from stemtune.errors import ModelError
from stemtune.model.chatglm import read_pickled
from stemtune.model.converted import converted_once, digest_of

PLAIN, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
FUSED = "self_attention.query_key_value"
WHOLE = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
OLD_KEY = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(\w+\.\w+)\.(lora_\w+)(.*)")
# What would speak of layers by their old names, in ways of its own.
REFUSED = ("modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules")


def renamed(folder: Path, model: PreTrainedModel) -> Path:
    """The adapter's folder, or one in the cache with the names of `glm`, if it has the old ones.

    Args:
        model: the base.

    Raises:
        ModelError: it adapts what can't be converted, or has other sizes than the base.
        Exception: what PEFT's formats raise for a damaged file.
    """
    if model.config.model_type != "glm":
        return folder
    file = folder / (PLAIN if (folder / PLAIN).is_file() else PICKLED)
    weights = load_file(file) if file.name == PLAIN else read_pickled(file)
    if not any(OLD_KEY.search(key) for key in weights):
        return folder
    rows = _rows(model)
    name = f"chatglm-adapter-{digest_of([file, folder / CONFIG], rows)}"

    def convert(target: Path) -> None:
        converted: dict[str, Tensor] = {}
        for key, tensor in weights.items():
            converted |= _converted(key, tensor, rows, folder)
        values = _config(folder, converted)
        save_file(converted, target / PLAIN)
        (target / CONFIG).write_text(json.dumps(values, indent=2), encoding="utf-8")

    return converted_once(name, CONFIG, convert)


def _rows(model: PreTrainedModel) -> list[int]:
    """The rows of q, k and v in the fused layer."""
    config: Any = model.config
    q, k = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    return [q, k, k]


def _converted(key: str, tensor: Tensor, rows: list[int], folder: Path) -> dict[str, Tensor]:
    found = OLD_KEY.search(key)
    if found is None or (found[2] != FUSED and found[2] not in WHOLE):
        what = f"the adapter holds {key!r}, which can't be converted"
        hint = "LoRA on query_key_value, dense, dense_h_to_4h and dense_4h_to_h can"
        raise ModelError(what, where=str(folder), hint=hint)
    number, old, kind, rest = found.groups()
    start = f"base_model.model.model.layers.{number}."
    if old != FUSED:
        return {f"{start}{WHOLE[old]}.{kind}{rest}": tensor.contiguous()}
    names = [f"{start}self_attn.{part}_proj.{kind}{rest}" for part in "qkv"]
    if kind == "lora_A":
        return {name: tensor.clone() for name in names}
    if tensor.shape[0] != sum(rows):
        what = f"{key!r} has {tensor.shape[0]} rows, and the base {sum(rows)}"
        raise ModelError(what, where=str(folder), hint="is it an adapter of this base?")
    return {name: part.clone() for name, part in zip(names, tensor.split(rows), strict=True)}


def _config(folder: Path, converted: dict[str, Tensor]) -> dict[str, Any]:
    """Its settings, with the new names."""
    values = cast(dict[str, Any], json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    refused = [name for name in REFUSED if values.get(name)]
    if refused:
        what = f"the adapter has `{refused[0]}`, which can't be converted"
        hint = "train a new one"
        raise ModelError(what, where=str(folder / CONFIG), hint=hint)
    layers = {key.partition(".lora_")[0].rpartition(".")[2] for key in converted}
    dropped = ("layers_pattern", "auto_mapping")
    kept = {name: value for name, value in values.items() if name not in dropped}
    return {**kept, "target_modules": sorted(layers)}
