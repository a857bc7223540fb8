"""Variants of LoRA, and layers that are trained whole: PEFT alone reads what they leave behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import stemtune as st
from stemtune.config import Adapter
from stemtune.errors import ConfigError
from stemtune.model.adapter import add_adapter, trainable
from stemtune.model.serving import serving_notes
from stemtune.model.targets import find_targets
from tests.models import save_tiny_model, tiny_model
from tests.runs import IGNORED, adapter_of, make_config, run_info, steps_of
from tests.trees import CASES, gradient, largest_error, one_by_one, relative_error

pytestmark = IGNORED
IDS = torch.arange(9)[None]


def by_peft(base: Path, adapter: Path) -> Tensor:
    """Logits of transformers and PEFT, with nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=IDS).logits


def train(folder: Path, base: Path, *overrides: str) -> st.Trainer:
    settings = ["train.max_steps=4", "train.learning_rate=0.01", *overrides]
    trainer = st.Trainer(make_config(folder, base, *settings))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter.use_rslora=true"],
        ["adapter.use_dora=true"],
        ["adapter.init_weights=pissa"],
        ["adapter.init_weights=pissa", "adapter.use_rslora=true"],
        ["adapter.modules_to_save=[lm_head]"],
        ["adapter.modules_to_save=[lm_head, embed_tokens]"],
        ["adapter.modules_to_save=[norm]"],
        ["adapter.target_modules=[layers.1.mlp.*, q_proj]"],
    ],
    ids=str,
)
def test_peft_alone_gives_the_same_logits(
    tmp_path: Path, tiny_base: Path, overrides: list[str]
) -> None:
    trainer = train(tmp_path, tiny_base, *overrides)
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=IDS).logits
        theirs = by_peft(tiny_base, tmp_path / "run" / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)(IDS).logits
    assert largest_error(ours, theirs) < 1e-5
    assert largest_error(ours, base) > 1e-2


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["segments", "padded"])
def test_exact(overrides: dict[str, Any], backend: str) -> None:
    """Against PEFT's own layers, in float64, one sequence at a time."""
    model = add_adapter(tiny_model("llama"), Adapter(r=4, dropout=0.0, **overrides), seed=0)
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules=find_targets(tiny_model("llama"), "auto"), **overrides
    )
    oracle = get_peft_model(tiny_model("llama", attn_implementation="eager"), config)
    generator = torch.Generator().manual_seed(1)
    copies = dict(oracle.named_parameters())
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            copies[name].copy_(parameter)
    sequences = CASES["targets inside shared stems"]
    expected = one_by_one(oracle.double().eval(), sequences)
    logps = st.target_logprobs(model.eval(), st.build_tree(sequences), backend)
    assert largest_error(logps, expected) < 1e-5
    assert relative_error(gradient(model, logps), gradient(oracle, expected)) < 1e-5


# -- PiSSA ------------------------------------------------------------------------------------


def test_pissa_starts_from_the_principal_components() -> None:
    """A and B are the best approximation of the weight, the base is what it leaves, and together
    they are the base as it was."""
    plain = tiny_model("llama")
    model = add_adapter(tiny_model("llama"), Adapter(r=4, alpha=8, init_weights="pissa"), seed=0)
    parameters = dict(model.named_parameters())
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        weight = plain.get_submodule(name).weight.double()
        u, s, v = torch.linalg.svd(weight)
        best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
        prefix = f"base_model.model.{name}."
        a, b = (parameters[f"{prefix}lora_{x}.default.weight"].double() for x in "AB")
        assert relative_error(2 * b @ a, best) < 1e-5
        assert relative_error(parameters[f"{prefix}base_layer.weight"], weight - best) < 1e-5
    assert largest_error(model.eval()(input_ids=IDS).logits, plain(IDS).logits) < 1e-4
    assert not any(".start." in name for name in trainable(model))


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_pissa_compares_with_the_base_as_it_was(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    rows = [{"prompt": f"{w}?", "chosen": f"the {w}", "rejected": "no"} for w in ("sea", "rope")]
    from tests.runs import write_run_file

    run_file = write_run_file(tmp_path, tiny_base, rows)
    overrides = [f"objective={{type: dpo, reference: {kind}}}", "train.max_steps=3"]
    overrides += ["adapter.init_weights=pissa", "train.learning_rate=0.01"]
    run = st.train(st.load_config(run_file, overrides)).output_dir
    losses = [line["loss"] for line in steps_of(run)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6) and losses[2] < 0.69
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (8, 16, True)


# -- targets ----------------------------------------------------------------------------------


def test_patterns() -> None:
    model = tiny_model("llama")
    assert find_targets(model, "*_proj") == find_targets(model, "auto")
    assert find_targets(model, "all-linear") == find_targets(model, "auto")
    assert find_targets(model, ["self_attn.[qv]_proj"]) == ["q_proj", "v_proj"]
    assert find_targets(model, ["layers.1.self_attn.q_proj", "layers.0.mlp.u*"]) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    with pytest.raises(ConfigError, match=r"no linear layer is named 'layers.2.\*'"):
        find_targets(model, ["q_proj", "layers.2.*"])


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "qwen3_moe"])
@pytest.mark.parametrize("wanted", ["auto", "all-linear"])
def test_experts_are_left_alone(family: str, wanted: str) -> None:
    """Whatever else a block or a shared expert has by the names of theirs: PEFT takes these for
    the experts, and neither drops out nor knows DoRA there."""
    adapter = Adapter(r=4, dropout=0.1, use_dora=True, target_modules=wanted)
    model = add_adapter(tiny_model(family), adapter, seed=0)
    lora: Any = model.peft_config["default"]
    assert not lora.target_parameters
    assert not any(".experts." in name for name in trainable(model))


@pytest.mark.parametrize("wanted", ["gate_proj", ["shared_experts.*", "q_a_proj"], "*_proj"])
def test_what_peft_takes_for_experts_is_refused(wanted: str | list[str]) -> None:
    with pytest.raises(ConfigError, match=r"PEFT takes .*gate_proj.* for the experts") as found:
        find_targets(tiny_model("deepseek_v3"), wanted)
    assert found.value.where == "adapter.target_modules"
    assert "q_a_proj" in found.value.hint and "gate_proj" not in found.value.hint


def test_a_whole_name_is_that_layer_alone() -> None:
    adapter = Adapter(r=4, target_modules=["layers.1.self_attn.q_proj"])
    assert set(trainable(add_adapter(tiny_model("llama"), adapter, seed=0))) == {
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"
    }


def test_an_unknown_module_to_save() -> None:
    with pytest.raises(ConfigError, match="the base has no 'lm_haed'") as found:
        add_adapter(tiny_model("llama"), Adapter(modules_to_save=["lm_haed"]), seed=0)
    assert found.value.where == "adapter.modules_to_save"
    assert found.value.hint == "it has embed_tokens, lm_head, norm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_whole_is_fp32(dtype: torch.dtype) -> None:
    adapter = Adapter(r=4, modules_to_save=["lm_head", "embed_tokens"])
    parameters = trainable(add_adapter(tiny_model("llama").to(dtype), adapter, seed=0))
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert sum("modules_to_save" in name for name in parameters) == 2


def test_a_tied_head_is_one_matrix(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    overrides = ["adapter.modules_to_save=[embed_tokens]"]
    trainer = train(tmp_path, tmp_path / "base", *overrides)
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=IDS).logits
    assert largest_error(ours, by_peft(tmp_path / "base", tmp_path / "run" / "adapter")) < 1e-5


def test_layers_that_no_gradient_reaches_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Mamba's kernels read the weights of dt_proj themselves."""
    save_tiny_model(tmp_path / "base", "mamba")
    train(tmp_path / "auto", tmp_path / "base", "model.attention=auto")
    assert "get no gradient" not in caplog.text
    overrides = ["model.attention=auto", "adapter.target_modules=[in_proj, dt_proj]"]
    train(tmp_path / "named", tmp_path / "base", *overrides)
    assert "4 of 8 trained weights get no gradient, the first is" in caplog.text


# -- what engines refuse ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.use_dora=true"], ["vLLM", "llama.cpp", "DoRA"]),
        (["adapter.modules_to_save=[lm_head]"], ["vLLM", "llama.cpp", "lm_head"]),
        (["adapter.use_rslora=true"], ["llama.cpp", "scale"]),
        (["adapter.r=520"], ["vLLM", "512"]),
        (["adapter.init_weights=loftq", "model.quantization=nf4"], ["rounded base"]),
        (["adapter.r=16"], []),
    ],
)
def test_what_an_engine_would_refuse_is_said_before(
    tmp_path: Path,
    tiny_base: Path,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
    words: list[str],
) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *overrides))
    trainer.folder.release()
    said = [record.message for record in caplog.records if "serving" in record.message]
    assert bool(said) == bool(words)
    assert all(word in said[0] for word in words)


def test_the_rank_that_pissa_leaves() -> None:
    """Twice that of training: an engine has to take so much."""
    assert serving_notes(Adapter(r=256, init_weights="pissa")) == []
    assert "512" in serving_notes(Adapter(r=257, init_weights="pissa"))[0]


# -- optimizers -------------------------------------------------------------------------------


def test_loraplus(tmp_path: Path, tiny_base: Path) -> None:
    """AdamW's first step moves each weight by its learning rate: B's is four times A's. A's own
    gradient is zero then, since B is."""
    overrides = ["train.max_steps=1", "train.warmup_ratio=0", "train.learning_rate=0.001"]
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *overrides, "train.loraplus_lr_ratio=4"))
    rates = {
        name: group["lr_ratio"]
        for group in trainer.optimizer.param_groups
        for name, p in trainer.parameters.items()
        if any(p is one for one in group["params"])
    }
    assert {("lora_B" in name, ratio) for name, ratio in rates.items()} == {(True, 4), (False, 1)}
    assert len(rates) == len(trainer.parameters)
    trainer.train()
    moved = adapter_of(tmp_path / "run" / "adapter")
    b = torch.cat([t.flatten() for name, t in moved.items() if "lora_B" in name]).abs()
    assert float(b.median()) == pytest.approx(0.004, rel=1e-3)
    assert [line["lr"] for line in steps_of(tmp_path / "run")] == [0.001]


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_other_optimizers_go_the_same_way(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    overrides = ["adapter.r=128", "train.max_steps=8"]  # 8 bits begin at 4,096 values
    plain = train(tmp_path / "plain", tiny_base, *overrides)
    other = train(tmp_path / "other", tiny_base, *overrides, f"train.optimizer={kind}")
    ours, theirs = (
        torch.tensor([line["loss"] for line in steps_of(Path(t.config.output.dir))])
        for t in (other, plain)
    )
    assert largest_error(ours, theirs) < (1e-4 if kind == "paged_adamw" else 0.05)
    assert not torch.equal(ours, theirs) or kind == "paged_adamw"
    state = next(iter(other.optimizer.state.values()))
    assert (state["state1"].dtype == torch.uint8) == kind.endswith("8bit")
    assert run_info(tmp_path / "other" / "run")["state"] == "done"
