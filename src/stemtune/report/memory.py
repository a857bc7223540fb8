"""What `check` tells of memory: the estimate, the device's, and what to change."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from stemtune.config import Config
from stemtune.data.prepare import Prepared
from stemtune.estimate import Estimate, NoEstimateError, with_dtype
from stemtune.fit import SMALLEST, Change, Fit, Workload
from stemtune.model.load import choose_device
from stemtune.model.memory import free_memory
from stemtune.plan.steps import plan_steps


@dataclass(frozen=True)
class Memory:
    """What a run takes, and what there is.

    Attributes:
        device: its kind.
        available: bytes of its memory.
        estimate: None where there is none; `reason` says why.
        changes: what makes it fit, where it does not.
        padded: why nothing is shared on this base; empty if a tree can be.
    """

    device: str
    available: int
    estimate: Estimate | None
    changes: list[Change]
    reason: str = ""
    padded: str = ""

    @property
    def fits(self) -> bool:
        """Whether the device has as much; true where nothing is known."""
        return self.estimate is None or self.estimate.total <= self.available

    def to_json(self) -> dict[str, Any]:
        """Everything by name, in bytes."""
        return {
            "device": self.device,
            "available": self.available,
            "estimate": None if self.estimate is None else self.estimate.to_json(),
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
            "reason": self.reason,
            "padded": self.padded,
        }


def memory_of(config: Config, data: Prepared, available: int | None = None) -> Memory:
    """The estimate of a run.

    Args:
        available: bytes of a device that need not be here, a GPU unless `model.device` says
            otherwise; None for this one, with what is free now.

    Raises:
        ModelError, ConfigError: see `Estimator.of`.
    """
    if available is None:
        device = choose_device(config.model.device)
        available = free_memory(device)
    else:
        wanted = config.model.device
        device = torch.device("cuda" if wanted == "auto" else wanted)
    config = with_dtype(config, device)
    fit = Fit(Workload(data.train, _plan(config, data), config), device, available)
    padded = fit.why_padded(config)
    try:
        budget = config.train.micro_batch_tokens
        if budget == "auto":
            budget = fit.largest_budget(config) or SMALLEST
        found = fit.estimate(config, budget)
        changes = [] if found.total <= available else fit.advise(config, budget)
    except NoEstimateError as error:
        return Memory(device.type, available, None, [], str(error), padded)
    return Memory(device.type, available, found, changes, padded=padded)


def _plan(config: Config, data: Prepared) -> list[list[int]]:
    train, part = config.train, data.train
    return plan_steps(
        part.groups.tolist(),
        part.personas.tolist(),
        batching=config.data.batching,
        batch_size=train.batch_size,
        epochs=min(train.num_train_epochs, 1.0),
        max_steps=train.max_steps,
        seed=train.seed,
    )
