"""The estimate against what a real model takes: its weights, its optimizer's state, and every
allocation of a step, as torch's profiler sees them."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from stemtune.config import Adapter, Config, Model, Train
from stemtune.estimate import Estimate, Estimator, NoEstimateError, state_bytes
from stemtune.model import blueprint
from stemtune.model.adapter import add_adapter, trainable
from stemtune.model.blueprint import packed_bytes
from stemtune.model.offload import offload
from stemtune.optimizer import make_optimizer
from stemtune.score import autocast
from stemtune.tree.build import Tree, build_tree
from stemtune.tree.logprobs import target_logprobs
from stemtune.tree.sequence import Sequence
from tests.models import tiny_model
from tests.runs import IGNORED

pytestmark = IGNORED
CPU = torch.device("cpu")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm_")
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5}


def config_of(base: Path, **sections: dict[str, Any]) -> Config:
    model = {"base": str(base), "dtype": "float32", "device": "cpu", **sections.pop("model", {})}
    return Config.model_validate({"data": {"path": "rows.jsonl"}, "model": model, **sections})


def describe(folder: Path, family: str = "llama", **shape: Any) -> Path:
    """A base of which nothing is there but its config."""
    tiny_model(family, **{**WIDE, **shape}).config.save_pretrained(folder)
    return folder


def branched(length: int = 300) -> Tree:
    """Two sequences with a common stem, one of them longer, a third of each trained."""
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 64, length // 2)
    sequences = [
        np.concatenate([stem, rng.integers(0, 64, tail)]) for tail in (length // 2, length // 3)
    ]
    return build_tree([Sequence(ids, np.arange(ids.size) >= 200) for ids in sequences])


def real_model(config: Config, family: str = "llama", **shape: Any) -> PeftModel:
    base = tiny_model(family, **{**WIDE, **shape})
    for parameter in base.parameters():  # buffers are loaded in fp32, whatever the weights are
        parameter.data = parameter.data.to(getattr(torch, config.model.dtype))
    model = add_adapter(base, config.adapter, 0)
    if config.train.activation_checkpointing:
        base.activation_checkpointing_enable()
    return model.train()


def real_peak(model: PeftModel, tree: Tree, backend: str) -> int:
    """The most bytes that a second, equal step has allocated at once, but for what a product's
    library takes and gives back within its call: `RUNTIME` has a share for buffers."""

    def step() -> None:
        with autocast(model):
            logps = target_logprobs(model, tree, backend)
        logps.sum().backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    memory = [event for event in events if event.name() == "[memory]"]
    starts = np.array([event.start_ns() for event in memory])
    kept = np.ones(len(memory), dtype=bool)
    for product in (event for event in events if event.name() in PRODUCTS):
        end = product.start_ns() + product.duration_ns()
        first, last = np.searchsorted(starts, [product.start_ns(), end])
        for one in range(first, last - 1):
            if memory[one].nbytes() == -memory[one + 1].nbytes() > 0:
                kept[one : one + 2] = False
    return int(np.cumsum([event.nbytes() for event in memory] * kept).max())


def estimated(config: Config, tree: Tree) -> Estimate:
    return Estimator(CPU).of(config, tree)


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {}),
        ("llama", {"adapter": {"dropout": 0.0}}),
        ("llama", {"adapter": {"r": 64, "target_modules": ["q_proj", "down_proj"]}}),
        ("llama", {"adapter": {"layers": 2}}),
        ("llama", {"adapter": {"use_dora": True}}),
        ("llama", {"train": {"activation_checkpointing": True}}),
        ("llama", {"adapter": {"layers": 3}, "train": {"activation_checkpointing": True}}),
        ("llama", {"model": {"attention": "padded"}}),
        ("llama", {"model": {"dtype": "bfloat16"}}),
        ("llama", {"model": {"dtype": "bfloat16"}, "train": {"activation_checkpointing": True}}),
        ("qwen3", {}),
        ("glm4", {}),
        ("mistral", {}),
        ("gemma2", {}),  # heads that are more than a matrix
        ("cohere", {}),
        ("phi", {}),
        ("mixtral", {}),
        ("mixtral", {"model": {"dtype": "bfloat16"}}),
        ("qwen3_moe", {}),
        ("granitemoe", {}),
        ("gpt_oss", {"model": {"attention": "padded"}}),
    ],
)
def test_a_step_takes_what_was_said(tmp_path: Path, family: str, sections: dict[str, Any]) -> None:
    config = config_of(describe(tmp_path, family), **sections)
    model, tree = real_model(config, family), branched()
    backend = "padded" if config.model.attention == "padded" else "segments"
    found = estimated(config, tree)
    said = found.activations + found.temporaries
    assert said == pytest.approx(real_peak(model, tree, backend), rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2 (capped)"])
def test_flex_is_estimated_where_it_cannot_run(tmp_path: Path, family: str) -> None:
    """It keeps what segments keep, which is measured above; perhaps copies of a stem's keys."""
    base = describe(tmp_path, family)
    flex, segments = (
        estimated(config_of(base, model={"attention": way}), branched(900)).activations
        for way in ("flex", "segments")
    )
    assert segments <= flex < 1.15 * segments


LINEAR, FULL = "linear_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("deepseek_v3", {"first_k_dense_replace": 4}),
        ("qwen3_next", {"layer_types": [LINEAR, LINEAR, LINEAR, FULL, LINEAR]}),
        ("qwen3_next", {"layer_types": [LINEAR, FULL] * 3, "num_hidden_layers": 6}),
    ],
)
@pytest.mark.parametrize("layers", [None, 3])
def test_blocks_of_several_kinds(
    tmp_path: Path, family: str, shape: dict[str, Any], layers: int | None
) -> None:
    """Mixtures with dense blocks below, and attention that is not the same everywhere."""
    attention = {"deepseek_v3": "segments", "qwen3_next": "padded"}[family]
    base = describe(tmp_path, family, **shape)
    config = config_of(base, model={"attention": attention}, adapter={"layers": layers})
    model, tree = real_model(config, family, **shape), branched()
    found = estimated(config, tree)
    said = found.activations + found.temporaries
    assert said == pytest.approx(real_peak(model, tree, attention), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [{}, {"r": 3, "layers": 2}, {"target_modules": ["v_proj"]}])
def test_weights_are_counted(tmp_path: Path, dtype: str, adapter: dict[str, Any]) -> None:
    config = config_of(describe(tmp_path), model={"dtype": dtype}, adapter=adapter)
    model = real_model(config)
    held = [*model.parameters(), *model.buffers()]
    sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in held}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainable(model), Train())
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(
        value.nbytes for one in optimizer.state.values() for value in one.values() if value.ndim
    )
    found = estimated(config, branched())
    assert found.adapter == sum(p.nbytes for p in trained)
    assert found.base + found.adapter == sum(sizes.values())
    assert found.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert found.optimizer == state
    assert found.total == sum(found.parts.values())


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    found = [
        estimated(config_of(describe(tmp_path / str(tied), tie_word_embeddings=tied)), branched())
        for tied in (True, False)
    ]
    assert found[1].base - found[0].base == 64 * 64 * 4


def test_the_reference_is_a_second_adapter(tmp_path: Path) -> None:
    base = describe(tmp_path / "base")
    first = config_of(base, adapter={"r": 8, "layers": 2})
    model = add_adapter(tiny_model("llama", **WIDE), first.adapter, 0)
    model.save_pretrained(tmp_path / "adapter")
    going_on = {"init_from": str(tmp_path / "adapter")}
    sft = estimated(config_of(base, adapter=going_on), branched())
    dpo = estimated(config_of(base, adapter=going_on, objective={"type": "dpo"}), branched())
    fresh = estimated(first, branched())
    assert sft == fresh
    assert dpo.base == sft.base + sft.adapter
    # An earlier stage has yet to write it: its size is what the run file says.
    unwritten = Adapter(r=8, layers=2, init_from=str(tmp_path / "nowhere"))
    later = first.model_copy(update={"adapter": unwritten})
    assert estimated(later, branched()) == fresh


def test_offloaded_activations_are_not_on_a_gpu(tmp_path: Path) -> None:
    settings = {"train": {"activation_offload": True}, "model": {"device": "cuda"}}
    config = config_of(describe(tmp_path), **settings)
    there, here = (
        Estimator(torch.device("cuda")).of(config, branched()),
        estimated(config, branched()),
    )
    assert 0 <= there.activations < 0.05 * here.activations
    # They come back one by one, not all at once.
    assert here.temporaries < there.temporaries < 0.3 * here.activations


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_offloaded_weights_are_not_on_a_gpu(tmp_path: Path, count: int, layers: int | None) -> None:
    base, adapter = describe(tmp_path), {"layers": layers}
    plain, config = (
        config_of(base, model={"device": "cuda", "offload_layers": n}, adapter=adapter)
        for n in (None, count)
    )
    model = tiny_model("llama", **WIDE)
    before = sum(parameter.nbytes for parameter in model.parameters())
    offload(model, count, torch.device("meta"))
    there = sum(p.nbytes for p in model.parameters() if p.device.type == "meta")
    largest = max(p.nbytes for p in model.parameters() if p.device.type == "cpu")
    whole, found = (Estimator(torch.device("cuda")).of(c, branched()) for c in (plain, config))
    assert whole.base - found.base == before - there > 0
    assert found.temporaries == whole.temporaries + largest
    assert estimated(config, branched()) == estimated(plain, branched())


def test_the_state_of_an_optimizer_in_8_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = [(64, 64), (100, 100), (8, 16)]
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = bnb.optim.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [optimizer.state[p] for p in parameters]
    names = ("state1", "state2", "absmax1", "absmax2")
    real = sum(one[name].nbytes for one in state for name in names if name in one)
    counts = [p.numel() for p in parameters]
    assert state_bytes(counts, "adamw_8bit", CPU) == real
    assert state_bytes(counts, "paged_adamw", torch.device("cuda")) == 0


@pytest.fixture
def before_each_mlp(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[torch.Tensor], Any]]:
    """What to call with the inputs of the simulated blocks' MLPs."""
    calls: list[Callable[[torch.Tensor], Any]] = []
    made = blueprint.blueprint

    def called(_: nn.Module, inputs: Any) -> None:
        for call in calls:
            call(inputs[0])

    def hooked(*arguments: Any) -> PeftModel:
        model = made(*arguments)
        for module in model.modules():
            if type(module).__name__ == "LlamaMLP":
                module.register_forward_pre_hook(called)
        return model

    monkeypatch.setattr("stemtune.estimate.blueprint", hooked)
    monkeypatch.setattr("stemtune.estimate.SIMULATIONS", {})
    return calls


def test_what_depends_on_numbers_has_no_estimate(
    tmp_path: Path, before_each_mlp: list[Callable[[torch.Tensor], Any]]
) -> None:
    """A forward pass that asks a tensor for its number, as code of a base's own may."""
    before_each_mlp.append(lambda x: int(x.sum() > 0))
    with pytest.raises(NoEstimateError, match="local_scalar"):
        estimated(config_of(describe(tmp_path)), branched())


def test_ctrl_c_waits_for_the_end(
    tmp_path: Path, before_each_mlp: list[Callable[[torch.Tensor], Any]]
) -> None:
    """Raised within an operation on fake tensors it aborted the process, one time in three."""
    seen: list[int] = []
    before_each_mlp.append(lambda x: seen.append(len(x)))
    before_each_mlp.append(lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        estimated(config_of(describe(tmp_path)), branched())
    assert len(seen) == 4  # two blocks: to learn what the head does, and to score
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_drawn(tmp_path: Path) -> None:
    """A run draws the same numbers, whether it was estimated or not."""
    config = config_of(describe(tmp_path))
    before = torch.get_rng_state()
    estimated(config, branched())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_packed_weights_take_what_bitsandbytes_holds(kind: str, double: bool) -> None:
    """The table of 16 or 256 values that a layer's scales bring along is not counted."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    weight, count = torch.randn(192, 128), 192 * 128
    if kind == "int8":
        layer: Any = Linear8bitLt(128, 192, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": weight})
        packed = layer.to("cpu").weight
        held = packed.nbytes + packed.SCB.nbytes
    else:
        layer = Linear4bit(128, 192, bias=False, compress_statistics=double, quant_type=kind)
        layer.load_state_dict({"weight": weight})
        packed = layer.to("cpu").weight
        state = packed.quant_state
        held = packed.nbytes + state.absmax.nbytes
        held += state.state2.absmax.nbytes if double else 0
    config = Model(base="none", quantization=kind, double_quantization=double)
    assert packed_bytes(weight.shape, config) == held
    assert held < (1.1 if kind == "int8" else 0.6) * count
