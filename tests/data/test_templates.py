"""Templates for bases that have none: what is trained, by text read with the eye."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import stemtune as st
from stemtune.data.records import Message
from stemtune.data.renderer import Renderer
from stemtune.errors import ConfigError, ModelError
from tests.models import save_tiny_model, tiny_tokenizer
from tests.runs import IGNORED, make_config

pytestmark = IGNORED
TALK = [
    Message("system", "You are Socrates."),
    Message("user", "What is virtue?"),
    Message("assistant", "I know not."),
    Message("user", "学而时习之？"),
    Message("assistant", "不亦说乎"),
]
WRITTEN = {
    "chatml": (
        "<|im_start|>system\nYou are Socrates.<|im_end|>\n"
        "<|im_start|>user\nWhat is virtue?<|im_end|>\n"
        "<|im_start|>assistant\nI know not.<|im_end|>\n"
        "<|im_start|>user\n学而时习之？<|im_end|>\n"
        "<|im_start|>assistant\n",
        "不亦说乎<|im_end|>",
    ),
    "dialogue": (
        "You are Socrates.\n\nUser: What is virtue?\nAssistant: I know not.<|im_end|>\n"
        "User: 学而时习之？\nAssistant:",
        " 不亦说乎<|im_end|>",
    ),
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    without = tiny_tokenizer()
    without.chat_template = None
    return without


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_trained(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    prompt, answer = WRITTEN[name]
    renderer = Renderer(tokenizer, name)
    ids = renderer.prompt(TALK[:-1])
    assert tokenizer.decode(ids) == prompt
    assert ids == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(renderer.answer(TALK, ids)) == answer
    assert renderer.stop_ids() == {tokenizer.eos_token_id}


@pytest.mark.parametrize("name", ["dialogue", "folk.jinja"])
def test_it_travels_with_the_adapter(tmp_path: Path, name: str) -> None:
    save_tiny_model(tmp_path / "base")
    AutoTokenizer.from_pretrained(tmp_path / "base")
    for path in (tmp_path / "base").glob("*.jinja"):
        path.unlink()
    text = "{% for m in messages %}{{ m.role + '> ' + m.content + eos_token }}{% endfor %}"
    (tmp_path / "folk.jinja").write_text(text + "{% if add_generation_prompt %}me>{% endif %}")
    run = st.train(
        make_config(tmp_path, tmp_path / "base", f"data.template={name}", "train.max_steps=2")
    ).output_dir
    saved = AutoTokenizer.from_pretrained(run / "adapter")
    written = saved.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert written == ("User: Hi\n" if name == "dialogue" else "user> Hi<|im_end|>")
    from stemtune.chat import Chat
    from stemtune.generate import Sampling

    chat = Chat(run, Sampling(temperature=0, max_new_tokens=2))
    prompt = chat.renderer.tokenizer.decode(chat.renderer.prompt([Message("user", "Hi")]))
    assert prompt == ("User: Hi\nAssistant:" if name == "dialogue" else "user> Hi<|im_end|>me>")


def test_a_base_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="the base has no chat template") as found:
        Renderer(tokenizer, "chat")
    assert "chatml, dialogue, plain or a file" in found.value.hint


def test_chatml_without_its_tokens() -> None:
    bare = tiny_tokenizer()
    plain = PreTrainedTokenizerFast(
        tokenizer_object=type(bare.backend_tokenizer).from_str(
            bare.backend_tokenizer.to_str().replace("<|im_end|>", "</s>")
        ),
        eos_token="</s>",
    )
    with pytest.raises(ModelError, match=r"no <\|im_end\|>"):
        Renderer(plain, "chatml")
    assert Renderer(plain, "dialogue").stop_ids() == {plain.eos_token_id}


@pytest.mark.parametrize("value", ["alpaca", "chat-ml", "nowhere.jinja"])
def test_a_template_that_is_none(tmp_path: Path, tiny_base: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"none of chat, chatml|can't read the template"):
        make_config(tmp_path, tiny_base, f"data.template={value}")
