"""Gathered rows and their gradient against indexing in float64."""

import pytest
import torch

from stemtune.kernels.gather import gather

ROWS = torch.tensor([2, 0, 2, 2, 1, 2])


def test_it_is_indexing() -> None:
    states = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather(states, ROWS), states[ROWS])
    assert torch.autograd.gradcheck(lambda x: gather(x, ROWS), states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_the_sum_alone(dtype: torch.dtype) -> None:
    """A thousand times one row: in half precision such a sum would stop growing at 256 or 2048."""
    states = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    gather(states, torch.zeros(4001, dtype=torch.long)).backward(torch.ones(4001, 3, dtype=dtype))
    assert states.grad is not None and states.grad.dtype == dtype
    assert torch.equal(states.grad, torch.tensor([[4001.0] * 3, [0.0] * 3]).to(dtype))
