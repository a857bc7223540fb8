"""Which models can attend over a tree."""

from typing import Any

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def why_no_tree(base: Any) -> str:
    """Why a model's sequences can't share one tree; empty if they can.

    What is found here would be silently wrong otherwise; the self-check is for the rest.
    """
    config = base.config
    if not getattr(base, "_supports_attention_backend", False):
        return "its attention takes no function from outside"
    if has_length_dependent_rope(config):
        return "its position encoding depends on the length of the sequence"
    if any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")):
        return "it drops attention weights in training"
    if any(name.endswith(".sinks") for name, _ in base.named_parameters()):
        return "it has attention sinks"
    return ""


def has_length_dependent_rope(config: Any) -> bool:
    """Whether a token's rotation depends on how long the longest sequence beside it is: then even
    a padded batch is not what separate sequences are."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in LENGTH_DEPENDENT_ROPE for kind in kinds)
