"""Where runs are broken: a tiny base, children that can be killed, and the oracle.

Children are forked, not started: importing torch anew would take most of the time. So nothing here
may start a thread before it forks, and torch keeps to one.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import stemtune as st
from stemtune import checkpoint
from stemtune.errors import CheckpointError, StemtuneError
from stemtune.trainer import Trainer
from tests.runs import adapter_of, make_config, metrics_of, without_clock

TRACEBACK = 70  # of a child that ended by what no code of ours expects
SETTINGS = [
    "adapter.dropout=0.05",
    "data.eval_fraction=0.2",
    "train.max_steps=8",
    "train.batch_size=4",
    "train.eval_steps=3",
    "train.save_steps=2",
    "train.micro_batch_tokens=60",
    "output.on_existing=resume",
]


@dataclass
class Row:
    """What came of a fault.

    Attributes:
        failures: what went wrong, one line for each of those that did not hold.
    """

    fault: str
    tried: int = 0
    failures: list[str] = field(default_factory=list[str])

    @property
    def held(self) -> int:
        """How many times it held."""
        return self.tried - len(self.failures)

    @contextmanager
    def attempt(self, what: str) -> Generator[None]:
        """One try; an assertion that does not hold is a failure."""
        self.tried += 1
        try:
            yield
        except AssertionError as error:
            line = (str(error) or traceback.format_exc().splitlines()[-2]).strip().splitlines()[0]
            self.failures.append(f"{what}: {line}")


class Lab:
    """Runs in folders of their own, and the uninterrupted ones that they are compared with.

    Args:
        folder: for all of it.
        base: a tiny base.
        seed: of all that is random.
    """

    def __init__(self, folder: Path, base: Path, seed: int = 0) -> None:
        self.folder, self.base = folder, base
        self.random = random.Random(seed)
        self._number = 0
        self._whole: dict[tuple[str, ...], tuple[Path, float]] = {}
        # What children need not do each anew, for it writes nothing: imports, and the simulation
        # of a step's memory.
        for dtype in ("float32", "bfloat16"):
            Trainer(self.config(f"model.dtype={dtype}")).folder.release()

    def config(self, *settings: str) -> st.Config:
        """Of a new run in a folder of its own."""
        self._number += 1
        return make_config(self.folder / f"{self._number:04d}", self.base, *SETTINGS, *settings)

    def whole(self, *settings: str) -> tuple[Path, float]:
        """The run with these settings that nobody disturbed, and how long it took."""
        if settings not in self._whole:
            config = self.config(*settings)
            started = time.perf_counter()
            code = child(lambda: st.train(config)).wait()
            assert code == 0, f"the undisturbed run ends with {code}"
            self._whole[settings] = Path(config.output.dir), time.perf_counter() - started
        return self._whole[settings]

    def again(self, config: st.Config, *settings: str) -> None:
        """The same command once more: it ends as the undisturbed run did."""
        process = child(lambda: st.train(config))
        code = process.wait()
        assert code == 0, f"the same command again ends with {code}: {process.said()}"
        assert_same_run(Path(config.output.dir), self.whole(*settings)[0])

    def forget(self, config: st.Config) -> None:
        """Delete a run that held."""
        shutil.rmtree(Path(config.output.dir).parent, ignore_errors=True)


class Child:
    """A forked process."""

    def __init__(self, process: int, log: Path) -> None:
        self.process, self.log = process, log

    def wait(self) -> int:
        """Its exit code; of a signal the negative number."""
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal, if it is still there."""
        try:
            os.kill(self.process, number)
        except ProcessLookupError:
            return

    def said(self) -> str:
        """Its last lines."""
        return " | ".join(self.log.read_text(encoding="utf-8").splitlines()[-3:])


_logs = TemporaryDirectory(prefix="chaos-")
_numbers: Iterator[int] = iter(range(1_000_000))


def child(action: Callable[[], Any]) -> Child:
    """Run it in a forked process, with the exit codes of the command line."""
    log = Path(_logs.name) / f"{os.getpid()}-{next(_numbers)}.log"
    process = os.fork()
    if process:
        return Child(process, log)
    code = TRACEBACK
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", encoding="utf-8")  # not pytest's
        torch.set_num_threads(1)
        action()
        code = 0
    except StemtuneError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def assert_same_run(run: Path, expected: Path) -> None:
    """Adapter, optimizer, losses and the order of records, bit for bit."""
    assert without_clock(metrics_of(run)) == without_clock(metrics_of(expected)), "other metrics"
    for folder in ("adapter", "adapter-last"):
        assert (run / folder).exists() == (expected / folder).exists(), f"{folder} is missing"
        if (expected / folder).exists():
            ours, theirs = adapter_of(run / folder), adapter_of(expected / folder)
            assert ours.keys() == theirs.keys(), "other tensors"
            same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert same, f"another {folder}"
    ours, theirs = newest(run), newest(expected)
    assert ours.path.name == theirs.path.name, "another last checkpoint"
    for kind in ("adapter", "optimizer"):
        same = all(
            torch.equal(ours.tensors[kind][name], tensor)
            for name, tensor in theirs.tensors[kind].items()
        )
        assert same, f"another {kind} in the last checkpoint"


def newest(run: Path) -> checkpoint.Checkpoint:
    """The newest checkpoint that verifies."""
    try:
        return checkpoint.newest(run / "checkpoints")[0]
    except CheckpointError as error:
        raise AssertionError(str(error)) from None


def committed(run: Path) -> list[int]:
    """Steps that have a checkpoint."""
    return checkpoint.steps(run / "checkpoints")
