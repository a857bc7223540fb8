"""A base's weights on disk, file by file, so that no more than one is in memory."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stemtune.errors import ModelError


def shard_names(folder: Path, allow_pickled: bool) -> list[str]:
    """The files, safetensors before pickles.

    Raises:
        ModelError: there are none, or their index is damaged or leads out of the folder.
    """
    for stem in ("model.safetensors", *(["pytorch_model.bin"] if allow_pickled else [])):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return indexed(index)
        if (folder / stem).is_file():
            return [stem]
    raise ModelError("the base has no weights here", where=str(folder), hint="is it whole?")


def indexed(index: Path) -> list[str]:
    """The files that an index of weights names.

    Raises:
        ModelError: it is damaged, or names one outside of its folder.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in found.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names:
        what, hint = "can't load the base's weights: their index is damaged", "is the base whole?"
        raise ModelError(what, where=str(index), hint=hint)
    for name in names:
        if Path(name).name != name:
            hint = "a base holds its weights in its own folder: don't trust this one"
            raise ModelError(f"it names the file {name!r}", where=str(index), hint=hint)
    return names


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """By name, without reading the values of safetensors.

    Raises:
        ModelError: the file is damaged, or not there; of `tensors` and `rows` as well.
    """
    if path.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in tensors(path)}
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """One after another."""
    if path.suffix == ".bin":
        with _readable(path):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        yield from found.items()
        return
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def rows(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The middle row of each tensor, read alone; nothing of a pickle, which is read whole."""
    if path.suffix == ".bin":
        return
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            middle = tuple(slice(size // 2, size // 2 + 1) for size in part.get_shape()[:-1])
            yield name, (part[middle] if middle else file.get_tensor(name)).flatten()


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    with _readable(path), safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def _readable(path: Path) -> Generator[None]:
    try:
        yield
    except UnpicklingError as error:  # torch advises to read it all the same, and run it
        what = "the base's .bin files are damaged, or hold more than weights; nothing was run"
        raise ModelError(what, where=str(path), hint="is the base whole?") from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what, hint = f"can't load the base's weights: {reason}", "is the base whole?"
        raise ModelError(what, where=str(path), hint=hint) from error
