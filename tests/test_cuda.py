"""What only a GPU can show: each back end, quantized bases and whole runs there."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import stemtune as st
from stemtune.model.adapter import trainable
from stemtune.step import StepRunner
from stemtune.tree.build import build_tree
from tests.models import save_tiny_model, tiny_model, with_lora
from tests.runs import (
    IGNORED,
    QUESTIONS,
    Spy,
    adapter_of,
    steps_of,
    without_clock,
    write_rows,
    write_run_file,
)
from tests.tree.test_attention import random_sequences
from tests.trees import CASES, gradient, largest_error, one_by_one, relative_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.filterwarnings("ignore"),  # of Triton, inductor and bitsandbytes, by version
    *IGNORED,
]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WIDE = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.06}
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma2 (capped)", "glm", "phi3", "olmo2"]


def on_cuda(family: str, dtype: torch.dtype, **options: Any) -> Any:
    model = tiny_model(family, **{**WIDE, **options})
    return with_lora(model.to("cuda", dtype))  # pyright: ignore


@pytest.mark.parametrize("backend", ["segments", "flex", "varlen"])
@HALVES
@pytest.mark.parametrize("family", FAMILIES)
def test_as_near_to_the_truth_as_eager(family: str, dtype: torch.dtype, backend: str) -> None:
    """The truth is the same half-precision weights in float64; eager sets the measure."""
    if backend == "varlen" and family == "gemma2 (capped)":
        pytest.skip("varlen attention has no cap on scores")
    window = {"sliding_window": 100} if family in ("mistral", "gemma2", "gemma2 (capped)") else {}
    sequences = random_sequences(stem=300, branch=50)
    eager = on_cuda(family, dtype, attn_implementation="eager", **window)
    model = on_cuda(family, dtype, **window)
    truth = on_cuda(family, dtype, attn_implementation="eager", **window).double()
    logps = [st.target_logprobs(model, build_tree(sequences), backend)]
    logps += [one_by_one(oracle, sequences) for oracle in (eager, truth)]
    grads = [gradient(m, x) for m, x in zip((model, eager, truth), logps, strict=True)]
    assert 0 < relative_error(logps[0], logps[2]) < 2 * relative_error(logps[1], logps[2])
    assert 0 < relative_error(grads[0], grads[2]) < 2 * relative_error(grads[1], grads[2])


@pytest.mark.parametrize("backend", ["segments", "flex"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2 (capped)"])
def test_float32_is_exact(family: str, backend: str) -> None:
    window = {} if family == "llama" else {"sliding_window": 100}
    sequences = random_sequences(stem=300, branch=50) + CASES["nothing shared"]
    model = on_cuda(family, torch.float32, **window)
    truth = on_cuda(family, torch.float32, attn_implementation="eager", **window).double()
    logps, expected = (
        st.target_logprobs(model, build_tree(sequences), backend),
        one_by_one(truth, sequences),
    )
    assert largest_error(logps, expected) < 1e-4
    assert relative_error(gradient(model, logps), gradient(truth, expected)) < 1e-4


@pytest.mark.parametrize("backend", ["segments", "flex", "varlen"])
def test_trees_of_any_size_run(backend: str) -> None:
    """Compiled code must not fall back to something else where shapes change."""
    model, eager = (
        on_cuda("llama", torch.bfloat16, **more) for more in ({}, {"attn_implementation": "eager"})
    )
    for stem, branch in [(3, 1), (100, 9), (128, 128), (700, 33), (1111, 257), (257, 3), (40, 600)]:
        sequences = random_sequences(stem, branch)
        logps = st.target_logprobs(model, build_tree(sequences), backend)
        logps.sum().backward()
        with torch.no_grad():
            again = st.target_logprobs(model, build_tree(sequences), backend)
            expected = one_by_one(eager, sequences)
        assert relative_error(logps, expected) < 0.02
        assert relative_error(again, expected) < 0.02


@pytest.mark.parametrize("backend", ["segments", "flex", "varlen"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2 (capped)"])
def test_the_backward_pass_may_run_within_autocast(family: str, backend: str) -> None:
    if backend == "varlen" and family == "gemma2 (capped)":
        pytest.skip("varlen attention has no cap on scores")
    model = on_cuda(family, torch.bfloat16, **({} if family == "llama" else {"sliding_window": 90}))
    tree, found = build_tree(random_sequences(stem=300, branch=50)), []
    for within in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            logps = st.target_logprobs(model, tree, backend)
            if within:
                found.append(gradient(model, logps))
        if not within:
            found.append(gradient(model, logps))
    assert relative_error(*found) < 1e-2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda-base")
    save_tiny_model(folder, "llama", **WIDE)
    return folder


Run = Callable[..., Path]
HERE = ["model.device=cuda", "model.dtype=bfloat16", "model.attention=auto"]


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Run:
    def train(name: str, *settings: str, objective: Any = None, resume: bool = False) -> Path:
        folder = tmp_path / name
        path = folder / "run.yaml" if resume else write_run_file(folder, base)
        config = st.load_config(path, [*HERE, *settings])
        return st.train(config, resume=resume, objective=objective).output_dir

    return train


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in steps_of(path)]


def test_a_run_learns_and_says_where_it_ran(run: Run) -> None:
    path = run("plain", "train.max_steps=12", "train.learning_rate=1e-2")
    found = losses(path)
    assert found[-1] < 0.8 * found[0]
    chosen = st.load_config(path / "config.yaml").model
    assert (chosen.device, chosen.dtype) == ("cuda", "bfloat16")
    assert chosen.attention in ("varlen", "flex")


class Crash(Exception):
    """What no code of ours expects."""


def crash() -> None:
    raise Crash


def interrupted(run: Run, *settings: str) -> tuple[Path, Path]:
    """A run of six steps, and one that crashed in its fifth and went on from its third."""
    settings = ("train.max_steps=6", "train.save_steps=3", *settings)
    whole = run("whole", *settings, objective=Spy())
    with pytest.raises(Crash):
        run("cut", *settings, objective=Spy(at=5, act=crash))
    return whole, run("cut", *settings, objective=Spy(), resume=True)


@pytest.mark.parametrize("attention", ["flex", "segments"])
def test_an_interrupted_run_goes_on_bit_for_bit(run: Run, attention: str) -> None:
    whole, cut = interrupted(run, f"model.attention={attention}", "adapter.dropout=0.1")
    assert without_clock(steps_of(cut)) == without_clock(steps_of(whole))
    ours, theirs = adapter_of(cut / "adapter"), adapter_of(whole / "adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.activation_checkpointing=true"],
        ["train.activation_offload=true"],
        ["train.micro_batch_tokens=200"],
        ["model.attention=segments"],
        ["model.attention=padded"],
        ["model.attention=varlen"],
        ["model.attention=flex"],
    ],
    ids=lambda settings: settings[0],
)
def test_the_way_changes_nothing(run: Run, settings: list[str]) -> None:
    steps = "train.max_steps=4"
    plain = losses(run("plain", steps))
    other = run("other", steps, *settings)
    assert losses(other) == pytest.approx(plain, rel=5e-3)
    facts = json.loads((other / "run.json").read_text(encoding="utf-8"))
    assert facts["memory"]["estimate"]["total"] > 0, "each way's memory is estimated"


def test_micro_batches_that_do_not_fit_are_halved(run: Run, monkeypatch: Any) -> None:
    real, failed = StepRunner._run_micro_batches, []

    def once(self: Any, step: Any) -> Any:
        if not failed:
            failed.append(None)
            torch.empty(2**45, dtype=torch.uint8, device="cuda")
        return real(self, step)

    plain = losses(run("plain", "train.max_steps=3"))
    monkeypatch.setattr(StepRunner, "_run_micro_batches", once)
    assert losses(run("halved", "train.max_steps=3")) == pytest.approx(plain, rel=5e-3)
    assert failed


quantized = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes here")


@quantized
@pytest.mark.parametrize("held", ["nf4", "fp4", "int8"])
def test_quantized_bases_train_and_resume(run: Run, held: str) -> None:
    whole, cut = interrupted(run, f"model.quantization={held}", "train.learning_rate=1e-2")
    assert losses(whole)[-1] < losses(whole)[0]
    assert losses(cut) == pytest.approx(losses(whole), rel=5e-3)


@quantized
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_optimizers_of_few_bits(run: Run, optimizer: str) -> None:
    found = losses(run("plain", f"train.optimizer={optimizer}", "train.max_steps=6"))
    exact = losses(run("exact", "train.max_steps=6"))
    assert found == pytest.approx(exact, rel=2e-2)


def test_preferences_start_at_ln_2(run: Run, tmp_path: Path, base: Path) -> None:
    rows = [
        {"prompt": QUESTIONS[n % 3], "chosen": f"I know not {n}.", "rejected": f"Buy {n} figs!"}
        for n in range(16)
    ]
    path = write_run_file(tmp_path / "dpo", base)
    write_rows(tmp_path / "dpo" / "rows.jsonl", rows)
    config = st.load_config(path, [*HERE, "objective.type=dpo", "train.max_steps=4"])
    found = losses(st.train(config).output_dir)
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    assert found[-1] < found[0]


def test_generation_on_a_gpu_is_what_it_was() -> None:
    model = tiny_model("llama", **WIDE).to("cuda")
    ids = torch.arange(1, 20, device="cuda")[None]
    before = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    st.target_logprobs(model, build_tree(CASES["a shared stem"]))
    after = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(before, after)
    assert not trainable(model)
