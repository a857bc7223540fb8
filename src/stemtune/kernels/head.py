"""log-softmax of a frozen head at given tokens, without ever holding all logits.

Shapes: S rows (distinct sources), U wanted (row, token) pairs, D hidden width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from stemtune.kernels.kind import kind_of
from stemtune.kernels.linear import linear

# Rows and tokens of the vocabulary at once: on a CPU 32 MB of logits in fp32, which a cache holds;
# on a GPU what keeps it busy.
BLOCKS = {"cpu": (2048, 4096), "cuda": (2048, 16384)}


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, tokens: Tensor
) -> Tensor:
    """The log-softmax of h Wᵀ + bias at the wanted tokens, in fp32: [U].

    Args:
        hidden: [S, D].
        weight: [V, D], W, frozen. bias: [V], frozen.
        rows, tokens: [U].

    Source:
        Its gradient is ∂ log p(t) / ∂h = W[t] - Σ_v p(v) W[v]. The last sum, an expected embedding,
        does not depend on the gradient from above, so the forward pass computes it while the
        logits are at hand: [S, D] is kept instead of [S, V], and the backward pass needs no product
        with W. Blocks of the vocabulary are joined by the logarithms of their sums, as in Milakov
        and Gimelshein 2018, https://arxiv.org/abs/1805.02867.
    """
    return _FrozenHead.apply(hidden, weight, bias, rows, tokens)  # pyright: ignore


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, tokens: Tensor
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        scores = torch.empty(rows.numel(), dtype=torch.float32, device=hidden.device)
        parts: list[Tensor] = []
        count = _block_of(hidden)[0]
        for start in range(0, hidden.shape[0], count):
            here = torch.nonzero((rows >= start) & (rows < start + count)).squeeze(1)
            chunk = hidden[start : start + count].to(weight.dtype)
            local = rows[here] - start
            scores[here], expected = _chunk(chunk, weight, bias, local, tokens[here], needs_grad)
            parts.append(expected)
        if needs_grad:
            ctx.save_for_backward(torch.cat(parts), weight, rows, tokens)
            ctx.dtype = hidden.dtype
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        expected, weight, rows, tokens = ctx.saved_tensors
        grad = grads[0].float()
        total = torch.zeros(expected.shape[0], device=grad.device).index_add_(0, rows, grad)
        result = expected * -total[:, None]
        result.index_add_(0, rows, weight[tokens].float() * grad[:, None])
        return result.to(ctx.dtype), None, None, None, None


def _chunk(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    tokens: Tensor,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of some rows' tokens, and the rows' expected embeddings, fp32 [rows, D]
    (empty where no gradient is needed)."""
    norm = torch.full((states.shape[0], 1), float("-inf"), device=states.device)
    expected = norm.new_zeros(states.shape if needs_grad else (0,))
    wanted = norm.new_empty(rows.numel())
    count = _block_of(states)[1]
    for start in range(0, weight.shape[0], count):
        block = weight[start : start + count]
        logits = linear(states, block, None if bias is None else bias[start : start + count])
        # All of them, and those that are elsewhere left out: a GPU need not tell which these are.
        place = (tokens - start).clamp(0, logits.shape[1] - 1)
        wanted = torch.where(place == tokens - start, logits[rows, place].float(), wanted)
        # On CPUs softmax is one fused pass; exp, which logsumexp calls, takes ten times as long.
        # The likeliest token's logit less its log-probability is the logarithm of the sum too.
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        largest = logits.amax(dim=-1, keepdim=True).float()
        own = largest - probabilities.amax(dim=-1, keepdim=True).log()
        if needs_grad:
            mean = linear(probabilities.to(weight.dtype), block.t())
            expected.lerp_(mean.float(), torch.sigmoid(own - norm))
        norm = torch.logaddexp(norm, own)
    return wanted - norm[rows, 0], expected


def _block_of(states: Tensor) -> tuple[int, int]:
    return BLOCKS.get(kind_of(states), BLOCKS["cpu"])
