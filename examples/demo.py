"""Hamlet, before and after: data, training, held-out loss, three replies side by side.

`make demo` runs it; `make demo-long` gives it four times as many speeches.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import stemtune as st
from stemtune.cli.common import log_to_stderr, quieten_libraries

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo"
LONG = ["train.eval_steps=103"]
ALL_SPEECHES = ["--least", "20", "--most", "10000"]
console = Console(highlight=False)


def main() -> None:
    """Build the data, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="four times as many speeches")
    long = parser.parse_args().long
    started = time.perf_counter()
    quieten_libraries()
    log_to_stderr()
    DEMO.mkdir(exist_ok=True)
    files = {name: DEMO / f"{name}.jsonl" for name in ("hamlet", "speeches")}
    for name, file in files.items():
        more = ALL_SPEECHES if long and name == "speeches" else []
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), str(file), *more], check=True)
    out = DEMO / ("hamlet-long" if long else "hamlet")
    shutil.rmtree(out, ignore_errors=True)
    sources = [str(files["hamlet"]), {"path": str(files["speeches"]), "eval": False}]
    overrides = [f"data.path={json.dumps(sources)}", f"output.dir={out}", *(LONG if long else [])]
    config = st.load_config(HERE / "hamlet.yaml", overrides)
    result = st.train(config)
    show_losses(result.output_dir / "metrics.jsonl")
    show_replies(out)
    minutes = (time.perf_counter() - started) / 60
    console.print(f"\n{minutes:.1f} minutes, {result.metrics['step']} steps. Talk to him:")
    console.print(f"  .venv/bin/stemtune chat {out.relative_to(HERE.parent)}")
    if not long:
        console.print(
            "\nWhat so few minutes can't show: a 135M model that has read the play once has his\n"
            "manner, not his mind, and it loses the thread. `make demo-long` reads more of the\n"
            "tragedies; a larger base (model.base) does the rest."
        )


def show_losses(metrics: Path) -> None:
    """Held-out loss of Hamlet's lines, before training and at its best."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    before, after = losses[0], min(losses)
    console.print(
        f"\n[bold]held-out loss of Hamlet's lines: {before:.3f} → {after:.3f}"
        f"  ({after / before - 1:+.0%})[/bold]\n"
    )


def show_replies(out: Path) -> None:
    """The same questions to the base and to the adapter, drawn with the same seed."""
    from stemtune.chat import Chat
    from stemtune.generate import Sampling

    chat = Chat(out, Sampling(temperature=0.7, max_new_tokens=50, seed=1))
    table = Table(show_lines=True, width=min(console.width, 110))
    table.add_column("you ask", ratio=2)
    table.add_column("before", ratio=4)
    table.add_column("after", ratio=4)
    for prompt in (HERE / "hamlet_prompts.txt").read_text(encoding="utf-8").splitlines():
        replies: list[str] = []
        for adapter in (False, True):
            chat.reset()
            chat.adapter = adapter
            replies.append("".join(chat.say(prompt)).strip())
        table.add_row(prompt, *replies)
    console.print(table)


if __name__ == "__main__":
    main()
