"""Prepared sequences: Arrow record batches, memory-mapped from disk or held in memory.

A sequence's columns: `record` (over all records, in order), `role`, `answer` and `preferred_to`
(among its record's answers), `num_targets`, `ids` and `targets` (a byte a token). Reading one
touches no other.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stemtune.tree.sequence import Sequence

Batch = Any
"""A record batch of Arrow's, which has no types."""
SCHEMA = pa.schema(
    [
        ("record", pa.int64()),
        ("role", pa.dictionary(pa.int8(), pa.string())),
        ("answer", pa.int16()),
        ("preferred_to", pa.list_(pa.int16())),
        ("num_targets", pa.int32()),
        ("ids", pa.large_list(pa.int32())),
        ("targets", pa.large_list(pa.uint8())),
    ]
)
READS_KEPT = 500  # each maps up to a few hundred kB
ROLES = pa.array(["answer", "chosen", "rejected"])
ROLE_NUMBER = {"answer": 0, "chosen": 1, "rejected": 2}


def to_batch(sequences: list[Sequence]) -> Batch:
    """The columns of some sequences, whose `record` counts over all records."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
    empty = np.zeros(0, np.int32)
    ids = np.concatenate([empty, *(s.input_ids.astype(np.int32) for s in sequences)])
    targets = np.concatenate([empty.astype(np.uint8), *(s.is_target for s in sequences)])
    roles = pa.array([ROLE_NUMBER[s.role] for s in sequences], pa.int8())
    return pa.record_batch(
        [
            pa.array([s.record for s in sequences], pa.int64()),
            pa.DictionaryArray.from_arrays(roles, ROLES),
            pa.array([s.answer for s in sequences], pa.int16()),
            pa.array([s.preferred_to for s in sequences], pa.list_(pa.int16())),
            pa.array([s.num_targets for s in sequences], pa.int32()),
            pa.LargeListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            pa.LargeListArray.from_arrays(offsets, pa.array(targets.astype(np.uint8))),
        ],
        schema=SCHEMA,
    )


class Store:
    """Sequences by number.

    Args:
        source: a file of Arrow's IPC format, or a buffer that holds one.

    Attributes:
        record: [S] for each sequence its record.
        length: [S] how many tokens it has.
        targets: [S] how many of them are trained.
    """

    def __init__(self, source: Path | Any) -> None:
        self._map: mmap.mmap | None = None
        self._reads = 0
        if isinstance(source, Path):
            with source.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            source = pa.py_buffer(self._map)
        self._reader: Any = pa.ipc.open_file(pa.BufferReader(source))
        self._first = [0]
        records: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        lengths, targets = list(records), list(records)
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            offsets = np.asarray(batch.column("ids").offsets)
            records.append(np.asarray(batch.column("record")))
            lengths.append(np.diff(offsets))
            targets.append(np.asarray(batch.column("num_targets")).astype(np.int64))
            self._first.append(self._first[-1] + batch.num_rows)
        self.record = np.concatenate(records)
        self.length = np.concatenate(lengths)
        self.targets = np.concatenate(targets)
        self._batch = lru_cache(maxsize=4096)(self._read_batch)

    def __len__(self) -> int:
        return self._first[-1]

    def largest_id(self) -> int:
        """Of all tokens."""
        batches = (self._batch(number) for number in range(self._reader.num_record_batches))
        return max((int(ids.max()) for *_, ids, _ in batches if ids.size), default=-1)

    def sequence(self, number: int, record: int) -> Sequence:
        """A sequence, with the number of its record as the caller counts them."""
        self._forget_now_and_then()
        place = bisect_right(self._first, number) - 1
        row = number - self._first[place]
        roles, answers, preferred, offsets, ids, targets = self._batch(place)
        start, end = int(offsets[row]), int(offsets[row + 1])
        return Sequence(
            ids[start:end],
            targets[start:end].view(np.bool_).copy(),
            record=record,
            role=str(ROLES[int(roles[row])]),
            answer=int(answers[row]),
            preferred_to=preferred[row].as_py(),
        )

    def _forget_now_and_then(self) -> None:
        """Drop the pages that were read from this process's memory: they stay in the system's file
        cache, and with random reading nearly all of a large file would be held here."""
        self._reads += 1
        if (
            self._reads % READS_KEPT == 0
            and self._map is not None
            and hasattr(mmap, "MADV_DONTNEED")
        ):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _read_batch(self, number: int) -> tuple[Any, ...]:
        batch = self._reader.get_batch(number)
        ids, targets = batch.column("ids"), batch.column("targets")
        return (
            np.asarray(batch.column("role").indices),
            np.asarray(batch.column("answer")),
            batch.column("preferred_to"),
            np.asarray(ids.offsets),
            np.asarray(ids.values),
            np.asarray(targets.values),
        )


def write(batches: Iterator[Batch], sink: Any) -> None:
    """All batches, into a path or an output stream."""
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
