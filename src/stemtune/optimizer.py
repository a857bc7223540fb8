"""AdamW, its learning rate, and its state as named tensors."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from stemtune.config import Train


def make_optimizer(parameters: dict[str, nn.Parameter], config: Train) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only: biases and norms have no scale to shrink. Each group has a
    `lr_ratio`, by which its rate differs from the schedule's (LoRA+, Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        ratio = config.loraplus_lr_ratio if "lora_B" in name else 1.0
        groups.setdefault((decay, ratio), []).append(parameter)
    grouped = [
        {"params": params, "weight_decay": decay, "lr_ratio": ratio}
        for (decay, ratio), params in groups.items()
    ]
    device = next(iter(parameters.values())).device.type
    if config.optimizer == "adamw":
        fused = device in ("cpu", "cuda")
        return torch.optim.AdamW(grouped, lr=config.learning_rate, fused=fused)
    from bitsandbytes.optim import adamw as optim

    bits = 8 if config.optimizer.endswith("8bit") else 32
    paged = config.optimizer.startswith("paged") and device == "cuda"  # there is nowhere else
    return optim.AdamW(grouped, lr=config.learning_rate, optim_bits=bits, is_paged=paged)


def learning_rate(step: int, total: int, config: Train) -> float:
    """The rate of step `step` (from 0) of `total`: a linear warm-up from 0, then the schedule.

    A pure function, so that a resumed run has nothing to restore. Equal to transformers'
    `get_scheduler` of the same names.
    """
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, total - warmup)
    factor = (
        1 - done if config.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    )
    return config.learning_rate * factor


def optimizer_tensors(optimizer: Any, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `parameter/key`; numbers become tensors without dimensions."""
    state = optimizer.state
    return {
        f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in parameters.items()
        for key, value in state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: Any, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took."""
    names = {parameter: name for name, parameter in parameters.items()}
    saved = optimizer.state_dict()
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    is_ours = isinstance(optimizer, torch.optim.AdamW)
    keys: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        name, key = full.rsplit("/", 1)
        # torch's counts steps in tensors, that of bitsandbytes in integers.
        number = not is_ours and tensor.ndim == 0
        keys.setdefault(name, {})[key] = int(tensor) if number else tensor
    saved["state"] = {index: keys[name] for index, name in enumerate(order) if name in keys}
    optimizer.load_state_dict(saved)
