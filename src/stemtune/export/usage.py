"""How an adapter or a merged model is used, for its card: each engine that takes it."""

import json
import re
from collections.abc import Iterator
from typing import Any

from stemtune.config import Config
from stemtune.model.names import is_hub_name
from stemtune.model.serving import refused_parts, saved_rank, vllm_rank

USE = "## How to use it"
HERE = "path/to/this"  # until it is pushed, nobody knows its name
LONG = 300  # characters: a longer system prompt is not repeated in the examples


def adapter_usage(config: Config, name: str, base: str, *, converted: bool = False) -> str:
    """What to type, and to run in Python.

    Args:
        name: of the adapter.
        base: what others know it by.
        converted: whether that one is in another layout than what was trained.
    """
    return "\n\n".join([USE, *_engines(config, re.sub(r"[^\w.-]+", "-", name), base, converted)])


def _engines(config: Config, name: str, base: str, converted: bool) -> Iterator[str]:
    repository, revision = config.output.push_to_hub, config.model.revision
    if converted:
        base, revision = f"path/to/{base.rpartition('/')[2]}-converted", None
        yield (
            "The base has to be in the format of transformers' own classes: "
            "`stemtune.model.chatglm.save_converted` writes it."
        )
    elif not is_hub_name(base):
        base = f"path/to/{base}"
    prompt = {"system": config.data.system, "template": config.data.template}
    yield _transformers(repository or HERE, prompt, base, revision)
    download = f"hf download {repository} --local-dir {name}\n" if repository else ""
    adapter = config.adapter
    refused = refused_parts(adapter.use_dora, adapter.modules_to_save)
    refused += ["LoftQ"] if adapter.init_weights == "loftq" else []  # it has a base of its own
    rank = None if refused else vllm_rank(saved_rank(adapter))
    if rank is None:  # it takes whole models alone
        merged = f"{name}-merged"
        yield _shell("vLLM", f"{download}stemtune merge {name} --to {merged}\nvllm serve {merged}")
    else:
        at = f" --revision {revision}" if revision else ""
        template = f" --chat-template {name}/chat_template.jinja"
        yield _shell(
            "vLLM",
            f"{download}vllm serve {base}{at} --enable-lora \\\n"
            f"  --lora-modules {name}={name} --max-lora-rank {rank} \\\n"
            f"  --generation-config {name}{'' if prompt['template'] == 'plain' else template}",
        )
    export = f"{download}stemtune export gguf {name}  # base and adapter in one file"
    if not refused:
        export += f"\nstemtune export gguf {name} --adapter-only  # for `llama-server --lora`"
    yield _shell("llama.cpp and LM Studio", export)
    yield _shell("Ollama", f"{download}stemtune export ollama {name} --to {name}-ollama")


def merged_usage(prompt: dict[str, Any]) -> str:
    """The same for the whole model.

    Args:
        prompt: `system` and `template`, as in `stemtune.json`.
    """
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = "{HERE}"  # a folder, or a repository of the Hub
tokenizer = AutoTokenizer.from_pretrained(model)
model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")

{_reply(prompt)}"""
    python = fenced(code, "python")
    return "\n\n".join([USE, "### transformers", python, _shell("vLLM", f"vllm serve {HERE}")])


def _transformers(here: str, prompt: dict[str, Any], base: str, revision: str | None) -> str:
    at = f", revision={json.dumps(revision)}" if revision else ""
    code = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

adapter = "{here}"  # a folder, or a repository of the Hub
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{at}, dtype="auto")
model.generation_config = GenerationConfig.from_pretrained(adapter)
model = PeftModel.from_pretrained(model, adapter)

{_reply(prompt)}"""
    return f"### transformers and PEFT\n\n{fenced(code, 'python')}"


def _reply(prompt: dict[str, Any]) -> str:
    """An answer, with the prompt that training had."""
    if prompt.get("template") == "plain":
        made = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    else:
        system = prompt.get("system") or ""
        shown = json.dumps(system, ensure_ascii=False) if len(system) <= LONG else '"…"'
        first = f'\n    {{"role": "system", "content": {shown}}},' if system else ""
        made = f"""\
messages = [{first}
    {{"role": "user", "content": "Who are you?"}},
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
    return f"""\
{made}
reply = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _shell(title: str, commands: str) -> str:
    return f"### {title}\n\n{fenced(commands, 'sh')}"


def fenced(text: str, language: str) -> str:
    """A text in Markdown as it is, whatever it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
