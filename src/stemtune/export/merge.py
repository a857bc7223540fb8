"""Merges an adapter into its base, file by file: memory stays near one file of the base."""

import json
import logging
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stemtune.config import Model
from stemtune.errors import ConfigError, ModelError
from stemtune.export.card import merged_card
from stemtune.model import weights
from stemtune.model.adapter import adapter_folder, load_onto
from stemtune.model.identity import require_same_base
from stemtune.model.load import base_source, load_model
from stemtune.model.memory import free_memory
from stemtune.model.names import CARD, PROMPT_FILE
from stemtune.model.quantized import comes_quantized, rounded
from stemtune.model.trust import require_inside, require_own_files, require_trust
from stemtune.rundir import write_text

log = logging.getLogger(__name__)
PREFIX = "base_model.model."
INDEX = "model.safetensors.index.json"
NOT_OF_THE_BASE = ("adapter_config.json", "adapter_model.safetensors", CARD, PROMPT_FILE)
# Text as people write it: tokens that never stand beside one another make any rounding look large.
PROBE = "Who goes there? Answer me: stand, and unfold yourself. It was May 2024. 学而时习之"
FP32_TOLERANCE = 1e-3  # of the largest logit: two ways to the same product differ by some of it


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a weight.

    Attributes:
        delta: B A times the scale is added; a [r, in], b [out, r].
        magnitude: [out], of DoRA: the length of each row afterwards.
        transposed: whether the base holds the weight as [in, out].
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    transposed: bool = False

    def of(self, weight: Tensor) -> Tensor:
        """The merged weight, fp32, as the base holds it."""
        if self.transposed:
            return replace(self, transposed=False).of(weight.t()).t().contiguous()
        merged = weight.float().addmm(self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.float() / merged.norm(dim=1))[:, None]


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it lies on disk.

    Attributes:
        updates: by the name of the base's weight.
        whole: weights that were trained whole, by the base's name.
        model: the base, as it was trained on.
        rounds_base: whether the adapter stands for what the base's quantization loses (LoftQ), and
            so belongs on the rounded base.
    """

    folder: Path
    updates: dict[str, Update]
    whole: dict[str, Tensor]
    model: Model
    rounds_base: bool


@dataclass(frozen=True)
class Comparison:
    """Of the logits of a merged and an unmerged model, both computed in fp32.

    Attributes:
        difference: the largest.
        largest: of the unmerged logits, either sign: what the difference is to be seen against.
    """

    difference: float
    largest: float

    def __str__(self) -> str:
        return (
            f"merged and unmerged logits differ by {self.difference:.1e} at most,"
            f" and are up to {self.largest:.3g}"
        )


def merge(run: Path, target: Path, dtype: str | None = None) -> Comparison | None:
    """Write the base with the adapter of a run merged into it, as a model of its own.

    Args:
        run: a run's folder, or an adapter's.
        target: a folder that is not there yet.
        dtype: of the merged weights; as the base's own, if not given.

    Returns:
        How far merged and unmerged are apart; None where there was no memory to compare.

    Raises:
        ConfigError: the target is there.
        ModelError: the adapter or the base can't be read, do not fit, or rounding to `dtype` would
            lose what was trained.
    """
    if target.exists():
        hint = "give another folder with --to, or delete it"
        raise ConfigError("the folder is there already", where=str(target), hint=hint)
    adapter = read_adapter(adapter_folder(run))
    source = base_source(adapter.model)
    if comes_quantized(source):
        hint = "merge into the base as it was before: set model.base in stemtune.json to it"
        raise ModelError("the base comes quantized", where=str(source), hint=hint)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        _write(adapter, source, temporary, dtype)
        found = _compare(adapter, temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def read_adapter(folder: Path) -> SavedAdapter:
    """Raises: ModelError, if it is none of stemtune's, or damaged."""
    require_own_files(folder)
    try:
        prompt = json.loads((folder / PROMPT_FILE).read_text(encoding="utf-8"))
        lora = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        saved = load_file(folder / "adapter_model.safetensors")
        model = Model.model_validate(prompt["model"])
        scale = lora["lora_alpha"] / lora["r"] ** (0.5 if lora.get("use_rslora") else 1)
    except Exception as error:  # safetensors has its own kinds
        hint = "give the folder of a finished run, or its adapter/"
        raise ModelError("no adapter of stemtune's here", where=str(folder), hint=hint) from error
    require_trust(model, folder)
    if lora.get("target_parameters"):
        what, hint = "it adapts the experts of a mixture", "PEFT alone runs such an adapter"
        raise ModelError(what, where=str(folder), hint=hint)
    updates: dict[str, Update] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in saved.items():
        name = key.removeprefix(PREFIX)
        module = name.removesuffix(".lora_A.weight")
        if module != name:
            b = saved[f"{PREFIX}{module}.lora_B.weight"]
            magnitude = saved.get(f"{PREFIX}{module}.lora_magnitude_vector")
            transposed = bool(lora.get("fan_in_fan_out"))
            updates[f"{module}.weight"] = Update(tensor, b, scale, magnitude, transposed)
        elif ".lora_" not in name:
            whole[name] = tensor
    start = prompt.get("adapter", {}).get("init_weights")
    return SavedAdapter(folder, updates, whole, model, start == "loftq")


def _write(adapter: SavedAdapter, source: Path, target: Path, dtype: str | None) -> None:
    names = weights.shard_names(source, adapter.model.allow_pickled)
    found = {name: weights.shapes(source / name) for name in names}
    _require_fit(adapter, {n: s for part in found.values() for n, s in part.items()}, source)
    require_same_base(adapter.folder, adapter.model)
    target.mkdir(parents=True)
    _copy_rest(adapter, source, target, dtype)
    extra = {
        n: t for n, t in adapter.whole.items() if not any(n in part for part in found.values())
    }
    weight_map: dict[str, str] = {}
    size = 0
    for number, name in enumerate(names):
        merged = {n: _merged(n, t, adapter, dtype) for n, t in weights.tensors(source / name)}
        merged |= {n: _cast(t, dtype) for n, t in (extra.items() if number == 0 else ())}
        file = f"{Path(name).stem.replace('pytorch_model', 'model')}.safetensors"
        save_file(merged, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(merged, file)
        size += sum(tensor.nbytes for tensor in merged.values())
    if len(names) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(target / INDEX, json.dumps(index, indent=1))


def _require_fit(adapter: SavedAdapter, found: dict[str, tuple[int, ...]], source: Path) -> None:
    """Refuse an adapter of another base.

    Raises:
        ModelError: a weight that the adapter changes is not there, or of another shape.
    """
    for name, update in adapter.updates.items():
        expected = (update.b.shape[0], update.a.shape[1])
        expected = expected[::-1] if update.transposed else expected
        if found.get(name) != expected:
            what = f"the base has no weight {name} of shape {list(expected)}"
            hint = "is it the base that the adapter was trained on?"
            raise ModelError(what, where=str(source), hint=hint)


def _merged(name: str, tensor: Tensor, adapter: SavedAdapter, dtype: str | None) -> Tensor:
    if name in adapter.whole:
        return _cast(adapter.whole[name], dtype or tensor.dtype)
    update = adapter.updates.get(name)
    if update is None:
        return _cast(tensor, dtype)
    weight = rounded(tensor, adapter.model) if adapter.rounds_base else tensor
    return _cast(update.of(weight), dtype or tensor.dtype)


def _cast(tensor: Tensor, dtype: str | torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point() or dtype is None:
        return tensor.contiguous()
    return tensor.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).contiguous()


def _copy_rest(adapter: SavedAdapter, source: Path, target: Path, dtype: str | None) -> None:
    """Configuration of the base; tokenizer, template, settings of generation and the card of the
    adapter."""
    for path in (*source.iterdir(), *adapter.folder.iterdir()):
        own = path.parent == adapter.folder and path.suffix == ".png"  # of its card
        wanted = own or path.suffix in (".json", ".jinja", ".model", ".txt")
        is_map = path.name.endswith(".index.json")
        if path.is_file() and wanted and path.name not in NOT_OF_THE_BASE and not is_map:
            require_inside(path, path.parent)
            shutil.copyfile(path, target / path.name)
    config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    if dtype is not None:
        config["dtype"] = dtype
    if any(name.startswith("lm_head") for name in adapter.whole):
        config["tie_word_embeddings"] = False
    write_text(target / "config.json", json.dumps(config, indent=1, ensure_ascii=False))
    card = adapter.folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    prompt = json.loads((adapter.folder / PROMPT_FILE).read_text(encoding="utf-8"))
    write_text(target / CARD, merged_card(text, prompt))


def _compare(adapter: SavedAdapter, merged: Path) -> Comparison | None:
    """Base, base with adapter, and the merged model on the same ids, one after another.

    Raises:
        ModelError: rounding the merged weights lost what was trained.
    """
    size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    # In fp32, and a file is read while the model stands.
    if free_memory(torch.device("cpu")) < 3 * size * 4 / _bytes_each(merged):
        log.warning("merged and unmerged logits are not compared: there is no memory for it")
        return None
    updates: dict[str, Any] = {"device": "cpu", "dtype": "float32", "offload_layers": None}
    if not adapter.rounds_base:
        updates["quantization"] = None
    base, tokenizer = load_model(adapter.model.model_copy(update=updates))
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]]) % base.config.get_text_config().vocab_size
    with torch.no_grad():
        before = base.eval()(ids).logits
        adapted: PeftModel = load_onto(base, adapter.folder)
        expected = adapted.eval()(input_ids=ids).logits
        del base, adapted
        found = _logits(merged, ids)
    largest = float(expected.abs().max())
    comparison = Comparison(float((found - expected).abs().max()), largest)
    learned = float((before - expected).abs().max())
    allowed = max(FP32_TOLERANCE * max(1.0, largest), learned / 2)
    if not comparison.difference <= allowed:
        what = f"{comparison}; allowed is a difference of {allowed:.1e}"
        hint = "in half precision what was trained is rounded away: --dtype float32, or --type f32"
        raise ModelError(what, where=str(adapter.folder), hint=hint)
    return comparison


def _logits(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    return model.eval()(ids).logits


def _bytes_each(folder: Path) -> int:
    """Of a weight on disk."""
    for _, tensor in weights.tensors(next(folder.glob("*.safetensors"))):
        return tensor.element_size()
    return 4
