"""Peak resident memory of one DPO step of one pair, by the length of its prompt.

    python benchmarks/dpo_memory.py
    python benchmarks/dpo_memory.py --prompts 256 1024 --json dpo-memory.json

Each case runs in a process of its own. Answers have 64 tokens each; the reference is stored.

Cases:
    sft          stemtune on the prompt with its chosen answer alone.
    sft_both     stemtune on the prompt with one answer as long as both.
    stemtune     both answers, the loss of DPO.
    trl_head     TRL's DPOTrainer, its head switched to targets (see contestants.py).
    trl          the same as installed.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from base import DTYPES
from contestants import stemtune_tree
from dpo import CONTESTANTS, Group
from memory import add_allocator_argument, load_for, reset_peak, resident
from sft import note, quiet

CASES = ["sft", "sft_both", "stemtune", "trl_head", "trl"]
OURS = CASES[:3]
ANSWER = 64


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    add_allocator_argument(parser)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--case", choices=CASES, help="this case alone, in this process")
    return parser.parse_args()


def measure(case: str, length: int, dtype: str, allocator: str) -> float:
    """MiB that the second of two equal steps needs at its peak, on top of what is resident between
    them: the first one reads the weights, loads code and makes the optimizer's state."""
    model, tokenizer = load_for(case in OURS, dtype, allocator)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(100, 40_000, (count,), generator=generator).tolist()

    prompt, answers = draw(length), [draw(ANSWER), draw(ANSWER)]
    if case in ("sft", "sft_both"):
        answer = answers[0] if case == "sft" else answers[0] + answers[1]
        samples = Group([prompt], [answer]).samples()
        train = stemtune_tree(model, tokenizer, budget=sys.maxsize)
        step = partial(train, samples)
    else:
        compare = CONTESTANTS[case](model, tokenizer, sys.maxsize)
        # Any numbers will do for the reference.
        step = partial(compare, [Group([prompt], answers)], [[0.0] * ANSWER] * 2)
    step()
    reset_peak()
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def in_own_process(case: str, length: int, dtype: str, allocator: str) -> float:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__)), "--case", case, "--prompts", str(length)]
    command += ["--allocator", allocator]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # see memory.py
    output = subprocess.run(
        [*command, "--dtype", dtype], check=True, stdout=subprocess.PIPE, text=True, env=env
    ).stdout
    return float(output.split()[-1])


def main() -> None:
    """One case in this process, or all of them in their own."""
    options = parse()
    quiet()
    if options.case:
        print(measure(options.case, options.prompts[0], options.dtype, options.allocator))
        return
    print(f"| prompt | {' | '.join(options.cases)} |\n|{'---|' * (len(options.cases) + 1)}")
    figures: dict[int, dict[str, float]] = {}
    for length in options.prompts:
        figures[length] = {}
        for case in options.cases:
            note(f"{length} {case} …")
            figures[length][case] = in_own_process(case, length, options.dtype, options.allocator)
        row = " | ".join(f"{figures[length][case]:,.0f}" for case in options.cases)
        print(f"| {length:,} | {row} |", flush=True)
    if options.json:
        document = {
            "dtype": options.dtype,
            "allocator": options.allocator,
            "answer": ANSWER,
            "peak_mib": figures,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
