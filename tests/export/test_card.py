"""Model cards: word by word, and that they name nothing of this machine."""

import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from stemtune.config import Adapter, Config, Data, Dpo, Memories, Model, Output, Sft, Source
from stemtune.export.card import Known, adapter_card, merged_card
from stemtune.export.curves import MOST, pictures, ticks
from stemtune.resume import training_settings

GOLDEN = Path(__file__).parent / "golden"
HOME = "/home/somebody"
CONFIG = Config(
    model=Model(base="Qwen/Qwen3-0.6B", revision="abc123", dtype="bfloat16", device="cuda"),
    data=Data(
        path=[f"{HOME}/rows|1.jsonl", Source(path="owner/dialogues")],
        system="You are Hamlet.\n```no fence ends here```",
        samples="turn",
        memories=Memories(path=f"{HOME}/memories.txt"),
        license="cc-by-4.0",
    ),
    output=Output(dir=f"{HOME}/runs/hamlet", push_to_hub="me/dane", license="apache-2.0"),
)
INFO: dict[str, Any] = {
    "host": "somebodys-machine",
    "versions": {"python": "3.11.9", "stemtune": "0.1.0"},
    "base": {"name": "Qwen/Qwen3-0.6B", "weights": "f00d"},
    "steps": 40,
    "data": [
        {"file": "rows|1.jsonl", "sha256": "5ba1", "rows": 1200},
        {"dataset": "owner/dialogues", "split": "train", "rows": 80},
    ],
    "ledger": {
        "formats": {"dialogue": 1200, "messages": 80},
        "num_refused": 3,
        "refused": [{"place": f"{HOME}/rows.jsonl:1"}],
        "train_records": 1100,
        "eval_records": 177,
    },
}


def lines(steps: int = 40) -> list[dict[str, Any]]:
    """Of a run: a line a step, one evaluation before the first and two later."""
    evaluated = [
        {"step": 0, "eval_loss": 3.5, "eval_perplexity": 33.115, "eval_targets": 900},
        {"step": 20, "eval_loss": 2.5, "eval_perplexity": 12.182, "eval_targets": 900},
        {"step": 40, "eval_loss": 2.75, "eval_perplexity": 15.643, "eval_targets": 900},
    ]
    sizes = {"tokens": 3000, "distinct_tokens": 1200, "seconds": 6.0}
    return [*evaluated, *({"step": n + 1, "loss": 3 / (n + 1), **sizes} for n in range(steps))]


def known(config: Config = CONFIG, info: dict[str, Any] = INFO, step: int = 20) -> Known:
    return Known(config, info, lines(), step)


def changed(**sections: Any) -> Config:
    return CONFIG.model_copy(update=sections)


# -- word by word -----------------------------------------------------------------------------


def test_the_whole_card() -> None:
    assert adapter_card(known()) == (GOLDEN / "card.md").read_text(encoding="utf-8")


def test_the_whole_card_of_a_merged_model() -> None:
    prompt = {"system": CONFIG.data.system, "template": "chat"}
    card = merged_card(adapter_card(known()), prompt)
    assert card == (GOLDEN / "merged.md").read_text(encoding="utf-8")


def test_what_the_hub_reads_of_it() -> None:
    data = ModelCard(adapter_card(known())).data.to_dict()
    assert data == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "datasets": ["owner/dialogues"],
        "tags": ["lora", "sft", "stemtune"],
    }
    data = ModelCard(merged_card(adapter_card(known()), {})).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "finetune")


@pytest.mark.parametrize("base", [f"{HOME}/models/tiny", f"{HOME}/tiny.gguf"])
def test_a_base_that_others_do_not_find(base: str) -> None:
    card = adapter_card(known(changed(model=Model(base=base))))
    assert "base_model" not in ModelCard(card).data.to_dict()  # the Hub would refuse it
    assert f"`{Path(base).name}`" in card and "SHA-256 `f00d`" in card


def test_nothing_of_this_machine() -> None:
    local = changed(
        model=Model(base=f"{HOME}/models/tiny"),
        adapter=Adapter(init_from=f"{HOME}/runs/before"),
        output=Output(dir=f"{HOME}/runs/hamlet"),
    )
    for config in (CONFIG, local):
        card = adapter_card(known(config))
        assert HOME not in card and "somebody" not in card
        assert "[More Information Needed]" not in card


def test_no_token() -> None:
    token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
    data = CONFIG.data.model_copy(update={"system": f"My token is {token}"})
    assert token not in adapter_card(known(changed(data=data)))


# -- what is said where -----------------------------------------------------------------------


def test_before_a_run() -> None:
    """A card can be written before there is anything to say."""
    bare = Config(data=Data(path="rows.jsonl"), output=Output(dir="runs/x"))
    card = adapter_card(Known(bare, {}, [], 0))
    assert "# x" in card and "SmolLM2" in card
    assert "## Evaluation" not in card and "## Data" not in card


@pytest.mark.parametrize(
    ("adapter", "rank"),
    [
        ({"r": 1}, 1),
        ({"r": 4}, 8),
        ({"r": 8}, 8),
        ({"r": 24}, 32),
        ({"r": 300}, 320),
        ({"r": 512}, 512),
        ({"r": 513}, None),
        ({"r": 8, "init_weights": "pissa"}, 16),  # it is saved with twice the rank
        ({"r": 300, "init_weights": "pissa"}, None),
        ({"use_dora": True}, None),
        ({"init_weights": "loftq"}, None),
        ({"modules_to_save": ["lm_head"]}, None),
    ],
)
def test_engines_that_take_it(adapter: dict[str, Any], rank: int | None) -> None:
    card = adapter_card(known(changed(adapter=Adapter(**adapter))))
    assert ("--enable-lora" in card) == (rank is not None)
    assert (f"--max-lora-rank {rank} " in card) == (rank is not None)
    assert ("vllm serve dane-merged" in card) == (rank is None)
    assert "stemtune export gguf dane" in card  # of which it makes whole models, too
    loftq = adapter.get("init_weights") == "loftq"
    refused = "use_dora" in adapter or "modules_to_save" in adapter or loftq
    assert ("--adapter-only" in card) != refused


def test_a_converted_base_is_named_as_such() -> None:
    info = {**INFO, "base": {"name": "THUDM/chatglm3-6b", "converted": True}}
    card = adapter_card(known(changed(model=Model(base="THUDM/chatglm3-6b")), info))
    assert 'from_pretrained("path/to/chatglm3-6b-converted"' in card and "save_converted" in card


def test_preferences() -> None:
    config = changed(objective=[Dpo(beta=0.2), Sft(weight=0.5)])
    more = {"eval_rewards_accuracy": 0.75, "eval_loss/rows.jsonl": 1.0}
    told = [{"step": 0, "eval_loss": 0.6931}, {"step": 20, "eval_loss": 0.5, **more}]
    card = adapter_card(Known(config, INFO, told, 20))
    assert "dpo (beta 0.2); sft (weight 0.5)" in card
    assert "| rewards accuracy | – | 0.75 |" in card and "loss/rows" not in card


def test_a_licence_is_no_setting_of_training() -> None:
    """It may be added, and the run goes on."""
    assert "data.license" not in training_settings(CONFIG)


def test_nothing_shared() -> None:
    sizes = {"tokens": 300, "distinct_tokens": 300, "seconds": 1.0}
    card = adapter_card(Known(CONFIG, INFO, [{"step": 1, "loss": 1.0, **sizes}], 1))
    assert "300 tokens of training; no two answers shared any. 1 steps took 1 seconds" in card


def test_plain_text_has_no_chat() -> None:
    data = CONFIG.data.model_copy(update={"template": "plain", "system": None, "memories": None})
    card = adapter_card(known(changed(data=data)))
    assert "apply_chat_template" not in card and "--chat-template" not in card
    assert "## The character" not in card


def test_the_python_in_it_is_python() -> None:
    for system in (CONFIG.data.system, "'\"\\\n"):
        data = CONFIG.data.model_copy(update={"system": system})
        card = adapter_card(known(changed(data=data)))
        for text in (card, merged_card(card, {"system": system})):
            fence, code = re.findall(r"^(`+)python\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)[0]
            assert f'"content": {json.dumps(system)}' in code and len(fence) >= 3
            compile(code, "card", "exec")


@pytest.mark.parametrize("card", ["", "# Mine\n\nBy hand.\n", "---\nlicense: mit\n---\n# Mine\n"])
def test_a_merged_model_of_any_card(card: str) -> None:
    merged = merged_card(card, {})
    assert ModelCard(merged).data.to_dict()["library_name"] == "transformers"
    assert ("By hand." in merged) == ("By hand." in card)
    assert merged.count("## How to use it") == 1


# -- pictures ---------------------------------------------------------------------------------


def pixels(content: bytes) -> dict[tuple[int, int, int], int]:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return {colour: count for count, colour in image.getcolors(1 << 24)}


def test_pictures_show_both_curves() -> None:
    found = pictures(lines())
    assert list(found) == ["loss.png"]
    shown = pixels(found["loss.png"])
    assert shown[0x7A, 0xA7, 0xD9] > 300 and shown[0x2F, 0x9E, 0x5B] > 300
    without = pictures([line for line in lines() if "loss" in line])
    assert (0x2F, 0x9E, 0x5B) not in pixels(without["loss.png"])


def test_a_curve_falls_where_its_values_fall() -> None:
    """The columns of training's colour go down from left to right."""
    told = [{"step": n, "loss": 10.0 - n} for n in range(10)]
    image = Image.open(io.BytesIO(pictures(told)["loss.png"])).convert("RGB")
    rows = []
    for x in range(150, 1100, 100):
        # Blue is above red in it by more than in all else that is drawn.
        column = [image.getpixel((x, y)) for y in range(80, 440)]
        rows.append(max(range(360), key=lambda y: column[y][2] - column[y][0]))
    steps = [b - a for a, b in pairwise(rows)]
    assert min(steps) > 0 and max(steps) - min(steps) < 6  # a straight line


def test_no_picture_of_too_little() -> None:
    assert pictures([]) == {} and pictures([{"step": 1, "loss": 1.0}]) == {}
    assert pictures([{"step": 1, "loss": None}, {"step": 2, "loss": math.nan}]) == {}


def test_a_long_run_is_averaged() -> None:
    told = [{"step": n, "loss": 1.0 + n % 2} for n in range(50 * MOST)]
    shown = pixels(pictures(told)["loss.png"])
    assert shown[0x7A, 0xA7, 0xD9] < 12_000  # a line, not a band between 1 and 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 10.0], [0, 2, 4, 6, 8, 10]),
        ([2.1, 3.9], [2.0, 2.5, 3.0, 3.5, 4.0]),
        ([5.0, 5.0], [5.0, 6.0]),
        ([0.0, 0.0], [0.0, 0.2]),
    ],
)
def test_ticks(values: list[float], expected: list[float]) -> None:
    assert ticks(values) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[-3e-5, 2e-6], [1e9, 1e12], [0.001, 0.0011], [-5, 5]])
def test_ticks_lie_around_all_values(values: list[float]) -> None:
    found = ticks(values)
    assert found[0] <= min(values) and found[-1] >= max(values) and 2 <= len(found) <= 10
