"""Lower states, kept on disk: the same run, with the upper blocks alone."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stemtune as st
from stemtune import lower
from stemtune.errors import ConfigError, DiskError
from stemtune.lower import prefix_keys
from stemtune.model.targets import find_targets
from stemtune.tree.blocks import Below
from stemtune.tree.build import build_tree
from stemtune.tree.logprobs import lower_states
from tests.invariants.test_families import NO_TREE
from tests.invariants.test_resume_is_exact import Crash, assert_same_run
from tests.models import FAMILIES, tiny_model, with_lora
from tests.runs import IGNORED, adapter_of, make_config, steps_of
from tests.trees import CASES, gradient, largest_error, relative_error

pytestmark = IGNORED
EVERYTHING = [sequence for case in CASES.values() for sequence in case]
SETTINGS = ["adapter.layers=1", "train.batch_size=4", "train.num_train_epochs=3"]
KEPT = [*SETTINGS, "train.keep_lower_states=true"]


def upper_adapted(family: str) -> Any:
    """A model of two blocks, the upper one adapted."""
    model = tiny_model(family)
    return with_lora(model, layers_to_transform=[1], target_modules=find_targets(model, "auto"))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NO_TREE)))
def test_given_states_change_nothing(family: str) -> None:
    """Log-probabilities and gradients of an adapter on the upper block."""
    model = upper_adapted(family)
    tree = build_tree(EVERYTHING)
    plain = st.target_logprobs(model, tree)
    with torch.no_grad():
        states = lower_states(model, tree, 1)
    assert states.shape == (tree.num_distinct, 32)
    found = st.target_logprobs(model, tree, below=Below(1, states))
    assert torch.equal(found, plain)
    assert torch.equal(gradient(model, found), gradient(model, plain))
    other = st.target_logprobs(model, tree, below=Below(1, torch.zeros_like(states)))
    assert largest_error(other, plain) > 0.1
    assert torch.equal(st.target_logprobs(model, tree), plain), "the blocks are back"


def test_a_failure_puts_the_blocks_back() -> None:
    model = upper_adapted("llama")
    tree = build_tree(EVERYTHING)
    plain = st.target_logprobs(model, tree)
    with pytest.raises(RuntimeError):
        st.target_logprobs(model, tree, below=Below(1, torch.zeros(1, 1, 3)))
    assert torch.equal(st.target_logprobs(model, tree), plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_run_is_the_same(tmp_path: Path, tiny_base: Path, dtype: str) -> None:
    """But for rounding: a state may come from another tree than the step's."""
    runs = {
        name: st.train(
            make_config(tmp_path / name, tiny_base, *settings, f"model.dtype={dtype}")
        ).output_dir
        for name, settings in {"plain": SETTINGS, "kept": KEPT}.items()
    }
    plain, kept = ([line["loss"] for line in steps_of(run)] for run in runs.values())
    assert len(plain) == 15 and plain[-1] < plain[0]
    bound = 1e-5 if dtype == "float32" else 3e-2
    assert kept == pytest.approx(plain, rel=bound)
    if dtype == "float32":
        ours, theirs = (
            torch.cat([part.flatten() for _, part in sorted(adapter_of(run / "adapter").items())])
            for run in runs.values()
        )
        assert relative_error(ours, theirs) < 1e-4
    assert not (runs["kept"] / lower.FILE).exists()


def test_the_lower_blocks_are_not_run_again(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each micro-batch before training, and for nothing after that."""
    calls: list[int] = []
    count = lower.LowerStates.compute

    def watched(self: lower.LowerStates, *args: object) -> None:
        block = self.model.get_base_model().get_decoder().layers[0]
        block.register_forward_hook(lambda *_: calls.append(1))
        count(self, *args)  # pyright: ignore[reportArgumentType]
        calls.append(0)

    monkeypatch.setattr(lower.LowerStates, "compute", watched)
    st.train(make_config(tmp_path, tiny_base, *KEPT))
    assert calls == [1, 0]


def test_each_distinct_prefix_has_one_row(tmp_path: Path, tiny_base: Path) -> None:
    sizes: list[tuple[int, int]] = []
    init = lower.LowerStates.__init__

    def watched(self: lower.LowerStates, *args: object) -> None:
        init(self, *args)  # pyright: ignore[reportArgumentType]
        prefixes = {
            tuple(s.input_ids[: end + 1].tolist()) for s in self.part.flat for end in range(len(s))
        }
        sizes.append((len(self.key), len(prefixes)))
        assert (self.path).stat().st_size == len(prefixes) * 32 * 4

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lower.LowerStates, "__init__", watched)
        st.train(make_config(tmp_path, tiny_base, *KEPT))
    assert sizes and sizes[0][0] == sizes[0][1] > 100


def test_keys_tell_prefixes_apart() -> None:
    """Order, place and length count."""
    spelled = [[1, 2, 3], [2, 1, 3], [1, 2], [1], [2], [3, 2, 1], [0, 1, 2, 3], [0], [0, 0]]
    prefixes = {tuple(ids[: n + 1]) for ids in spelled for n in range(len(ids))}
    keys = {tuple(prefix_keys(np.array(ids))[-1].tolist()) for ids in prefixes}
    assert len(keys) == len(prefixes)
    whole = prefix_keys(np.array([5, 6, 7]))
    assert np.array_equal(whole[:2], prefix_keys(np.array([5, 6])))


def test_an_interrupted_run_is_the_uninterrupted_one(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*KEPT, "train.save_steps=4", "adapter.dropout=0.1"]
    whole = make_config(tmp_path / "whole", tiny_base, *settings)
    st.train(whole)
    config = make_config(tmp_path / "cut", tiny_base, *settings)

    trainer = st.Trainer(config)
    step = trainer._step

    def fails(records: object) -> object:
        if trainer.progress.step == 6:
            raise Crash
        return step(records)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(trainer, "_step", fails)
    with pytest.raises(Crash):
        trainer.train()
    assert (tmp_path / "cut" / "run" / lower.FILE).exists()
    st.train(config, resume=True)
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "whole" / "run")


def test_without_lower_blocks(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, "train.keep_lower_states=true")
    with pytest.raises(ConfigError, match="no blocks below the adapter") as found:
        st.train(config)
    assert found.value.where == "train.keep_lower_states" and "adapter.layers" in found.value.hint
    assert not (tmp_path / "run").exists()


def test_without_lower_blocks_in_the_adapter_that_it_goes_on_with(
    tmp_path: Path, tiny_base: Path
) -> None:
    for name, setting in (("all", "adapter.r=4"), ("upper", "adapter.layers=1")):
        st.train(make_config(tmp_path / name, tiny_base, setting, "train.max_steps=1"))
        start = f"adapter.init_from={tmp_path / name / 'run'}"
        kept = "train.keep_lower_states=true"
        config = make_config(tmp_path / f"on-{name}", tiny_base, start, kept, "train.max_steps=1")
        if name == "upper":
            st.train(config)
            continue
        with pytest.raises(ConfigError, match="no blocks below the adapter"):
            st.train(config)
        assert not (tmp_path / "on-all" / "run").exists()


@pytest.mark.parametrize("setting", ["adapter.layers=2", "model.attention=padded"])
def test_what_can_not_be_kept(tmp_path: Path, tiny_base: Path, setting: str) -> None:
    with pytest.raises(ConfigError) as found:
        st.train(make_config(tmp_path, tiny_base, *KEPT, setting))
    assert found.value.hint == "leave train.keep_lower_states out"


def test_too_little_space(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    fields = dict(zip(("total", "used", "free"), (usage.total, usage.used, 1000), strict=True))
    few = dataclasses.make_dataclass("Usage", fields)(**fields)
    monkeypatch.setattr(lower.shutil, "disk_usage", lambda _: few)
    monkeypatch.setattr("stemtune.trainer.require_space", lambda *_: None)  # for checkpoints
    with pytest.raises(DiskError, match=r"GB, and 0\.0 are free"):
        st.train(make_config(tmp_path, tiny_base, *KEPT))
    assert not (tmp_path / "run" / lower.FILE).exists()
