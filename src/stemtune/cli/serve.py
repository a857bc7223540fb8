"""`stemtune serve`: an OpenAI-compatible endpoint, by an engine that is installed."""

import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from stemtune.cli.common import err, log_to_stderr, without_quiet
from stemtune.errors import ConfigError

PROGRAMS = {"vllm": "vllm", "transformers": "transformers", "llama.cpp": "llama-server"}
SERVING = ("fastapi", "uvicorn", "openai")  # what transformers' own server needs


def serve(
    run: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    engine_options: Annotated[
        list[str] | None, typer.Argument(help="Behind --: more options for the engine.")
    ] = None,
    engine: Annotated[
        Literal["auto", "vllm", "transformers", "llama.cpp"],
        typer.Option(help="auto: the first of them that is installed and loads this run."),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; else the folder's name.")
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(help="llama.cpp: a GGUF file; twice for a base and an adapter."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command, and don't run it.")
    ] = False,
) -> None:
    """Serve a run by vLLM, transformers' own server or llama.cpp's.

    The command that starts it, with the right adapter and template, is printed and run."""
    log_to_stderr()
    if gguf and engine == "auto":
        engine = "llama.cpp"
    if gguf and engine != "llama.cpp":
        hint = "leave --gguf out, or --engine"
        raise ConfigError("GGUF files are for llama.cpp", where="--gguf", hint=hint)
    from stemtune.export.serve import Address, read_run, serve_command

    found = {one: path for one in PROGRAMS if (path := _program(one)) is not None}
    command = serve_command(read_run(run), engine, found, Address(host, port, name), gguf)
    words = [*command.words, *(engine_options or [])]
    for note in command.notes:
        err.print(note, markup=False, soft_wrap=True)
    if dry_run:
        print(shlex.join(words))
        return
    err.print(shlex.join(words), markup=False, soft_wrap=True)
    _become(words)


def _program(engine: str) -> str | None:
    """As it would be typed, or where it lies beside this Python; None where it is not there."""
    if engine == "transformers" and not all(find_spec(name) for name in SERVING):
        return None
    name = PROGRAMS[engine]
    return name if shutil.which(name) else shutil.which(name, path=Path(sys.executable).parent)


def _become(words: list[str]) -> None:
    """Run the engine in the place of this process, so that signals and exit code are its own."""
    sys.stderr.flush()
    environment = without_quiet(os.environ)
    try:
        if os.name == "posix":
            os.execvpe(words[0], words, environment)  # noqa: S606
        raise typer.Exit(subprocess.run(words, env=environment, check=False).returncode)  # noqa: S603
    except OSError as error:
        what, hint = f"can't be run: {error.strerror}", "is it installed whole?"
        raise ConfigError(what, where=words[0], hint=hint) from None
