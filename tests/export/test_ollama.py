"""Modelfiles: read as Ollama reads them, their templates run as Go runs them."""

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from stemtune.data.renderer import Renderer
from stemtune.errors import ConfigError, ModelError
from stemtune.export.gguf import read_run
from stemtune.export.ollama import export_ollama, modelfile, template_of
from tests.data.templates import tokenizer_of
from tests.export import go
from tests.export.llamacpp import loaded
from tests.export.test_gguf import as_messages, write_run
from tests.models import save_tiny_model, tiny_tokenizer
from tests.runs import IGNORED

pytestmark = IGNORED
PROMPTS = [
    [("user", "What is virtue?")],
    [("system", "You are Socrates."), ("user", "Who?\n\n你好 {{ .Content }}")],
    [("user", "Who?"), ("assistant", 'I, "too".'), ("user", "Why {% x %}?")],
    [("system", "s {{ end }}"), ("user", "a"), ("assistant", "b 🦉"), ("user", "c")],
    [
        ("system", "s"),
        *[(r, f"{r} {i}") for i in range(3) for r in ("user", "assistant")],
        ("user", "?"),
    ],
    [("system", "s"), ("assistant", "I greet you."), ("user", "And I you.")],
    [("assistant", "I greet you."), ("user", "And I you.")],
]


def rendered(tokenizer: Any, turns: list[tuple[str, str]]) -> str:
    return tokenizer.apply_chat_template(
        as_messages(turns), tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("family", "prompts"),
    [
        ("chatml", 7),
        ("qwen3", 7),
        ("qwen3_hybrid", 7),
        ("llama3", 7),
        ("phi", 7),
        ("glm4", 7),
        ("mistral", 5),
        ("mistral_v1", 5),
        ("gemma", 2),
        ("gemma3", 5),
    ],
)
def test_a_template_says_in_go_what_it_says_in_jinja(family: str, prompts: int) -> None:
    """Of as many of the conversations as the family's own template takes; what begins every text is
    left to llama.cpp."""
    tokenizer: Any = tokenizer_of(family)
    template = template_of(Renderer(tokenizer, "chat"), "x")
    begins = tokenizer.bos_token or ""
    taken = 0
    for turns in PROMPTS:
        try:
            expected = rendered(tokenizer, turns)
        except TemplateError:
            continue
        assert go.render(template, turns) == expected.removeprefix(begins)
        taken += 1
    assert taken == prompts


@pytest.mark.parametrize("name", ["chatml", "dialogue"])
def test_stemtune_s_own_templates(name: str) -> None:
    tokenizer: Any = tiny_tokenizer()
    template = template_of(Renderer(tokenizer, name), "x")
    for turns in PROMPTS:
        assert go.render(template, turns) == rendered(tokenizer, turns)


def test_a_system_prompt_of_the_template_s_own() -> None:
    tokenizer: Any = tiny_tokenizer()
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe {{ '{{' }} kind.<|im_end|>\n"
    tokenizer.chat_template = f"{own}{{% endif %}}{tokenizer.chat_template}"
    template = template_of(Renderer(tokenizer, "chat"), "x")
    for turns in PROMPTS:
        assert go.render(template, turns) == rendered(tokenizer, turns)


def test_a_text_alone() -> None:
    template = template_of(Renderer(tiny_tokenizer(), "plain"), "x")
    assert all(go.render(template, turns) == turns[-1][1] for turns in PROMPTS)


ODD = {
    "counts its turns": "{% for m in messages %}{{ loop.index }} {{ m.content }};{% endfor %}",
    "reads its texts": "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
    "says a text twice": "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
    "shouts": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "system last": (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if messages[0].role == 'system' %}({{ messages[0].content }}){% endif %}"
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_template_that_ollama_s_language_does_not_say(name: str) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = ODD[name]
    with pytest.raises(ModelError, match="no template for Ollama: ") as found:
        template_of(Renderer(tokenizer, "chat"), "x")
    assert "stemtune export gguf" in found.value.hint


# -- Modelfiles -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ollama")
    save_tiny_model(folder / "Base_1")
    return write_run(folder / "my run", folder / "Base_1")


def test_the_folder(tiny_run: Path, tmp_path: Path) -> None:
    written = export_ollama(read_run(tiny_run), tmp_path / "out", "q8_0")
    assert (written.folder, written.name) == (tmp_path / "out", "base-1-my-run")
    names = sorted(path.name for path in written.folder.iterdir())
    assert names == ["Base-1-my-run-Q8_0.gguf", "Modelfile"]
    found = go.commands((written.folder / "Modelfile").read_text(encoding="utf-8"))
    assert [name for name, _ in found] == ["from", "template", "parameter", "system"]
    values = dict(found)
    assert values["from"] == "./Base-1-my-run-Q8_0.gguf"
    assert values["parameter"] == 'stop "<|im_end|>"'
    assert values["system"] == "You are Socrates."
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_run / "adapter")
    with loaded(written.folder / names[0]) as model:
        for turns in PROMPTS:
            prompt = go.render(values["template"], turns)
            assert prompt == rendered(tokenizer, turns) == model.prompt(as_messages(turns))
            wanted = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert model.ids(prompt, begin=True) == wanted


@pytest.mark.parametrize(
    "system",
    [
        "",
        '"""',
        'Say "I".',
        'He said """no""" to it',
        'Two "quoted"',
        "One\n\n  two\t三 🦉\n",
        "\n",
    ],
)
def test_a_system_text_is_read_as_written(system: str) -> None:
    found = dict(go.commands(modelfile("x.gguf", "{{ .Prompt }}\n", ["<|end|>", "</s>"], system)))
    assert found.get("system", "") == system and found["template"] == "{{ .Prompt }}\n"


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ('He said """no"""\nand left', '""" at the end of a line'),
        ("👩\u200d👧", "U\\+200D"),
        ("a\u00a0b", "U\\+00A0"),
    ],
)
def test_a_system_text_that_ollama_would_read_otherwise(
    tiny_run: Path, tmp_path: Path, system: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        export_ollama(read_run(tiny_run), tmp_path / "out", "f32", system=system)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b/c", "-x", "a:", "ü", "x" * 90])
def test_a_name_that_ollama_does_not_take(tiny_run: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="Ollama takes no such name"):
        export_ollama(read_run(tiny_run), tmp_path / "out", "f32", name=name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is there already"):
        export_ollama(read_run(tiny_run), tmp_path, "f32")
