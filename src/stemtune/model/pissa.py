"""PiSSA: the update starts as the principal components of a weight, which are taken out of it.

Meng et al. 2024, https://arxiv.org/abs/2404.02948. The base is another one then, so the start is
kept, frozen: it is what training is compared with, and with it the trained adapter is written as
one of twice the rank on the base as it was, which every engine takes:
B A − B₀ A₀ = [B, −B₀] [A; A₀].
"""

from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from stemtune.model.lora import use_fast_layers

START = "start"  # the frozen copy of an adapter that training goes on with, or begins with


def keep_start(model: PeftModel) -> None:
    """Put a frozen copy of the fresh adapter beside it."""
    config: Any = deepcopy(model.peft_config["default"])
    config.init_lora_weights = True
    config.inference_mode = True
    model.add_adapter(START, use_fast_layers(config))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{START}." in name:
                parameter.copy_(parameters[name.replace(f".{START}.", ".default.")])
                parameter.requires_grad_(False)
    model.set_adapter("default")


def is_pissa(model: PeftModel) -> bool:
    """Whether the adapter started so."""
    config: Any = model.peft_config["default"]
    return config.init_lora_weights == "pissa"


def on_the_base_as_it_was(model: PeftModel) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The trained adapter as an ordinary one of twice the rank: its settings, its tensors."""
    now, start = (get_peft_model_state_dict(model, adapter_name=n) for n in ("default", START))
    tensors = {
        name: torch.cat(
            [now[name], start[name] if "lora_A" in name else -start[name]],
            dim=0 if "lora_A" in name else 1,
        )
        for name in now
    }
    config: Any = deepcopy(model.peft_config["default"])
    config.init_lora_weights, config.inference_mode = True, True
    # The scale stays: alpha / r, or alpha / √r.
    config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    config.r *= 2
    return config, tensors
