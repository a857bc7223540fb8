"""Losses that are no numbers, losses that leap, and time that runs out."""

import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import stemtune as st
from stemtune import checkpoint, guards
from stemtune.config import Train
from stemtune.errors import ConfigError, DiskError, DivergedError, Interrupted, OutputBusyError
from stemtune.guards import SpikeWatch
from stemtune.interrupt import StopRequest
from stemtune.saver import Saver
from tests.runs import (
    IGNORED,
    Spy,
    adapter_of,
    dialogue_rows,
    make_config,
    metrics_of,
    run_info,
    steps_of,
    write_rows,
)

pytestmark = IGNORED
SHORT = ["train.max_steps=5", "train.batch_size=4", "train.save_steps=2"]


def crash() -> None:
    raise RuntimeError("crash")


class NaN(Spy):
    """The SFT objective, with a loss of NaN in some calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.poisoned = calls

    def __call__(self, *arguments: Any) -> Any:
        loss, told = super().__call__(*arguments)
        return (loss * math.nan if self.calls in self.poisoned else loss), told


# -- what is no number ----------------------------------------------------------------------------


def test_a_step_is_left_out(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT, "train.on_nonfinite=skip")
    trainer = st.Trainer(config, objective=NaN(3))
    before: list[torch.Tensor] = []
    step = trainer._step

    def seen(records: Any) -> Any:
        before.append(
            torch.cat([p.detach().flatten().clone() for p in trainer.parameters.values()])
        )
        return step(records)

    trainer._step = seen  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    assert torch.equal(before[2], before[3]) and not torch.equal(before[3], before[4])
    lines = [line for line in metrics_of(tmp_path / "run") if "lr" in line]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False]
    said = [message for message in caplog.messages if "step 3 is skipped" in message]
    assert len(said) == 1 and "rows.jsonl:" in said[0]


def test_skipping_has_an_end(tmp_path: Path, tiny_base: Path) -> None:
    settings = [*SHORT, "train.on_nonfinite=skip", "train.max_skipped_steps=2"]
    with pytest.raises(DivergedError, match=r"step 4: .* 2 steps were skipped") as found:
        st.train(make_config(tmp_path, tiny_base, *settings), objective=NaN(2, 3, 4))
    assert found.value.exit_code == 4


def test_a_resumed_run_remembers_what_it_skipped(tmp_path: Path, tiny_base: Path) -> None:
    settings = [*SHORT, "train.on_nonfinite=skip"]
    whole = st.train(make_config(tmp_path / "a", tiny_base, *settings), objective=NaN(2, 5))
    config = make_config(tmp_path / "b", tiny_base, *settings)
    trainer = st.Trainer(config, objective=NaN(2))

    def step_then_stop(records: Any, own: Any = trainer._step) -> Any:
        line = own(records)
        trainer.stop.requested = trainer.progress.step == 3
        return line

    trainer._step = step_then_stop  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = st.Trainer(config, resume=True, objective=NaN(2))
    assert resumed.progress.skipped == 1
    resumed.train()
    ours, theirs = adapter_of(tmp_path / "b/run/adapter"), adapter_of(whole.adapter_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_weight_that_is_no_number(tmp_path: Path, tiny_base: Path) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT, "train.save_steps=1"))
    own = trainer.optimizer.step

    def spoil() -> None:
        own()
        if trainer.progress.step == 2:
            next(iter(trainer.parameters.values())).data[0] = math.inf

    trainer.optimizer.step = spoil
    with pytest.raises(DivergedError, match="step 3: a weight is no finite number"):
        trainer.train()
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [1, 2]


def test_the_suspects_are_the_records_with_bad_numbers() -> None:
    sequences = [st.Sequence([1, 2], [False, True], record=n) for n in (7, 7, 8, 9)]
    logps = [torch.tensor([x]) for x in (-1.0, -2.0, math.nan, -3.0)]
    assert guards.suspects(sequences, logps) == [8]
    assert guards.suspects(sequences, [torch.tensor([-1.0])] * 4) == [7, 8, 9]


# -- what leaps -----------------------------------------------------------------------------------


def test_a_leap_is_noticed_and_noise_is_not() -> None:
    draw = random.Random(0)
    watch = SpikeWatch()
    noise = [3.0 - 0.01 * n + draw.gauss(0, 0.1) for n in range(100)]
    assert [watch.above(loss) for loss in noise] == [None] * 100
    leap = watch.above(9.0)
    assert leap is not None and 6 < leap < 7.5
    assert watch.above(2.0) is None


def test_nothing_is_said_of_the_first_losses() -> None:
    watch = SpikeWatch()
    assert [watch.above(loss) for loss in (1.0, 50.0, 1.0, 80.0)] == [None] * 4


def test_a_constant_loss_may_move_a_little() -> None:
    watch = SpikeWatch()
    assert [watch.above(2.0) for _ in range(20)] == [None] * 20
    assert watch.above(2.3) is None and watch.above(2.5) is not None


def test_a_leap_is_said(tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ["train.max_steps=14", "train.batch_size=4", "train.learning_rate=1e-5"]

    class Leap(Spy):
        def __call__(self, *arguments: Any) -> Any:
            loss, told = super().__call__(*arguments)
            return (loss * 5 if self.calls == 13 else loss), told

    st.train(make_config(tmp_path, tiny_base, *settings), objective=Leap())
    assert [m for m in caplog.messages if "above the last ones'" in m and "step 13" in m]


# -- time -----------------------------------------------------------------------------------------


def test_time_runs_out(tmp_path: Path, tiny_base: Path) -> None:
    # Counted from the start of this process, whose imports alone took longer.
    config = make_config(tmp_path, tiny_base, *SHORT, "train.time_limit=1")
    with pytest.raises(Interrupted) as found:
        st.train(config)
    assert found.value.exit_code == 75
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [1]
    st.train(st.load_config(tmp_path / "run.yaml", SHORT), resume=True)
    assert steps_of(tmp_path / "run")[-1]["step"] == 5


def test_there_is_time_left(caplog: pytest.LogCaptureFixture) -> None:
    stop = StopRequest(1e9)
    stop.look_at_clock(needed=10.0)
    assert not stop.requested
    stop = StopRequest(1e9)
    stop.look_at_clock(needed=2e9)
    assert stop.requested and any("train.time_limit" in message for message in caplog.messages)


def test_a_clock_that_jumps_moves_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(1e6)
    for jump in (-1e9, 1e9):
        with monkeypatch.context() as patch:
            now = time.time()
            patch.setattr(time, "time", lambda now=now, jump=jump: now + jump)
            stop.look_at_clock(needed=10.0)
    assert not stop.requested


def test_a_signal_that_a_launcher_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = StopRequest()
    for _ in range(2):
        stop._handle(signal.SIGTERM, None)
    assert stop.requested
    monkeypatch.setattr("stemtune.interrupt.ECHO", -1.0)
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGTERM, None)


def test_a_process_of_its_own_stops_at_the_second_signal() -> None:
    stop = StopRequest()
    stop._handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGTERM, None)


def test_the_first_signal_after_the_deadline_is_no_second_one() -> None:
    stop = StopRequest(1e-3)
    stop.look_at_clock(needed=0.0)
    assert stop.requested
    stop._handle(signal.SIGTERM, None)


# -- the folder -----------------------------------------------------------------------------------


def test_the_same_command_again(tmp_path: Path, tiny_base: Path) -> None:
    whole = st.train(make_config(tmp_path / "whole", tiny_base, *SHORT))
    config = make_config(tmp_path / "a", tiny_base, *SHORT, "output.on_existing=resume")

    for at in (1, 4):  # before the first checkpoint, and behind it
        with pytest.raises(RuntimeError):
            st.train(config, objective=Spy(at, crash))
    st.train(config)
    ours, theirs = adapter_of(tmp_path / "a/run/adapter"), adapter_of(whole.adapter_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert st.train(config).metrics["step"] == 5  # done: nothing more happens
    assert len(steps_of(tmp_path / "a/run")) == 5


def test_a_new_folder_beside_the_old_one(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT, "output.on_existing=new")
    names = [st.train(config).output_dir.name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]
    assert run_info(tmp_path / "run-3")["state"] == "done"
    with pytest.raises(OutputBusyError):
        st.train(make_config(tmp_path, tiny_base, *SHORT))


def test_stages_can_not_take_new_names(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT, "output.on_existing=new")
    with pytest.raises(ConfigError, match="without stages"):
        st.train([config, config])


def test_what_is_allowed_to_change(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    st.train(make_config(tmp_path, tiny_base, *SHORT, "train.max_steps=3"))
    write_rows(tmp_path / "rows.jsonl", dialogue_rows(24))
    config = st.load_config(tmp_path / "run.yaml", [*SHORT, "train.learning_rate=1e-3"])
    for allowed in ([], ["data"], ["data", "train.learning_rate"]):
        with pytest.raises(ConfigError, match="can't resume"):
            st.train(config, resume=True, allow_changes=allowed)
    names = ["data", "train.learning_rate", "train.max_steps"]
    assert st.train(config, resume=True, allow_changes=names).metrics["step"] == 5
    assert "allowed to differ from the interrupted run: train.max_steps: 3 → 5" in caplog.messages


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dta", "'data'"), ("train.learning_rat", "'train.learning_rate'"), ("adapter.r", "shape")],
)
def test_what_names_nothing_to_allow(tmp_path: Path, tiny_base: Path, name: str, hint: str) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT, "train.max_steps=1")
    st.train(config)
    with pytest.raises(ConfigError, match="can't be allowed to change") as found:
        st.train(config, resume=True, allow_changes=[name])
    assert hint in found.value.hint


def test_other_files_of_a_base_of_the_hub(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub names them by their hashes: a commit that holds others now is not the same base."""
    snapshot = tmp_path / ("c" * 40)
    snapshot.mkdir()
    for file in tiny_base.iterdir():
        blob = tmp_path / f"blob-of-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr("stemtune.model.load._fetched", lambda *_: snapshot)
    config = make_config(tmp_path, tiny_base, *SHORT, "model.base=someone/tiny")
    with pytest.raises(RuntimeError):
        st.train(config, objective=Spy(4, crash))
    base = run_info(tmp_path / "run")["base"]
    assert base["name"] == "someone/tiny" and base["revision"] == snapshot.name
    assert base["files"] == {
        name: f"blob-of-{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    (tmp_path / "blob-of-config.json").rename(tmp_path / "other")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"base\.config\.json: is not what it was"):
        st.train(config, resume=True)
    st.train(config, resume=True, allow_changes=["base"])


# -- the disk -------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_training(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("stemtune.saver.shutil.disk_usage", lambda _path: usage(9, 9, 1000))
    with pytest.raises(DiskError, match="checkpoints will take about") as found:
        st.train(make_config(tmp_path, tiny_base, *SHORT))
    assert found.value.exit_code == 7
    assert not metrics_of(tmp_path / "run")


@pytest.mark.parametrize(("free", "warned"), [(50_000, True), (1_000_000, False)])
def test_little_space_is_said_while_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    warned: bool,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("stemtune.saver.shutil.disk_usage", lambda _: usage._replace(free=free))
    saver = Saver(tmp_path, Train())
    saver.save(1, {"adapter": {"a": torch.zeros(10_000)}}, {}, None)  # 40 kB
    saver.close()
    assert any("the disk is nearly full" in message for message in caplog.messages) == warned


def test_what_saving_cost_is_told(tmp_path: Path, tiny_base: Path) -> None:
    st.train(make_config(tmp_path, tiny_base, *SHORT))
    cost = run_info(tmp_path / "run")["saving"]
    assert cost["saves"] == 3 and cost["written"] > 0 and cost["waited"] >= 0


def test_numbers_are_on_the_disk_before_the_checkpoint(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    from stemtune.metrics import MetricsFile

    sync, save = MetricsFile.sync, Saver.save

    def spied_sync(file: MetricsFile) -> None:
        sync(file)
        order.append("metrics")

    def spied_save(saver: Saver, *arguments: Any) -> None:
        order.append("checkpoint")
        save(saver, *arguments)

    monkeypatch.setattr(MetricsFile, "sync", spied_sync)
    monkeypatch.setattr(Saver, "save", spied_save)
    st.train(make_config(tmp_path, tiny_base, *SHORT))
    assert order == ["metrics", "checkpoint"] * 3
