"""What watches over a run's numbers: losses that are no numbers, and losses that leap."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from statistics import median

import torch
from torch import Tensor

from stemtune.tree.sequence import Sequence

WINDOW = 50  # losses that a new one is compared with
FEW = 10  # with fewer nothing is said
SPREADS = 8.0


class SpikeWatch:
    """Notices a loss far above those of the steps before it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def above(self, loss: float) -> float | None:
        """How far a loss is above the median of the last ones, where that is remarkable: more than
        eight times their median distance from it, and a fifth of it.

        Args:
            loss: of the newest step; it is one of the last ones from now on.
        """
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < FEW:
            return None
        middle = median(before)
        spread = median(abs(value - middle) for value in before)
        distance = loss - middle
        limit = max(SPREADS * spread, abs(middle) / 5)
        return distance if distance > limit else None


def unreached(parameters: Mapping[str, Tensor]) -> list[str]:
    """Those without a gradient behind a backward pass, where others have one: layers past whose
    adapter a model reads the weight itself."""
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    return without if len(without) < len(parameters) else []


def is_finite(loss: float, norm: float | None) -> bool:
    """Whether a step's loss and its gradient's norm, if there is one, are numbers."""
    return math.isfinite(loss) and (norm is None or math.isfinite(norm))


def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all weights are numbers."""
    return all(bool(torch.isfinite(p).all()) for p in parameters)


def suspects(sequences: Seq[Sequence], logps: Seq[Tensor]) -> list[int]:
    """Records some of whose log-probabilities are no finite numbers; all records, where it is the
    gradient alone."""
    records = [sequence.record for sequence in sequences]
    found = [
        record
        for record, mine in zip(records, logps, strict=True)
        if not bool(torch.isfinite(mine).all())
    ]
    return list(dict.fromkeys(found or records))
