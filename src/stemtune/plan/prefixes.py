"""Records in the order of their prefixes, however many there are."""

from bisect import bisect
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import chain

SAMPLES = 8  # keys in memory for each window


def windows_by_prefix(records: Seq[int], key: Callable[[int], bytes], size: int) -> list[list[int]]:
    """Cut records into windows of at most `size`, so that nearly all of what they share lies within
    one: each is a range of the sorted keys, in no order within.

    A sorted sample of the keys says where a key belongs, so that it is read twice at most, and the
    others are not in memory.

    Args:
        key: of a record; asked for whenever it is needed.
    """
    bounds = sorted(key(record) for record in records[:: max(1, size // SAMPLES)])
    buckets: list[list[int]] = [[] for _ in range(len(bounds) + 1)]
    for record in records:
        buckets[bisect(bounds, key(record))].append(record)
    ordered = list(chain(*buckets))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
