"""The processor's own matrix-multiply peak, and how many FLOPs a training step has to do.

A figure in seconds says little on a machine whose clock and neighbours change by the minute. The
share of the peak, measured beside it, does.

Shapes: D hidden width, V vocabulary, P matrix parameters of the frozen decoder layers.
"""

import time
from typing import Any

import torch
from workload import Work

from stemtune.kernels.linear import linear

# (rows, in, out): the linear layers of SmolLM2-135M over 2,048 tokens, and a square that any
# processor likes.
SHAPES = [(2048, 576, 1536), (2048, 1536, 576), (2048, 576, 576), (2048, 2048, 2048)]


def matmul_peak(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """The best GFLOP/s of `x @ W.T` over several shapes, by torch's own product and by the one that
    stemtune takes, tried in turn for about `seconds`."""
    operands = [
        (torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype), 2.0 * n * k * m)
        for n, k, m in SHAPES
    ]
    products = (torch.nn.functional.linear, linear)
    for x, w, _ in operands:
        for product in products:
            product(x, w)
    best = 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        for x, w, flops in operands:
            for product in products:
                start = time.perf_counter()
                product(x, w)
                best = max(best, flops / (time.perf_counter() - start) / 1e9)
    return best


def step_flops(model: Any, work: Work) -> float:
    """FLOPs of forward and backward, without what a contestant recomputes and LoRA's own part.

    Source:
        decoder    4·P·tokens: forward 2, backward to the activations 2 (weights are frozen)
        head       4·D·V·scored: forward 2·D·V, backward to the hidden states 2·D·V a position
        attention  3·(4·D·pairs) a layer: QKᵀ and weights·V are 2·D each over all query heads,
                   backward twice the forward; a pair is a query and a key it may see
    """
    config = model.config
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.dim() == 2 and not parameter.requires_grad
    )
    width = config.num_attention_heads * config.head_dim
    return (
        4.0 * matrices * work.tokens
        + 4.0 * config.hidden_size * config.vocab_size * work.scored
        + 12.0 * config.num_hidden_layers * width * work.pairs
    )


def main() -> None:
    """Print the peak of this machine, now."""
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{dtype}: {matmul_peak(dtype):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
