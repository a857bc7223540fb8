"""Activations that wait elsewhere. The device `cpu:0`, which is no other than `cpu` but is not
equal to it, stands in for one that tensors are copied to."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stemtune as st
from stemtune.model.activations import SMALL, OffloadedActivations
from tests.models import tiny_model, with_lora
from tests.tree.test_attention import random_sequences
from tests.trees import gradient

ELSEWHERE = torch.device("cpu:0")


class Copies(TorchDispatchMode):
    """Notes how many bytes each `copy_` writes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.sizes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def copied(model: torch.nn.Module, function: Any) -> list[int]:
    """Bytes of each tensor that leaves during a forward pass; of small ones nothing is copied."""
    with Copies() as copies, OffloadedActivations(model, ELSEWHERE):
        function()
    return copies.sizes


def test_gradients_are_the_same_bit_for_bit() -> None:
    model = with_lora(tiny_model("llama", hidden_size=128, initializer_range=0.06))
    found = []
    tree = st.build_tree(random_sequences(stem=300, branch=50))
    for way in (OffloadedActivations(model, ELSEWHERE), nullcontext()):
        with Copies() as copies, way:
            logps = st.target_logprobs(model, tree, "segments")
        found.append((gradient(model, logps), len(copies.sizes)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] > found[1][1]


def test_what_layers_share_leaves_once_and_weights_stay() -> None:
    x = torch.randn(64, 128, requires_grad=True)
    layers = torch.nn.ModuleList(torch.nn.Linear(128, 256, bias=False) for _ in range(3))
    shared = x * 1.0
    assert copied(layers, lambda: [layer(shared) for layer in layers]) == [x.nbytes]


def test_what_was_written_over_meanwhile_leaves_again() -> None:
    x, weight = torch.ones(64, 128), torch.randn(64, 128, requires_grad=True)
    model = torch.nn.Module()
    with OffloadedActivations(model, ELSEWHERE):
        first = (weight * x).sum()
        x.mul_(3)
        second = (weight * x).sum()
    (grad,) = torch.autograd.grad(first + second, weight)
    assert torch.equal(grad, torch.full_like(weight, 4.0))


def test_views_of_one_tensor_come_back_as_they_were() -> None:
    x, weight = torch.randn(128, 128), torch.randn(128, 64, requires_grad=True)
    with OffloadedActivations(torch.nn.Module(), ELSEWHERE):
        y: Tensor = x[:, :64] @ weight[:64] + x.t()[:, 64:] @ weight[64:]
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    expected = torch.cat([x[:, :64].t() @ (2 * y), x.t()[:, 64:].t() @ (2 * y)])
    torch.testing.assert_close(grad, expected)


def test_small_tensors_stay() -> None:
    x = torch.randn(SMALL // 4 - 1, requires_grad=True)
    assert copied(torch.nn.Module(), x.exp) == []
