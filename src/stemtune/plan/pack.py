"""A step's sequences to micro-batches: which run together, on which rank."""

import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from stemtune.tree.build import common_prefix, sort_by_prefix
from stemtune.tree.sequence import Sequence

MicroBatch = list[int]


def pack(
    sequences: Seq[Sequence],
    budget: int,
    *,
    shared: bool = True,
    together: bool = False,
    world_size: int = 1,
) -> list[list[MicroBatch]]:
    """Cut a step into micro-batches of at most `budget` tokens, and hand them out to ranks.

    In the order of their ids, sequences that share stems are neighbours; cutting between two of
    them computes what they share twice. The cuts that cost least are found by dynamic programming.
    What is longer than the budget runs alone.

    Args:
        sequences: of one step.
        budget: distinct tokens of a tree; with `shared` false, tokens of a padded batch.
        together: keep the sequences of a record in one micro-batch, for losses that compare them.
        world_size: how many ranks share the step.

    Returns:
        For each rank its micro-batches, as indices into `sequences`.
    """
    order, common = sort_by_prefix(sequences)
    units = _units(sequences, order, common, together)
    batches = (_cut if shared else _cut_padded)(units, budget)
    costs = [(computed_tokens([sequences[i] for i in batch], shared), batch) for batch in batches]
    ranks: list[tuple[int, int, list[MicroBatch]]] = [(0, rank, []) for rank in range(world_size)]
    for cost, batch in sorted(costs, key=lambda item: (-item[0], item[1])):
        load, rank, mine = ranks[0]
        mine.append(batch)
        heapq.heapreplace(ranks, (load + cost, rank, mine))
    return [mine for _, _, mine in sorted(ranks, key=lambda item: item[1])]


@dataclass(frozen=True)
class _Unit:
    """Sequences that are not torn apart, in the order of their ids.

    Attributes:
        distinct: tokens of their own tree.
        longest: tokens of the longest of them.
        common: tokens of the stem that the first one shares with the last one of the unit before.
    """

    members: list[int]
    distinct: int
    longest: int
    common: int


def _units(
    sequences: Seq[Sequence], order: list[int], common: list[int], together: bool
) -> list[_Unit]:
    if not together:
        lengths = [len(sequences[i]) for i in order]
        return [
            _Unit([i], size, size, stem)
            for i, size, stem in zip(order, lengths, common, strict=True)
        ]
    records: dict[int, list[int]] = {}
    for index in order:
        records.setdefault(sequences[index].record, []).append(index)
    units: list[_Unit] = []
    for members in records.values():
        mine = [sequences[i] for i in members]
        # Records of one prompt may lie between one another: what neighbours share is counted less
        # than it is, never more, so that a budget holds.
        last = sequences[units[-1].members[-1]].input_ids if units else mine[0].input_ids[:0]
        stem = common_prefix(last, mine[0].input_ids)
        longest = max(len(sequence) for sequence in mine)
        units.append(_Unit(members, count_distinct(mine), longest, stem))
    return units


def computed_tokens(sequences: Seq[Sequence], shared: bool) -> int:
    """Those of a micro-batch's tree or, with `shared` false, of its padded batch."""
    if shared:
        return count_distinct(sequences)
    return len(sequences) * max(len(sequence) for sequence in sequences)


def count_distinct(sequences: Seq[Sequence]) -> int:
    """Tokens that the tree of these sequences would hold."""
    _, common = sort_by_prefix(sequences)
    return sum(len(sequence) for sequence in sequences) - sum(common)


def _cut(units: list[_Unit], budget: int) -> list[MicroBatch]:
    """The cheapest cuts of a sorted list; cutting before a unit costs what it shares once more."""
    size = len(units)
    best: list[float] = [0.0] + [float("inf")] * size  # cost of everything before i
    start_of = [0] * (size + 1)
    for start in range(size):
        tokens = 0
        for end in range(start, size):
            tokens += units[end].distinct - (units[end].common if end > start else 0)
            if tokens > budget and end > start:
                break
            # Fewer micro-batches break ties, since each has a cost of its own.
            cost = best[start] + units[start].common + 1
            if cost < best[end + 1]:
                best[end + 1], start_of[end + 1] = cost, start
    batches: list[MicroBatch] = []
    end = size
    while end:
        start = start_of[end]
        batches.append([index for unit in units[start:end] for index in unit.members])
        end = start
    return batches[::-1]


def _cut_padded(units: list[_Unit], budget: int) -> list[MicroBatch]:
    """Sequences of like length together, so that little is padded."""
    batches: list[MicroBatch] = []
    longest = 0
    for unit in sorted(units, key=lambda unit: (-unit.longest, unit.members)):
        if batches and longest * (len(batches[-1]) + len(unit.members)) <= budget:
            batches[-1] += unit.members
        else:
            batches.append(list(unit.members))
            longest = unit.longest
    return batches
