"""A contestant of `contestants.py` or `dpo.py` as a worker: stemtune, the plain loop, TRL.

python own.py NAME DTYPE WORK      WORK: samples, or groups with their references, as JSON
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contestants
import dpo
from base import load_adapted
from sft import quiet
from turns import Driver
from workload import Sample

BUDGET = 4096


def main(name: str, dtype: str, work: dict[str, Any]) -> None:
    """Steps of this work, until there are no more turns."""
    driver = Driver()
    quiet()
    model, tokenizer = load_adapted(dtype, ours=name == "stemtune")  # pyright: ignore[reportArgumentType]
    step: Callable[..., tuple[float, float]]
    if "samples" in work:
        step = contestants.CONTESTANTS[name](model, tokenizer, BUDGET)
        given = ([Sample(**sample) for sample in work["samples"]],)
    else:
        step = dpo.CONTESTANTS[name](model, tokenizer, BUDGET)
        given = ([dpo.Group(**group) for group in work["groups"]], work["references"])
    while True:
        driver.wait()
        loss, seconds = step(*given)
        driver.reply(loss=loss, seconds=seconds)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
