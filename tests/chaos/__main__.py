"""Every fault many times, and a table of what held: `python -m tests.chaos --seed 0`."""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch

from tests.chaos.faults import FAULTS
from tests.chaos.lab import Lab
from tests.models import save_tiny_model


def main() -> int:
    """The table; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="as few as `make test` tries")
    parser.add_argument("--only", nargs="+", help="names of faults")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("stemtune").addHandler(logging.NullHandler())
    failed: list[str] = []
    print("| fault | tried | held | failed |\n|---|---|---|---|")
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_tiny_model(base)
        for fault, counts in FAULTS.items():
            if options.only and fault.__name__ not in options.only:
                continue
            lab = Lab(Path(folder) / fault.__name__, base, options.seed)
            row = fault(lab, counts[0 if options.short else 1])
            print(f"| {row.fault} | {row.tried} | {row.held} | {len(row.failures)} |", flush=True)
            for line in row.failures[:5]:
                print(f"  {fault.__name__}: {line}", file=sys.stderr, flush=True)
            failed += row.failures
            total += row.tried
    print(f"\n{total} tries, {len(failed)} failed. With none, the rate of failures is below")
    print(f"3/{total} = {3 / max(1, total):.4f} at a confidence of 95 % (rule of three).")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
