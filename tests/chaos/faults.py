"""The faults, one function each: tries it a number of times, and says what held."""

import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import stemtune as st
from stemtune import checkpoint
from stemtune.estimate import SIMULATIONS
from stemtune.rundir import RunFolder
from tests.chaos.lab import Lab, Row, child, committed, newest
from tests.models import save_tiny_model
from tests.runs import Spy, metrics_of, run_info, write_rows

Fault = Callable[[Lab, int], Row]
NOBODY = 65534
SIMULATING = 1.0  # seconds that a step's memory takes, about


def kill_at_random(lab: Lab, count: int) -> Row:
    """SIGKILL after a random time: while stepping, evaluating, saving, rotating."""
    row = Row("kill -9 at a random moment")
    for settings in (("model.dtype=float32",), ("model.dtype=bfloat16",)):
        _, seconds = lab.whole(*settings)
        for _ in range(count // 2):
            config = lab.config(*settings)
            delay = lab.random.uniform(0, seconds)
            with row.attempt(f"after {delay:.3f} s, {settings[0]}"):
                process = child(lambda config=config: st.train(config))
                time.sleep(delay)
                process.kill()
                process.wait()
                lab.again(config, *settings)
                lab.forget(config)
    return row


class Counted:
    """Calls back before the n-th time that a run opens a file to write, syncs or renames."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at, self.act, self.count = at, act, 0
        for name in ("fsync", "rename", "replace"):
            plain = getattr(os, name)
            setattr(os, name, self._wrapped(plain))

    def _wrapped(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.seen()
            return plain(*args, **options)

        return call

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: Python tells it of every file that is opened or deleted."""
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event in ("os.remove", "os.mkdir", "os.rmdir"):
            self.seen()

    def seen(self) -> None:
        """One more."""
        self.count += 1
        if self.count == self.at:
            self.act()


def _kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train_counted(config: st.Config, at: int, act: Callable[[], None]) -> Counted:
    import sys

    trainer = st.Trainer(config)
    counted = Counted(at, act)
    sys.addaudithook(counted.hear)
    trainer.train()
    return counted


def kill_at_each_write(lab: Lab, count: int) -> Row:
    """SIGKILL just before each write, fsync, rename and deletion of a run, or `count` of them."""
    row = Row("kill -9 at each write, fsync and rename")
    places = _operations(lab)
    for at in range(1, places + 1) if count >= places else _spread(places, count):
        config = lab.config()
        with row.attempt(f"operation {at} of {places}"):
            code = child(
                lambda at=at, config=config: _train_counted(config, at, _kill_myself)
            ).wait()
            assert code == -signal.SIGKILL, f"it ended with {code}"
            lab.again(config)
            lab.forget(config)
    return row


def _operations(lab: Lab) -> int:
    """How many operations on files a run has."""
    config = lab.config()
    told = lab.folder / "operations"

    def count() -> None:
        told.write_text(str(_train_counted(config, -1, _kill_myself).count), encoding="ascii")

    assert child(count).wait() == 0
    return int(told.read_text(encoding="ascii"))


def _spread(total: int, count: int) -> list[int]:
    return sorted({1 + round(n * (total - 1) / max(1, count - 1)) for n in range(count)})


def _train_anew(config: st.Config) -> None:
    """Simulate a step's memory as well: a signal may come then."""
    SIMULATIONS.clear()
    st.train(config)


def stop_by_signal(lab: Lab, count: int) -> Row:
    """SIGTERM or SIGINT at a random moment of training, then the same command again."""
    row = Row("SIGTERM or SIGINT, once")
    seconds = lab.whole()[1] + SIMULATING
    for number in range(count):
        config = lab.config()
        name = signal.SIGTERM if number % 2 else signal.SIGINT
        delay = lab.random.uniform(0, seconds)
        with row.attempt(f"{name.name} after {delay:.3f} s"):
            process = child(lambda config=config: _train_anew(config))
            time.sleep(delay)
            process.kill(name)
            code = process.wait()
            # Before training there is nothing to save: the signal ends the process as ever.
            assert code in (75, 130, 0, -name), f"it ended with {code}: {process.said()}"
            if code == 75:
                newest(Path(config.output.dir))
            lab.again(config)
            lab.forget(config)
    return row


def stop_twice(lab: Lab, count: int) -> Row:
    """Two signals, one just after the other."""
    row = Row("two signals")
    seconds = lab.whole()[1] + SIMULATING
    for _ in range(count):
        config = lab.config()
        delay = lab.random.uniform(0, seconds)
        with row.attempt(f"after {delay:.3f} s"):
            process = child(lambda config=config: _train_anew(config))
            time.sleep(delay)
            process.kill(signal.SIGTERM)
            time.sleep(lab.random.uniform(0, 0.02))
            process.kill(signal.SIGTERM)
            code = process.wait()
            assert code in (130, 75, 0, -signal.SIGTERM), f"it ended with {code}: {process.said()}"
            lab.again(config)
            lab.forget(config)
    return row


def power_loss(lab: Lab, count: int) -> Row:
    """The machine stops: what was not synced is gone, renames that were not are undone."""
    row = Row("power loss")
    places = _operations(lab)
    for at in _spread(places, count):
        config = lab.config()
        journal = Journal()
        with row.attempt(f"operation {at} of {places}"):

            def lose(journal: "Journal" = journal, config: st.Config = config) -> None:
                try:
                    journal.lose(Path(config.output.dir))
                finally:  # another thread may have taken a file away meanwhile: the power is off
                    _kill_myself()

            def run(at: int = at, journal: "Journal" = journal, config: st.Config = config) -> None:
                journal.listen()
                _train_counted(config, at, lose)

            code = child(run).wait()
            assert code == -signal.SIGKILL, f"it ended with {code}"
            lab.again(config)
            lab.forget(config)
    return row


class Journal:
    """Which files and folders were synced, as they were then."""

    def __init__(self) -> None:
        self.synced: dict[tuple[int, int], int] = {}  # device and number of a file: size
        self.renamed: list[tuple[Path, Path]] = []

    def listen(self) -> None:
        """From now on."""
        sync, rename, replace = os.fsync, os.rename, os.replace

        def fsync(descriptor: int) -> None:
            sync(descriptor)
            facts = os.fstat(descriptor)
            self.synced[facts.st_dev, facts.st_ino] = facts.st_size
            there = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.renamed = [pair for pair in self.renamed if pair[1].parent != there]

        def renaming(plain: Callable[..., None]) -> Callable[..., None]:
            def call(source: Any, target: Any, **options: Any) -> None:
                existed = Path(target).exists()
                plain(source, target, **options)
                if not existed:  # in place of an old file either may be found: both are whole
                    self.renamed.append((Path(source), Path(target)))

            return call

        os.fsync, os.rename, os.replace = fsync, renaming(rename), renaming(replace)

    def lose(self, run: Path) -> None:
        """Undo what no disk promises."""
        for source, target in reversed(self.renamed):
            if target.exists() and run in target.parents:
                Path.rename(target, source)
        for path in sorted(run.rglob("*")):
            facts = path.stat()
            if path.is_file():
                kept = self.synced.get((facts.st_dev, facts.st_ino), 0)
                if kept < facts.st_size:
                    os.truncate(path, kept)


def damage(lab: Lab, count: int) -> Row:
    """Flipped bits in the newest checkpoint."""
    row = Row("a flipped bit in a checkpoint")
    config, run = _interrupted(lab)
    steps = committed(run)
    for _ in range(count):
        files = sorted((run / "checkpoints" / f"step-{steps[-1]:06d}").iterdir())
        sizes = [file.stat().st_size for file in files]
        file = lab.random.choices(files, sizes)[0]
        bit = lab.random.randrange(file.stat().st_size * 8)
        with row.attempt(f"bit {bit} of {file.name}"):
            before = file.read_bytes()
            spoiled = bytearray(before)
            spoiled[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bytes(spoiled))
            try:
                found, passed = checkpoint.newest(run / "checkpoints")
                assert found.path.name == f"step-{steps[-2]:06d}", "it was not found"
                assert passed, "it was not named"
            finally:
                file.write_bytes(before)
    with row.attempt("the same command again"):
        lab.again(config)
    return row


def torn_files(lab: Lab, count: int) -> Row:
    """Each file of the newest checkpoint missing, empty, cut; each tensor dropped or reshaped."""
    row = Row("torn, empty or missing files, other tensors")
    config, run = _interrupted(lab)
    names = [path.name for path in sorted(_newest_folder(run).iterdir())]
    spoil: dict[str, Callable[[Path], None]] = {
        "missing": Path.unlink,
        "empty": lambda path: path.write_bytes(b"") and None,
        "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
        "a tensor dropped": _drop_tensor,
        "a tensor reshaped": _reshape_tensor,
    }
    cases = [
        (name, kind)
        for name in names
        for kind in spoil
        if "tensor" not in kind or name.endswith(".safetensors")
    ]
    for name, kind in cases[:count]:
        config, run = _interrupted(lab)
        with row.attempt(f"{name}, {kind}"):
            spoil[kind](_newest_folder(run) / name)
            lab.again(config)
            assert f"passed over step-{6:06d}" in (run / "log.txt").read_text(encoding="utf-8")
            lab.forget(config)
    return row


def _newest_folder(run: Path) -> Path:
    return run / "checkpoints" / f"step-{committed(run)[-1]:06d}"


def _drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def _reshape_tensor(path: Path) -> None:
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = tensors[name].flatten()
    save_file(tensors, path)


def _interrupted(lab: Lab, *settings: str) -> tuple[st.Config, Path]:
    """A run that was killed in step 7, behind its checkpoints of steps 4 and 6."""
    config = lab.config(*settings)
    run = Path(config.output.dir)
    # Three micro-batches a step, or so: the call after the line of step 6 is in step 7.
    process = child(lambda: st.train(config, objective=_Until(run, 6)))
    assert process.wait() == -signal.SIGKILL, process.said()
    assert committed(run)[-1] == 6, committed(run)
    return config, run


class _Until(Spy):
    """Kills its process in the first micro-batch after a step."""

    def __init__(self, run: Path, step: int) -> None:
        super().__init__()
        self.run, self.step = run, step

    def __call__(self, *args: Any) -> Any:
        lines = [line for line in metrics_of(self.run) if line.get("loss") is not None]
        if lines and lines[-1]["step"] >= self.step and committed(self.run)[-1:] == [self.step]:
            _kill_myself()
        return super().__call__(*args)


def disk_full(lab: Lab, count: int) -> Row:
    """No file may grow beyond a limit, which sweeps over the sizes of what is written."""
    row = Row("a full disk")
    largest = max(p.stat().st_size for p in lab.whole()[0].rglob("*") if p.is_file())
    for number in range(count):
        limit = round(largest * (number + 0.5) / count)
        config = lab.config()
        run = Path(config.output.dir)
        with row.attempt(f"files up to {limit} bytes"):

            def limited(limit: int = limit, config: st.Config = config) -> None:
                trainer = st.Trainer(config)
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                trainer.train()

            process = child(limited)
            code = process.wait()
            assert code == 7, f"it ended with {code}: {process.said()}"
            left = [path for path in run.rglob("*") if path.name.startswith(".tmp-")]
            assert not left, f"left behind: {left[0].name}"
            for step in committed(run):
                checkpoint.read(run / "checkpoints" / f"step-{step:06d}")
            lab.again(config)
            lab.forget(config)
    return row


def no_permission(lab: Lab, count: int) -> Row:
    """A process that may not write where its run is to go."""
    row = Row("no permission")
    if os.getuid() != 0:
        return row  # a child can't become somebody else
    with tempfile.TemporaryDirectory() as name:
        public = Path(name)
        public.chmod(0o755)
        shutil.copytree(lab.base, public / "base")
        (public / "base").chmod(0o755)
        theirs = Lab(public, public / "base")
        for mode in (0o555, 0o000, 0o755)[:count]:
            config = theirs.config()
            folder = Path(config.output.dir).parent / "closed"
            folder.mkdir()
            folder.chmod(mode)
            output = config.output.model_copy(update={"dir": str(folder / "run")})
            with row.attempt(f"mode {mode:03o}"):
                process = child(_as_nobody(config.model_copy(update={"output": output})))
                code = process.wait()
                assert code == 7, f"it ended with {code}: {process.said()}"
                assert not list(folder.iterdir()), "something is left behind"
    return row


def _as_nobody(config: st.Config) -> Callable[[], Any]:
    claim = RunFolder.claim

    def claim_as_nobody(folder: RunFolder, resume: bool) -> None:
        # From here on: Python's own modules may lie in a folder that is closed to others.
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        claim(folder, resume)

    def act() -> None:
        RunFolder.claim = claim_as_nobody
        st.train(config)

    return act


def not_a_number(lab: Lab, count: int) -> Row:
    """NaN or Inf in loss or gradient at a random step."""
    row = Row("NaN or Inf")
    for number in range(count):
        skip = number % 2 == 1
        config = lab.config(*(["train.on_nonfinite=skip"] if skip else []))
        run, step = Path(config.output.dir), lab.random.randrange(2, 8)
        poison = (float("nan"), float("inf"))[number // 2 % 2]
        with row.attempt(f"{poison} in step {step}, {'skip' if skip else 'stop'}"):
            process = child(_poisoned(config, step, poison))
            code = process.wait()
            assert code == (0 if skip else 4), f"it ended with {code}: {process.said()}"
            for found in committed(run):
                for tensor in newest_of(run, found).values():
                    assert bool(torch.isfinite(tensor).all()), f"NaN in step {found}"
            said = (run / "log.txt").read_text(encoding="utf-8") + process.said()
            assert "rows.jsonl:" in said, "the records are not named"
            if not skip:
                assert committed(run) == [s for s in (2, 4, 6, 3) if s < step] or committed(run)
                lab.again(config)
            lab.forget(config)
    return row


def _poisoned(config: st.Config, step: int, value: float) -> Callable[[], Any]:
    return lambda: st.train(config, objective=Poison(step, value))


def newest_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The adapter of a checkpoint."""
    return checkpoint.read(run / "checkpoints" / f"step-{step:06d}").tensors["adapter"]


class Poison:
    """The SFT objective, whose loss is no number in one step."""

    def __init__(self, step: int, value: float) -> None:
        self.spy, self.step, self.value, self.totals = Spy(), step, value, set[int]()

    def __call__(self, logps: Any, reference: Any, layout: Any, config: Any) -> Any:
        loss, told = self.spy(logps, reference, layout, config)
        # Every step draws its seed anew: what comes first in it tells which one it is.
        self.totals.add(torch.initial_seed())
        return (loss * self.value if len(self.totals) == self.step else loss), told


def out_of_memory(lab: Lab, count: int) -> Row:
    """No memory at a random micro-batch: smaller ones, the same step, the same result."""
    row = Row("out of memory")
    plain = ("adapter.dropout=0",)
    expected = [line["loss"] for line in metrics_of(lab.whole(*plain)[0]) if "loss" in line]
    for _ in range(count):
        config = lab.config(*plain, "train.micro_batch_tokens=1000")
        run, call = Path(config.output.dir), lab.random.randrange(1, 9)
        with row.attempt(f"in micro-batch {call}"):
            spy = Spy(call, _no_memory if call % 2 else _no_memory_at_all)
            process = child(lambda config=config, spy=spy: st.train(config, objective=spy))
            code = process.wait()
            assert code == 0, f"it ended with {code}: {process.said()}"
            losses = [line["loss"] for line in metrics_of(run) if "loss" in line]
            apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            assert apart < 1e-5, f"losses differ by {apart:.1e}"
            lab.forget(config)
    return row


def _no_memory() -> None:
    raise torch.OutOfMemoryError("no memory")


def _no_memory_at_all() -> None:
    """What a CPU's allocator says itself."""
    torch.empty(1 << 60, dtype=torch.uint8)


def changed_on_resume(lab: Lab, count: int) -> Row:
    """Other rows, another setting, another base: refused, unless allowed by name."""
    row = Row("data, settings or base changed before a resume")
    other = lab.folder / "other-base"
    save_tiny_model(other)
    weights = load_file(other / "model.safetensors")
    save_file({k: 1.01 * v for k, v in weights.items()}, other / "model.safetensors")
    changes: list[tuple[str, list[str]]] = [
        ("", ["data"]),
        ("train.learning_rate=1e-3", ["train"]),
        ("train.seed=5", ["train.seed", "data"]),  # other records are held out, too
        ("data.samples=turn", ["data"]),
        (f"model.base={other}", ["base"]),
    ]
    for number in range(count):
        setting, allowed = changes[number % len(changes)]
        config, run = _interrupted(lab)
        overrides = [setting] if setting else []
        with row.attempt(setting or "other rows"):
            if not setting:
                rows = [{"context": f"q{n}", "target": f"a{n}"} for n in range(20)]
                write_rows(run.parent / "rows.jsonl", rows)
            from tests.chaos.lab import SETTINGS

            changed = st.load_config(run.parent / "run.yaml", [*SETTINGS, *overrides])
            process = child(lambda changed=changed: st.train(changed))
            code = process.wait()
            assert code == 2, f"it ended with {code}: {process.said()}"
            assert "can't resume" in run_info(run)["reason"], run_info(run)["reason"]
            process = child(
                lambda changed=changed, allowed=allowed: st.train(changed, allow_changes=allowed)
            )
            code = process.wait()
            assert code == 0, f"allowed, it ended with {code}: {process.said()}"
            lab.forget(config)
    return row


def two_in_one_folder(lab: Lab, count: int) -> Row:
    """A second run in the folder of one that goes on; then of one that was killed."""
    row = Row("two runs in one folder, a stale lock")
    for _ in range(count):
        config = lab.config()
        run = Path(config.output.dir)
        with row.attempt("the second"):
            first = child(lambda config=config: st.train(config, objective=_Slow()))
            while not metrics_of(run):
                time.sleep(0.01)
            second = child(lambda config=config: st.train(config))
            code = second.wait()
            assert code == 6, f"it ended with {code}: {second.said()}"
            assert str(first.process) in second.said(), "it does not name the holder"
            first.kill()
            first.wait()
            lab.again(config)
            lab.forget(config)
    return row


class _Slow(Spy):
    def __call__(self, *args: Any) -> Any:
        time.sleep(0.05)
        return super().__call__(*args)


def clock_jumps(lab: Lab, count: int) -> Row:
    """Times of checkpoints in a random order: the newest is the one of the latest step."""
    row = Row("a clock that jumps")
    for _ in range(count):
        config, run = _interrupted(lab)
        with row.attempt("times in a random order"):
            for path in (run / "checkpoints").rglob("*"):
                moment = lab.random.uniform(0, 2e9)
                os.utime(path, (moment, moment))
            assert checkpoint.newest(run / "checkpoints")[0].path.name == "step-000006"
            lab.again(config)
            lab.forget(config)
    return row


# With how many tries: in `make test`, and in `make chaos`.
FAULTS: dict[Fault, tuple[int, int]] = {
    kill_at_random: (8, 200),
    kill_at_each_write: (12, 10_000),
    stop_by_signal: (4, 40),
    stop_twice: (2, 20),
    power_loss: (8, 200),
    damage: (60, 200),
    torn_files: (4, 100),
    disk_full: (4, 40),
    no_permission: (3, 3),
    not_a_number: (4, 40),
    out_of_memory: (2, 20),
    changed_on_resume: (2, 10),
    two_in_one_folder: (1, 10),
    clock_jumps: (1, 10),
}
