"""A run of several processes, of which the second one alone meets what can happen to a process:
its memory runs out at one step, and a signal reaches it at a later one. Started by torchrun."""

import os
import signal
import sys
from typing import Any

import torch

import stemtune as st
from stemtune.errors import Interrupted
from stemtune.objectives import sft

OUT_OF_MEMORY_AT, SIGNAL_AT = 3, 9  # micro-batches of the second process


def main(run_file: str, *overrides: str) -> None:
    calls = 0

    def objective(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1":
            if calls == OUT_OF_MEMORY_AT:
                raise torch.OutOfMemoryError("as if")
            if calls == SIGNAL_AT:
                os.kill(os.getpid(), signal.SIGTERM)
        return sft(*args)

    torch.set_num_threads(1)
    try:
        st.train(st.load_config(run_file, list(overrides)), objective=objective)
    except Interrupted as error:
        print(f"process {os.environ['RANK']}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
