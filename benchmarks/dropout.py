"""What LoRA's dropout costs: a step with it beside one without.

    python benchmarks/dropout.py --dtype bfloat16

Six answers of 250 tokens behind a stem of 500, random tokens, SmolLM2 with an adapter of rank 16 on
every linear layer; forward and backward pass, the two in turns, medians.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from base import load_base

import stemtune as st
from stemtune.config import Adapter
from stemtune.model.adapter import add_adapter
from stemtune.score import autocast

STEM, ANSWER, COUNT = 500, 250, 6
RATES = (0.0, 0.05)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tree = st.build_tree(answers())
    models = {rate: adapted(options.dtype, rate) for rate in RATES}
    seconds: dict[float, list[float]] = {rate: [] for rate in RATES}
    for number in range(options.rounds + 1):
        for rate, model in models.items():
            took = step(model, tree)
            if number:  # the first ones set the kernels up
                seconds[rate].append(took)
    medians = {rate: statistics.median(found) for rate, found in seconds.items()}
    for rate, found in seconds.items():
        print(f"dropout {rate}: {medians[rate]:.2f} s ({min(found):.2f}-{max(found):.2f})")
    print(f"{options.dtype}: {medians[RATES[1]] / medians[RATES[0]]:.2f} times")


def answers() -> list[st.Sequence]:
    """To one prompt."""
    rng = np.random.default_rng(0)
    stem, length = rng.integers(0, 49_000, STEM), STEM + ANSWER
    rows = [np.concatenate([stem, rng.integers(0, 49_000, ANSWER)]) for _ in range(COUNT)]
    return [st.Sequence(row, np.arange(length) >= STEM) for row in rows]


def adapted(dtype: Any, rate: float) -> Any:
    """A fresh one."""
    base, _ = load_base(dtype)
    return add_adapter(base, Adapter(r=16, alpha=32, dropout=rate), seed=0).train()


def step(model: Any, tree: Any) -> float:
    """Seconds."""
    model.zero_grad()
    start = time.perf_counter()
    with autocast(model):
        logps = st.target_logprobs(model, tree)
    (-logps.mean()).backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
