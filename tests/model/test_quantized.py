"""Bases in 4 and 8 bits: weights by the formats' own definitions, the gradient by plain torch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stemtune as st
from stemtune.cli.check import check
from stemtune.config import Adapter, Model
from stemtune.errors import ConfigError, ModelError
from stemtune.model import quantized
from stemtune.model.adapter import add_adapter, trainable
from stemtune.model.load import load_model
from stemtune.model.quantized import QuantizedLinear, require_trainable
from tests.models import save_tiny_model
from tests.runs import IGNORED, adapter_of, make_config, steps_of, write_run_file
from tests.trees import CASES, gradient, largest_error, one_by_one, relative_error

pytestmark = IGNORED
KINDS = ["nf4", "fp4", "int8"]
# QLoRA (Dettmers et al. 2023), appendix E: the 16 values of NF4.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
# A sign, and one of eight magnitudes: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4 of the largest.
FP4 = [s * m for s in (-1, 1) for m in (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)]
BLOCK = 64


def held(base: Path, kind: str | None, dtype: str = "float32", **more: Any) -> Any:
    return load_model(Model(base=str(base), quantization=kind, dtype=dtype, device="cpu", **more))[
        0
    ]


def packed_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def rounded(weight: Tensor, kind: str) -> Tensor:
    """[out, in] as a 4-bit format holds it, by its definition."""
    code = torch.tensor(NF4 if kind == "nf4" else FP4)
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest).unsqueeze(-1).sub(code).abs().argmin(-1)
    return (code[nearest] * largest).view_as(weight)


def test_weights_of_8_bits(tiny_base: Path) -> None:
    """Whole numbers times a scale for each row, none further from its weight than half a step."""
    plain = held(tiny_base, None)
    for name, layer in packed_layers(held(tiny_base, "int8")).items():
        weight = plain.get_submodule(name).weight
        step = weight.abs().amax(1, keepdim=True) / 127
        steps = layer.dense() / step
        assert largest_error(steps, steps.round()) < 0.1  # scales are rounded to half precision
        assert float(((layer.dense() - weight).abs() / step).max()) < 0.6
        assert float(steps.abs().max()) == pytest.approx(127, abs=0.1)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_what_the_format_says(tiny_base: Path, kind: str) -> None:
    plain = held(tiny_base, None)
    layers = packed_layers(held(tiny_base, kind, double_quantization=False))
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        expected = rounded(plain.get_submodule(name).weight, kind)
        assert largest_error(layer.dense(), expected) < 1e-5
        assert largest_error(layer.dense(), plain.get_submodule(name).weight) > 1e-3


def test_double_quantization_rounds_the_scales(tiny_base: Path) -> None:
    once = packed_layers(held(tiny_base, "nf4", double_quantization=False))
    twice = packed_layers(held(tiny_base, "nf4"))
    for name, layer in once.items():
        ours, exact = twice[name].dense(), layer.dense()
        assert torch.equal(ours == 0, exact == 0)
        # Scales of 8 bits, over blocks of 256 of them.
        ratio = ours[exact != 0] / exact[exact != 0]
        assert 0 < float((ratio - 1).abs().max()) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_stays_as_it_is(tiny_base: Path, kind: str, dtype: str) -> None:
    model = held(tiny_base, kind, dtype)
    packed = {f"{name}.weight" for name in packed_layers(model)}
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    small = {dtypes[n] for n in packed}
    assert small == {torch.int8 if kind == "int8" else torch.uint8}
    assert {d for n, d in dtypes.items() if n not in packed} == {getattr(torch, dtype)}
    assert {layer.dense().dtype for layer in packed_layers(model).values()} == {
        getattr(torch, dtype)
    }
    assert "lm_head.weight" not in packed and "model.embed_tokens.weight" not in packed
    assert not any(p.requires_grad for p in model.parameters())


def adapted(model: Any) -> Any:
    adapter = add_adapter(model, Adapter(r=4, alpha=8, dropout=0.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(adapter).items():
            if "lora_B" in name:  # it starts at zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


@pytest.mark.parametrize("backend", ["segments", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradient(tiny_base: Path, kind: str, backend: str) -> None:
    """The oracle is the base with the rounded weights in their places, in float64, run one
    sequence at a time by transformers and PEFT."""
    model = adapted(held(tiny_base, kind))
    oracle = held(tiny_base, None)
    for name, layer in packed_layers(held(tiny_base, kind)).items():
        oracle.get_submodule(name).weight.data = layer.dense()
    oracle.set_attn_implementation("eager")
    oracle = adapted(oracle).double()
    sequences = CASES["targets inside shared stems"]
    logps = st.target_logprobs(model, st.build_tree(sequences), backend)
    expected = one_by_one(oracle, sequences)
    assert largest_error(logps, expected) < 1e-5
    assert relative_error(gradient(model, logps), gradient(oracle, expected)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_computes_as_training_does(tiny_base: Path, kind: str) -> None:
    """bitsandbytes' own layers do not: see model/quantized.py."""
    model = adapted(held(tiny_base, kind))
    tree = st.build_tree(CASES["a shared stem"])
    trained = st.target_logprobs(model.train(), tree)
    with torch.no_grad():
        first = st.target_logprobs(model.eval(), tree)
        again = st.target_logprobs(model.eval(), tree)
    assert torch.equal(trained.detach(), first) and torch.equal(first, again)
    assert gradient(model.train(), st.target_logprobs(model, tree)).abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_not_adapted_hand_gradients_down(tiny_base: Path, kind: str) -> None:
    base = held(tiny_base, kind)
    model = add_adapter(base, Adapter(r=4, dropout=0.0, target_modules="q_proj"), seed=0)
    st.target_logprobs(model, st.build_tree(CASES["a shared stem"])).sum().backward()
    norms = {n: float(p.grad.norm()) for n, p in trainable(model).items() if "lora_B" in n}
    assert len(norms) == 2 and all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    overrides = [f"model.quantization={kind}", "train.max_steps=12", "train.learning_rate=5e-3"]
    run = st.train(make_config(tmp_path, tiny_base, *overrides)).output_dir
    losses = [line["loss"] for line in steps_of(run)]
    assert losses[-1] < losses[0] - 0.1
    saved = json.loads((run / "adapter" / "stemtune.json").read_text())
    assert saved["model"]["quantization"] == kind


@pytest.mark.parametrize("double", [True, False])
def test_loftq_starts_as_the_best_approximation_of_what_is_lost(
    tmp_path: Path, tiny_base: Path, double: bool
) -> None:
    overrides = ["model.quantization=nf4", f"model.double_quantization={double}"]
    overrides += ["adapter.init_weights=loftq", "adapter.use_rslora=true"]
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *overrides))
    plain = held(tiny_base, None)
    packed = packed_layers(held(tiny_base, "nf4", double_quantization=double))
    tensors = {n: p.detach() for n, p in trainable(trainer.model).items()}
    trainer.folder.release()
    for name, layer in packed.items():
        prefix = f"base_model.model.{name}.lora_"
        update = tensors[f"{prefix}B.default.weight"] @ tensors[f"{prefix}A.default.weight"]
        lost = (plain.get_submodule(name).weight - layer.dense()).double()
        u, s, v = torch.linalg.svd(lost)
        best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
        left = (lost - update * 8 / 4**0.5).norm()
        assert left < 1.02 * (lost - best).norm() < lost.norm()


def test_loftq_without_the_base_as_it_was(tmp_path: Path, tiny_base: Path) -> None:
    from stemtune.model.loftq import start_from_residual

    model = add_adapter(held(tiny_base, "nf4"), Adapter(r=4), seed=0)
    with pytest.raises(ModelError, match=r"loftq can.t find the weight") as found:
        start_from_residual(model, tmp_path, 0)
    assert found.value.where == str(tmp_path)


# -- refused ----------------------------------------------------------------------------------


def with_quantization_config(folder: Path, base: Path, values: dict[str, Any]) -> Path:
    save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": values}))
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_base_that_comes_quantized_otherwise(
    tmp_path: Path, tiny_base: Path, method: str
) -> None:
    base = with_quantization_config(tmp_path / "base", tiny_base, {"quant_method": method})
    with pytest.raises(ModelError, match=f"the base comes quantized by {method}") as found:
        held(base, None)
    assert found.value.where == str(base)
    assert found.value.hint == "take the base as it was before, with model.quantization: nf4"


@pytest.mark.parametrize(
    ("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
def test_a_base_that_says_so_in_a_file_of_its_own(tmp_path: Path, file: str, method: str) -> None:
    """As the first tools wrote it."""
    save_tiny_model(tmp_path)
    (tmp_path / file).write_text('{"w_bit": 4}')
    with pytest.raises(ModelError, match=f"comes quantized by {method}"):
        held(tmp_path, None)


@pytest.mark.parametrize("what", ["check", "train"])
def test_before_the_data_are_prepared(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    base = with_quantization_config(tmp_path / "base", tiny_base, {"quant_method": "awq"})
    run_file = write_run_file(tmp_path, base)
    monkeypatch.setattr("stemtune.data.prepare.prepare", None)
    monkeypatch.setattr("stemtune.trainer.prepare", None)
    with pytest.raises(ModelError, match="comes quantized by awq"):
        if what == "check":
            check(run_file)
        else:
            st.train(st.load_config(run_file))


def test_a_base_that_comes_in_nf4(tmp_path: Path, tiny_base: Path) -> None:
    """As bitsandbytes saved it; it is trained on as it is, and not quantized once more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    ours, expected = (
        packed_layers(model)
        for model in (
            held(tmp_path / "base", None),
            held(tiny_base, "nf4", double_quantization=False),
        )
    )
    assert ours.keys() == expected.keys() and len(ours) == 14
    assert all(torch.equal(ours[n].dense(), expected[n].dense()) for n in ours)
    with pytest.raises(ConfigError, match="quantized already") as found:
        held(tmp_path / "base", "nf4")
    assert found.value.where == "model.quantization"
    with pytest.raises(ConfigError, match="can't be offloaded"):
        require_trainable(tmp_path / "base", Model(base="base", offload_layers=1))


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("model.quantization=nf4", "model.quantization"),
        ("train.optimizer=adamw_8bit", "train.optimizer"),
    ],
)
def test_without_bitsandbytes(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, override: str, where: str
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes") as found:
        st.Trainer(make_config(tmp_path, tiny_base, override))
    assert (found.value.where, found.value.hint) == (where, "pip install 'stemtune[quantized]'")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.quantization=nf4", "adapter.init_weights=pissa"], "not quantized"),
        (["adapter.init_weights=loftq"], "needs a model.quantization"),
        (
            ["model.quantization=nf4", "adapter.init_weights=loftq", "objective={type: dpo}"],
            "no reference",
        ),
        (["adapter.init_weights=pissa", "adapter.use_dora=true"], "exclude each other"),
        (["adapter.init_weights=pissa", "adapter.modules_to_save=[lm_head]"], "exclude each other"),
        (["model.quantization=int4"], "int4"),
    ],
)
def test_settings_that_exclude_each_other(
    tmp_path: Path, tiny_base: Path, overrides: list[str], text: str
) -> None:
    with pytest.raises(ConfigError) as found:
        make_config(tmp_path, tiny_base, *overrides)
    assert text in str(found.value)


def test_a_dora_adapter_on_a_quantized_base(tmp_path: Path) -> None:
    """PEFT's DoRA finds the dense weight of a packed layer: its first output is the base's."""
    save_tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    ids = torch.arange(9)[None]
    for kind in KINDS:
        base = held(tmp_path / "base", kind)
        expected = base(ids).logits
        model = add_adapter(base, Adapter(r=4, use_dora=True), seed=0).eval()
        assert largest_error(model(input_ids=ids).logits, expected) < 1e-4
        norms = base.get_submodule("model.layers.0.mlp.up_proj")
        dense = norms.get_base_layer().dense()
        magnitude = norms.lora_magnitude_vector["default"].weight
        assert largest_error(magnitude, dense.norm(dim=1)) < 1e-4
    overrides = ["model.quantization=nf4", "adapter.use_dora=true", "train.max_steps=2"]
    run = st.train(make_config(tmp_path, tmp_path / "base", *overrides)).output_dir
    assert any("magnitude" in name for name in adapter_of(run / "adapter"))


def test_dora_where_its_norms_would_be_wrong(tiny_base: Path) -> None:
    """32 columns end within a block of 64."""
    with pytest.raises(ConfigError, match="reads 4-bit weights of this width wrongly"):
        add_adapter(held(tiny_base, "nf4"), Adapter(r=4, use_dora=True), seed=0)


@pytest.mark.parametrize("shape", [(5, 6), (8, 100), (33, 96), (2, 32), (3, 64), (7, 130)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_that_end_within_a_block(kind: str, shape: tuple[int, int]) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=False)
    layer.load_state_dict({"weight": weight})
    dense = QuantizedLinear(layer.to("cpu"), torch.float32).dense()
    count = weight.numel()
    padded = torch.zeros(-(-count // BLOCK) * BLOCK)
    padded[:count] = weight.flatten()
    assert largest_error(dense, rounded(padded, kind)[:count].view(shape)) < 1e-6
