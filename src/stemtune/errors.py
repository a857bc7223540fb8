"""What a user reads when something is wrong: what, where, a hint, and an exit code."""

from stemtune.redact import redacted

MAX_LINE = 600


class StemtuneError(Exception):
    """An error meant for a person.

    Args:
        what: one line saying what is wrong.
        where: `file:line`, a field path or a key; empty if there is no such place.
        hint: one line saying what to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [_line(self.what)]
        if self.where:
            lines.append(f"  at {_line(self.where)}")
        if self.hint:
            lines.append(f"hint: {_line(self.hint)}")
        return "\n".join(lines)


def printable(text: str, keep: str = "") -> str:
    """A text without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def _line(text: str) -> str:
    """One line that a terminal shows as it is: it may quote what stands in somebody's file."""
    shown = redacted(printable(text))
    return shown if len(shown) <= MAX_LINE else shown[: MAX_LINE - 1] + "…"


class ConfigError(StemtuneError):
    """The run file or the command line is wrong."""

    exit_code = 2


class DataError(StemtuneError):
    """A row, or a file of rows, is wrong."""

    exit_code = 2


class ModelError(StemtuneError):
    """The base, its tokenizer or the hub is at fault."""

    exit_code = 3


class DivergedError(StemtuneError):
    """A loss or a gradient is no longer finite."""

    exit_code = 4


class CheckpointError(StemtuneError):
    """No usable checkpoint."""

    exit_code = 5


class OutputBusyError(StemtuneError):
    """The output folder belongs to another run."""

    exit_code = 6


class DiskError(StemtuneError):
    """Nothing can be written there."""

    exit_code = 7


class OutOfMemoryError(StemtuneError):
    """Not even one sequence fits in memory."""

    exit_code = 8


class Interrupted(StemtuneError):
    """Stopped by a signal, after a committed checkpoint; run again to go on."""

    exit_code = 75
