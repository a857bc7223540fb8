"""The run's folder: who writes to it, in which phase the run is, what it was made of."""

import json
import logging
import os
import platform
import re
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from stemtune.errors import DiskError, OutputBusyError, StemtuneError
from stemtune.redact import Redacting, redacted

RUST_FAULT = re.compile(r"\(os error (\d+)\)")
State = Literal["running", "done", "failed", "interrupted"]


class RunFolder:
    """A folder that one run owns: a lock while it runs, `run.json` for good.

    Args:
        is_writer: false for the other processes of the run, which write nothing.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path, self.is_writer = path, is_writer
        self.info: dict[str, Any] = {}
        self._lock = FileLock(path / ".lock")
        self._log: logging.FileHandler | None = None
        self._created = False

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are committed."""
        return self.path / "checkpoints"

    def claim(self, resume: bool) -> None:
        """Take the folder for this process.

        Raises:
            OutputBusyError: another process, or another run's results, are in it.
            DiskError: it can't be written.
        """
        if not self.is_writer:
            return
        where = str(self.path)
        try:
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if self._created:
                self.path.chmod(0o700)
            self._lock.acquire(timeout=0)
        except Timeout:
            hint = "wait for it, or choose another output.dir"
            raise OutputBusyError(f"busy: {self._holder()}", where=where, hint=hint) from None
        except OSError as error:
            hint = "choose another output.dir"
            what = f"the output folder can't be written: {error.strerror}"
            raise DiskError(what, where=where, hint=hint) from None
        if not resume:
            self._refuse_results()
            self.path.chmod(0o700)  # not before: it may be the folder of something else
        self._start_log()
        self.info = _read_json(self.path / "run.json") if resume else {}
        self.info |= {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
        }

    def _refuse_results(self) -> None:
        """Another run's checkpoints or adapter, or a folder of something else altogether."""
        # A run that was killed before it wrote run.json leaves no more than these.
        begun = {".lock", "log.txt", _temporary(self.path / "run.json").name}
        names = {entry.name for entry in self.path.iterdir()} - begun - {"stages"}
        results = "adapter" in names or any(self.checkpoints.glob("step-*"))
        if results or (names and "run.json" not in names):
            self.release()
            what = "the output folder holds another run" if results else "the folder is not empty"
            hint = "--resume goes on with it; or choose another output.dir, or delete it"
            raise OutputBusyError(what, where=str(self.path), hint=hint)

    def _holder(self) -> str:
        info = _read_json(self.path / "run.json")
        return f"process {info.get('pid', '?')} on {info.get('host', '?')} is writing to it"

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Say what the run is at; if it fails there, say so and why. A folder that a refused run
        would leave behind is taken away again."""
        try:
            self.write(phase=name, state="running")
            yield
        except BaseException as error:
            state: State = "failed"
            if isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", 0) == 75:
                state = "interrupted"
            if self.info["state"] == "running":  # else a phase within this one has said it
                with suppress(DiskError):  # a full disk must not hide what went wrong
                    self.write(state=state, reason=redacted(str(error)) or type(error).__name__)
            refused = isinstance(error, StemtuneError) and error.exit_code in (2, 5)
            if self._created and refused and not self.checkpoints.exists():
                self.release()
                shutil.rmtree(self.path, ignore_errors=True)
            fault = disk_fault(error)
            if fault is not None:
                raise self._disk_error(fault) from error
            raise

    def write(self, **facts: Any) -> None:
        """Add facts to `run.json`."""
        self.info |= facts
        if facts.get("state") in ("running", "done"):
            self.info.pop("reason", None)
        if not self.is_writer:
            return
        try:
            write_text(self.path / "run.json", json.dumps(self.info, indent=1, ensure_ascii=False))
        except OSError as error:
            raise self._disk_error(error) from error

    def _disk_error(self, error: OSError) -> DiskError:
        hint = "free some space, or choose another output.dir; --resume goes on"
        what = f"can't write: {error.strerror or error}"
        return DiskError(what, where=str(error.filename or self.path), hint=hint)

    def release(self) -> None:
        """Let others have the folder."""
        if self._log is not None:
            logging.getLogger("stemtune").removeHandler(self._log)
            self._log.close()
            self._log = None
        self._lock.release()

    def _start_log(self) -> None:
        """Everything that is said, with its time and level, also goes to `log.txt`."""
        path = self.path / "log.txt"
        if path.is_symlink():
            path.unlink()
        self._log = logging.FileHandler(path, encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self._log.addFilter(Redacting())
        logger = logging.getLogger("stemtune")
        logger.addHandler(self._log)
        logger.setLevel(logging.DEBUG)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, whatever happens to process or machine."""
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)  # of a killed process; or a link, which is not followed
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def disk_fault(error: BaseException) -> OSError | None:
    """What the system said, where an error is that of a disk: safetensors and tokenizers raise
    their own kinds, with the system's number in the text."""
    if isinstance(error, OSError):
        return error
    found = RUST_FAULT.search(str(error))
    if found is None or isinstance(error, StemtuneError):
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])))


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def read_info(folder: Path) -> dict[str, Any]:
    """`run.json` of a folder; empty without one."""
    return _read_json(folder / "run.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _versions() -> dict[str, str]:
    names = ["stemtune", "torch", "transformers", "peft", "accelerate", "tokenizers"]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
