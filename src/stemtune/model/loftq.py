"""LoftQ: the update starts as what the quantization of the base loses.

Li et al. 2023, https://arxiv.org/abs/2310.08659, with the quantized weight Q as it is: B A is the
best approximation of rank r of (W − Q) / scale.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stemtune.errors import ModelError
from stemtune.model.lora import FastLoraLinear
from stemtune.model.quantized import QuantizedLinear

ITERATIONS, EXTRA = 4, 8  # of the randomised decomposition: passes, and columns beyond the rank
PREFIX = "base_model.model."


def start_from_residual(model: PeftModel, folder: Path, seed: int) -> None:
    """Set A and B of each adapted layer.

    Args:
        folder: the base as it was, in safetensors.

    Raises:
        ModelError: a layer's weight is not there by its own name.
    """
    torch.manual_seed(seed)
    for name, layer in model.named_modules():
        if not isinstance(layer, FastLoraLinear):
            continue
        base = cast(QuantizedLinear, layer.get_base_layer())
        weight = _weight(folder, f"{name.removeprefix(PREFIX)}.weight").to(base.weight.device)
        lost = (weight.float() - base.dense().float()) / layer.scaling["default"]
        a, b = cast(Any, layer.lora_A["default"]), cast(Any, layer.lora_B["default"])
        rank = a.weight.shape[0]
        u, s, v = torch.svd_lowrank(lost, q=min(rank + EXTRA, *lost.shape), niter=ITERATIONS)
        with torch.no_grad():
            b.weight.copy_((u * s.sqrt())[:, :rank])
            a.weight.copy_((v * s.sqrt())[:, :rank].t())


def _weight(folder: Path, name: str) -> Tensor:
    try:
        path = folder / "model.safetensors"
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            path = folder / json.loads(index.read_text(encoding="utf-8"))["weight_map"][name]
        with safe_open(path, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = f"loftq can't find the weight {name!r} in the base's own files"
        hint = "leave adapter.init_weights out"
        raise ModelError(what, where=str(folder), hint=hint) from error
