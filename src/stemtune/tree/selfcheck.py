"""Before training: does the tree give what separate sequences give, on this very model?"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stemtune.tree.build import Tree, build_tree
from stemtune.tree.logprobs import base_model, target_logprobs
from stemtune.tree.sequence import Sequence

FP32_TOLERANCE = 1e-4
NOISE_FACTOR = 4.0
MAX_TOKENS = 320  # of the sequences that are compared: enough to see, cheap enough to wait for
LONGEST = 128  # of each; a fault that only longer ones show is for the tests of its family


@dataclass(frozen=True)
class Verdict:
    """What the self-check saw: a difference of the targets' log-probabilities (the largest, or the
    mean where that is the one that is too large), and what is allowed."""

    passed: bool
    difference: float
    bound: float
    reason: str = ""


def self_check(model: nn.Module, sequences: Seq[Sequence], backend: str) -> Verdict:
    """Compare tree and padded log-probabilities on some sequences, without dropout.

    In fp32 they agree to 1e-4 a target. In half precision two correct ways differ by more, so the
    bounds come from two correct padded ways: transformers' SDPA and its plain matrix products. The
    largest of many differences is loose there, so their mean is compared as well.
    """
    if not any(sequence.num_targets for sequence in sequences):
        return Verdict(True, 0.0, 0.0)
    tree = build_tree(_some(sequences))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            padded = target_logprobs(model, tree, "padded")
            try:
                shared = target_logprobs(model, tree, backend)
            except (NotImplementedError, RuntimeError, TypeError) as error:
                return Verdict(False, float("inf"), 0.0, str(error).splitlines()[0])
            largest_allowed, mean_allowed = _bounds(model, tree, padded)
    finally:
        model.train(training)
    differences = (shared - padded).abs()
    largest, mean = float(differences.max()), float(differences.mean())
    # Not-a-number compares as false: it fails.
    if largest <= largest_allowed and not mean <= mean_allowed:
        reason = f"on average it differs by {mean:.1e}, allowed {mean_allowed:.1e}"
        return Verdict(False, mean, mean_allowed, reason)
    return Verdict(largest <= largest_allowed, largest, largest_allowed)


def _bounds(model: nn.Module, tree: Tree, padded: torch.Tensor) -> tuple[float, float]:
    """What is allowed: for the largest difference, and for the mean."""
    base = base_model(model)
    if base.dtype not in (torch.bfloat16, torch.float16):
        return FP32_TOLERANCE, FP32_TOLERANCE
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        other = target_logprobs(model, tree, "padded", keep_attention=True)
    finally:
        base.set_attn_implementation(before)
    noise = (other - padded).abs()
    # Both ways can happen to round alike; a log-probability of this dtype is never surer than this.
    floor = float(torch.finfo(base.dtype).eps) * padded.abs().clamp(min=1.0)
    largest = torch.maximum(noise.max(), floor.max())
    mean = torch.maximum(noise.mean(), floor.mean())
    return NOISE_FACTOR * float(largest), NOISE_FACTOR * float(mean)


def _some(sequences: Seq[Sequence]) -> list[Sequence]:
    """The shortest sequences, up to a limit, and a branch that leaves one of them halfway: a step
    may well be a single path, and the next one not."""
    chosen: list[Sequence] = []
    total = 0
    for sequence in sorted(sequences, key=len):
        cut = _beginning(sequence)
        total += len(cut)
        if chosen and total > MAX_TOKENS:
            break
        chosen.append(cut)
    trunk = max(chosen, key=len)
    half = len(trunk) // 2
    ids = np.concatenate([trunk.input_ids[:half], trunk.input_ids[half:][::-1]])
    return [*chosen, Sequence(ids, np.arange(len(trunk)) >= max(half, 1))]


def _beginning(sequence: Sequence) -> Sequence:
    """Cut to the longest that is compared; what is scored are its targets, or all of its second
    half where none is left."""
    ids, targets = sequence.input_ids[:LONGEST], sequence.is_target[:LONGEST]
    if not targets.any():
        targets = np.arange(len(ids)) >= max(len(ids) // 2, 1)
    return Sequence(ids, targets)
