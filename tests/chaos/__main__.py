"""Every fault many times, and a table of what held: `python -m tests.chaos --seed 0`."""

import argparse
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

from tests.chaos.faults import FAULTS
from tests.chaos.lab import Lab, Row
from tests.models import save_tiny_model

# Faults that end before a run has begun, or belong to no moment of it: each is a test of its own.
TESTS = {
    "the network: errors, hangs, short and wrong bytes": "model/test_hub.py",
    "a bad row, alone and as one in 10,000": "data/test_bad_rows.py",
    "rows mutated at random": "data/test_fuzz.py",
    "pickles, code, tags, templates, links": "test_security.py",
    "a secret in the environment or the run file": "export/test_canary.py",
}


def tested(fault: str, file: str) -> Row:
    """The tests of a file as a row of the table."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", f"tests/{file}"]
        run = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True)
        if not report.exists():
            return Row(fault, 0, [run.stdout + run.stderr])
        cases = ElementTree.parse(report).iter("testcase")
        tried = [case for case in cases if case.find("skipped") is None]
    failures = [case for case in tried if len(case) and case[0].tag in ("failure", "error")]
    return Row(fault, len(tried), [str(case.get("name")) for case in failures])


def main() -> int:
    """The table; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="as few as `make test` tries")
    parser.add_argument("--only", nargs="+", help="names of faults")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("stemtune").addHandler(logging.NullHandler())
    rows: list[Row] = []
    print("| fault | tried | held | failed |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_tiny_model(base)
        for fault, counts in FAULTS.items():
            if not options.only or fault.__name__ in options.only:
                lab = Lab(Path(folder) / fault.__name__, base, options.seed)
                rows.append(told(fault(lab, counts[0 if options.short else 1])))
    for name, file in TESTS.items():
        if not options.only or Path(file).stem in options.only:
            rows.append(told(tested(name, file)))
    total, failed = sum(row.tried for row in rows), sum(len(row.failures) for row in rows)
    print(f"\n{total} tries, {failed} failed. With none, the rate of failures is below")
    print(f"3/{total} = {3 / max(1, total):.4f} at a confidence of 95 % (rule of three).")
    return 1 if failed else 0


def told(row: Row) -> Row:
    """Printed."""
    print(f"| {row.fault} | {row.tried} | {row.held} | {len(row.failures)} |", flush=True)
    for line in row.failures[:5]:
        print(f"  {row.fault}: {line}", file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
