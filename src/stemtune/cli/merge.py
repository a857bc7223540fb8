"""`stemtune merge`: the base with the adapter in it, as a model of its own."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stemtune.cli.common import log_to_stderr, out


def merge(
    run: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="Where; the run's folder/merged, if not given.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the merged weights; as the base's own, if not given."),
    ] = None,
) -> None:
    """Merge an adapter into its base: into full precision, whatever it was trained on."""
    log_to_stderr()
    from stemtune.export.merge import merge as write

    target = to or run / "merged"
    comparison = write(run, target, dtype)
    told = "" if comparison is None else f"; {comparison}"
    out.print(f"{target}{told}", markup=False, soft_wrap=True)
