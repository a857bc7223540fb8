"""`stemtune train`."""

from typing import Annotated

import typer

from stemtune.cli.common import Overrides, RunFile, log_to_stderr
from stemtune.runfile import load_stages


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
) -> None:
    """Train an adapter as a run file says."""
    stages = load_stages(run_file, overrides)
    config = stages[-1]
    log_to_stderr()
    from stemtune.data.survey import survey

    # Complaints about data don't wait for torch.
    surveyed = [survey(stage.data, stage.train.seed) for stage in stages]
    from stemtune.trainer import train as run

    if len(stages) == 1:
        result = run(config, resume=resume, surveyed=surveyed[0])
    else:
        result = run(stages, resume=resume)
    typer.echo(f"next: stemtune chat {config.output.dir}", err=True)
    print(result.adapter_dir)
