"""How a step's time and memory grow with what is shared, beside the arithmetic of distinct tokens.

    python benchmarks/curves.py --dtype bfloat16 --json curves.json

Random ids, so that nothing is shared but what should be: n answers of one prompt while the prompt
grows; a prompt of 512 tokens while its answers grow in number; eight rows behind one persona while
the persona grows; rows behind a persona of 256 tokens while the batch grows. Each point is a
step by the tree and by the plain loop, in turns; memory is measured in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from base import DTYPES, load_adapted
from contestants import hand, stemtune_tree
from memory import reset_peak, resident
from sft import note, quiet
from workload import Sample, separate_work, shared_work

ANSWER = 64
MESSAGE = 48  # what a row of its own says before its answer


def draw(count: int, generator: torch.Generator) -> list[int]:
    """Random ids."""
    return torch.randint(100, 40_000, (count,), generator=generator).tolist()


def answers(prompt: int, count: int) -> list[Sample]:
    """Answers to one prompt."""
    generator = torch.Generator().manual_seed(0)
    stem = draw(prompt, generator)
    mask = [False] * prompt + [True] * ANSWER
    return [Sample(stem + draw(ANSWER, generator), mask) for _ in range(count)]


def rows(persona: int, count: int) -> list[Sample]:
    """A message and an answer each, behind one persona."""
    generator = torch.Generator().manual_seed(0)
    stem = draw(persona, generator)
    mask = [False] * (persona + MESSAGE) + [True] * ANSWER
    return [Sample(stem + draw(MESSAGE + ANSWER, generator), mask) for _ in range(count)]


def points() -> Iterator[tuple[str, list[Sample]]]:
    """Every point, and its samples."""
    for prompt in (128, 512, 1024, 2048):
        yield f"prompt of {prompt:,}, 2 answers", answers(prompt, 2)
    for count in (1, 4, 8):
        yield f"prompt of 512, {count} answer{'s' * (count > 1)}", answers(512, count)
    for persona in (64, 256, 1024):
        yield f"persona of {persona:,}, 8 rows", rows(persona, 8)
    for count in (1, 4, 16):
        yield f"persona of 256, {count} row{'s' * (count > 1)}", rows(256, count)


def peak(who: str, samples: list[Sample], dtype: str) -> float:
    """MiB that one step needs on top of the loaded model."""
    model, tokenizer = load_adapted(dtype, ours=who == "stemtune")  # pyright: ignore
    step = {"stemtune": stemtune_tree, "hand": hand}[who](model, tokenizer, sys.maxsize)
    step([Sample([1, 2, 3], [False, True, True])])
    reset_peak()
    before = resident("VmRSS")
    step(samples)
    return resident("VmHWM") - before


def in_own_process(who: str, number: int, dtype: str) -> float:
    """`peak` in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__)), "--dtype", dtype, "--case", who, str(number)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ).stdout
    return float(output.split()[-1])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All points."""
    steps = {
        name: make(*load_adapted(options.dtype, ours=name == "stemtune"), sys.maxsize)
        for name, make in (("stemtune", stemtune_tree), ("hand", hand))
    }
    found: list[dict[str, Any]] = []
    for number, (name, samples) in enumerate(points()):
        seconds: dict[str, list[float]] = {who: [] for who in steps}
        for turn in range(options.rounds):
            for who in sorted(steps, reverse=turn % 2 == 0):
                _, taken = steps[who](samples)
                seconds[who].append(taken)
        tokens, distinct = separate_work(samples).tokens, shared_work(samples).tokens
        ratios = [b / a for a, b in zip(seconds["stemtune"], seconds["hand"], strict=True)]
        found.append(
            {
                "point": name,
                "tokens": tokens,
                "distinct": distinct,
                "seconds": seconds,
                "ratio": statistics.median(ratios),
                "peak_mib": {who: in_own_process(who, number, options.dtype) for who in steps},
            }
        )
        note(f"{name}: {found[-1]['ratio']:.2f}x")
    return found


def report(found: list[dict[str, Any]]) -> None:
    """A table."""
    print(
        "| work | tokens ÷ distinct | tree, s | loop, s | loop ÷ tree | tree, MiB | loop, MiB |"
        "\n|---|---|---|---|---|---|---|"
    )
    for point in found:
        ours, theirs = (statistics.median(point["seconds"][who]) for who in ("stemtune", "hand"))
        memory = point["peak_mib"]
        print(
            f"| {point['point']} | {point['tokens']:,} ÷ {point['distinct']:,} ="
            f" {point['tokens'] / point['distinct']:.2f} | {ours:.2f} | {theirs:.2f}"
            f" | {point['ratio']:.2f}× | {memory['stemtune']:,.0f} | {memory['hand']:,.0f} |"
        )


def main() -> None:
    """One peak in this process, or all points."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    parser.add_argument("--case", nargs=2, help="a contestant and the number of a point: its peak")
    options = parser.parse_args()
    quiet()
    if options.case:
        who, number = options.case
        print(peak(who, list(points())[int(number)][1], options.dtype))
        return
    found = measure(options)
    report(found)
    if options.json:
        document = {"dtype": options.dtype, "points": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
