"""Weights of a base that wait in main memory, and are on the device for the moment of a product.

accelerate's hooks bring a weight for a module's forward pass alone; here the backward pass asks for
it again, and is given it.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stemtune.config import Model
from stemtune.errors import ConfigError
from stemtune.kernels.linear import frozen_linear
from stemtune.tree.blocks import has_blocks

WHERE = "model.offload_layers"


class OffloadedLinear(nn.Linear):
    """A frozen linear layer. Its parameter is in main memory, pinned where there is a GPU; whoever
    reads `weight` gets a copy on the device, so that PEFT puts an adapter there.

    Attributes:
        device, dtype: of its products.
    """

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.device, self.dtype = device, layer.weight.dtype
        self.bias = layer.bias
        home = layer.weight.detach()
        if torch.cuda.is_available():  # what is pinned is copied while the processor goes on
            home = home.pin_memory()
        # Not by attribute: torch refuses a parameter of a property's name.
        self._parameters["weight"] = nn.Parameter(home, requires_grad=False)
        self.to(device)

    def dense(self) -> Tensor:
        """[out, in] on the device; brought anew on each call."""
        home: Any = self._parameters["weight"]
        return home.to(self.device, non_blocking=True)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `dense`: what is written into it is lost."""
        return self.dense()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What moves the model leaves the weight where it is."""
        home = self._parameters.pop("weight")
        super()._apply(fn, recurse)
        self._parameters["weight"] = home
        return self

    def __deepcopy__(self, _: Any) -> nn.Linear:
        """A plain layer on the device: PEFT copies what is trained whole."""
        has_bias = self.bias is not None  # pyright: ignore[reportUnnecessaryComparison]
        layer = nn.Linear(self.in_features, self.out_features, has_bias, "meta", self.dtype)
        layer.load_state_dict(
            {n: p.to(self.device) for n, p in self.named_parameters()}, assign=True
        )
        return layer.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's)
        """[..., in] to [..., out]."""
        return frozen_linear(input, self.dense, self.bias)


def offload(model: PreTrainedModel, count: int, device: torch.device) -> None:
    """Move a frozen base to a device, all but the linear layers of its lowest blocks.

    Raises:
        ConfigError: it has fewer blocks, or none that we know how to find.
    """
    blocks: Any = model.get_decoder().layers if has_blocks(model) else []
    if count > len(blocks):
        what = f"{count} blocks are to be offloaded, and the base has {len(blocks)}"
        hint = f"at most {len(blocks)}" if len(blocks) else "leave model.offload_layers out"
        raise ConfigError(what, where=WHERE, hint=hint)
    for block in blocks[:count]:
        for parent, name, layer in offloadable(block):
            setattr(parent, name, OffloadedLinear(layer, device))
    model.to(device)  # pyright: ignore[reportArgumentType]


def offloadable(block: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The frozen linear layers of a block, each with its parent and its name there."""
    return [
        (parent, name, layer)
        for parent in block.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and not layer.weight.requires_grad
    ]


def require_gpu(config: Model, device: torch.device) -> None:
    """Refuse to offload from a device that has no memory of its own.

    Raises:
        ConfigError: see above.
    """
    if config.offload_layers is not None and device.type != "cuda":
        what = f"on {device.type} the weights are in main memory anyway"
        raise ConfigError(what, where=WHERE, hint="leave it out: it is for a GPU")
