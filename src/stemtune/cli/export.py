"""`stemtune export`: a run in the formats of other engines."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stemtune.cli.common import log_to_stderr, out
from stemtune.model.gguf import require_package

Type = Literal["f32", "f16", "bf16", "q8_0"]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")]

app = typer.Typer(help="Write a run for other engines.", no_args_is_help=True)


@app.command()
def gguf(
    run: RunFolder,
    to: Annotated[
        Path | None, typer.Option("--to", help="The file; in the run's folder, if not given.")
    ] = None,
    type_: Annotated[
        Type | None,
        typer.Option("--type", help="Of the weights; f16, or f32 of an adapter, if not given."),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="The adapter without its base.")
    ] = False,
) -> None:
    """One GGUF file for llama.cpp and LM Studio: base and adapter merged, or the adapter alone."""
    log_to_stderr()
    require_package("export")
    from stemtune.export.gguf import export_gguf, file_name, read_run

    kind = type_ or ("f32" if adapter_only else "f16")
    read = read_run(run)
    target = to or run / file_name(read, kind, adapter_only=adapter_only)
    export_gguf(read, target, kind, adapter_only=adapter_only)
    out.print(str(target), markup=False, soft_wrap=True)


@app.command()
def ollama(
    run: RunFolder,
    to: Annotated[
        Path | None, typer.Option("--to", help="The folder; the run's folder/ollama, if not given.")
    ] = None,
    type_: Annotated[Type, typer.Option("--type", help="Of the weights.")] = "f16",
    name: Annotated[
        str | None, typer.Option(help="Of the model; of base and run, if not given.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system text; as in training, if not given.")
    ] = None,
) -> None:
    """A folder for Ollama: the merged model as GGUF, and a Modelfile."""
    log_to_stderr()
    require_package("export")
    from stemtune.export.gguf import read_run
    from stemtune.export.ollama import export_ollama

    written = export_ollama(read_run(run), to or run / "ollama", type_, name=name, system=system)
    out.print(str(written.folder), markup=False, soft_wrap=True)
    create = f"ollama create {written.name} -f {written.folder / 'Modelfile'}"
    out.print(f"{create}\nollama run {written.name}", markup=False, soft_wrap=True)
