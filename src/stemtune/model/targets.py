"""Which layers of a base are adapted, and which are trained whole."""

import re
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stemtune.errors import ConfigError

SHOWN = 30
IN_A_BLOCK = re.compile(r"\.\d+\.")
ROUTERS = ("gate", "router", "shared_expert_gate")  # they choose experts: no projection
OF_MAMBA = ("out_proj", "dt_proj")  # its kernels read these weights themselves, past an adapter
# Experts are one parameter each layer; a shared expert's layers have the names that they once had.
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def find_targets(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Names of the linear layers to adapt, as PEFT takes them: the last part of a name where that
    says all, else whole names.

    Args:
        wanted: `auto`, `all-linear`, or names and patterns; see `Adapter.target_modules`.

    Raises:
        ConfigError: something that no linear layer is named; the hint lists what there is.
    """
    linear = linear_layers(model)
    if wanted == "all-linear":
        chosen = linear
    elif wanted == "auto":
        left_out = {*ROUTERS, *_taken_otherwise(model)}
        chosen = [n for n in linear if IN_A_BLOCK.search(n) and _last(n) not in left_out]
    else:
        chosen = _named(linear, [wanted] if isinstance(wanted, str) else wanted)
    if not chosen:
        hint = "name some in adapter.target_modules"
        what = "this base has no linear layers in its blocks"
        raise ConfigError(what, where="adapter.target_modules", hint=hint)
    names = sorted({_last(name) for name in chosen})
    whole = all(name in chosen for name in linear if _last(name) in names)
    return names if whole else sorted(chosen)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """All but the head, by name."""
    head: Any = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _taken_otherwise(model: PreTrainedModel) -> tuple[str, ...]:
    """Names that PEFT takes for something else, or refuses, in such a model."""
    if "mamba" in model.config.model_type or model.config.model_type == "falcon_h1":
        return OF_MAMBA
    experts = any("experts" in name and p.ndim == 3 for name, p in model.named_parameters())
    return OF_EXPERTS if experts else ()


def _named(linear: list[str], wanted: list[str]) -> list[str]:
    found = {one: [name for name in linear if _is_named(name, one)] for one in wanted}
    missing = [one for one, names in found.items() if not names]
    if missing:
        what = f"no linear layer is named {', '.join(map(repr, missing))}"
        there = ", ".join(sorted({_last(name) for name in linear})[:SHOWN])
        hint = f"this base has {there}; or use auto"
        raise ConfigError(what, where="adapter.target_modules", hint=hint)
    return sorted({name for names in found.values() for name in names})


def _is_named(name: str, wanted: str) -> bool:
    return fnmatchcase(name, wanted) or fnmatchcase(name, f"*.{wanted}")


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def require_modules(model: PreTrainedModel, wanted: list[str]) -> None:
    """Refuse an `adapter.modules_to_save` that the base has not.

    Raises:
        ConfigError: the hint lists what it has outside of its blocks.
    """
    modules = [(name, module) for name, module in model.named_modules() if name]
    names = {_last(name) for name, _ in modules}
    missing = [one for one in wanted if one not in names]
    if not missing:
        return
    outside = {
        _last(name)
        for name, module in modules
        if not IN_A_BLOCK.search(f"{name}.") and any(True for _ in module.parameters(recurse=False))
    }
    what = f"the base has no {', '.join(map(repr, missing))}"
    hint = f"it has {', '.join(sorted(outside))}"
    raise ConfigError(what, where="adapter.modules_to_save", hint=hint)


def upper_layers(model: PreTrainedModel, wanted: int | None) -> list[int] | None:
    """Numbers of the upper blocks; None for all.

    Raises:
        ConfigError: there are fewer.
    """
    count: int = model.config.get_text_config().num_hidden_layers
    if wanted is None or wanted == count:
        return None
    if wanted > count:
        what = f"{wanted} blocks are to be adapted, and the base has {count}"
        raise ConfigError(what, where="adapter.layers", hint=f"at most {count}")
    return list(range(count - wanted, count))
