"""Sequences to a prefix tree: each distinct token once, in depth-first order.

Shapes: N distinct tokens, T targets, U distinct (source, token) pairs, S distinct sources.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from stemtune.tree.sequence import Ids, Sequence

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """A run of tokens without a branch: packed indices `start` to `end`."""

    start: int
    end: int
    parent: int
    """Number of the segment it grows out of, -1 for a root."""
    depth: int
    """Position of its first token: how many tokens its ancestors hold."""


@dataclass(frozen=True, eq=False)
class Tree:
    """The prefix tree of some sequences.

    Attributes:
        input_ids: [N] distinct tokens, depth first.
        position_ids: [N] depth of each token.
        segments: in packed order.
        paths: for each sequence the packed index of each of its tokens.
        target_source: [T] packed index of the token that predicts, sequence by sequence, in order.
        target_id: [T] the token that is predicted.
        target_sequence: [T] the sequence it belongs to.
        target_weight: [T].
    """

    input_ids: Ids
    position_ids: Index
    segments: tuple[Segment, ...]
    paths: tuple[Index, ...]
    target_source: Index
    target_id: Ids
    target_sequence: Index
    target_weight: NDArray[np.float64]

    @property
    def num_distinct(self) -> int:
        """Tokens that are computed."""
        return int(self.input_ids.size)

    @property
    def num_tokens(self) -> int:
        """Tokens that separate sequences would compute."""
        return sum(path.size for path in self.paths)

    @property
    def num_targets(self) -> int:
        """Targets of all sequences."""
        return int(self.target_id.size)

    @cached_property
    def subtree_end(self) -> Index:
        """[N] one past the last packed index under each token: q sees k iff k <= q < end[k]."""
        ends = [segment.end for segment in self.segments]
        for number in range(len(self.segments) - 1, -1, -1):
            parent = self.segments[number].parent
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[number])
        lengths = [segment.end - segment.start for segment in self.segments]
        return np.repeat(np.asarray(ends, dtype=np.int64), lengths)

    @cached_property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Targets without repetition: sources [S], row of each pair in them [U], token of each
        pair [U], pair of each target [T]."""
        keys = np.stack([self.target_source, self.target_id])
        pairs, pair_of_target = np.unique(keys, axis=1, return_inverse=True)
        sources, row_of_pair = np.unique(pairs[0], return_inverse=True)
        parts = (sources, row_of_pair, pairs[1], pair_of_target.reshape(-1))
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts)  # pyright: ignore[reportReturnType]


def build_tree(sequences: Seq[Sequence]) -> Tree:
    """Lay sequences out as one prefix tree.

    Sorted by their ids, neighbours share the longest prefixes: one pass over the sorted list
    gives a compressed trie in depth-first order.

    Raises:
        ValueError: no sequences.
    """
    if not sequences:
        raise ValueError("a tree needs at least one sequence")
    order, shared = sort_by_prefix(sequences)
    paths: list[Index] = [np.empty(0, np.int64)] * len(sequences)
    ids: list[Ids] = []
    parents: dict[int, int] = {0: -1}  # of tokens that do not follow their packed predecessor
    size = 0
    path = np.empty(0, np.int64)
    for number, common in zip(order, shared, strict=True):
        tail = sequences[number].input_ids[common:]
        if tail.size and common < path.size:
            parents[size] = int(path[common - 1]) if common else -1
        path = np.concatenate([path[:common], np.arange(size, size + tail.size)])
        paths[number] = path
        ids.append(tail)
        size += tail.size
    position_ids = np.empty(size, np.int64)
    for path in paths:
        position_ids[path] = np.arange(path.size)
    return Tree(
        input_ids=np.concatenate(ids),
        position_ids=position_ids,
        segments=_segments(parents, position_ids),
        paths=tuple(paths),
        target_source=np.concatenate(
            [p[np.flatnonzero(s.is_target) - 1] for p, s in zip(paths, sequences, strict=True)]
        ),
        target_id=np.concatenate([s.input_ids[s.is_target] for s in sequences]),
        target_sequence=np.repeat(np.arange(len(sequences)), [s.num_targets for s in sequences]),
        target_weight=np.repeat([s.weight for s in sequences], [s.num_targets for s in sequences]),
    )


def sort_by_prefix(sequences: Seq[Sequence]) -> tuple[list[int], list[int]]:
    """Order sequences by their ids; with each, the length of the prefix shared with the one
    before it (0 for the first). Their lengths less these add up to the distinct tokens."""
    keys = [prefix_key(sequence) for sequence in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = [0] + [
        common_prefix(sequences[a].input_ids, sequences[b].input_ids) for a, b in pairwise(order)
    ]
    return order, shared


def prefix_key(sequence: Sequence) -> bytes:
    """Bytes that compare like the ids themselves; a prefix comes before what extends it."""
    return sequence.input_ids.astype(">u8").tobytes()


def common_prefix(a: Ids, b: Ids) -> int:
    """Length of the longest prefix that both have."""
    size = min(a.size, b.size)
    unequal = np.flatnonzero(a[:size] != b[:size])
    return int(unequal[0]) if unequal.size else size


def _segments(parents: dict[int, int], position_ids: Index) -> tuple[Segment, ...]:
    """Cut the packed tokens where a branch starts, and behind each token that has several."""
    starts = sorted({*parents, *(parent + 1 for parent in parents.values())})
    ends = [*starts[1:], position_ids.size]
    segment_of_last = {end - 1: number for number, end in enumerate(ends)}
    segments: list[Segment] = []
    for start, end in zip(starts, ends, strict=True):
        parent = parents.get(start, start - 1)
        number = segment_of_last[parent] if parent >= 0 else -1
        segments.append(Segment(start, end, number, int(position_ids[start])))
    return tuple(segments)
