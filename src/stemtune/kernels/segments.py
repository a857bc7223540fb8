"""Attention of a prefix tree's segments over their paths, forward and backward.

The scores are computed again for the backward pass instead of being kept, so that memory grows with
the tokens, not with their square. The G query heads of a key/value head are stacked as rows of one
matrix product: keys are never repeated. Gradients of keys and values are added up in one buffer.

Shapes: N packed tokens, H query heads, K key/value heads, G = H / K, D head width (of values E); a
segment has n tokens and its path (ancestors and itself) m; h of the K heads are computed together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from stemtune.kernels.kind import kind_of
from stemtune.kernels.linear import has_fast_linear, linear

CPU_ROWS = 768  # rows of scores of a head at a time, of several heads half as many: see notes.md
GPU_ROWS = 4096
ALONE = 1_000_000  # scores of a segment in a head from which heads are computed one by one


@dataclass(frozen=True)
class SegmentPath:
    """A segment's packed range, and the packed ranges of its ancestors and itself, in order."""

    start: int
    end: int
    path: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """Tokens of the path."""
        return sum(end - start for start, end in self.path)


def segments_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: list[SegmentPath],
    scale: float,
    window: int | None,
    cap: float | None = None,
) -> Tensor:
    """softmax(scale · q Kᵀ) V for each segment's queries over the keys of its path.

    Args:
        query: [H, N, D]. key: [K, N, D]. value: [K, N, E]. All of one dtype.
        segments: they cover all N tokens.
        window: how many keys up to its own a query sees; None for all.
        cap: scores become cap · tanh(score / cap).

    Returns:
        [H, N, E].

    Source:
        Backward as in FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135, with P
        the weights: ∂V = Pᵀ ∂O, ∂S = P ∘ (∂O Vᵀ - rowsum(∂O ∘ O)), ∂Q = ∂S K, ∂K = ∂Sᵀ Q.
    """
    return _Segments.apply(query, key, value, segments, scale, window, cap)  # pyright: ignore


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: list[SegmentPath],
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        queries = _stack(query * scale, key.shape[0])
        output = _tokens_first(queries, value.shape[-1])
        with torch.autocast(query.device.type, enabled=False):  # it would cast softmax on a GPU
            for heads, mine in _together(segments, queries):
                own = [states[heads] for states in (queries, key, value, output)]
                for segment in mine:
                    _attend(segment, own, window, cap)
        ctx.save_for_backward(query, key, value, output)
        ctx.segments, ctx.scale, ctx.window, ctx.cap = segments, scale, window, cap
        return output.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        queries = _stack(query * ctx.scale, key.shape[0])
        above = _stack(grads[0], key.shape[0])
        # rowsum(∂O ∘ O), what softmax takes off each row
        mean = (above * output).sum(-1, keepdim=True, dtype=wide).to(query.dtype)
        to_query = _tokens_first(queries, queries.shape[-1])
        to_key, to_value = (x.new_zeros(x.shape, dtype=wide) for x in (key, value))
        known = (queries, key, value, above, mean, to_query, to_key, to_value)
        with torch.autocast(query.device.type, enabled=False):
            for heads, mine in _together(ctx.segments, queries):
                own = [states[heads] for states in known]
                for segment in mine:
                    _attend_backward(segment, own, ctx.window, ctx.cap)
        to_query.mul_(ctx.scale)
        to_key, to_value = to_key.to(key.dtype), to_value.to(value.dtype)
        return to_query.flatten(0, 1), to_key, to_value, None, None, None, None


def _attend(
    segment: SegmentPath, states: list[Tensor], window: int | None, cap: float | None
) -> None:
    """A segment's part of the output, for some heads."""
    queries, key, value, output = states
    keys, values = _take(key, segment.path), _take(value, segment.path)
    for block in _blocks(segment, queries, window):
        weights = _weights(_scores(_rows(queries, block), _seen(keys, block), cap), block)
        _put(output, block, _times(weights, _seen(values, block).mT))


def _attend_backward(
    segment: SegmentPath, states: list[Tensor], window: int | None, cap: float | None
) -> None:
    """A segment's part of the gradients, added up; `above` is ∂O, `mean` what softmax takes off."""
    queries, key, value, above, mean, to_query, to_key, to_value = states
    keys, values = _take(key, segment.path), _take(value, segment.path)
    to_keys, to_values = (x.new_zeros(x.shape, dtype=to_key.dtype) for x in (keys, values))
    for block in _blocks(segment, queries, window):
        rows, own, seen = _rows(queries, block), _rows(above, block), _seen(keys, block)
        scores = _scores(rows, seen, cap)
        slope = None if cap is None else 1 - (scores / cap) ** 2
        weights = _weights(scores, block)
        del scores  # two matrices of this size are alive at once, not three
        _add_product(to_values[:, block.keys], weights, own)
        to_scores = _times(own, _seen(values, block))
        to_scores.sub_(_rows(mean, block)).mul_(weights)
        del weights
        if slope is not None:
            to_scores.mul_(slope)
        _add_product(to_keys[:, block.keys], to_scores, rows)
        _put(to_query, block, _times(to_scores, seen.mT))
        del to_scores
    _give(to_key, to_keys, segment.path)
    _give(to_value, to_values, segment.path)


@dataclass(frozen=True)
class _Block:
    """Some rows of a segment.

    Attributes:
        rows: their packed range.
        keys: those of the path that one of them sees.
        outside: how many of these only a window hides from the last row.
        device: where it is computed.
    """

    rows: slice
    keys: slice
    outside: int
    device: torch.device

    @cached_property
    def past(self) -> Tensor:
        """[rows, outside]: which of the first keys each row does not see any more."""
        count = self.rows.stop - self.rows.start
        hidden = torch.ones(count, self.outside, dtype=torch.bool, device=self.device)
        return hidden.tril_(self.outside - count)


def _together(
    segments: list[SegmentPath], stacked: Tensor
) -> Iterator[tuple[slice, list[SegmentPath]]]:
    """Key/value heads that are computed together, and the segments for which they are: one by one
    where a product of two matrices has a faster kernel than a batched one, and is worth a call."""
    heads, groups, _, _ = stacked.shape
    fast = stacked.dtype == torch.float32 and has_fast_linear(stacked)
    large = [fast and groups * (s.end - s.start) * s.length >= ALONE for s in segments]
    yield slice(None), list(compress(segments, map(not_, large)))
    for head in range(heads):
        yield slice(head, head + 1), list(compress(segments, large))


def _blocks(segment: SegmentPath, stacked: Tensor, window: int | None) -> Iterator[_Block]:
    heads, groups, _, _ = stacked.shape
    limit = GPU_ROWS if kind_of(stacked) == "cuda" else CPU_ROWS // min(heads, 2)
    size = max(1, limit // groups)
    before = segment.length - segment.end  # a packed index plus this is a place in the path
    for start in range(segment.start, segment.end, size):
        end = min(start + size, segment.end)
        first = 0 if window is None else max(0, before + start - window + 1)
        outside = 0 if window is None else max(0, before + end - window - first)
        keys = slice(first, before + end)
        yield _Block(slice(start, end), keys, outside, stacked.device)


def _seen(path: Tensor, block: _Block) -> Tensor:
    """A path's keys or values that a block's rows may see. In half precision they are made dense
    here, once: a batched product would do it by itself, each time."""
    seen = path[:, block.keys]
    return seen if seen.element_size() > 2 else seen.contiguous()


def _scores(rows: Tensor, keys: Tensor, cap: float | None) -> Tensor:
    """Of a block's queries [h, G·rows, D] with the keys that it may see."""
    scores = _times(rows, keys)
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _weights(scores: Tensor, block: _Block) -> Tensor:
    """Their softmax over the keys that each query sees; the scores are written over."""
    count = block.rows.stop - block.rows.start
    by_row = scores.unflatten(1, (-1, count))
    by_row[..., -count:].masked_fill_(_future(count, scores.device), float("-inf"))
    if block.outside:
        by_row[..., : block.outside].masked_fill_(block.past, float("-inf"))
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=16)
def _future(count: int, device: torch.device) -> Tensor:
    """[rows, rows]: which of the last keys each row does not see yet."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)


def forget_masks() -> None:
    """Before and after a simulation: its masks hold no numbers."""
    _future.cache_clear()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right; the sum is in fp32 at least, whatever the product is in."""
    if left.dtype == total.dtype:
        total.baddbmm_(left.mT, right)
    else:
        total += torch.bmm(left.mT, right)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """The product left rightᵀ: [h, n, c] and [h, m, c] to [h, n, m]."""
    if left.shape[0] == 1:
        return linear(left[0], right[0])[None]
    return torch.bmm(left, right.mT)


def _stack(states: Tensor, kv_heads: int) -> Tensor:
    """[H, N, D] as [K, G, N, D]."""
    return states.unflatten(0, (kv_heads, -1))


def _rows(stacked: Tensor, block: _Block) -> Tensor:
    """A block's rows of [h, G, N, D] as [h, G·rows, D]."""
    return stacked[:, :, block.rows].flatten(1, 2)


def _put(stacked: Tensor, block: _Block, rows: Tensor) -> None:
    """The way back."""
    stacked[:, :, block.rows] = rows.unflatten(1, (stacked.shape[1], -1))


def _tokens_first(stacked: Tensor, width: int) -> Tensor:
    """Room for [K, G, N, width], in memory by token, as the layer behind attention reads it."""
    kv_heads, groups, tokens, _ = stacked.shape
    return stacked.new_empty(tokens, kv_heads, groups, width).permute(1, 2, 0, 3)


def _take(states: Tensor, path: list[tuple[int, int]]) -> Tensor:
    """[K, m, D], dense: products of many rows are worth a copy."""
    return torch.cat([states[:, start:end] for start, end in path], dim=1)


def _give(total: Tensor, parts: Tensor, path: list[tuple[int, int]]) -> None:
    """Add to each packed token what its place in the path has come to."""
    sizes = [end - start for start, end in path]
    for (start, end), part in zip(path, parts.split(sizes, dim=1), strict=True):
        total[:, start:end] += part
