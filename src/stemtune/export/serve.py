"""The command line of an engine that serves a run, by the engine's documentation; or why it would
not load it.

Sources:
    vLLM: `vllm serve --help`, "LoRA Adapters" and `LoRAConfig` of its documentation. transformers:
    `transformers serve --help`. llama.cpp: README of `tools/server`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stemtune.config import Model
from stemtune.errors import ConfigError, ModelError
from stemtune.model.adapter import adapter_folder
from stemtune.model.gguf import SUFFIX
from stemtune.model.identity import require_same_base
from stemtune.model.load import base_source, is_gguf, is_on_hub, require_base
from stemtune.model.save import read_settings
from stemtune.model.serving import VLLM_RANKS, refused_parts, vllm_rank
from stemtune.model.smollm2 import NAME as SMOLLM2
from stemtune.model.smollm2 import require_gguf

INSTALL = {
    "vllm": "pip install vllm",
    "transformers": "pip install 'transformers[serving]'",
    "llama.cpp": "put llama-server on the PATH: github.com/ggml-org/llama.cpp",
}
TEMPLATE_FILE = "chat_template.jinja"
EMBEDDINGS = ("lm_head", "embed_tokens", "embed_out", "wte")
SERVERS = {"vllm": "vllm", "transformers": "transformers' server", "llama.cpp": "llama-server"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Run:
    """What an engine has to know of a run.

    Attributes:
        folder: as it was given.
        settings: of its prompts, see `stemtune.model.save`.
        lora: PEFT's settings of its adapter.
    """

    folder: Path
    adapter: Path
    model: Model
    settings: dict[str, Any]
    lora: dict[str, Any]

    @property
    def merged(self) -> Path | None:
        """The folder that `stemtune merge` wrote."""
        folder = self.folder / "merged"
        return folder.resolve() if (folder / "config.json").is_file() else None

    @property
    def template(self) -> Path | None:
        """The chat template of its training; None for plain text."""
        file = self.adapter / TEMPLATE_FILE
        return file if self.settings["template"] != "plain" and file.is_file() else None


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        name: what requests call the model; the folder's name, if not given.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None


@dataclass(frozen=True)
class Command:
    """What to run, and what to know about it."""

    engine: str
    words: list[str]
    notes: list[str]


def read_run(folder: Path) -> Run:
    """A run, without its weights.

    Raises:
        ModelError: there is no adapter of stemtune's, or it is damaged.
    """
    adapter = adapter_folder(folder)
    model, settings = read_settings(adapter)
    try:
        lora = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(lora["r"], int):
            raise ValueError("r is no number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what, hint = f"adapter_config.json can't be read: {error}", "is the adapter whole?"
        raise ModelError(what, where=str(adapter), hint=hint) from None
    return Run(folder, adapter.resolve(), model, settings, lora)


def serve_command(
    run: Run,
    engine: str,
    installed: Mapping[str, str],
    address: Address,
    ggufs: list[Path] | None = None,
) -> Command:
    """How to serve a run.

    Args:
        engine: `vllm`, `transformers`, `llama.cpp`, or `auto`: the first of them that is installed
            and would load it.
        installed: the program of each engine that is there.
        ggufs: for llama.cpp: a whole model, or a base and an adapter; else what is in the run's
            folder.

    Raises:
        ConfigError: the engine is not installed, or would not load it.
    """
    builders: dict[str, Callable[[], tuple[list[str], list[str]]]] = {
        "vllm": lambda: _vllm(run, address),
        "transformers": lambda: _transformers(run, address),
        "llama.cpp": lambda: _llama_cpp(run, address, ggufs or []),
    }
    passed_over: list[str] = []
    refusals: list[ConfigError] = []
    for name in builders if engine == "auto" else [engine]:
        if name not in installed:
            refusals.append(ConfigError(f"{SERVERS[name]} is not installed", hint=INSTALL[name]))
            continue
        try:
            words, notes = builders[name]()
        except ConfigError as error:
            refusals.insert(len(passed_over), error)  # before those that are not even there
            passed_over.append(f"passed over: {error.what}")
            continue
        notes = [*passed_over, *notes, *_notes(run, address)]
        return Command(name, [installed[name], *words], notes)
    what = "; ".join(error.what for error in refusals)
    hint = refusals[0].hint if passed_over else "; or ".join(error.hint for error in refusals)
    raise ConfigError(what, where=str(run.folder), hint=hint)


def _vllm(run: Run, address: Address) -> tuple[list[str], list[str]]:
    reasons, name = _refused_by_vllm(run), _name(run, address)
    named = f"requests name the model {name}"
    listening = ["--host", address.host, "--port", str(address.port)]
    if not reasons:
        lora = ["--enable-lora", "--lora-modules", _lora_module(name, run.adapter)]
        lora += ["--max-lora-rank", str(vllm_rank(run.lora["r"]))]
        words = ["serve", *_base_for_vllm(run), *lora, *_prompts_for_vllm(run), *listening]
        return words, [named, *_rounding_notes(run.model)]
    what = f"vLLM does not load this adapter: {' and '.join(reasons)}"
    if run.merged is None:
        raise ConfigError(what, hint=_merge_hint(run))
    words = ["serve", str(run.merged), "--served-model-name", name]
    words += [*_prompts_for_vllm(run), *listening]
    return words, [f"{what}; it gets the merged model", named, *_merged_notes(run)]


def _refused_by_vllm(run: Run) -> list[str]:
    lora = run.lora
    reasons = refused_parts(bool(lora.get("use_dora")), lora.get("modules_to_save") or [])
    rank = lora["r"]
    if vllm_rank(rank) is None:
        reasons.append(f"a rank of {rank} (up to {VLLM_RANKS[-1]})")
    targets = lora.get("target_modules") or []
    heads = [name for name in targets if name.rpartition(".")[2] in EMBEDDINGS]
    if heads:
        reasons.append(f"updates of embeddings or the head ({', '.join(heads)})")
    if lora.get("rank_pattern") or lora.get("alpha_pattern"):
        reasons.append("ranks or scales that differ from layer to layer")
    if lora.get("fan_in_fan_out"):
        reasons.append("layers that hold their weights transposed (GPT-2)")
    if run.settings.get("adapter", {}).get("init_weights") == "loftq":
        reasons.append("LoftQ, whose adapter belongs on the base as it was rounded")
    return reasons


def _base_for_vllm(run: Run) -> list[str]:
    """The base, and how it is held."""
    model = run.model
    require_base(model)
    if not is_on_hub(model):  # there its commit says what it is, and the engine fetches it itself
        require_same_base(run.adapter, model)
    words = [model.base if is_on_hub(model) else str(base_source(model))]
    if is_on_hub(model) and model.revision is not None:
        words += ["--revision", model.revision]
    if model.trust_remote_code and model.revision is not None:
        words += ["--trust-remote-code", "--code-revision", model.revision]
    if model.dtype != "auto":
        words += ["--dtype", model.dtype]
    if model.quantization == "nf4":  # the only kind that vLLM rounds to as it loads
        words += ["--quantization", "bitsandbytes"]
    return words


def _rounding_notes(model: Model) -> list[str]:
    if model.quantization in (None, "nf4"):
        return []
    return [f"trained on {model.quantization} weights, served on the base's own"]


def _lora_module(name: str, path: Path) -> str:
    """`name=path`, or the form that vLLM documents for paths with such characters."""
    if {"=", ","} & {*name, *str(path)}:
        return json.dumps({"name": name, "path": str(path)}, ensure_ascii=False)
    return f"{name}={path}"


def _prompts_for_vllm(run: Run) -> list[str]:
    """The template of training, and the tokens that end a reply."""
    words = ["--chat-template", str(run.template)] if run.template is not None else []
    if (run.adapter / "generation_config.json").is_file():
        words += ["--generation-config", str(run.adapter)]
    return words


def _transformers(run: Run, address: Address) -> tuple[list[str], list[str]]:
    if run.merged is None:
        raise ConfigError(
            "transformers serves no adapter, only whole models", hint=_merge_hint(run)
        )
    model = str(run.merged)
    if "@" in model:
        hint = f"put it elsewhere: stemtune merge {run.folder} --to FOLDER"
        raise ConfigError("transformers takes what follows an @ for a revision", hint=hint)
    if address.name not in (None, model):
        hint = "leave --name out, or choose another --engine"
        raise ConfigError("transformers names a model by its folder", hint=hint)
    words = ["serve", model, "--host", address.host, "--port", str(address.port)]
    if run.model.dtype != "auto":
        words += ["--dtype", run.model.dtype]
    return words, [f"requests name the model {model}", *_merged_notes(run)]


def _llama_cpp(run: Run, address: Address, given: list[Path]) -> tuple[list[str], list[str]]:
    models, adapters = _sorted_out(given or _found(run))
    if models and not given:
        adapters = []  # it is merged
    if adapters and not models:
        models = _base_gguf(run.model)
    if not models:
        what = (
            "llama.cpp needs the base as GGUF, too" if adapters else "llama.cpp needs a GGUF file"
        )
        both = "give both: --gguf BASE --gguf ADAPTER"
        raise ConfigError(what, hint=both if adapters else f"stemtune export gguf {run.folder}")
    if len(models) > 1 or len(adapters) > 1:
        names = ", ".join(path.name for path in (*models, *adapters))
        raise ConfigError(f"which of these GGUF files: {names}", hint="name it with --gguf")
    words = ["--model", str(models[0])]
    if adapters:
        words += ["--lora", str(adapters[0])]
    if run.template is not None:
        words += ["--jinja", "--chat-template-file", str(run.template)]
    name = _name(run, address)
    words += ["--alias", name, "--host", address.host, "--port", str(address.port)]
    return words, [f"requests name the model {name}"]


def _found(run: Run) -> list[Path]:
    """In the run's folder, or else one below it: that for Ollama."""
    return sorted(run.folder.glob(f"*{SUFFIX}")) or sorted(run.folder.glob(f"*/*{SUFFIX}"))


def _sorted_out(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Models, and adapters.

    Raises:
        ConfigError: a file is not there, or no GGUF file.
    """
    models: list[Path] = []
    adapters: list[Path] = []
    for file in files:
        (adapters if _kind(file) == "adapter" else models).append(file.resolve())
    return models, adapters


def _kind(file: Path) -> str:
    """What a GGUF file says that it is."""
    if not file.is_file():
        hint = "--gguf is a file that `stemtune export gguf` wrote"
        raise ConfigError("there is no such GGUF file", where=str(file), hint=hint)
    if find_spec("gguf") is None:
        return "model"
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).get_field("general.type")
        return "model" if field is None else str(field.contents())
    except Exception as error:  # what its reader raises depends on where the file is damaged
        what, hint = f"this is no GGUF file: {error}", "is it whole?"
        raise ConfigError(what, where=str(file), hint=hint) from error


def _base_gguf(model: Model) -> list[Path]:
    """The base, where it came as GGUF."""
    if model.base == SMOLLM2:
        return [require_gguf()]
    return [Path(model.base)] if is_gguf(model) else []


def _merge_hint(run: Run) -> str:
    return f"stemtune merge {run.folder}"


def _merged_notes(run: Run) -> list[str]:
    weights, merged = run.adapter / "adapter_model.safetensors", run.merged
    if merged is None or not weights.is_file():
        return []
    older = (merged / "config.json").stat().st_mtime < weights.stat().st_mtime
    return [f"{merged} is older than the adapter: is it merged from this one?"] if older else []


def _name(run: Run, address: Address) -> str:
    folder = run.adapter.parent if run.adapter.name == "adapter" else run.adapter
    return address.name or re.sub(r"[^\w.-]+", "-", folder.name)


def _notes(run: Run, address: Address) -> list[str]:
    """What an engine does not do as training did."""
    notes: list[str] = []
    if run.settings["template"] == "plain":
        notes.append("trained on plain text: ask /v1/completions, not /v1/chat/completions")
    if run.settings["system"]:
        shown = json.dumps(run.settings["system"], ensure_ascii=False)
        notes.append(f"requests begin with the system message of training: {shown}")
    if run.settings.get("memories"):
        notes.append("an engine remembers nothing: memories are chosen by `stemtune chat` alone")
    if address.host not in LOOPBACK:
        notes.append(f"whoever reaches {address.host}:{address.port} can use it")
    return notes
