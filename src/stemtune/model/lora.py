"""PEFT's LoRA layer, run by one kernel."""

from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stemtune.kernels.dropout import Dropout, next_seed
from stemtune.kernels.linear import as_rows, linear
from stemtune.kernels.lora import lora_linear
from stemtune.model.offload import OffloadedLinear
from stemtune.model.quantized import QuantizedLinear


def use_fast_layers(config: LoraConfig) -> LoraConfig:
    """Have PEFT make `FastLoraLinear` of every linear layer, plain, in few bits or offloaded.
    Others get PEFT's own. The adapter and its file are the same."""
    # PEFT wants a class; what it does is to call it, and to go on where that gives None.
    mapping = cast(dict[type[nn.Module], type[nn.Module]], {nn.Linear: _fast_layer})
    # Documented under "custom models", underscore or not.
    config._register_custom_module(mapping)  # pyright: ignore[reportPrivateUsage]
    return config


def _fast_layer(
    target: nn.Module, adapter_name: str, *, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    plain = type(layer) is nn.Linear and layer.weight.is_floating_point()
    if (
        not (plain or isinstance(layer, QuantizedLinear | OffloadedLinear))
        or config.fan_in_fan_out
        or kwargs.get("parameter_name")
    ):
        return None
    return FastLoraLinear(target, adapter_name, config=config, **kwargs)


class FastLoraLinear(Linear):
    """The same layer, and the same numbers but for rounding. What the kernel does not do (several
    adapters at once, merged weights, DoRA and other variants) is left to PEFT.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        base = cast(nn.Linear, self.get_base_layer())
        away = isinstance(base, QuantizedLinear | OffloadedLinear)  # made anew for each product
        dtype = base.dtype if away else base.weight.dtype
        if args or kwargs or self.merged or not _one_dtype(x, dtype):
            return super().forward(x, *args, **kwargs)
        names = (
            [] if self.disable_adapters else [n for n in self.active_adapters if n in self.lora_A]
        )
        if not names and not torch.is_grad_enabled() and not away:
            rows = as_rows(x, dtype)
            return linear(rows, base.weight, base.bias).view(*x.shape[:-1], -1)
        if len(names) != 1 or names[0] in self.lora_variant:
            return super().forward(x)
        if not away and base.weight.requires_grad:
            return super().forward(x)
        a, b = cast(nn.Linear, self.lora_A[names[0]]), cast(nn.Linear, self.lora_B[names[0]])
        if b.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            return super().forward(x)
        weight = base.dense if away else lambda: base.weight
        dropout = self._dropout(self.lora_dropout[names[0]])
        return lora_linear(
            x, dropout, weight, base.bias, a.weight, b.weight, self.scaling[names[0]]
        )

    def _dropout(self, module: nn.Module) -> Dropout | None:
        if not self.training or not isinstance(module, nn.Dropout):  # none of it: an Identity
            return None
        return Dropout.of(module.p, next_seed())


def _one_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether all of a layer's products are in the dtype of its weights."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) == dtype
    return x.dtype == dtype == torch.float32
