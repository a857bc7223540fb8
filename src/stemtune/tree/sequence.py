"""A sequence: token ids, and which of them are trained."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, init=False)
class Sequence:
    """Token ids plus a target mask.

    Args:
        input_ids: token ids, length L >= 1.
        is_target: length L; true where the token is predicted (from the one before) and scored.
            The first token has none before it, so it can't be a target.
        weight: how much each of its targets counts in the loss.
        record: the number of the record it came from.
        role: what it is to its record: `answer`, `chosen`, `rejected`.
        answer: its number among the answers of its record.
        preferred_to: numbers of those that it is better than.

    Raises:
        ValueError: empty, of unequal lengths, or with its first token as a target.
    """

    input_ids: Ids
    is_target: Mask
    weight: float
    record: int
    role: str
    answer: int
    preferred_to: tuple[int, ...]

    def __init__(
        self,
        input_ids: ArrayLike | Seq[int],
        is_target: ArrayLike | Seq[bool],
        weight: float = 1.0,
        record: int = 0,
        role: str = "answer",
        answer: int = 0,
        preferred_to: Seq[int] = (),
    ) -> None:
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.asarray(is_target, dtype=np.bool_)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError("a sequence needs at least one token, in one dimension")
        if ids.shape != mask.shape:
            raise ValueError(f"{ids.size} tokens, but {mask.size} mask entries")
        if mask[0]:
            raise ValueError("the first token can't be a target: nothing comes before it")
        if ids.min() < 0:
            raise ValueError("token ids are not negative")
        for name, value in {
            "input_ids": ids,
            "is_target": mask,
            "weight": float(weight),
            "record": record,
            "role": role,
            "answer": answer,
            "preferred_to": tuple(preferred_to),
        }.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return int(self.input_ids.size)

    @property
    def num_targets(self) -> int:
        """How many of its tokens are scored."""
        return int(self.is_target.sum())
