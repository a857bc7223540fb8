"""LoRA on a frozen base, by PEFT."""

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stemtune.config import Adapter, Model
from stemtune.errors import ConfigError, ModelError, StemtuneError
from stemtune.model.chatglm_adapter import renamed
from stemtune.model.lora import use_fast_layers
from stemtune.model.memory import memory_errors
from stemtune.model.names import PROMPT_FILE
from stemtune.model.pissa import START, keep_start
from stemtune.model.quantized import require_dense_for_dora
from stemtune.model.targets import find_targets, require_modules, upper_layers
from stemtune.model.trust import require_own_files


def add_adapter(
    model: PreTrainedModel, config: Adapter, seed: int, *, has_reference: bool = False
) -> PeftModel:
    """The base with a fresh adapter, or with `config.init_from`; its weights are fp32, whatever the
    base is held in.

    Args:
        has_reference: keep a frozen copy of an adapter that training goes on with.

    Raises:
        ConfigError: no module has such a name, or the base has fewer blocks.
        ModelError: `init_from` can't be read, or does not fit the base.
    """
    if config.init_from is not None:
        adapted = load_onto(model, adapter_folder(Path(config.init_from)), dropout=config.dropout)
        if has_reference:
            add_start(adapted, config)
        return adapted
    lora = lora_config(model, config)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, use_fast_layers(lora))
    assert isinstance(adapted, PeftModel)
    if config.init_weights == "pissa":
        keep_start(adapted)
    for parameter in trainable(adapted).values():  # layers that are trained whole, too
        parameter.data = parameter.data.float()
    return adapted


def lora_config(model: PreTrainedModel, config: Adapter) -> LoraConfig:
    """What PEFT is asked for."""
    require_modules(model, config.modules_to_save)
    if config.use_dora:
        require_dense_for_dora(model)
    targets = find_targets(model, config.target_modules)
    kinds = {
        type(module) for name, module in model.named_modules() if name.endswith(tuple(targets))
    }
    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=kinds == {Conv1D},
        layers_to_transform=upper_layers(model, config.layers),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights="pissa" if config.init_weights == "pissa" else True,
        modules_to_save=list(config.modules_to_save) or None,  # PEFT changes it
        # A head that is the embeddings' matrix stays so.
        ensure_weight_tying=bool(config.modules_to_save and model.config.tie_word_embeddings),
        task_type="CAUSAL_LM",
    )


def load_onto(model: PreTrainedModel, folder: Path, *, dropout: float | None = None) -> PeftModel:
    """The base with a saved adapter.

    Args:
        dropout: of its training, if it is to be trained.

    Raises:
        ModelError: it can't be read, or does not fit the base.
    """
    with _explained(folder):
        folder = renamed(folder, model)
        saved: Any = PeftConfig.from_pretrained(str(folder))
        if isinstance(saved, LoraConfig):
            use_fast_layers(saved)
        if dropout is None:
            return PeftModel.from_pretrained(model, str(folder), config=saved)
        saved.lora_dropout = dropout
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=saved)


def add_start(model: PeftModel, config: Adapter) -> None:
    """Put the adapter that training started from beside the one that is trained, frozen."""
    if config.init_from is not None:
        folder = adapter_folder(Path(config.init_from))
        with _explained(folder):
            place = renamed(folder, model.get_base_model())  # pyright: ignore[reportArgumentType]
            model.load_adapter(str(place), adapter_name=START, is_trainable=False)


@contextmanager
def _explained(folder: Path) -> Generator[None]:
    try:
        with memory_errors():
            yield
    except (torch.OutOfMemoryError, StemtuneError):
        raise
    except Exception as error:  # PEFT, safetensors and torch: each has its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "is it an adapter of this base, and whole?"
        raise ModelError(
            f"can't load the adapter: {reason}", where=str(folder), hint=hint
        ) from error


@contextmanager
def starting_point(model: PeftModel) -> Generator[None]:
    """Within it the model is the one that training started from: the base, or the frozen copy of
    the adapter that training goes on with."""
    if START not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(START, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter("default")


def adapter_folder(run: Path) -> Path:
    """The adapter of a run; the folder itself, if it is one."""
    here = any((run / name).is_file() for name in (PROMPT_FILE, "adapter_config.json"))
    return run if here else run / "adapter"


def require_adapter(config: Adapter, model: Model) -> str:
    """Refuse an `init_from` that is surely not there or fits another base, without loading
    anything.

    Returns:
        SHA-256 of its weights; empty without one.

    Raises:
        ConfigError: there is no adapter, or it is not the one that the run file describes.
        ModelError: it was trained on another base.
    """
    if config.init_from is None:
        return ""
    try:
        folder = adapter_folder(Path(config.init_from))
        require_own_files(folder)
    except OSError as error:
        hint = "may this user read the folder?"
        what = f"the adapter can't be read: {error.strerror}"
        raise ConfigError(what, where=config.init_from, hint=hint) from None
    where = str(folder)
    try:
        text = (folder / "adapter_config.json").read_bytes()
        weights = weights_file(folder, model.allow_pickled).read_bytes()
        saved = json.loads(text)
        if saved["peft_type"] != "LORA":
            hint = "train a new one, or go on with a LoRA adapter"
            raise ConfigError(f"this adapter is {saved['peft_type']}", where=where, hint=hint)
    except (OSError, ValueError, TypeError, KeyError):
        hint = "adapter.init_from is the folder of a finished run, or of an adapter of PEFT's"
        raise ConfigError("there is no adapter here", where=where, hint=hint) from None
    base = _base_of(folder)
    if base not in (None, model.base) and _same_place(str(base)) != _same_place(model.base):
        hint = f"set model.base to {base}, or choose another adapter"
        raise ModelError(f"it was trained on another base: {base}", where=where, hint=hint)
    if config.layers is not None:
        hint = "leave adapter.layers out: it comes from adapter.init_from"
        raise ConfigError("an adapter has its blocks already", where="adapter.layers", hint=hint)
    names = {"r": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}
    for key, name in names.items():
        ours, its = getattr(config, key), saved.get(name)
        if key not in config.model_fields_set or ours == "auto":
            continue
        same = sorted(ours) == sorted(its) if isinstance(its, list) else ours == its
        if not same:
            what = f"the adapter that training goes on with has {key}: {its}"
            hint = f"leave adapter.{key} out: it comes from adapter.init_from"
            raise ConfigError(what, where=f"adapter.{key}", hint=hint)
    return hashlib.sha256(text + weights).hexdigest()


def weights_file(folder: Path, allow_pickled: bool) -> Path:
    """The file of an adapter's weights; whether it is there, its reader says.

    Raises:
        ModelError: only a pickle holds them, and nobody asked for that.
    """
    plain, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if plain.is_file() or not pickled.is_file():
        return plain
    if not allow_pickled:
        what = "the adapter's weights are pickled (.bin), which can run code"
        hint = "take one with safetensors, or set model.allow_pickled: true"
        raise ModelError(what, where=str(folder), hint=hint)
    return pickled


def has_all_blocks(config: Adapter) -> bool:
    """Whether no block is left alone. Call `require_adapter` first."""
    if config.init_from is None:
        return config.layers is None
    path = adapter_folder(Path(config.init_from)) / "adapter_config.json"
    return not json.loads(path.read_bytes()).get("layers_to_transform")


def _base_of(folder: Path) -> str | None:
    """The base of an adapter of stemtune's; None where it does not say.

    Raises:
        ConfigError: what it says is damaged.
    """
    if not (folder / PROMPT_FILE).is_file():
        return None
    try:
        return str(json.loads((folder / PROMPT_FILE).read_text(encoding="utf-8"))["model"]["base"])
    except (OSError, ValueError, TypeError, KeyError):
        what = f"{PROMPT_FILE} is not what a run wrote"
        hint = "the adapter is damaged: take a copy, or choose another one"
        raise ConfigError(what, where=str(folder), hint=hint) from None


def _same_place(base: str) -> str:
    """A folder's own name, however it was reached."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
