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
# Experts are one parameter each layer. Layers of a shared expert, or of a block without experts,
# have the names that theirs once had: by these PEFT adapts all experts, and not the layers.
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def find_targets(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Names of the linear layers to adapt, as PEFT takes them: the last part of a name where that
    says all, else whole names.

    Args:
        wanted: `auto`, `all-linear`, or names and patterns; see `Adapter.target_modules`.

    Raises:
        ConfigError: something that no linear layer is named, or what PEFT takes for experts; the
            hint lists what there is.
    """
    experts = OF_EXPERTS if _has_experts(model) else ()
    linear = linear_layers(model)
    others = [name for name in linear if _last(name) not in experts]
    if wanted == "all-linear":
        chosen = others
    elif wanted == "auto":
        left_out = {*ROUTERS, *(OF_MAMBA if _is_mamba(model) else ())}
        chosen = [n for n in others if IN_A_BLOCK.search(n) and _last(n) not in left_out]
    else:
        names = [wanted] if isinstance(wanted, str) else wanted
        _require_in_blocks(model, names)
        chosen = _named(linear, names)
        _require_no_experts(chosen, others)
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


def _require_in_blocks(model: PreTrainedModel, wanted: list[str]) -> None:
    """Refuse head and embeddings by their names: an update of theirs is served by none."""
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    names = {_last(name) for name, module in model.named_modules() if module in ends}
    outside = [one for one in wanted if one in names]
    if outside:
        what = f"{', '.join(outside)}: head and embeddings are no targets"
        hint = f"adapter.modules_to_save: [{', '.join(outside)}] trains them whole"
        raise ConfigError(what, where="adapter.target_modules", hint=hint)


def _is_mamba(model: PreTrainedModel) -> bool:
    return "mamba" in model.config.model_type or model.config.model_type == "falcon_h1"


def _has_experts(model: PreTrainedModel) -> bool:
    return any("experts" in name and p.ndim == 3 for name, p in model.named_parameters())


def _require_no_experts(chosen: list[str], others: list[str]) -> None:
    taken = sorted({_last(name) for name in chosen if name not in others})
    if taken:
        what = f"PEFT takes {', '.join(taken)} for the experts of a mixture, which are not adapted"
        hint = f"this base has {_shown(others)}; or use auto"
        raise ConfigError(what, where="adapter.target_modules", hint=hint)


def _named(linear: list[str], wanted: list[str]) -> list[str]:
    found = {one: [name for name in linear if _is_named(name, one)] for one in wanted}
    missing = [one for one, names in found.items() if not names]
    if missing:
        what = f"no linear layer is named {', '.join(map(repr, missing))}"
        hint = f"this base has {_shown(linear)}; or use auto"
        raise ConfigError(what, where="adapter.target_modules", hint=hint)
    return sorted({name for names in found.values() for name in names})


def _is_named(name: str, wanted: str) -> bool:
    return fnmatchcase(name, wanted) or fnmatchcase(name, f"*.{wanted}")


def _shown(names: list[str]) -> str:
    return ", ".join(sorted({_last(name) for name in names})[:SHOWN])


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
