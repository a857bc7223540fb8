"""Checkpoints written while training goes on."""

import copy
import logging
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stemtune import checkpoint
from stemtune.config import Train
from stemtune.errors import DiskError

log = logging.getLogger(__name__)
Named = dict[str, dict[str, Tensor]]
FEW_SAVES = 3  # with space for no more of them, the user is warned


@dataclass
class Cost:
    """What saving has cost so far, in seconds.

    Attributes:
        waited: that the loop stood still.
        written: that writing, syncing and deleting took.
    """

    saves: int = 0
    waited: float = 0.0
    written: float = 0.0


class Saver:
    """Takes a snapshot, lets the loop go on, and commits the snapshot meanwhile.

    One save at a time: the next one waits for the one before, and raises what went wrong there.

    Args:
        folder: of the checkpoints.
        config: which of them are kept.
    """

    def __init__(self, folder: Path, config: Train) -> None:
        self.folder, self.config = folder, config
        self.cost = Cost()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._room: Named = {}
        self._pending: Future[None] | None = None

    def reserve(self, tensors: Named) -> None:
        """Take the memory of snapshots of such tensors, in the background: the system clears it
        page by page, which takes longer than to fill it."""
        self.wait()

        def take() -> None:
            self._room = _room_for(tensors, {})

        self._pending = self._writer.submit(take)

    def save(self, step: int, tensors: Named, state: dict[str, Any], best: int | None) -> None:
        """Commit a checkpoint; only the snapshot is waited for.

        Args:
            best: step of the best checkpoint so far, which is kept.

        Raises:
            DiskError: the save before this one failed.
        """
        started = time.perf_counter()
        self.wait()
        self._room = _room_for(tensors, self._room)
        for name, named in tensors.items():
            for key, tensor in named.items():
                self._room[name][key].copy_(tensor.detach())
        self._pending = self._writer.submit(
            self._write, step, self._room, copy.deepcopy(state), best
        )
        self.cost.saves += 1
        self.cost.waited += time.perf_counter() - started

    def wait(self) -> None:
        """Until everything is committed.

        Raises:
            DiskError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the thread end; what is still to be written is written."""
        self._writer.shutdown(wait=True)

    def _write(self, step: int, tensors: Named, state: dict[str, Any], best: int | None) -> None:
        started = time.perf_counter()
        path = checkpoint.commit(self.folder, step, tensors, state)
        kept = {best} if best else set[int]()
        if self.config.keep_every is not None:
            kept |= {s for s in checkpoint.steps(self.folder) if s % self.config.keep_every == 0}
        checkpoint.rotate(self.folder, self.config.save_total_limit, kept)
        seconds = time.perf_counter() - started
        self.cost.written += seconds
        log.debug("saved step %d in %.2f s", step, seconds)
        _warn_of_little_space(path)


def _room_for(tensors: Named, room: Named) -> Named:
    """Memory like these tensors, touched; of `room` what fits."""

    def place(name: str, key: str, tensor: Tensor) -> Tensor:
        there = room.get(name, {}).get(key)
        if there is not None and (there.shape, there.dtype) == (tensor.shape, tensor.dtype):
            return there
        return torch.zeros_like(tensor, device="cpu", memory_format=torch.contiguous_format)

    return {
        name: {key: place(name, key, tensor) for key, tensor in named.items()}
        for name, named in tensors.items()
    }


def _warn_of_little_space(path: Path) -> None:
    """While there is time to do something about it."""
    taken = sum(file.stat().st_size for file in path.iterdir())
    free = shutil.disk_usage(path).free
    if free < FEW_SAVES * taken:
        sizes = f"{free / 1e9:.2f} GB are free, and a checkpoint takes {taken / 1e9:.2f}"
        log.warning("the disk is nearly full: %s", sizes)


def require_space(folder: Path, parameters: Iterable[Tensor], config: Train) -> None:
    """Refuse a run whose checkpoints won't fit on the disk.

    Args:
        parameters: that are trained; AdamW keeps two numbers for each.

    Raises:
        DiskError: with what they need.
    """
    adapter = sum(p.numel() * p.element_size() for p in parameters)
    # Those kept, the best, the one that is being written; and two adapters at the end.
    needed = 3 * adapter * (config.save_total_limit + 2) + 2 * adapter
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"checkpoints will take about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} are free"
        hint = "free some space, choose another output.dir, or lower train.save_total_limit"
        raise DiskError(what, where=str(folder), hint=hint)
