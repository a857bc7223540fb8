"""Tiny checkpoints in the very layout of ChatGLM2 and ChatGLM3, and what the originals do with
them, written down again: the forward pass, the prompts, the training ids."""

import json
import math
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models import SENTENCES
from tests.runs import ANSWERS, QUESTIONS

TEXTS = [
    *SENTENCES,
    *QUESTIONS,
    *ANSWERS,
    "[Round 1]\n\n问：你好\n\n答：你好，我是人工智能助手。",
    "def f(x):\n    return x + 1\n        y = 2",
    "a   b  ====  ---- 哈哈哈哈",
]
LAYERS, HIDDEN, HEADS, GROUPS, HEAD, INNER, PADDED = 2, 32, 4, 2, 8, 48, 512
Q, K = HEADS * HEAD, GROUPS * HEAD
CONFIG: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "ffn_hidden_size": INNER,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": HIDDEN,
    "kv_channels": HEAD,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": GROUPS,
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "original_rope": True,
    "padded_vocab_size": PADDED,
    "post_layer_norm": True,
    "quantization_bit": 0,
    "rmsnorm": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@cache
def pieces_model(**options: Any) -> bytes:
    """A `tokenizer.model`: BPE with byte fallback and a dummy prefix, and no normalizer."""
    import sentencepiece

    written = BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 480,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
        **options,
    }
    texts = [line for text in TEXTS * 3 for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, **settings
    )
    return written.getvalue()


@cache
def joined_pieces_model() -> bytes:
    """Two vocabularies put together, each with its own scores, so that many are the same."""
    from sentencepiece import sentencepiece_model_pb2

    first, second = (
        sentencepiece_model_pb2.ModelProto.FromString(pieces_model(**options))
        for options in ({"vocab_size": 440}, {"vocab_size": 470, "max_sentencepiece_length": 3})
    )
    known = {piece.piece for piece in first.pieces}
    first.pieces.extend(piece for piece in second.pieces if piece.piece not in known)
    return first.SerializeToString()


def pieces_of(file: Path) -> Any:
    """SentencePiece itself."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(file))


def random_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """By the keys of the original; the same in every call."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (PADDED, HIDDEN),
        "rotary_pos_emb.inv_freq": (HEAD // 4,),
    }
    for n in range(LAYERS):
        layer = f"encoder.layers.{n}."
        shapes |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "self_attention.query_key_value.weight": (Q + 2 * K, HIDDEN),
            layer + "self_attention.query_key_value.bias": (Q + 2 * K,),
            layer + "self_attention.dense.weight": (HIDDEN, Q),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
            layer + "mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
        }
    shapes |= {
        "encoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (PADDED, HIDDEN),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"transformer.{key}": (0.2 * torch.randn(shape, generator=generator)).to(dtype)
        for key, shape in shapes.items()
    }
    for key in weights:
        if "layernorm" in key:
            weights[key] += 1
    return weights


def write_checkpoint(
    folder: Path,
    version: int,
    *,
    pickled: bool = False,
    shards: int = 3,
    dtype: torch.dtype = torch.float32,
    **values: Any,
) -> dict[str, Tensor]:
    """A base as it is published; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"THUDM/chatglm{version}-6b"
    config = {**CONFIG, "_name_or_path": name, **values}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(pieces_model())
    weights = random_weights(dtype)
    keys = list(weights)
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    places: dict[str, str] = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{end}"
        part = {key: weights[key] for key in keys[number::shards]}
        places |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    index = folder / f"{stem}.{end}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return weights


# -- the original's forward pass ----------------------------------------------------------------


def reference_logits(weights: dict[str, Tensor], ids: Tensor, **rope: Any) -> Tensor:
    """Logits `(T, V)` of ids `(T,)`: one sequence, line by line.

    Args:
        rope: `base`, and `divide` for positions.
    """
    w = {key.removeprefix("transformer."): value for key, value in weights.items()}
    length = len(ids)
    angles = rope_angles(length, **rope)
    hidden = w["embedding.word_embeddings.weight"][ids]
    for n in range(LAYERS):
        layer = f"encoder.layers.{n}."
        normed = rms(hidden, w[layer + "input_layernorm.weight"])
        fused = normed @ w[layer + "self_attention.query_key_value.weight"].T
        fused = fused + w[layer + "self_attention.query_key_value.bias"]
        q = rotated(fused[:, :Q].view(length, HEADS, HEAD), angles)
        k = rotated(fused[:, Q : Q + K].view(length, GROUPS, HEAD), angles)
        v = fused[:, Q + K :].view(length, GROUPS, HEAD)
        context = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = q[:, head] @ k[:, group].T / math.sqrt(HEAD)
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            context.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v[:, group])
        hidden = hidden + torch.cat(context, -1) @ w[layer + "self_attention.dense.weight"].T
        normed = rms(hidden, w[layer + "post_attention_layernorm.weight"])
        both = normed @ w[layer + "mlp.dense_h_to_4h.weight"].T
        gate, up = both[:, :INNER], both[:, INNER:]
        inner = gate * torch.sigmoid(gate) * up
        hidden = hidden + inner @ w[layer + "mlp.dense_4h_to_h.weight"].T
    return rms(hidden, w["encoder.final_layernorm.weight"]) @ w["output_layer.weight"].T


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def rope_angles(length: int, base: float = 10000.0, divide: float = 1.0) -> Tensor:
    """`(T, HEAD / 4)`: half of the head's dimensions turn, in pairs."""
    turning = HEAD // 2
    frequencies = [base ** (-2 * pair / turning) for pair in range(turning // 2)]
    return torch.tensor([[t / divide * f for f in frequencies] for t in range(length)])


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbours (0, 1), (2, 3), … of the first half turn; the second half stays."""
    x = x.clone()
    for pair in range(angles.shape[1]):
        cos, sin = angles[:, pair].cos()[:, None], angles[:, pair].sin()[:, None]
        a, b = x[..., 2 * pair].clone(), x[..., 2 * pair + 1].clone()
        x[..., 2 * pair] = a * cos - b * sin
        x[..., 2 * pair + 1] = b * cos + a * sin
    return x


# -- the originals' prompts ---------------------------------------------------------------------

Turns = list[tuple[str, str]]


def original_prompt(version: int, pieces: Any, turns: Turns) -> list[int]:
    """The ids of an inference: the last turn is the user's."""
    n = pieces.get_piece_size()
    if version == 3:
        role_ids = {"system": n + 5, "user": n + 6, "assistant": n + 7}
        ids = [n + 1, n + 3]
        for role, content in turns:
            ids += [role_ids[role], *pieces.encode("\n"), *pieces.encode(content)]
        return [*ids, role_ids["assistant"]]
    text, number = "", 0
    for role, content in turns:
        if role == "system":
            text += content + "\n\n"
        elif role == "user":
            number += 1
            text += f"[Round {number}]\n\n问：{content}\n\n答："
        else:
            text += content + "\n\n"
    return [n + 1, n + 3, *pieces.encode(text)]


def original_answer(version: int, pieces: Any, answer: str) -> list[int]:
    """What is trained behind a prompt."""
    head = pieces.encode("\n") if version == 3 else []
    return [*head, *pieces.encode(answer), 2]
