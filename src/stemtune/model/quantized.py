"""A base whose linear layers are held in 4 or 8 bits, by bitsandbytes.

bitsandbytes' own layers compute otherwise in evaluation than in training (8 bits: activations are
rounded too; 4 bits on some processors: scales are, and the layer has no gradient from then on), and
8 bits look at the whole batch for outliers. A tree must give what separate sequences give, and the
reference what the policy starts from; so a layer here has one way: its weight, made dense for the
moment of a product.
"""

import json
from copy import copy
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stemtune.config import Model
from stemtune.errors import ConfigError, ModelError
from stemtune.kernels.linear import frozen_linear

TRAINED_ON = ("bitsandbytes",)
OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # beside a config.json
WHERE = "model.quantization"


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds what a layer of bitsandbytes' held.

    Attributes:
        weight: packed, with its scales.
        dtype: of its products.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.state = getattr(layer, "state", None)  # PEFT's DoRA looks for it, of 8 bits
        self.dtype = dtype
        if self.state is not None:
            self.state.SCB = layer.weight.SCB

    def dense(self) -> Tensor:
        """[out, in] in `dtype`; made anew on each call."""
        from bitsandbytes import functional as bnb

        if self.state is not None:
            return bnb.int8_vectorwise_dequant(self.weight.data, self.state.SCB).to(self.dtype)
        flat = bnb.dequantize_4bit(self.weight.data, self._flat_state)
        return flat.view(self.out_features, self.in_features).to(self.dtype)

    @cached_property
    def _flat_state(self) -> Any:
        """The scales, a row a block: rows that end within a block get wrong ones on a CPU
        (bitsandbytes 0.50)."""
        packed: Any = self.weight
        state = copy(packed.quant_state)
        count, size = self.in_features * self.out_features, state.blocksize
        state.shape = torch.Size([1, count] if count % size else [count // size, size])
        return state

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's)
        """[..., in] to [..., out]."""
        return frozen_linear(input, self.dense, self.bias)


def quantization(config: Model, dtype: torch.dtype) -> Any:
    """What transformers loads the base by; None for a base as it is.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if config.quantization is None:
        return None
    require_bitsandbytes(WHERE)
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def require_bitsandbytes(where: str) -> None:
    """Refuse a setting that needs it.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        hint = "pip install 'stemtune[quantized]'"
        raise ConfigError("this needs the package bitsandbytes", where=where, hint=hint)


def require_trainable(folder: Path, config: Model) -> None:
    """Refuse a base that comes quantized in a way that can't be trained on, before it is loaded.

    Raises:
        ModelError: with the reason.
        ConfigError: it comes quantized, and is to be quantized again, or offloaded.
    """
    method = comes_quantized(folder)
    if not method:
        return
    if method not in TRAINED_ON:
        what = f"the base comes quantized by {method}, whose layers give no exact gradient here"
        hint = "take the base as it was before, with model.quantization: nf4"
        raise ModelError(what, where=str(folder), hint=hint)
    if config.quantization is not None:
        hint = "leave model.quantization out"
        raise ConfigError("the base comes quantized already", where=WHERE, hint=hint)
    if config.offload_layers is not None:
        what = "a base that comes quantized can't be offloaded"
        raise ConfigError(what, where="model.offload_layers", hint="leave it out")
    require_bitsandbytes("model.base")


def comes_quantized(folder: Path) -> str:
    """How a base in a folder was quantized; empty for one as it was trained."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = str((found.get("quantization_config") or {}).get("quant_method", ""))
    except (OSError, ValueError, AttributeError):
        return ""  # transformers says what is wrong with it
    older = (kind for name, kind in OLDER.items() if (folder / name).is_file())
    return method or next(older, "")


def rounded(weight: Tensor, config: Model) -> Tensor:
    """A weight [out, in] as a base that is quantized so holds it."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    size = (weight.shape[1], weight.shape[0])
    if config.quantization == "int8":
        layer: Any = Linear8bitLt(*size, bias=False, has_fp16_weights=False)
    else:
        layer = Linear4bit(
            *size,
            bias=False,
            compress_statistics=config.double_quantization,
            quant_type=config.quantization or "nf4",
        )
    layer.load_state_dict({"weight": weight})
    return QuantizedLinear(layer.to("cpu"), weight.dtype).dense()


def require_dense_for_dora(model: PreTrainedModel) -> None:
    """PEFT's DoRA makes weights dense by bitsandbytes, which see `QuantizedLinear`.

    Raises:
        ConfigError: it would get wrong ones.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear) and layer.state is None:
            packed: Any = layer.weight
            if layer.in_features % packed.quant_state.blocksize and packed.device.type == "cpu":
                hint = "set adapter.use_dora: false"
                what = "bitsandbytes reads 4-bit weights of this width wrongly on a CPU"
                raise ConfigError(what, where="adapter.use_dora", hint=hint)


def hold_packed(model: PreTrainedModel) -> None:
    """Put a `QuantizedLinear` in the place of each of bitsandbytes' layers, and let go of the files
    that they were made from."""
    if not getattr(model, "is_quantized", False):
        return
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit | Linear8bitLt):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(layer, model.dtype))
    # In main memory the other weights are views of the mapped files, which stay mapped for them.
    for weight in model.parameters():
        if weight.device.type == "cpu" and weight.is_floating_point():
            weight.data = weight.data.clone()
