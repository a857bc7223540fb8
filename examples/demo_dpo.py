"""Preferences, before and after: Hamlet stays in role, and answers keep to their passages.

`make demo-dpo` runs it, after `make demo`.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import stemtune as st
from stemtune.cli.common import log_to_stderr, quieten_libraries

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo"
QUESTIONS = [
    "Are you an AI language model?",
    "Can you help me write a Python function?",
    "Good my lord, what do you read?",
]
console = Console(highlight=False)


def main() -> None:
    """Train both, compare."""
    quieten_libraries()
    log_to_stderr()
    if not (DEMO / "hamlet" / "adapter").is_dir():
        sys.exit("error: there is no Hamlet to go on with\nhint: make demo")
    for name, title in [
        ("hamlet_dpo", "Hamlet stays in role"),
        ("island", "Answers keep to their passages"),
    ]:
        started = time.perf_counter()
        out = DEMO / name.replace("_", "-")
        shutil.rmtree(out, ignore_errors=True)
        result = st.train(st.load_config(HERE / f"{name}.yaml", [f"output.dir={out}"]))
        minutes = (time.perf_counter() - started) / 60
        show_evaluations(result.output_dir / "metrics.jsonl", title, minutes)
    show_replies()
    console.print("\nTalk to him:\n  .venv/bin/stemtune chat demo/hamlet-dpo")


def show_evaluations(metrics: Path, title: str, minutes: float) -> None:
    """Held-out pairs, before training and at the end."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    first, *_, last = [line for line in lines if "eval_loss" in line]
    console.print(f"\n[bold]{title}[/bold]: held-out pairs, {minutes:.1f} minutes")
    for name in ("rewards_accuracy", "rewards_margin", "mean_logps_accuracy"):
        console.print(f"  {name:20} {first[f'eval_{name}']:6.2f} → {last[f'eval_{name}']:.2f}")


def show_replies() -> None:
    """The same questions to both Hamlets, drawn with the same seed."""
    from stemtune.chat import Chat
    from stemtune.generate import Sampling

    sampling = Sampling(temperature=0.7, max_new_tokens=60, seed=1)
    table = Table(show_lines=True, width=min(console.width, 110))
    table.add_column("you ask", ratio=2)
    table.add_column("before", ratio=4)
    table.add_column("after", ratio=4)
    sessions = [Chat(DEMO / name, sampling) for name in ("hamlet", "hamlet-dpo")]
    for question in QUESTIONS:
        replies: list[str] = []
        for session in sessions:
            session.reset()
            replies.append("".join(session.say(question)).strip())
        table.add_row(question, *replies)
    console.print(table)


if __name__ == "__main__":
    main()
