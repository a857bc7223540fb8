"""The adapter's layers against PEFT's own: the same weights, values and gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from stemtune.kernels.dropout import Dropout, next_seed
from stemtune.model.lora import FastLoraLinear, use_fast_layers
from tests.kernels.test_dropout import stays_of
from tests.models import tiny_model
from tests.runs import IGNORED
from tests.trees import relative_error

pytestmark = IGNORED
IDS = torch.arange(24)[None] % 64


def pair(family: str = "qwen3", dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """The same model twice: with our layers, and with PEFT's."""
    models: list[Any] = []
    for ours in (True, False):
        base = tiny_model(family).to(dtype).requires_grad_(False)
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        config = LoraConfig(**{**settings, **options}, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = get_peft_model(base, use_fast_layers(config) if ours else config)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        if not ours:
            drop_as_ours(model)
        models.append(model)
    return models


class DropAsOurs(nn.Module):
    """Written out: what is not dropped is divided by how likely it is to stay."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        dropout = Dropout.of(self.rate, next_seed())
        stays = stays_of(x, dropout).double()
        return (x.double() * stays / (1 - dropout.rate)).to(x.dtype)


def drop_as_ours(model: Any) -> None:
    for layer in layers(model):
        for name, module in layer.lora_dropout.items():
            if isinstance(module, nn.Dropout):
                layer.lora_dropout[name] = DropAsOurs(module.p)


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def logits_and_gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(2)  # the same dropout for both
    half = model.get_base_model().dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(input_ids=IDS, use_cache=False).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = torch.log_softmax(logits.float(), -1)[0, :-1].gather(1, IDS[0, 1:, None]).mean()
    return logits.detach(), list(torch.autograd.grad(loss, trained))


def assert_equal(models: list[Any], bound: float) -> None:
    (logits, gradients), (expected, wanted) = map(logits_and_gradients, models)
    assert logits.dtype == expected.dtype
    assert relative_error(logits.float(), expected.float()) < bound
    ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, wanted))
    assert relative_error(ours, theirs) < bound


def distances(found: Any, truth: Any) -> tuple[float, float]:
    """Of logits and of all gradients."""
    parts = [
        (x[0].double(), torch.cat([g.flatten() for g in x[1]]).double()) for x in (found, truth)
    ]
    return relative_error(parts[0][0], parts[1][0]), relative_error(parts[0][1], parts[1][1])


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "phi"])  # phi's layers have a bias
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
def test_the_same_numbers(family: str, dropout: float, training: bool) -> None:
    """PEFT's; with dropout, where two roundings differ more, as near to float64 as PEFT's are."""
    models = [model.train(training) for model in pair(family, lora_dropout=dropout)]
    assert {type(layer) for layer in layers(models[0])} == {FastLoraLinear}
    assert {type(layer) for layer in layers(models[1])} == {Linear}
    if not (dropout and training):
        assert_equal(models, 2e-6)
        return
    ours, theirs = map(logits_and_gradients, models)
    truth = logits_and_gradients(models[1].double())
    assert truth[0].dtype == torch.float64
    for error, of_peft in zip(distances(ours, truth), distances(theirs, truth), strict=True):
        assert 0 < error < min(1.5 * of_peft, 5e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_bfloat16(dropout: float) -> None:
    """Both round; neither is nearer to the other than both are to the same weights in float64."""
    assert_equal([m.train() for m in pair(dtype=torch.bfloat16, lora_dropout=dropout)], 5e-2)


def test_bfloat16_is_nearer_to_the_truth_than_pefts() -> None:
    """One rounding less for each layer."""
    ours, theirs = pair(dtype=torch.bfloat16)
    truth = pair(dtype=torch.bfloat16)[1].double()
    exact = logits_and_gradients(truth)[0]
    errors = [relative_error(logits_and_gradients(m)[0].double(), exact) for m in (ours, theirs)]
    assert errors[0] < 1.2 * errors[1]


def test_a_base_in_bfloat16_without_autocast_is_pefts_own() -> None:
    """Its adapter is computed in fp32 there."""
    models = pair(dtype=torch.bfloat16)
    found = [model(input_ids=IDS, use_cache=False).logits for model in models]
    assert torch.equal(*found)


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def with_two(model: Any) -> Any:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("change", [merged, with_two], ids=["merged", "two adapters"])
@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_left_to_peft(change: Callable[[Any], Any], gradient: bool) -> None:
    models = [change(model) for model in pair()]
    with torch.set_grad_enabled(gradient):
        logits = [model(input_ids=IDS, use_cache=False).logits for model in models]
    assert relative_error(*logits) < 2e-6


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_variants(options: dict[str, bool]) -> None:
    models = pair("phi" if "lora_bias" in options else "qwen3", **options)
    if "lora_bias" in options:
        for model in models:
            for name, parameter in model.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.data.fill_(0.5)
    assert_equal(models, 2e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_switched_off_it_is_the_base(gradient: bool) -> None:
    ours, _ = pair()
    with torch.set_grad_enabled(gradient), ours.disable_adapter():
        logits = ours(input_ids=IDS, use_cache=False).logits
    assert relative_error(logits, tiny_model("qwen3")(input_ids=IDS).logits) < 2e-6


def test_the_first_layers_input_needs_no_gradient() -> None:
    """Nothing below the first adapted layer is trained: the products there are not computed."""
    ours, _ = pair()
    first = layers(ours)[0]
    x = torch.randn(40, first.in_features)
    result = first(x)
    gradients = torch.autograd.grad(result.sum(), [first.lora_A["default"].weight])
    assert not x.requires_grad and gradients[0].abs().sum() > 0


class Quantized(nn.Linear):
    """A layer whose weight is not what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_another_kind_of_linear_layer_is_left_to_peft() -> None:
    base = nn.Sequential(Quantized(8, 8), nn.Linear(8, 8))
    config = use_fast_layers(LoraConfig(r=2, target_modules=["0", "1"]))
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    assert [type(layer) for layer in layers(model)] == [Linear, FastLoraLinear]


def test_the_file_is_pefts_own(tmp_path: Path) -> None:
    ours, theirs = pair()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("ours", "theirs")]
    assert files[0] == files[1]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    again = PeftModel.from_pretrained(tiny_model("qwen3"), str(tmp_path / "ours"))
    logits = [model.eval()(input_ids=IDS, use_cache=False).logits for model in (again, theirs)]
    assert torch.equal(*logits)
