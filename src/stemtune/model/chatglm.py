"""ChatGLM2 and ChatGLM3 without their own code: a checkpoint becomes one of transformers' `glm`,
once, in the user's cache. The table of names stands in `weights_of`.

Letters of shapes: V vocabulary, H hidden, Q = heads * head size, K = key/value groups * head size,
F the MLP's inner width.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, GlmConfig

from stemtune.errors import DiskError, ModelError
from stemtune.model import hub
from stemtune.model.chatglm_tokenizer import build_tokenizer, stop_ids
from stemtune.model.converted import converted_once, digest_of, reason_of
from stemtune.model.weights import indexed

log = logging.getLogger(__name__)
CONVERSION = 1  # one more whenever the same checkpoint would be converted differently

# Those of `config.json`, by the names that `GlmConfig` has for them.
SIZES = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
    "attention_bias": "add_qkv_bias",
}
# What every ChatGLM2 and ChatGLM3 has; another value is another architecture.
FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
    "tie_word_embeddings": False,
}
OTHERS = "ChatGLM2 and ChatGLM3 are converted; ChatGLM-6B, GLM-130B and quantized ones are not"
# In a tokenizer's files of ChatGLM3 since its later revisions, and always in its code.
ROLE = "<|assistant|>"
NAMES = {2: ("chatglm2", "codegeex2"), 3: ("chatglm3",)}
READ = (".json", ".model", ".safetensors", ".bin", ".py")
DROPPED = "rotary_pos_emb.inv_freq"


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint.

    Attributes:
        shape: as it should be.
        becomes: new names, and how many of its rows each takes, in order.
    """

    shape: tuple[int, ...]
    becomes: dict[str, int]


def is_chatglm(folder: Path) -> bool:
    """Whether this is a checkpoint of ChatGLM's own kind, one that can be converted or not."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return values["model_type"] == "chatglm"
    except (OSError, ValueError, KeyError, TypeError):
        return False  # transformers says what is wrong with it


def converted_folder(source: Path, allow_pickled: bool) -> Path:
    """The converted base, made on the first call; its weights keep their dtype.

    Args:
        source: a folder with `config.json`, `tokenizer.model` and weights.
        allow_pickled: take `.bin` files, where there are no safetensors.

    Raises:
        ModelError: a file is missing or damaged, or it is no ChatGLM2 or ChatGLM3.
        DiskError: there is no room for it.
    """
    hub.require_plain_weights(source, allow_pickled)
    files = [path for path in source.iterdir() if path.suffix in READ and path.is_file()]
    name = f"chatglm-{digest_of(files, CONVERSION, _last_names(source))}"

    def convert(folder: Path) -> None:
        log.info("%s is converted, once: a minute or two", " ".join(_last_names(source)[-1:]))
        _convert(source, folder, allow_pickled)

    return converted_once(name, "config.json", convert)


def save_converted(source: Path, target: Path, *, allow_pickled: bool = False) -> None:
    """Write the converted base into a new folder, for tools that read transformers' `glm`.

    Raises:
        ModelError, DiskError: see `converted_folder`; or the folder is there already.
    """
    converted = converted_folder(source, allow_pickled)
    try:
        shutil.copytree(converted, target)
    except FileExistsError:
        raise ModelError("it is there already", where=str(target), hint="choose another") from None
    except OSError as error:
        what = f"can't write the converted base: {error.strerror or error}"
        raise DiskError(what, where=str(target), hint="is there room?") from error


def _convert(source: Path, folder: Path, allow_pickled: bool) -> None:
    values = _read_json(source / "config.json")
    version = version_of(source, values)
    config = config_of(values, version, source)
    tokenizer = build_tokenizer(source / "tokenizer.model", version)
    if len(tokenizer) > config.vocab_size:
        what = f"the tokenizer has {len(tokenizer)} tokens, the weights {config.vocab_size}"
        raise ModelError(what, where=str(source), hint="are these files of the same base?")
    stops = stop_ids(tokenizer)
    config.eos_token_id = stops
    config.pad_token_id = cast(int, tokenizer.pad_token_id)
    config.dtype = _convert_weights(source, folder, config, allow_pickled)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=stops, pad_token_id=config.pad_token_id).save_pretrained(folder)
    config.save_pretrained(folder)


def version_of(folder: Path, values: dict[str, Any]) -> int:
    """2 or 3. Weights and sizes are no proof, since both architectures are the same.

    Files of the tokenizer that know of roles are ChatGLM3's, code of a tokenizer that does not is
    ChatGLM2's; it is read as a text, never run. Else it is what the base is called: in
    `config.json`, in `tokenizer_config.json`, on the Hub, or as a folder.

    Raises:
        ModelError: nothing tells.
    """
    code = folder / "tokenization_chatglm.py"
    texts = [_text(folder / "tokenizer_config.json"), _text(folder / "special_tokens_map.json")]
    if any(ROLE in text for text in [*texts, _text(code)]):
        return 3
    if code.is_file():
        return 2
    names = [
        str(values.get("_name_or_path", "")),
        *re.findall(r'"name_or_path": *"(.*?)"', texts[0]),
    ]
    for name in [*names, *_last_names(folder)]:
        plain = Path(name).name.lower().replace("-", "").replace("_", "")
        found = [version for version, names in NAMES.items() if any(n in plain for n in names)]
        if len(found) == 1:
            return found[0]
    what = "can't tell whether this is ChatGLM2 or ChatGLM3: their prompts differ"
    hint = "put `chatglm2` or `chatglm3` into the folder's name"
    raise ModelError(what, where=str(folder), hint=hint)


def config_of(values: dict[str, Any], version: int, folder: Path) -> GlmConfig:
    """The config of `glm` for that of a checkpoint.

    Raises:
        ModelError: it is of another architecture, or quantized.
    """
    where = str(folder / "config.json")
    missing = [name for name in SIZES.values() if name not in values]
    if missing:
        what = f"this is no ChatGLM2 or ChatGLM3: there is no `{missing[0]}`"
        raise ModelError(what, where=where, hint=OTHERS)
    other = [name for name, value in FIXED.items() if values.get(name, value) != value]
    if values.get("quantization_bit"):
        other.append("quantization_bit")
    if other:
        what = f"this is no plain ChatGLM2 or ChatGLM3: `{other[0]}` is {values[other[0]]}"
        raise ModelError(what, where=where, hint=OTHERS)
    try:
        return GlmConfig(
            **{name: values[theirs] for name, theirs in SIZES.items()},
            rope_parameters=_rope(float(values.get("rope_ratio", 1)), version),
            architectures=["GlmForCausalLM"],
            pad_token_id=0,  # as the tokenizer says later
            eos_token_id=2,
        )
    except Exception as error:  # transformers' own kinds, for a value of a wrong type
        what = f"this config.json makes no model: {reason_of(error)}"
        raise ModelError(what, where=where, hint="is it the original file?") from error


def _rope(ratio: float, version: int) -> dict[str, Any]:
    """`rope_ratio` divides ChatGLM2's positions (its 32k model), and multiplies ChatGLM3's base."""
    rope: dict[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio == 1:
        return {**rope, "rope_type": "default"}
    if version == 2:
        return {**rope, "rope_type": "linear", "factor": ratio}
    return {**rope, "rope_type": "default", "rope_theta": 10000.0 * ratio}


def weights_of(config: GlmConfig) -> dict[str, Weight]:
    """By its key, without the prefix `transformer.`, each tensor that a checkpoint should hold."""
    v, h, f = config.vocab_size, config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * cast(int, config.head_dim)
    k = cast(int, config.num_key_value_heads) * cast(int, config.head_dim)
    weights = {
        "embedding.word_embeddings.weight": _whole("model.embed_tokens.weight", v, h),
        "encoder.final_layernorm.weight": _whole("model.norm.weight", h),
        "output_layer.weight": _whole("lm_head.weight", v, h),
    }
    for number in range(config.num_hidden_layers):
        old, new = f"encoder.layers.{number}.", f"model.layers.{number}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            weights[old + norm] = _whole(new + norm, h)
        fused = old + "self_attention.query_key_value."
        parts = {"q_proj": q, "k_proj": k, "v_proj": k}
        for kind, columns in {
            "weight": (h,),
            **({"bias": ()} if config.attention_bias else {}),
        }.items():
            names = {f"{new}self_attn.{name}.{kind}": rows for name, rows in parts.items()}
            weights[fused + kind] = Weight((q + 2 * k, *columns), names)
        for theirs, ours, *shape in (
            ("self_attention.dense", "self_attn.o_proj", h, q),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj", 2 * f, h),
            ("mlp.dense_4h_to_h", "mlp.down_proj", h, f),
        ):
            weights[f"{old}{theirs}.weight"] = _whole(f"{new}{ours}.weight", *shape)
    return weights


def _whole(name: str, *shape: int) -> Weight:
    return Weight(shape, {name: shape[0]})


def _convert_weights(
    source: Path, folder: Path, config: GlmConfig, allow_pickled: bool
) -> torch.dtype:
    """One new shard for each old one: no more than one is held at a time. Returns the dtype."""
    wanted = weights_of(config)
    seen: set[str] = set()
    places: dict[str, str] = {}
    size, dtype = 0, torch.float32
    shards = _shards(source, allow_pickled)
    for number, shard in enumerate(shards, start=1):
        converted: dict[str, Tensor] = {}
        for key, tensor in _tensors(shard):
            name = key.removeprefix("transformer.")
            if name == DROPPED:
                continue
            converted |= _pieces(shard, name, tensor, wanted.get(name))
            seen.add(name)
            dtype = tensor.dtype
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save(converted, folder / file)
        places |= dict.fromkeys(converted, file)
        size += sum(tensor.nbytes for tensor in converted.values())
    missing = sorted(wanted.keys() - seen)
    if missing:
        what = f"the weights are not whole: there is no {missing[0]!r}"
        raise ModelError(what, where=str(source), hint="download the base again")
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return dtype


def _pieces(shard: Path, name: str, tensor: Tensor, weight: Weight | None) -> dict[str, Tensor]:
    """What a tensor becomes.

    Raises:
        ModelError: it is unknown, or not as it should be.
    """
    if weight is None:
        what = f"unknown tensor {name!r}"
        raise ModelError(what, where=str(shard), hint=OTHERS)
    if tuple(tensor.shape) != weight.shape or not tensor.is_floating_point():
        what = f"{name!r} is {list(tensor.shape)} of {tensor.dtype}, not {list(weight.shape)}"
        raise ModelError(what, where=str(shard), hint=OTHERS)
    # Copies: a file of safetensors holds no two views of the same memory.
    pieces = tensor.split(list(weight.becomes.values()))
    return {
        new: piece.clone(memory_format=torch.contiguous_format)
        for new, piece in zip(weight.becomes, pieces, strict=True)
    }


def _shards(source: Path, allow_pickled: bool) -> list[Path]:
    """The files of weights, safetensors where there are any.

    Raises:
        ModelError: there are none, or one of those that the index names is missing.
    """
    kinds = [("model.safetensors.index.json", "model*.safetensors")]
    if allow_pickled:
        kinds.append(("pytorch_model.bin.index.json", "pytorch_model*.bin"))
    for index, pattern in kinds:
        names = {path.name for path in source.glob(pattern)}
        if (source / index).is_file():
            names = set(indexed(source / index))
        for name in sorted(names):
            if not (source / name).is_file():
                what = f"a part of the weights is missing: {name}"
                raise ModelError(what, where=str(source), hint="download the base again")
        if names:
            return [source / name for name in sorted(names)]
    hint = "a base has safetensors, or .bin files and model.allow_pickled: true"
    raise ModelError("there are no weights here", where=str(source), hint=hint)


def _tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one after the other.

    Raises:
        ModelError: it is damaged, or holds something else.
    """
    try:
        if shard.suffix == ".bin":
            yield from read_pickled(shard).items()
        else:
            with safe_open(shard, framework="pt") as file:  # pyright: ignore
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    yield key, file.get_tensor(key)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, zip and pickle: each has its own kinds
        what = f"{shard.name} can't be read: {reason_of(error)}"
        hint = "is it whole? Download it again"
        raise ModelError(what, where=str(shard), hint=hint) from error


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, mapped from it; nothing that it holds is run.

    Raises:
        ValueError: it holds something else than tensors by name.
        Exception: what torch raises for a damaged file.
    """
    found: object = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    if isinstance(found, dict):
        tensors = cast(dict[object, object], found)
        if all(isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()):
            return cast(dict[str, Tensor], tensors)
    raise ValueError("it holds something else than tensors")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a shard; safetensors has a kind of error of its own for a full disk."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except Exception as error:
        raise OSError(reason_of(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"{path.name} can't be read: {reason_of(error)}"
        raise ModelError(what, where=str(path), hint="download the base again") from None
    return cast(dict[str, Any], values) if isinstance(values, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _last_names(folder: Path) -> list[str]:
    """What a folder is called; that of the Hub's cache is called as the base is."""
    names = [folder.resolve().name]
    if folder.parent.name == "snapshots":
        names.append(folder.parent.parent.name.replace("--", "/"))
    return names
