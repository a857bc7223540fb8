"""How far a run has come."""

from dataclasses import dataclass

from stemtune.metrics import Metrics


@dataclass
class Progress:
    """Where a run is: all that a resumed run must know besides weights and optimizer."""

    step: int = 0
    evaluated: int = -1  # the last step that was: a signal does not wait for an evaluation
    best_step: int | None = None
    best_loss: float | None = None
    skipped: int = 0
    metrics: Metrics | None = None
