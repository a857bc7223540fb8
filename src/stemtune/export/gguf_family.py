"""What llama.cpp calls the parts of a model: its settings, its tensors, the order of their rows.

Only families that come out exactly the same there; the others are refused by name. The rules are
those of llama.cpp's graphs and of its converter, https://github.com/ggml-org/llama.cpp
(`src/models`, `conversion`).
"""

import json
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig

from stemtune.errors import ModelError

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
}
GEMMA = (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3)
# Of how many blocks the last one looks further than its window.
WINDOWED = {MODEL_ARCH.GEMMA2: 2, MODEL_ARCH.GEMMA3: 6}
# By the number of blocks: whose scores are scaled by the model's width, not by a head's.
WIDE_SCALE = {MODEL_ARCH.GEMMA2: 46, MODEL_ARCH.GEMMA3: 62}
# Which linear layers may have a bias.
BIASED = {
    MODEL_ARCH.LLAMA: (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ),
    MODEL_ARCH.QWEN2: ("attn_q", "attn_k", "attn_v"),
}
LOCAL_THETA = 10000.0  # of Gemma 3's windows: llama.cpp knows no other
SKIPPED = (".rotary_emb.inv_freq",)  # a buffer that old checkpoints hold
# Of YaRN what llama.cpp is told, and what it takes as given.
YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
YARN_GIVEN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Family:
    """A base as llama.cpp has it.

    Attributes:
        config: transformers' own.
        architecture: llama.cpp's name for the family.
        where: the base, for errors.
    """

    config: Any
    architecture: MODEL_ARCH
    where: str

    @cached_property
    def _names(self) -> TensorNameMap:
        return get_tensor_name_map(self.architecture, self.config.num_hidden_layers)

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor of the base's files stands for nothing of its own."""
        tied = name == "lm_head.weight" and self.config.tie_word_embeddings
        return tied or name.endswith(SKIPPED)

    def name_of(self, name: str) -> str:
        """A tensor's name there.

        Raises:
            ModelError: llama.cpp has no such tensor.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        layer = (found or "").removesuffix(".bias").rpartition(".")[2]
        allowed = BIASED.get(self.architecture, ())
        if found is None or (found.endswith(".bias") and layer not in allowed):
            raise _refusal(f"llama.cpp's {self.title} has no {name}", self.where)
        return found

    @property
    def title(self) -> str:
        """The family's name in transformers."""
        return self.config.model_type

    def rows_of(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor, or the B of an update of it, in llama.cpp's order of rows: RoPE turns
        neighbouring pairs of a Llama's head there, in transformers its two halves."""
        if self.architecture != MODEL_ARCH.LLAMA:
            return tensor
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.rsplit(".", 2)[-2])
        if heads is None:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    def value_of(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base, fp32, as llama.cpp wants it."""
        rows = self.rows_of(name, tensor.float())
        # Gemma's norms are kept as what they differ from one.
        return rows + 1 if self.architecture in GEMMA and name.endswith("norm.weight") else rows

    def more_tensors(self) -> dict[str, Tensor]:
        """What transformers computes and llama.cpp reads: Llama 3's factors of frequencies."""
        rope = rope_of(self.config)
        if rope["rope_type"] != "llama3":
            return {}
        return {"rope_freqs.weight": _llama3_factors(rope, rotated(self.config))}

    def add_settings(self, writer: GGUFWriter) -> None:
        """The numbers that llama.cpp builds its graph from."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self._context())
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(rotated(config))
        _add_rope(writer, rope_of(config))
        if self.architecture == MODEL_ARCH.PHI3:
            writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        if self.architecture in WINDOWED:
            writer.add_sliding_window(config.sliding_window)
        if self.architecture == MODEL_ARCH.GEMMA2 and config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if self.architecture in GEMMA and config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)

    def _context(self) -> int:
        """How long a text may be: where llama.cpp has no windows, as long as one."""
        longest: int = self.config.max_position_embeddings
        window = getattr(self.config, "sliding_window", None)
        if window is None or self.architecture in WINDOWED or window >= longest:
            return longest
        log.warning(
            "llama.cpp knows no sliding window for %s: the context ends where one would, at %d",
            self.title,
            window,
        )
        return window


def family_of(source: Path) -> Family:
    """The family of a base, given its folder.

    Raises:
        ModelError: none that comes out exactly the same in llama.cpp.
    """
    where = str(source)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES.get(raw["model_type"])
    if architecture is None:
        hint = f"GGUF is written of {', '.join(ARCHITECTURES)}; others: `stemtune merge`"
        raise ModelError(f"no GGUF of a {raw['model_type']} base", where=where, hint=hint)
    config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    reason = _difference(config, architecture)
    if reason:
        raise _refusal(f"llama.cpp would compute this base otherwise: {reason}", where)
    return Family(config, architecture, where)


def _refusal(what: str, where: str) -> ModelError:
    hint = "`stemtune merge` writes it for engines that run transformers' models"
    return ModelError(what, where=where, hint=hint)


def _difference(config: Any, architecture: MODEL_ARCH) -> str:
    """What of a config llama.cpp has no setting for; empty where nothing is."""
    gemma = architecture in GEMMA
    activation = config.hidden_activation if gemma else config.hidden_act
    if activation != ("gelu_pytorch_tanh" if gemma else "silu"):
        return f"the activation {activation}"
    rope = rope_of(config)
    kinds = ["default", "linear", "yarn", *(["llama3"] if architecture == MODEL_ARCH.LLAMA else [])]
    if rope["rope_type"] not in kinds:
        return f"RoPE of type {rope['rope_type']}"
    if rope["rope_type"] == "yarn":
        known = YARN_GIVEN | {name: rope.get(name) for name in YARN}
        other = [name for name, value in rope.items() if value not in (None, known.get(name))]
        if other:
            return f"YaRN with {', '.join(other)}"
    return _difference_of_gemma(config, architecture) if gemma else ""


def _difference_of_gemma(config: Any, architecture: MODEL_ARCH) -> str:
    every = WINDOWED[architecture]
    kinds = ("sliding_attention", "full_attention")
    wanted = [kinds[(block + 1) % every == 0] for block in range(config.num_hidden_layers)]
    if list(config.layer_types) != wanted:
        return f"windows in other blocks than all but each {every}th"
    wide = config.num_hidden_layers == WIDE_SCALE[architecture]
    scalar = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if config.query_pre_attn_scalar != scalar:
        return f"scores scaled by {config.query_pre_attn_scalar} instead of {scalar}"
    if architecture == MODEL_ARCH.GEMMA3:
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default" or local["rope_theta"] != LOCAL_THETA:
            return f"RoPE of its windows with theta {local['rope_theta']}"
        if getattr(config, "attn_logit_softcapping", None):
            return "capped scores"
    return ""


def rope_of(config: Any) -> dict[str, Any]:
    """RoPE's settings: of the blocks without a window, where those have their own."""
    found: dict[str, Any] = config.rope_parameters
    return found.get("full_attention", found)


def head_dim(config: Any) -> int:
    """Of an attention head."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def rotated(config: Any) -> int:
    """How many dimensions of a head RoPE turns."""
    return int(head_dim(config) * (rope_of(config).get("partial_rotary_factor") or 1.0))


def _add_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    kind = RopeScalingType.YARN if rope["rope_type"] == "yarn" else RopeScalingType.LINEAR
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == RopeScalingType.YARN:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _llama3_factors(rope: dict[str, Any], dimensions: int) -> Tensor:
    """What each frequency is divided by, [dimensions / 2]; as in transformers'
    `_compute_llama3_parameters`."""
    powers = torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions
    wavelengths = 2 * math.pi * rope["rope_theta"] ** powers
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
