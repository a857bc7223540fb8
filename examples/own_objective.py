"""Your own objective: a pure function of log-probabilities, handed to the trainer.

    python examples/own_objective.py examples/hamlet.yaml train.max_steps=20

Here a focal loss: tokens that the model already predicts well count less,
-(1 - p)^gamma · log p (Lin et al. 2017, arXiv 1708.02002).
"""

import sys
from typing import Any

from torch import Tensor

import stemtune as st
from stemtune.objectives import Layout

GAMMA = 1.0


def focal(
    logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the micro-batch's targets; the trainer divides by the step's total weight."""
    easiness = logps.exp().detach()
    return -(layout.weight * (1 - easiness) ** GAMMA * logps).sum(), {}


if __name__ == "__main__":
    config = st.load_config(sys.argv[1], sys.argv[2:])
    print(st.train(config, objective=focal).adapter_dir)
