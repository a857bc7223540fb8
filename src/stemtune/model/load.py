"""Loads a base and its tokenizer; picks device and dtype."""

import hashlib
import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stemtune.config import Model
from stemtune.errors import ConfigError, ModelError, StemtuneError
from stemtune.model import chatglm, gguf, hub, smollm2
from stemtune.model.memory import memory_errors
from stemtune.model.offload import offload, require_gpu
from stemtune.model.processor import prepare_processor
from stemtune.model.quantized import hold_packed, quantization, require_trainable

log = logging.getLogger(__name__)
HUB = {"base", "revision", "allow_pickled", "trust_remote_code"}  # what decides a download
SAMPLES = 64  # values of each weight that go into a base's fingerprint


def load_model(config: Model) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base on its device, and its tokenizer.

    Raises:
        ModelError: no such base, or one that can't be read.
        ConfigError: a device or dtype that this machine does not have.
    """
    started = time.perf_counter()
    device = choose_device(config.device)
    require_gpu(config, device)
    if device.type == "cpu":
        prepare_processor()
    dtype = choose_dtype(config.dtype, device)
    require_trainable(base_source(config, weights=False), config)  # before they are downloaded
    source = base_source(config)
    hub.require_plain_weights(source, config.allow_pickled)
    packed = quantization(config, dtype)
    more: dict[str, Any] = {}
    if packed is not None:
        more |= {"quantization_config": packed, "device_map": {"": device}}
    with _explained(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            # Never left out: transformers would ask, and a "y" runs the base's own code.
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickled else True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in what it tells, with their names
            **more,
        )
    model: PreTrainedModel = loaded[0]
    _require_whole(config, loaded[1])
    model.requires_grad_(False)
    if config.offload_layers is not None:
        offload(model, config.offload_layers, device)
    elif packed is None:
        model.to(device)  # pyright: ignore[reportArgumentType]
    hold_packed(model)
    held = f", {config.quantization} weights" if config.quantization else ""
    name = str(dtype).removeprefix("torch.")
    seconds = time.perf_counter() - started
    log.info("%s on %s in %s%s: loaded in %.1f s", config.base, device, name, held, seconds)
    return model, load_tokenizer(config)


def _require_whole(config: Model, found: dict[str, Any]) -> None:
    """Transformers draws at random what the files lack, and says so in a log.

    Raises:
        ModelError: the files lack weights, or have them in another shape.
    """
    lost = sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"])
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        what = f"the base lacks the weight {lost[0]}{more}, or has it in another shape"
        hint = "is it whole? Do its config.json and its weights belong together?"
        raise ModelError(what, where=config.base, hint=hint)


def require_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, largest_id: Callable[[], int]
) -> None:
    """Refuse data with ids that the embeddings have no row for: that would fail in the middle of a
    run. Fewer ids than rows is padding.

    Args:
        largest_id: of the data; looked for only where the tokenizer knows more ids than rows.

    Raises:
        ModelError: an id has no row.
    """
    embeddings: Any = model.get_input_embeddings()
    rows, ids = embeddings.weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if ids > rows and largest_id() >= rows:
        token = tokenizer.convert_ids_to_tokens(largest_id())
        what = f"the data has the token {token!r} ({largest_id()}), the embeddings {rows} rows"
        hint = "do the tokenizer and the weights belong together?"
        raise ModelError(what, where="model.base", hint=hint)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over a sample of every weight and the sums of its bits: tells bases apart in a
    moment, by whatever value."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        stride = max(1, weight.numel() // SAMPLES)
        sample = weight.detach().flatten()[::stride].float().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
        digest.update(_sums(weight.detach()).numpy().tobytes())
    return digest.hexdigest()


def _sums(weight: torch.Tensor) -> torch.Tensor:
    """Of the bits of each row, as whole numbers: a value that changes, changes one of them. Sums
    are taken as fast as memory is read; a hash of all would take as long as loading."""
    columns = weight.shape[-1] if weight.dim() > 1 and weight.shape[-1] > 1 else weight.numel()
    rows = weight.contiguous().view(-1, columns) if columns else weight.view(0, 0)
    wide = rows.shape[1] * rows.element_size() % 8 == 0
    if rows.storage_offset() * rows.element_size() % 8:
        rows = rows.clone()
    whole = rows.view(torch.int64 if wide else torch.uint8)
    return whole.sum(dim=-1, dtype=torch.int64).cpu()


def load_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer alone: what `check` needs."""
    with _explained(config):
        return AutoTokenizer.from_pretrained(
            base_source(config, weights=False), trust_remote_code=config.trust_remote_code
        )


def base_source(config: Model, *, weights: bool = True) -> Path:
    """The folder to load from: the base's own, or one in the cache where it had to be converted.

    Args:
        weights: false where configuration and tokenizer will do; what has to be converted is there
            whole all the same.

    Raises:
        ModelError: the Hub does not give it, or it can't be converted.
        DiskError: there is no room for it.
    """
    if config.base == smollm2.NAME:
        return smollm2.converted_folder()
    if is_gguf(config):
        return gguf.converted_folder(Path(config.base))
    source = _original(config, weights=weights)
    if chatglm.is_chatglm(source):
        return chatglm.converted_folder(_original(config), config.allow_pickled)
    return source


def _original(config: Model, *, weights: bool = True) -> Path:
    """The folder of the base as it is published; that of the Hub is named by its commit."""
    if is_on_hub(config):
        return _fetched(config.model_dump_json(include=HUB), weights)
    return Path(config.base)


def is_gguf(config: Model) -> bool:
    """Whether the base is a GGUF file."""
    return config.base.endswith(gguf.SUFFIX)


def is_on_hub(config: Model) -> bool:
    """Whether the base is a name on the Hub."""
    local = config.base == smollm2.NAME or is_gguf(config)
    return not local and not Path(config.base).is_absolute()


def is_converted(config: Model) -> bool:
    """Whether a base is trained in another layout than the one that it is published in: others need
    the converted one."""
    if config.base == smollm2.NAME or is_gguf(config):
        return False
    return chatglm.is_chatglm(_original(config, weights=False))


def commit_of(config: Model) -> str | None:
    """The commit of a base of the Hub."""
    return _original(config).name if is_on_hub(config) else config.revision


def hashes_of(config: Model) -> dict[str, str]:
    """By file what a base of the Hub consists of; empty for others."""
    return hub.file_hashes(_original(config)) if is_on_hub(config) else {}


@cache
def _fetched(config: str, weights: bool) -> Path:
    model = Model.model_validate_json(config)
    if not weights:
        return hub.fetch(model, weights=False)
    # Of the same commit, should a branch move in between.
    commit = _fetched(config, False).name
    return hub.fetch(model.model_copy(update={"revision": commit}))


def require_base(config: Model) -> None:
    """Refuse a base that is surely not there, without loading anything."""
    if config.base == smollm2.NAME:
        smollm2.require_gguf()
        return
    if is_gguf(config):
        gguf.require_file(Path(config.base))
        return
    folder = Path(config.base)
    try:
        missing = folder.is_absolute() and not (folder / "config.json").is_file()
    except OSError as error:
        what = f"the base can't be read: {error.strerror}"
        raise ModelError(what, where=config.base, hint="may this user read the folder?") from None
    if missing:
        what = "no model here: there is no config.json"
        raise ModelError(what, where=config.base, hint="model.base is a folder or a Hub id")
    if not folder.is_absolute() and config.base.count("/") != 1:
        hint = "a folder, a .gguf file, a Hub id such as Qwen/Qwen3-0.6B, or smollm2"
        raise ModelError(f"unknown base {config.base!r}", where="model.base", hint=hint)


def choose_device(wanted: str) -> torch.device:
    """The device for `model.device`."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name, available in there.items() if available)
    if not there[wanted]:
        hint = "leave model.device at auto"
        raise ConfigError(f"no {wanted} on this machine", where="model.device", hint=hint)
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype for `model.dtype`; `auto` measures a matrix product in both on a CPU."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float32
    faster = _speed_of_bfloat16()
    log.debug("bfloat16 runs at %.1f times the speed of float32 on this processor", faster)
    return torch.bfloat16 if faster > 1.3 else torch.float32


def _speed_of_bfloat16() -> float:
    """How many times as fast as in float32 a matrix product is. The two take turns, and the fastest
    of each counts: what else the machine does slows both alike, or only some of the repeats."""
    fastest = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for repeat in range(16):
        for dtype, seconds in fastest.items():
            now = _matmul_seconds(dtype)
            if repeat > 1:  # the first ones set the kernels up
                fastest[dtype] = min(seconds, now)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def _matmul_seconds(dtype: torch.dtype, size: int = 768) -> float:
    a = torch.ones(size, size, dtype=dtype)
    start = time.perf_counter()
    torch.mm(a, a)
    return time.perf_counter() - start


@contextmanager
def _explained(config: Model) -> Generator[None]:
    """Turns what transformers and the hub raise into one error for a person."""
    try:
        with memory_errors():
            yield
    except (torch.OutOfMemoryError, StemtuneError):
        raise
    except Exception as error:  # safetensors, pickle, tokenizers: each has its own kinds
        hint = "is it whole, and of a kind that transformers knows?"
        what = f"can't load {config.base!r}: {_reason(error, base_source(config, weights=False))}"
        raise ModelError(what, where="model.base", hint=hint) from error


def _reason(error: BaseException, folder: Path) -> str:
    """One line, with the file of weights that is damaged: the libraries leave that out."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if isinstance(error, UnpicklingError):  # torch advises to read it all the same, and run it
        return "its .bin files are damaged, or hold more than weights; nothing of them was run"
    if lines[0].endswith(":"):
        return " ".join(lines)
    for file in sorted(folder.glob("*.safetensors")) if isinstance(error, SafetensorError) else []:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as damage:
            return f"{file.name}: {damage}"
    return lines[0]
