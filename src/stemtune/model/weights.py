"""A base's weights on disk, file by file, so that no more than one is in memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from stemtune.errors import ModelError


def shard_names(folder: Path, allow_pickled: bool) -> list[str]:
    """The files, safetensors before pickles.

    Raises:
        ModelError: there are none.
    """
    for stem in ("model.safetensors", *(["pytorch_model.bin"] if allow_pickled else [])):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if (folder / stem).is_file():
            return [stem]
    raise ModelError("the base has no weights here", where=str(folder), hint="is it whole?")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """By name, without reading the values of safetensors."""
    if path.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in tensors(path)}
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """One after another."""
    if path.suffix == ".bin":
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def rows(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The middle row of each tensor, read alone; nothing of a pickle, which is read whole."""
    if path.suffix == ".bin":
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            middle = tuple(slice(size // 2, size // 2 + 1) for size in part.get_shape()[:-1])
            yield name, (part[middle] if middle else file.get_tensor(name)).flatten()
