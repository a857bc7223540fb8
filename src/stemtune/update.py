"""A step of the optimizer: its gradient, what watches over the numbers, and AdamW."""

import logging
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, NoReturn

from accelerate import Accelerator
from torch import nn

from stemtune.config import Train
from stemtune.errors import DivergedError
from stemtune.guards import SpikeWatch, all_finite, is_finite, unreached
from stemtune.metrics import Metrics
from stemtune.optimizer import learning_rate
from stemtune.progress import Progress
from stemtune.step import Outcome, StepRunner

log = logging.getLogger(__name__)


class Updater:
    """Makes the steps of a run.

    Args:
        runner: gives a step's gradient.
        parameters: that are trained, by name.
        steps: of the whole run: what the learning rate follows.
    """

    def __init__(
        self,
        runner: StepRunner,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Any,
        accelerator: Accelerator,
        train: Train,
        steps: int,
    ) -> None:
        self.runner, self.parameters, self.train, self.steps = runner, parameters, train, steps
        self.optimizer, self.accelerator = optimizer, accelerator
        self._spikes = SpikeWatch()
        self._reach_is_known = False

    def take(self, records: Seq[int], progress: Progress) -> Metrics:
        """One step over exactly these records.

        Returns:
            Its figures, without number: the loss and what the objectives tell, `lr`, `grad_norm`,
            what was computed, and how fast.

        Raises:
            DivergedError: a number is not finite, and `train.on_nonfinite` says to stop, or so
                many steps were skipped already.
        """
        started = time.perf_counter()
        step = self.runner.gather(records)
        rate = learning_rate(progress.step, self.steps, self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        outcome = self.runner.accumulate(step, self.train.seed * 1_000_003 + progress.step)
        self._warn_of_unreached()
        norm = self._clip()
        is_good = is_finite(outcome.loss, norm)
        if not is_good:
            self._stop_or_skip(outcome, norm, progress)
        if is_good or self.accelerator.scaler is not None:  # which skips such a step by itself
            self.optimizer.step()
        if not all_finite(self.parameters.values()):
            self._diverged("a weight is no finite number", records, progress)
        self.optimizer.zero_grad()
        self._watch(outcome.loss, progress)
        seconds = time.perf_counter() - started
        tokens = sum(len(sequence) for sequence in step.sequences)
        return {
            "loss": outcome.loss if is_good else None,
            **(outcome.told if is_good else {}),
            "lr": rate,
            "grad_norm": norm if is_good else None,
            "records": len(records),
            "targets": sum(sequence.num_targets for sequence in step.sequences),
            "tokens": tokens,
            "distinct_tokens": outcome.distinct,
            "seconds": seconds,
            "samples_per_second": len(records) / seconds,
            "tokens_per_second": tokens / seconds,
            "distinct_tokens_per_second": outcome.distinct / seconds,
        }

    def _clip(self) -> float | None:
        """Scale the gradients down to the largest norm allowed; their norm before that."""
        limit = self.train.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit)
        return None if norm is None else float(norm)

    def _stop_or_skip(self, outcome: Outcome, norm: float | None, progress: Progress) -> None:
        """A loss or gradient that is no number: as `train.on_nonfinite` says."""
        if self.accelerator.scaler is not None and math.isfinite(outcome.loss):
            return  # fp16: the scaler lowers its scale, and goes on with the next step
        what = f"the loss is {outcome.loss}, the gradient's norm {norm}"
        if self.train.on_nonfinite == "stop":
            self._diverged(what, outcome.suspects, progress)
        progress.skipped += 1
        if progress.skipped > self.train.max_skipped_steps:
            what = f"{what}, and {self.train.max_skipped_steps} steps were skipped"
            self._diverged(what, outcome.suspects, progress)
        places = self._places(outcome.suspects)
        log.warning("step %d is skipped: %s (%s)", progress.step + 1, what, places)

    def _diverged(self, what: str, records: Seq[int], progress: Progress) -> NoReturn:
        hint = "lower train.learning_rate, look at these rows, or set train.on_nonfinite: skip"
        what = f"step {progress.step + 1}: {what}"
        raise DivergedError(what, where=self._places(records), hint=hint)

    def _places(self, records: Seq[int]) -> str:
        """Where the first few of some records stand."""
        return ", ".join(str(self.runner.part.place(record)) for record in records[:3])

    def _warn_of_unreached(self) -> None:
        """Once: weights that no gradient reaches."""
        if self._reach_is_known:
            return
        self._reach_is_known = True
        names = unreached(self.parameters)
        if names:
            what = "%d of %d trained weights get no gradient, the first is %s"
            log.warning(what, len(names), len(self.parameters), names[0])

    def _watch(self, loss: float, progress: Progress) -> None:
        distance = self._spikes.above(loss) if math.isfinite(loss) else None
        if distance is not None:
            what = "step %d: a loss of %.3f, %.3f above the last ones'"
            log.warning(what, progress.step + 1, loss, distance)
