"""LoRA: which layers, which dtype, from which seed."""

import pytest
import torch

from stemtune.config import Adapter
from stemtune.errors import ConfigError
from stemtune.model.adapter import add_adapter, trainable
from stemtune.model.targets import find_targets
from tests.models import tiny_model
from tests.runs import IGNORED

pytestmark = IGNORED
LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", LLAMA),
        ("qwen3", LLAMA),
        ("glm", ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]),
        ("phi", ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]),
    ],
)
def test_auto_is_every_linear_layer_but_the_head(family: str, expected: list[str]) -> None:
    assert find_targets(tiny_model(family), "auto") == expected


@pytest.mark.parametrize("wanted", ["v_proj", ["v_proj"]])
def test_targets_by_name(wanted: str | list[str]) -> None:
    assert find_targets(tiny_model("llama"), wanted) == ["v_proj"]


@pytest.mark.parametrize("wanted", ["v_prj", ["v_prj"], ["q_proj", "v_prj"], ["lm_head.v_prj"]])
def test_an_unknown_target(wanted: str | list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no linear layer is named '.*v_prj'") as raised:
        find_targets(tiny_model("llama"), wanted)
    assert raised.value.where == "adapter.target_modules"
    assert raised.value.hint == f"this base has {', '.join(LLAMA)}; or use auto"


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_head_and_embeddings_are_trained_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: head and embeddings are no targets") as raised:
        find_targets(tiny_model("llama"), ["q_proj", name])
    assert raised.value.hint == f"adapter.modules_to_save: [{name}] trains them whole"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adapter_is_fp32(dtype: torch.dtype) -> None:
    model = add_adapter(tiny_model("llama").to(dtype), Adapter(r=4), seed=0)
    parameters = trainable(model)
    assert len(parameters) == 2 * 7 * 2  # layers, their linear parts, A and B
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {dtype}
    assert all("lora_" in name for name in parameters)


def test_settings_reach_peft() -> None:
    config = Adapter(r=3, alpha=7, dropout=0.25, target_modules=["q_proj"])
    lora = add_adapter(tiny_model("llama"), config, seed=0).peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (3, 7, 0.25)
    assert lora.target_modules == {"q_proj"}


@pytest.mark.parametrize("family", ["llama", "glm", "phi"])
def test_the_upper_blocks(family: str) -> None:
    """PEFT's own layers of the last block alone; nothing below it needs a gradient."""
    model = add_adapter(tiny_model(family), Adapter(r=4, layers=1), seed=0)
    adapted = {name.split("layers.")[1].split(".")[0] for name in trainable(model)}
    assert adapted == {"1"}
    seen: list[bool] = []
    blocks = model.get_base_model().get_decoder().layers
    blocks[0].register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    blocks[1].register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    model(input_ids=torch.arange(5)[None])
    assert seen == [False, True]


def test_as_many_blocks_as_there_are_is_all_of_them() -> None:
    every = set(trainable(add_adapter(tiny_model("llama"), Adapter(r=4), seed=0)))
    assert set(trainable(add_adapter(tiny_model("llama"), Adapter(r=4, layers=2), seed=0))) == every


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(
        ConfigError, match="3 blocks are to be adapted, and the base has 2"
    ) as found:
        add_adapter(tiny_model("llama"), Adapter(r=4, layers=3), seed=0)
    assert (found.value.where, found.value.hint) == ("adapter.layers", "at most 2")


def test_it_begins_as_the_base_and_by_its_seed() -> None:
    ids = torch.arange(9)[None]
    expected = tiny_model("llama")(ids).logits
    starts = []
    for seed in (1, 1, 2):
        model = add_adapter(tiny_model("llama"), Adapter(), seed)
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
        starts.append(torch.cat([p.detach().flatten() for p in trainable(model).values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
