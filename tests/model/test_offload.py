"""Weights that wait in main memory. torch's meta device stands in for a GPU: another device, whose
tensors mix with no others. The last tests need a real one."""

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stemtune as st
from stemtune.config import Adapter, Model
from stemtune.errors import ConfigError
from stemtune.export.merge import merge
from stemtune.model.adapter import add_adapter, load_onto, trainable
from stemtune.model.load import fingerprint, load_model
from stemtune.model.lora import FastLoraLinear
from stemtune.model.offload import OffloadedLinear, offload
from stemtune.model.save import load_adapter
from tests.models import tiny_model
from tests.runs import IGNORED, make_config, steps_of
from tests.trees import CASES, gradient, relative_error

pytestmark = IGNORED
CPU, META = torch.device("cpu"), torch.device("meta")
on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="weights are offloaded from a GPU: no GPU here"
)
IDS = torch.arange(24)[None] % 64


def offloaded(count: int, device: torch.device, family: str = "llama", **shape: Any) -> Any:
    model = tiny_model(family, attn_implementation="eager", **shape)
    offload(model, count, device)
    return model


def adapted(model: Any, **options: Any) -> Any:
    """With an adapter that is not zero."""
    settings = {"r": 4, "alpha": 8, "dropout": 0.0, **options}
    adapter = add_adapter(model, Adapter.model_validate(settings), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(adapter).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def away(model: nn.Module) -> dict[str, OffloadedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, OffloadedLinear)}


def home(layer: OffloadedLinear) -> Tensor:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def logits_on_meta(model: Any) -> Tensor:
    """With a mask that transformers hands on as it is: to make one, it looks at numbers."""
    mask = torch.zeros(1, 1, IDS.shape[1], IDS.shape[1], device=META)
    return model(input_ids=IDS.to(META), attention_mask=mask, use_cache=False).logits


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has none for the meta device, and refuses to say that it is off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


class Strict(TorchDispatchMode):
    """As a GPU would, it refuses operations between its own tensors and those of main memory. It
    counts the weights that are brought."""

    brought = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        if func is torch.ops.aten._to_copy.default and given[0].device == CPU:
            self.brought += given[0].is_floating_point()
        else:
            assert len({t.device for t in given}) < 2, f"{func} of {given}"
        return func(*args, **(kwargs or {}))


# -- on any machine ---------------------------------------------------------------------------


def test_linear_layers_of_the_lower_blocks_wait() -> None:
    model = offloaded(1, META)
    plain = tiny_model("llama")
    names = [n for n, m in plain.get_decoder().layers[0].named_modules() if type(m) is nn.Linear]
    assert list(away(model)) == [f"model.layers.0.{name}" for name in names] and len(names) == 7
    waiting = {f"{name}.weight" for name in away(model)}
    assert {n: p.device for n, p in model.named_parameters()} == {
        n: CPU if n in waiting else META for n, _ in plain.named_parameters()
    }
    assert model.device == META
    model.to(META)
    assert all(home(layer).device == CPU for layer in away(model).values())
    for name, layer in away(model).items():
        assert torch.equal(home(layer), plain.get_submodule(name).weight)
        assert layer.weight.device == META and layer.weight.shape == home(layer).shape


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.5},
        {"target_modules": "q_proj"},
        {"layers": 1},
        {"use_dora": True},
        {"modules_to_save": ["o_proj"]},
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's layers have a bias
def test_all_that_is_computed_is_on_the_device(family: str, options: dict[str, Any]) -> None:
    targets = {"target_modules": "all-linear"} if "modules_to_save" not in options else {}
    if "modules_to_save" in options and family == "phi":
        options = {"modules_to_save": ["dense"]}
    model = adapted(offloaded(2, META, family), **{**targets, **options}).train()
    assert {p.device for p in trainable(model).values()} == {META}
    with Strict():
        logits_on_meta(model).sum().backward()
    assert all(p.grad is not None and p.grad.device == META for p in trainable(model).values())
    with Strict(), torch.no_grad(), model.disable_adapter():
        logits_on_meta(model.eval())
    assert all(home(layer).device == CPU for layer in away(model).values())


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_weight_is_brought_for_each_product(checkpointing: bool) -> None:
    """Once forward, once backward; twice forward where activations are computed again."""
    base = offloaded(2, META)
    model = adapted(base).train()
    if checkpointing:
        base.activation_checkpointing_enable()
    counts = []
    with Strict() as strict:
        loss = logits_on_meta(model).sum()
        counts.append(strict.brought)
        loss.backward()
        counts.append(strict.brought - counts[0])
    # Nothing is trained below the first three products; a block that is run again is run whole.
    assert counts == [14, 28 if checkpointing else 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj"])
def test_numbers_are_what_they_were(targets: str, dtype: torch.dtype) -> None:
    models = []
    for count in (0, 1, 2):
        base = tiny_model("llama").to(dtype)
        offload(base, count, CPU)
        models.append(adapted(base, target_modules=targets))
    found = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logps = st.target_logprobs(model, st.build_tree(CASES["a shared stem"]))
        found.append((logps.detach(), gradient(model, logps)))
    # Layers without an adapter go to MKL where they stay, to oneDNN where they are offloaded.
    bound = 0.0 if targets == "all-linear" else 2e-6 if dtype == torch.float32 else 2e-2
    for logps, grads in found[1:]:
        assert relative_error(logps, found[0][0]) <= bound
        assert relative_error(grads, found[0][1]) <= bound
    assert {
        type(m.get_base_layer()) for m in models[2].modules() if isinstance(m, FastLoraLinear)
    } == {OffloadedLinear}


def test_it_is_the_same_base_and_generates_the_same() -> None:
    plain, other = tiny_model("qwen3"), offloaded(2, CPU, "qwen3")
    assert fingerprint(plain) == fingerprint(other)
    replies = [m.generate(IDS[:, :5], max_new_tokens=8, do_sample=False) for m in (plain, other)]
    assert torch.equal(*replies)


def test_a_saved_adapter_is_put_on_it(tmp_path: Path) -> None:
    plain = adapted(tiny_model("llama"))
    plain.save_pretrained(tmp_path)
    again = load_onto(offloaded(2, CPU), tmp_path)
    tree = st.build_tree(CASES["a shared stem"])
    assert torch.equal(*(st.target_logprobs(model.eval(), tree) for model in (plain, again)))


# -- refused ----------------------------------------------------------------------------------


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(ConfigError, match="3 blocks are to be offloaded, and the base has 2"):
        offloaded(3, CPU)
    with pytest.raises(ConfigError, match="the base has 0"):  # it keeps them elsewhere
        offloaded(1, CPU, "gpt2")


def test_without_a_gpu(tmp_path: Path, tiny_base: Path) -> None:
    for start in (
        lambda: st.Trainer(make_config(tmp_path, tiny_base, "model.offload_layers=1")),
        lambda: load_model(Model(base=str(tiny_base), device="cpu", offload_layers=1)),
    ):
        with pytest.raises(ConfigError, match="on cpu the weights are in main memory") as found:
            start()
        assert found.value.where == "model.offload_layers"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.quantization=nf4", "exclude each other"),
        ("adapter.init_weights=pissa", "pissa changes weights that are offloaded"),
        ("model.offload_layers=0", "greater than 0"),
    ],
)
def test_settings_that_exclude_each_other(
    tmp_path: Path, tiny_base: Path, override: str, text: str
) -> None:
    with pytest.raises(ConfigError) as found:
        make_config(tmp_path, tiny_base, "model.offload_layers=1", override)
    assert text in str(found.value)


def test_what_was_trained_on_a_gpu_runs_without(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat, evaluation, merge: they read the base's settings from the adapter's folder."""
    for module in ("stemtune.trainer", "stemtune.model.load"):
        monkeypatch.setattr(f"{module}.require_gpu", lambda *_: None)
    overrides = ["model.offload_layers=1", "train.max_steps=2"]
    run = st.train(make_config(tmp_path, tiny_base, *overrides)).output_dir
    monkeypatch.undo()
    model, _, settings = load_adapter(run / "adapter", "cpu")
    assert settings["model"]["offload_layers"] == 1 and not away(model)
    compared = merge(run, tmp_path / "merged")
    assert compared is not None and compared.difference < 1e-4


# -- on a GPU ---------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("targets", ["all-linear", "q_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_on_cuda_not_a_bit_is_different(family: str, dtype: torch.dtype, targets: str) -> None:
    """Attention by plain matrix products: the backward pass of others adds up in any order."""
    found = []
    for count in (0, 2):
        base = tiny_model(family, attn_implementation="eager").to(dtype)
        offload(base, count, torch.device("cuda"))
        assert bool(away(base)) == bool(count)
        assert all(home(layer).is_pinned() for layer in away(base).values())
        model = adapted(base, target_modules=targets).train()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=IDS.cuda(), use_cache=False).logits
        loss = torch.log_softmax(logits.float(), -1)[0, :-1].gather(1, IDS[0, 1:, None].cuda())
        grads = torch.autograd.grad(loss.mean(), list(trainable(model).values()))
        found.append([logits.detach(), *grads])
    assert {t.device.type for t in found[1]} == {"cuda"}
    assert all(torch.equal(ours, plain) for plain, ours in zip(*found, strict=True))


@on_cuda
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cuda_the_weights_take_no_memory(tiny_base: Path, dtype: Any, count: int) -> None:
    taken, waiting = [], 0
    for layers in (None, count):
        before = torch.cuda.memory_allocated()
        config = Model(base=str(tiny_base), dtype=dtype, device="cuda", offload_layers=layers)
        model = load_model(config)[0]
        taken.append(torch.cuda.memory_allocated() - before)
        waiting = sum(-(-home(layer).nbytes // 512) * 512 for layer in away(model).values())
        del model
        gc.collect()  # modules hold one another
    assert waiting > 0 and taken[0] - taken[1] == waiting


@on_cuda
def test_on_cuda_a_run_is_the_same(tmp_path: Path, tiny_base: Path) -> None:
    losses = []
    for count in ("null", 1, 2):
        overrides = ["model.device=cuda", f"model.offload_layers={count}", "train.max_steps=6"]
        run = st.train(make_config(tmp_path / str(count), tiny_base, *overrides)).output_dir
        losses.append([line["loss"] for line in steps_of(run)])
    assert losses[0][0] == losses[1][0] == losses[2][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
