"""How long the loop stands still for a checkpoint, beside how long writing it takes.

    python benchmarks/save_cost.py
    python benchmarks/save_cost.py --parameters 1e8 --folder /mnt/disk

A state is made, not trained: a third of its numbers are an adapter's, two thirds AdamW's, fp32. As
in a run, a snapshot is taken while the loop waits; hashing, writing and syncing go on behind it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from stemtune.config import Train
from stemtune.model.processor import prepare_processor
from stemtune.saver import Saver

TENSORS = 200  # of each kind


def main() -> None:
    """A table of some saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--parameters", type=float, default=1e9, help="numbers of the state")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk in question")
    options = parser.parse_args()
    prepare_processor()
    size = int(options.parameters / 3 / TENSORS)
    adapter = {f"adapter.{i}": torch.randn(size) for i in range(TENSORS)}
    optimizer = {
        f"{kind}.{i}": torch.randn(size)
        for kind in ("exp_avg", "exp_avg_sq")
        for i in range(TENSORS)
    }
    state = {"adapter": adapter, "optimizer": optimizer}
    print(f"{3 * TENSORS * size:,} numbers, {12 * TENSORS * size / 1e9:.1f} GB")
    print("| save | the loop waits, s | writing takes, s | share |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saver = Saver(Path(folder), Train(save_total_limit=1))
        waited = written = 0.0
        saver.reserve(state)  # as a run does behind its first step
        time.sleep(15)
        for number in range(1, options.saves + 1):
            saver.save(number, state, {}, None)
            snapshot = saver.cost.waited - waited
            waited = saver.cost.waited
            while saver.cost.written == written:  # the loop computes meanwhile
                time.sleep(0.05)
            seconds, written = saver.cost.written - written, saver.cost.written
            print(f"| {number} | {snapshot:.2f} | {seconds:.2f} | {snapshot / seconds:.3f} |")
        saver.close()


if __name__ == "__main__":
    main()
