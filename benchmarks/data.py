"""Read, audit, tokenise and plan a large file, stage by stage; then once more, from what was kept.

    python benchmarks/data.py --rows 100000 300000 1000000 --json data.json
    python benchmarks/data.py --rows 20000 --peer          # datasets.map beside it

Each size runs in a process of its own, whose largest resident memory is taken with that of its
workers (the sum, sampled). Rows are made of random words: a prompt of about 700 characters, an
answer of about 250; one row in twenty asks what another asks.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

WORDS = 5000


def make_rows(path: Path, count: int) -> None:
    """A JSONL file of `count` rows of about 1 kB."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS)]
    asked = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 20 or not asked:
                asked = " ".join(rng.choices(vocabulary, k=115))
            said = " ".join(rng.choices(vocabulary, k=42))
            row = {"context": f"{asked}?", "target": f"{said.capitalize()}."}
            file.write(json.dumps(row) + "\n")


class Memory:
    """The largest resident memory of this process and of its children together, in MiB."""

    def __init__(self) -> None:
        self.alone = self.together = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.25):
            mine = me.memory_info().rss
            # Forked workers share most pages: the proportional size counts a shared page once.
            total = sum(_proportional(p) for p in [me, *me.children(recursive=True)])
            self.alone = max(self.alone, mine / 2**20)
            self.together = max(self.together, total / 2**20)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _proportional(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def run(path: Path, rows: int) -> dict[str, Any]:
    """All stages, in this process; then once more, as another run would."""
    memory = Memory()
    figures, fingerprint = first_run(path, rows)
    from stemtune.config import Data, Model
    from stemtune.data.prepare import prepare
    from stemtune.data.survey import survey
    from stemtune.model.load import load_tokenizer

    data, tokenizer = Data(path=str(path), eval_fraction=0.01), load_tokenizer(Model())
    again, seconds = timed(lambda: prepare(survey(data, 0), tokenizer, data))
    assert again.fingerprint == fingerprint
    memory.stop()
    return {
        **figures,
        "second_run_seconds": round(seconds, 2),
        "memory_mib": round(memory.alone),
        "memory_with_workers_mib": round(memory.together),
    }


def first_run(path: Path, rows: int) -> tuple[dict[str, Any], str]:
    """Figures of each stage, and the fingerprint of the data."""
    from stemtune.config import Data, Model
    from stemtune.data.survey import survey

    data = Data(path=str(path), eval_fraction=0.01)
    surveyed, survey_seconds = timed(lambda: survey(data, 0))
    from stemtune.data.prepare import prepare
    from stemtune.model.load import load_tokenizer
    from stemtune.plan.steps import plan_steps

    tokenizer = load_tokenizer(Model())
    prepared, render_seconds = timed(lambda: prepare(surveyed, tokenizer, data))
    part = prepared.train

    def plan() -> list[list[int]]:
        return plan_steps(
            part.groups.tolist(),
            part.personas.tolist(),
            batching="dialogue",
            batch_size=32,
            epochs=1.0,
            max_steps=None,
            seed=0,
        )

    steps, plan_seconds = timed(plan)
    sequences = part.sequences
    sample = random.Random(0).sample(steps, 200)
    _, read_seconds = timed(lambda: [sequences[record] for step in sample for record in step])
    figures = {
        "rows": rows,
        "megabytes": round(path.stat().st_size / 1e6),
        "survey_seconds": round(survey_seconds, 2),
        "render_seconds": round(render_seconds, 2),
        "survey_rows_per_second": round(rows / survey_seconds),
        "render_rows_per_second": round(rows / render_seconds),
        "tokens_per_second": round(int(part.store.length.sum()) / render_seconds),
        "plan_seconds": round(plan_seconds, 2),
        "plan_ms_per_step": round(plan_seconds / len(steps) * 1000, 3),
        "read_ms_per_step": round(read_seconds / len(sample) * 1000, 3),
    }
    return figures, prepared.fingerprint


def peer(path: Path, rows: int) -> dict[str, Any]:
    """`datasets.map` over the same rows and tokenizer, with as many processes as cores: the chat
    template's ids, once for the whole and once for the prompt, as TRL makes its masks."""
    from datasets import disable_progress_bars, load_dataset

    from stemtune.config import Model
    from stemtune.model.load import load_tokenizer

    disable_progress_bars()
    tokenizer = load_tokenizer(Model())
    dataset = load_dataset("json", data_files=str(path), split="train")

    def whole(row: dict[str, str]) -> dict[str, list[int]]:
        chat = [
            {"role": "user", "content": row["context"]},
            {"role": "assistant", "content": row["target"]},
        ]
        return {"input_ids": tokenizer.apply_chat_template(chat, return_dict=False)}

    def masked(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["context"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        ids = whole(row)["input_ids"]
        return {
            "input_ids": ids,
            "completion_mask": [int(i >= len(prompt)) for i in range(len(ids))],
        }

    workers = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"rows": rows}
    for name, function in (("whole", whole), ("masked", masked)):
        _, seconds = timed(
            lambda f=function: dataset.map(
                f, num_proc=workers, remove_columns=dataset.column_names, load_from_cache_file=False
            )
        )
        result[f"{name}_rows_per_second"] = round(rows / seconds)
    return result


def child(stage: str, path: Path, rows: int) -> dict[str, Any]:
    """A stage in a process and a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        model_cache = Path(os.environ.get("STEMTUNE_CACHE", Path.home() / ".cache/stemtune"))
        for folder in model_cache.glob("SmolLM2*"):
            (Path(cache) / folder.name).symlink_to(folder)
        output = subprocess.run(
            [sys.executable, __file__, "--stage", stage, str(path), "--rows", str(rows)],
            env={**os.environ, "STEMTUNE_CACHE": cache, "HF_HOME": f"{cache}/hf"},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--peer", action="store_true", help="datasets.map as well, in turns")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", nargs=2, metavar=("STAGE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage, path = options.stage
        print(json.dumps({"run": run, "peer": peer}[stage](Path(path), options.rows[0])))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            path = Path(folder) / f"{rows}.jsonl"
            make_rows(path, rows)
            result = child("run", path, rows)
            if options.peer:
                result["datasets_map"] = child("peer", path, rows)
            results.append(result)
            print(json.dumps(result, indent=1), flush=True)
            path.unlink()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
