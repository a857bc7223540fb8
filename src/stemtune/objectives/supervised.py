"""Objectives that raise the likelihood of an answer."""

from typing import Any

from torch import Tensor

from stemtune.objectives.layout import Layout

Outcome = tuple[Tensor, dict[str, Tensor]]


def sft(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """Supervised fine-tuning: -Σ weight · log p(target | path), the cross entropy."""
    return -(layout.weight * logps).sum(), {}


def best_answers(
    logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any
) -> Outcome:
    """The cross entropy of each prompt's best answer: the term that RPO (Pang et al. 2024,
    arXiv 2404.19733) adds to DPO, and that ORPO and CPO contain."""
    return -(logps * layout.best[layout.sequence]).sum(), {}
