"""A base with its adapter as a run would build them, from the base's `config.json` alone: on the
meta device, where weights have a size and take no memory."""

import json
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stemtune.config import Adapter, Config, Model
from stemtune.errors import ModelError
from stemtune.model.activations import checkpoint_activations
from stemtune.model.adapter import adapter_folder, add_adapter
from stemtune.model.load import base_source
from stemtune.model.offload import offloadable
from stemtune.model.targets import linear_layers
from stemtune.tree.blocks import has_blocks
from stemtune.tree.logprobs import base_model

BLOCK_4BIT = 64  # weights that share a scale, in bitsandbytes
BLOCK_SCALES = 256  # scales that share a scale


def blueprint(config: Config, dtype: torch.dtype) -> PeftModel:
    """The base in `dtype`, unquantized, with the adapter that is trained: on the meta device, ready
    to train.

    Raises:
        ModelError: transformers can't make the base of its config.
        ConfigError: the adapter does not fit it; see `add_adapter`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        base = _base(config.model, dtype)
        model = add_adapter(base, _fresh(config.adapter, base), config.train.seed)
    if config.train.activation_checkpointing:
        checkpoint_activations(base)
    return model.train()


def _base(config: Model, dtype: torch.dtype) -> PreTrainedModel:
    trust = config.trust_remote_code
    try:
        shape = AutoConfig.from_pretrained(
            base_source(config, weights=False), trust_remote_code=trust
        )
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=trust)
    except ModelError:
        raise
    except Exception as error:  # a config of a new kind, or with values that make no model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "is its config.json whole, and of a kind that transformers knows?"
        what = f"can't make {config.base!r} of its config: {reason}"
        raise ModelError(what, where="model.base", hint=hint) from error
    return model.requires_grad_(False)


def _fresh(config: Adapter, base: PreTrainedModel) -> Adapter:
    """An adapter of the same size that starts anew: what it starts from does not count. Of one that
    an earlier stage has yet to write, the run file says the size."""
    changes: dict[str, Any] = {"init_from": None, "init_weights": "default"}
    if config.init_from is not None:
        path = adapter_folder(Path(config.init_from)) / "adapter_config.json"
        saved = json.loads(path.read_bytes()) if path.is_file() else {}
        if saved:
            layers = saved.get("layers_to_transform")
            changes |= {
                "r": saved["r"],
                "target_modules": _targets(saved["target_modules"], base),
                "layers": len(layers) if layers else None,
                "use_dora": bool(saved.get("use_dora")),
                "modules_to_save": saved.get("modules_to_save") or [],
            }
    return config.model_copy(update=changes)


def _targets(saved: str | list[str], base: PreTrainedModel) -> str | list[str]:
    """PEFT's pattern, or its names, as names of this base; `auto` where it has other ones now
    (ChatGLM's)."""
    names = linear_layers(base)
    if isinstance(saved, str):
        return [name for name in names if re.fullmatch(saved, name)] or "auto"
    return [one for one in saved if any(f".{name}".endswith(f".{one}") for name in names)] or "auto"


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in set(tensors))


def frozen(model: PeftModel) -> list[torch.Tensor]:
    """All that is held and not trained."""
    return [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]


def quantizable(model: PeftModel) -> list[torch.Tensor]:
    """The frozen weights that a quantized base holds in few bits: of all linear layers but the
    head, which transformers leaves as it is."""
    base = base_model(model)
    head = set(base.get_output_embeddings().modules())
    layers = [m for m in base.modules() if isinstance(m, nn.Linear) and m not in head]
    return [layer.weight for layer in layers if not layer.weight.requires_grad]


def offloadable_by_block(model: PeftModel) -> list[int]:
    """Bytes of each block's weights that `model.offload_layers` can keep in main memory."""
    blocks = blocks_of(model)
    return [size_of(layer.weight for _, _, layer in offloadable(block)) for block in blocks]


def packed_bytes(shape: torch.Size, config: Model) -> int:
    """What a weight takes as `config.quantization` holds it, with its scales.

    Source:
        Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314, section 3; 8 bits have a
        scale a row.
    """
    count = shape.numel()
    if config.quantization == "int8":
        return count + 4 * shape[0]
    scales = -(-count // BLOCK_4BIT)
    if not config.double_quantization:
        return count // 2 + 4 * scales
    return count // 2 + scales + 4 * -(-scales // BLOCK_SCALES)


def blocks_of(model: PeftModel) -> list[nn.Module]:
    """The decoder's blocks; none where it has no list of them."""
    base = base_model(model)
    return list(base.get_decoder().layers) if has_blocks(base) else []


@contextmanager
def shortened(model: PeftModel) -> Generator[list[tuple[nn.Module, int]]]:
    """Within it the decoder has two of its blocks of each kind, if there are two. Each comes with
    how many it stands for: the first for itself, the second for all others of its kind."""
    blocks = blocks_of(model)
    if not blocks:
        yield []
        return
    decoder: Any = base_model(model).get_decoder()
    types = list[str](getattr(decoder.config, "layer_types", None) or [])
    derived = isinstance(getattr(type(decoder.config), "layer_types", None), property)
    has_several = len(set(types)) > 1 and not derived  # models look there for each block's mask
    numbers: dict[str, list[int]] = {}
    for number, block in enumerate(blocks):
        kind = f"{types[number] if has_several else ''} {_kind(block)}"
        numbers.setdefault(kind, []).append(number)
    stands_for: dict[int, int] = {}
    for first, *others in numbers.values():
        stands_for |= {first: 1, **{number: len(others) for number in others[:1]}}
    chosen, kept = sorted(stands_for), decoder.layers
    decoder.layers = nn.ModuleList(blocks[number] for number in chosen)
    if has_several:
        decoder.config.layer_types = [types[number] for number in chosen]
    try:
        yield [(blocks[number], stands_for[number]) for number in chosen]
    finally:
        decoder.layers = kept
        if has_several:
            decoder.config.layer_types = types


def _kind(block: nn.Module) -> str:
    """Equal for blocks that are built alike: mixtures have dense ones below, hybrids several kinds
    of attention, and not all need be trained."""
    modules = [type(module).__name__ for module in block.modules()]
    return f"{modules} {[(n, p.shape, p.requires_grad) for n, p in block.named_parameters()]}"
