"""Attention over a prefix tree, registered with transformers' attention interface.

The model's attention is one function for everything: with a `tree` among its keyword arguments
it attends over that tree; without one it is transformers' own SDPA, so that generation and padded
batches run through the very same model. The layout travels as a keyword argument because
activation checkpointing hands the same arguments to its second pass.

Shapes: N packed tokens, H query heads, K key/value heads, D head width; a segment has n tokens and
its path (ancestors and itself) m.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stemtune.kernels import segments
from stemtune.kernels.gather import gather
from stemtune.kernels.segments import SegmentPath
from stemtune.tree.build import Tree

NAME = "stemtune"


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """What attention needs to know of a tree, on the device where it runs."""

    tree: Tree
    backend: str
    device: torch.device

    @cached_property
    def paths(self) -> list[list[tuple[int, int]]]:
        """For each segment the packed ranges of its ancestors and itself, neighbours joined."""
        paths: list[list[tuple[int, int]]] = []
        for segment in self.tree.segments:
            path = list(paths[segment.parent]) if segment.parent >= 0 else []
            if path and path[-1][1] == segment.start:
                path[-1] = (path[-1][0], segment.end)
            else:
                path.append((segment.start, segment.end))
            paths.append(path)
        return paths

    @cached_property
    def segment_paths(self) -> list[SegmentPath]:
        """The segments with their paths."""
        numbered = zip(self.tree.segments, self.paths, strict=True)
        return [SegmentPath(segment.start, segment.end, path) for segment, path in numbered]

    @cached_property
    def subtree_end(self) -> Tensor:
        """[N], see Tree.subtree_end."""
        return torch.from_numpy(self.tree.subtree_end).to(self.device)

    @cached_property
    def position_ids(self) -> Tensor:
        """[N] depth of each token."""
        return torch.from_numpy(self.tree.position_ids).to(self.device)

    @cached_property
    def varlen(self) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
        """Gathered keys [Σm] (None where these are the packed tokens as they are), cumulated
        lengths of queries and keys [segments + 1], and the longest of both."""
        keys = [torch.arange(*part) for path in self.paths for part in path]
        n = [segment.end - segment.start for segment in self.tree.segments]
        m = [segment.depth + length for segment, length in zip(self.tree.segments, n, strict=True)]
        sizes = [torch.tensor([0, *x]).cumsum(0).to(torch.int32).to(self.device) for x in (n, m)]
        gathered = torch.cat(keys).to(self.device) if sum(m) > self.tree.num_distinct else None
        return gathered, sizes[0], sizes[1], max(n), max(m)

    def flex_mask(self, window: int | None) -> Any:
        """FlexAttention's block mask."""
        from stemtune.tree.blockmask import block_mask

        if window not in self._flex_masks:
            self._flex_masks[window] = block_mask(self.tree, window, self.device)
        return self._flex_masks[window]

    @cached_property
    def _flex_masks(self) -> dict[int | None, Any]:
        return {}


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: TreeLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: query [B, H, N, D], key and value [B, K, N, D]; the
    result is [B, N, H, D]. With a tree B is 1, and the mask is not looked at.

    Raises:
        NotImplementedError: the architecture asks for something no tree back end does.
    """
    cap = kwargs.get("softcap")
    if tree is None and cap is not None:
        return capped_attention(query, key, value, attention_mask, kwargs["scaling"], cap), None
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [k for k in ("s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {unknown[0]} over a tree")
    if kwargs.get("dropout"):
        raise NotImplementedError("attention dropout over a tree")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    window = kwargs.get("sliding_window")
    result = BACKENDS[tree.backend](query, key, value, tree, scale, window, cap)
    return result, None


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:
    """What SDPA can't do, without a tree: scores become cap · tanh(score / cap).

    Args:
        mask: [B, 1, queries, keys], of booleans; None where it is the causal one, or there is a
            single query.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = cap * torch.tanh(query @ key.mT * scale / cap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def register() -> None:
    """Make `attn_implementation="stemtune"` known to transformers."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def segments_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeLayout,
    scale: float,
    window: int | None,
    cap: float | None = None,
) -> Tensor:
    """Segment by segment: its queries over the keys of its path. Any device; the reference."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # it does not look into a function with its own backward
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    result = segments.segments_attention(
        query[0], key[0], value[0], tree.segment_paths, scale, window, cap
    )
    return result.transpose(0, 1)[None]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeLayout,
    scale: float,
    window: int | None,
    cap: float | None = None,
) -> Tensor:
    """One variable-length FlashAttention call over gathered keys; its causal mask is aligned to
    the bottom right, which is just a segment's place at the end of its path. CUDA, half precision.

    Raises:
        NotImplementedError: scores are to be capped.
    """
    if cap is not None:
        raise NotImplementedError("varlen attention with a cap on scores: use segments or flex")
    from torch.nn.attention.varlen import varlen_attn

    keys, ends_q, ends_k, longest_q, longest_k = tree.varlen
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    if keys is not None:
        k, v = gather(k, keys), gather(v, keys)
    # Before torch 2.12 it takes grouped heads without being told.
    grouped: dict[str, Any] = {}
    if _has(varlen_attn, "enable_gqa"):
        grouped["enable_gqa"] = q.shape[1] != k.shape[1]
    result = varlen_attn(
        q,
        k,
        v,
        ends_q,
        ends_k,
        longest_q,
        longest_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(result, Tensor)
    return result[None]


@cache
def _has(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in signature(function).parameters


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeLayout,
    scale: float,
    window: int | None,
    cap: float | None = None,
) -> Tensor:
    """FlexAttention: compiled on CUDA. It has no backward pass on CPUs."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    run = _compiled_flex() if query.is_cuda else flex
    result = run(
        query,
        key,
        value,
        score_mod=None if cap is None else _capped(cap, query.device),
        block_mask=tree.flex_mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.transpose(1, 2)


def _capped(cap: float, device: torch.device) -> Callable[..., Tensor]:
    """What becomes of scores. The cap is a tensor there: a number, which compiled code for any
    shape takes for one that changes, would not be compiled."""
    largest = torch.full((), cap, dtype=torch.float32, device=device)

    def score_mod(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return largest * torch.tanh(score / largest)

    return score_mod


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    # A window or none, one block or more, a gradient or none: there may be more kinds than eight,
    # beyond which it would run uncompiled. torch 2.13 takes another limit.
    more: dict[str, Any] = {"recompile_limit": 64} if _has(torch.compile, "recompile_limit") else {}
    return torch.compile(flex, dynamic=True, **more)


Backend = Callable[
    [Tensor, Tensor, Tensor, TreeLayout, float, "int | None", "float | None"], Tensor
]
BACKENDS: dict[str, Backend] = {
    "segments": segments_attention,
    "varlen": varlen_attention,
    "flex": flex_attention,
}


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype, config: Any) -> str:
    """The back end for `auto`: variable-length FlashAttention where it runs, else segments."""
    if wanted != "auto":
        return wanted
    half = dtype in (torch.bfloat16, torch.float16)
    capped = getattr(config, "attn_logit_softcapping", None)
    return "varlen" if device.type == "cuda" and half and not capped else "segments"
