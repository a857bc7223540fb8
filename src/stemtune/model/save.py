"""The adapter's folder: PEFT's files, tokenizer and template, and how its prompts are made."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from stemtune.config import Config, Model
from stemtune.errors import ModelError
from stemtune.model.adapter import load_onto, weights_file
from stemtune.model.identity import require_same_base
from stemtune.model.load import choose_device, load_model
from stemtune.model.names import CARD, HUB_NAMES, PROMPT_FILE
from stemtune.model.pissa import is_pissa, on_the_base_as_it_was
from stemtune.model.trust import require_own_files, require_trust
from stemtune.rundir import write_text

LOCAL_KEYS = ("is_local", "local_files_only")


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    config: Config,
    base: Mapping[str, str],
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write the folder whole, or leave the one that is there.

    Args:
        base: see `stemtune.model.identity.identity`: as it was when it was loaded.
        files: what else to put into it, by name: the model card, for one.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    _delete(temporary)
    try:
        _write(model, tokenizer, temporary, config, base, files or {})
    except BaseException:
        _delete(temporary)  # a full disk needs the space
        raise
    _delete(folder)
    temporary.rename(folder)


def _write(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    temporary: Path,
    config: Config,
    base: Mapping[str, str],
    files: Mapping[str, str | bytes],
) -> None:
    _save_weights(model, temporary, config)
    tokenizer.save_pretrained(str(temporary))
    tokenizer_config = temporary / "tokenizer_config.json"
    values = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    for key in LOCAL_KEYS:
        values.pop(key, None)
    write_text(tokenizer_config, json.dumps(values, indent=2, ensure_ascii=False))
    prompt = {
        "model": config.model.model_dump(),
        "base": dict(base),
        "adapter": {"init_weights": config.adapter.init_weights},
        "system": config.data.system,
        "template": config.data.template,
        "max_length": config.data.max_length,
        "window": _window(config),
        # They themselves are among `files`.
        "memories": config.data.memories and {**config.data.memories.model_dump(), "path": None},
        "rag": config.data.rag.model_dump(),
    }
    (temporary / CARD).unlink(missing_ok=True)  # PEFT's says nothing, and names a folder of ours
    for name, content in files.items():
        if isinstance(content, str):
            write_text(temporary / name, content)
        else:
            (temporary / name).write_bytes(content)
    write_text(temporary / PROMPT_FILE, json.dumps(prompt, indent=1, ensure_ascii=False))


def _delete(folder: Path) -> None:
    """A folder, or a link to one: what that leads to stays as it is."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _save_weights(model: PeftModel, folder: Path, config: Config) -> None:
    """PEFT's two files."""
    peft_config: Any = model.peft_config["default"]
    peft_config.base_model_name_or_path = HUB_NAMES.get(config.model.base, config.model.base)
    peft_config.revision = config.model.revision
    if is_pissa(model):
        ordinary, tensors = on_the_base_as_it_was(model)
        folder.mkdir(parents=True)
        ordinary.save_pretrained(str(folder))
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return
    # Layers that are trained whole are saved anyway; without the flag PEFT asks the Hub about
    # embeddings.
    model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=["default"])


def _window(config: Config) -> dict[str, Any]:
    """How much of a conversation a prompt had in training: see `stemtune.data.persona.Window`."""
    data = config.data
    if data.samples == "dialogue":
        return {}
    anchored = data.window == "anchored"
    return {"turns": data.history_turns, "tokens": data.history_tokens, "anchored": anchored}


def read_settings(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The base of a saved adapter, and the settings of its prompts.

    Raises:
        ModelError: not an adapter of stemtune's, or one that is not to be trusted.
    """
    require_own_files(folder)
    try:
        prompt = json.loads((folder / PROMPT_FILE).read_text(encoding="utf-8"))
        model = Model.model_validate(prompt["model"])
    except (OSError, ValueError, KeyError, TypeError):
        hint = "give the folder of a finished run, or its adapter/"
        raise ModelError("no adapter of stemtune's here", where=str(folder), hint=hint) from None
    require_trust(model, folder)
    return model, prompt


def load_adapter(
    folder: Path, device: str
) -> tuple[PeftModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The base with a saved adapter, the tokenizer, and the settings of its prompts.

    Raises:
        ModelError: not an adapter of stemtune's, or its base is another one now.
    """
    config, prompt = read_settings(folder)
    weights_file(folder, config.allow_pickled)
    require_same_base(folder, config)
    changes: dict[str, Any] = {"device": device}
    if choose_device(device).type != "cuda":  # it may have been trained on one
        changes["offload_layers"] = None
    base, tokenizer = load_model(config.model_copy(update=changes))
    model = load_onto(base, folder)
    model.eval()
    return model, tokenizer, prompt
