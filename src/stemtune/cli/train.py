"""`stemtune train`."""

from pathlib import Path
from typing import Annotated

import typer

from stemtune.cli.common import (
    Overrides,
    RunFile,
    is_first_process,
    log_to_stderr,
    private_files,
)
from stemtune.runfile import load_stages


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    allow_change: Annotated[
        str,
        typer.Option(
            help="With --resume, what may differ from the interrupted run: data, base, or settings"
            " such as train.learning_rate; several with commas."
        ),
    ] = "",
) -> None:
    """Train an adapter as a run file says."""
    stages = load_stages(run_file, overrides)
    config = stages[-1]
    log_to_stderr()
    from stemtune.data.survey import survey

    # Complaints about data don't wait for torch.
    surveyed = [survey(stage.data, stage.train.seed) for stage in stages]
    from stemtune.trainer import train as run

    allowed = [name.strip() for name in allow_change.split(",") if name.strip()]
    with private_files():
        if len(stages) == 1:
            result = run(config, resume=resume, allow_changes=allowed, surveyed=surveyed[0])
        else:
            result = run(stages, resume=resume, allow_changes=allowed)
    if not is_first_process():
        return
    typer.echo(f"next: stemtune chat {_shown(result.output_dir)}", err=True)
    print(result.adapter_dir)


def _shown(folder: Path) -> Path:
    """As it would be typed from here."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
