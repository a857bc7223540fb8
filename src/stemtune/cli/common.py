"""What several commands need."""

import logging
import os
import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stemtune.config import Config
from stemtune.errors import ConfigError
from stemtune.redact import Redacting
from stemtune.runfile import load_config, load_stages

RunFile = Annotated[Path, typer.Argument(help="The run file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, laid over the run file.")
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON.")]

# Libraries' progress bars and notes are not for the people who use stemtune.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def is_first_process() -> bool:
    """Of those that a launcher such as torchrun has started: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def log_to_stderr() -> None:
    """What the library says while it works, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    handler.setFormatter(_LineFormatter())
    handler.addFilter(Redacting())
    logging.getLogger("stemtune").addHandler(handler)


@contextmanager
def private_files() -> Generator[None]:
    """What is written within it is its owner's alone, wherever it is moved."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def quieten_libraries() -> None:
    """See QUIET; warnings and logs as well."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate)\b.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("stemtune").setLevel(logging.DEBUG)


def without_quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """For another program, which may say what it likes."""
    return {name: value for name, value in environment.items() if QUIET.get(name) != value}


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


def run_folder(run: Path) -> Path:
    """The folder of a run, given that, a folder in it, or its run file.

    Raises:
        ConfigError: there is no run.
    """
    if run.is_file():
        run = Path(load_stages(run)[-1].output.dir)
    for folder in (run, run.parent):
        if (folder / "config.yaml").is_file():
            return folder
    hint = "give a run's folder, such as runs/hamlet, or a run file"
    raise ConfigError("there is no run here", where=str(run), hint=hint)


def run_config(folder: Path) -> Config:
    """The resolved run file of a run."""
    return load_config(folder / "config.yaml")
