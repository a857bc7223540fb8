"""A run as GGUF, for llama.cpp and what is built on it: the merged model, or the adapter alone."""

import json
import logging
import re
import shutil
import uuid
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    naming_convention,
)
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import AutoTokenizer

from stemtune.data.renderer import Renderer
from stemtune.errors import ConfigError, DiskError, ModelError
from stemtune.export.gguf_family import Family, family_of
from stemtune.export.gguf_vocabulary import Vocabulary, vocabulary_of
from stemtune.export.merge import SavedAdapter, Update, merge, read_adapter
from stemtune.model import weights
from stemtune.model.adapter import adapter_folder
from stemtune.model.identity import require_same_base
from stemtune.model.load import base_source
from stemtune.model.names import PROMPT_FILE, shared_name

log = logging.getLogger(__name__)
SUFFIX = ".gguf"


@dataclass(frozen=True)
class Kind:
    """How weights are stored.

    Attributes:
        tensors: of matrices; vectors and norms stay fp32.
        file: what llama.cpp calls such a file.
        merged: the dtype to merge in, so that nothing is rounded twice.
    """

    tensors: GGMLQuantizationType
    file: LlamaFileType
    merged: str


KINDS = {
    "f32": Kind(GGMLQuantizationType.F32, LlamaFileType.ALL_F32, "float32"),
    "f16": Kind(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, "float16"),
    "bf16": Kind(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, "bfloat16"),
    "q8_0": Kind(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, "float32"),
}
BLOCK = 32  # of Q8_0: as many values have a scale


@dataclass(frozen=True)
class Run:
    """What an export is made of, read and checked before anything is written.

    Attributes:
        prompt: `stemtune.json`: how training made its prompts.
        name: of the base and the run, in letters that every engine takes.
        shapes: of the base's tensors, by name.
    """

    folder: Path
    adapter: SavedAdapter
    prompt: dict[str, Any]
    name: str
    source: Path
    family: Family
    shapes: dict[str, tuple[int, ...]]


def read_run(folder: Path) -> Run:
    """A run that can be written as GGUF.

    Raises:
        ModelError: there is none, or llama.cpp would compute its base otherwise.
    """
    adapter = read_adapter(adapter_folder(folder))
    source = base_source(adapter.model)
    require_same_base(adapter.folder, adapter.model)
    family = family_of(source)
    files = weights.shard_names(source, adapter.model.allow_pickled)
    shapes = {n: s for file in files for n, s in weights.shapes(source / file).items()}
    prompt = json.loads((adapter.folder / PROMPT_FILE).read_text(encoding="utf-8"))
    return Run(folder, adapter, prompt, _name(adapter, folder), source, family, shapes)


def _name(adapter: SavedAdapter, folder: Path) -> str:
    base = Path(shared_name(adapter.model.base)).name.removesuffix(SUFFIX)
    place = folder.resolve()
    run = place.parent.name if place.name == "adapter" else place.name
    run = re.sub(r"[^A-Za-z0-9]+", "-", run)  # a dot would end the name as llama.cpp parses it
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{base}-{run}").strip("-.")


def file_name(run: Run, kind: str, *, adapter_only: bool = False) -> str:
    """By llama.cpp's convention."""
    type_of = "LoRA" if adapter_only else None
    return naming_convention(None, run.name, None, None, None, kind, type_of) + SUFFIX


def renderer_of(run: Run) -> Renderer:
    """The training prompts' renderer.

    Raises:
        ModelError: the tokenizer can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(run.adapter.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers has its own kinds
        where = str(run.adapter.folder)
        raise ModelError("the adapter's tokenizer can't be read", where=where) from error
    return Renderer(tokenizer, run.prompt["template"])


def export_gguf(run: Run, target: Path, kind: str, *, adapter_only: bool = False) -> None:
    """Write a run as one GGUF file, whole or not at all.

    Args:
        target: a file that is not there yet.
        kind: one of `KINDS`.
        adapter_only: the adapter without its base, for llama.cpp's `--lora`.

    Raises:
        ConfigError: the target is there, or no name of a GGUF file.
        ModelError: llama.cpp can't run it, or would run it otherwise; nothing is written then.
        DiskError: there is no room for it.
    """
    require_new(target)
    if target.suffix != SUFFIX:
        hint = f"engines find models by the ending {SUFFIX}"
        raise ConfigError("this is no name of a GGUF file", where=str(target), hint=hint)
    if adapter_only:
        _require_alone(run)
        with written_whole(target) as temporary:
            _write_adapter(run, temporary, KINDS[kind])
        return
    for name in run.shapes:
        if not run.family.is_left_out(name):
            run.family.name_of(name)
    renderer = renderer_of(run)
    vocabulary = vocabulary_of(renderer, run.family.config.vocab_size, str(run.adapter.folder))
    if run.prompt.get("memories"):
        log.warning("what the character remembers stays behind: it answers without its memories")
    with written_whole(target) as temporary:
        merged = temporary.with_name("merged")
        comparison = merge(run.folder, merged, KINDS[kind].merged)
        if comparison is not None:
            log.info("%s", comparison)
        _write_model(run, merged, temporary, KINDS[kind], vocabulary, renderer)


def require_new(target: Path) -> None:
    """Raises: ConfigError, if there is something already."""
    if target.exists():
        hint = "give another place with --to, or delete it"
        raise ConfigError("it is there already", where=str(target), hint=hint)


@contextmanager
def written_whole(target: Path) -> Generator[Path]:
    """A place to write to, in a folder of its own beside the target; what is there in the end gets
    the target's name.

    Raises:
        DiskError: there is no room for it.
    """
    folder = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        yield folder / target.name
        (folder / target.name).rename(target)
    except OSError as error:
        what = f"can't write it: {error.strerror or error}"
        hint = "free some space, or give another place with --to"
        raise DiskError(what, where=str(target.parent), hint=hint) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- the merged model -----------------------------------------------------------------------------


def _write_model(
    run: Run,
    merged: Path,
    file: Path,
    kind: Kind,
    vocabulary: Vocabulary,
    renderer: Renderer,
) -> None:
    """One tensor at a time is in memory."""
    family = family_of(merged)  # a head that was trained whole is no longer the embeddings' matrix
    shards = [merged / name for name in weights.shard_names(merged, allow_pickled=False)]
    with closing(_writer(run, file, kind, vocabulary.name_for(run.name))) as writer:
        writer.add_type(GGUFType.MODEL)
        family.add_settings(writer)
        vocabulary.add_to(writer, renderer)
        for shard in shards:
            for name, shape in weights.shapes(shard).items():
                if not family.is_left_out(name):
                    _announce(writer, family.name_of(name), shape, kind)
        for name, tensor in family.more_tensors().items():
            _announce(writer, name, tuple(tensor.shape), kind)
        _begin_tensors(writer)
        for shard in shards:
            for name, tensor in weights.tensors(shard):
                if not family.is_left_out(name):
                    _write(writer, family.name_of(name), family.value_of(name, tensor), kind)
        for name, tensor in family.more_tensors().items():
            _write(writer, name, tensor, kind)


def _writer(run: Run, file: Path, kind: Kind, name: str) -> GGUFWriter:
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[run.family.architecture])
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(shared_name(run.adapter.model.base)).name)
    writer.add_tags(["stemtune", "lora"])
    writer.add_file_type(kind.file)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    return writer


def _stored_as(name: str, shape: tuple[int, ...], kind: Kind) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    if kind.tensors == GGMLQuantizationType.Q8_0 and shape[-1] % BLOCK:
        return GGMLQuantizationType.F16  # as llama.cpp does
    return kind.tensors


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    """A tensor's place in the file's head."""
    stored = _stored_as(name, shape, kind)
    held = quant_shape_to_byte_shape(shape, stored)
    size = int(np.prod(held))
    writer.add_tensor_info(name, held, np.dtype(np.uint8), size, raw_dtype=stored)


def _begin_tensors(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write(writer: GGUFWriter, name: str, tensor: Tensor, kind: Kind) -> None:
    stored = _stored_as(name, tuple(tensor.shape), kind)
    writer.write_tensor_data(quantize(tensor.float().contiguous().numpy(), stored))


# -- the adapter alone ----------------------------------------------------------------------------


def _require_alone(run: Run) -> None:
    """Refuse an adapter that llama.cpp would not load, or would run otherwise.

    Raises:
        ModelError: so it is.
    """
    adapter = run.adapter
    reason = ""
    if adapter.whole:
        names = ", ".join(sorted({name.rsplit(".", 1)[0] for name in adapter.whole}))
        reason = f"layers were trained whole ({names})"
    elif any(update.magnitude is not None for update in adapter.updates.values()):
        reason = "it is a DoRA adapter"
    elif adapter.rounds_base:
        reason = "it belongs on the base as LoftQ rounded it, not on the base's GGUF"
    if reason:
        what = f"llama.cpp can't run this adapter alone: {reason}"
        hint = "leave --adapter-only out: the merged model runs there"
        raise ModelError(what, where=str(adapter.folder), hint=hint)
    for name in adapter.updates:
        run.family.name_of(name)


def _write_adapter(run: Run, file: Path, kind: Kind) -> None:
    tensors: dict[str, Tensor] = {}
    for name, update in run.adapter.updates.items():
        there = run.family.name_of(name)
        tensors[f"{there}.lora_a"] = update.a
        tensors[f"{there}.lora_b"] = run.family.rows_of(name, update.b)
    alpha = _alpha(next(iter(run.adapter.updates.values())))
    with closing(_writer(run, file, kind, run.name)) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in tensors.items():
            _announce(writer, name, tuple(tensor.shape), kind)
        _begin_tensors(writer)
        for name, tensor in tensors.items():
            _write(writer, name, tensor, kind)


def _alpha(update: Update) -> float:
    """llama.cpp scales by alpha / r whatever the adapter: a rank-stabilised scale, alpha / √r, is
    written as that alpha which gives it."""
    return update.scale * update.a.shape[0]
