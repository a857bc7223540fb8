"""From the command to the first step, beside the bare import of what it stands on.

    python benchmarks/startup.py [--rounds 5] [--json PATH]

In turns: `import torch, transformers, peft`, and `stemtune train` on the starter data with a cached
SmolLM2, until its run says that training has begun.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = "import torch, transformers, peft"
STEMTUNE = [sys.executable, "-m", "stemtune"]
SETTINGS = ["data.eval_fraction=0", "train.max_steps=1", "train.batch_size=1", "output.dir=run"]


def main() -> None:
    """Measure, print a line a round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds + 1):
        line = {"imports": seconds_of_imports(), **seconds_of_run()}
        line["ratio"] = line["first_step"] / line["imports"]
        print({name: round(value, 2) for name, value in line.items()}, flush=True)
        if number:  # the first one warms the disk's cache
            rounds.append(line)
    medians = {name: statistics.median(line[name] for line in rounds) for name in rounds[0]}
    print("medians", {name: round(value, 2) for name, value in medians.items()})
    if options.json:
        document = {"rounds": rounds, "medians": medians}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def seconds_of_imports() -> float:
    """Of a process that imports and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_of_run() -> dict[str, float]:
    """Until each phase of a run began: `loading`, and `first_step`."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        subprocess.run([*STEMTUNE, "init", "."], cwd=here, check=True, capture_output=True)
        start = time.perf_counter()
        process = subprocess.Popen(
            [*STEMTUNE, "train", "run.yaml", *SETTINGS],
            cwd=here,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found: dict[str, float] = {}
        names = {"loading the model": "loading", "training": "first_step"}
        while process.poll() is None and "first_step" not in found:
            phase = phase_of(here / "run" / "run.json")
            if phase in names:
                found.setdefault(names[phase], time.perf_counter() - start)
            time.sleep(0.005)
        process.wait()
        return found


def phase_of(path: Path) -> str:
    """What a run is about; empty before it says so."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("phase", ""))
    except (OSError, ValueError):
        return ""


if __name__ == "__main__":
    main()
