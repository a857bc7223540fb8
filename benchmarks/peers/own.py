"""A contestant of `contestants.py` as a worker: stemtune, the plain loop, TRL."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base import load_adapted
from contestants import CONTESTANTS
from sft import quiet
from turns import Driver
from workload import Sample


def main(name: str, dtype: str, samples: list[Sample], budget: int = 4096) -> None:
    """Steps of these samples, until there are no more turns."""
    driver = Driver()
    quiet()
    model, tokenizer = load_adapted(dtype, ours=name == "stemtune")  # pyright: ignore[reportArgumentType]
    step = CONTESTANTS[name](model, tokenizer, budget)
    while True:
        driver.wait()
        loss, seconds = step(samples)
        driver.reply(loss=loss, seconds=seconds)


if __name__ == "__main__":
    import json

    work = json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
    main(sys.argv[1], sys.argv[2], [Sample(**sample) for sample in work])
