"""Checkpoints: committed whole, verified before use.

A checkpoint is written into a folder of its own, every file synced, the manifest last; then it is
renamed. What has the final name is complete, whatever happened meanwhile.
"""

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stemtune.errors import CheckpointError, DiskError
from stemtune.rundir import sync

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read back."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """By the name of the file, without its ending."""


def commit(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write a checkpoint; an existing one of this step is left as it is.

    Raises:
        DiskError: it can't be written; nothing is left behind.
    """
    final = folder / f"step-{step:06d}"
    if final.exists():
        try:
            return read(final).path
        except CheckpointError:  # spoiled, which is why a resumed run comes here again
            final.rename(folder / f".tmp-{step}-{uuid.uuid4().hex}")
    temporary = folder / f".tmp-{step}-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, named in tensors.items():
            # Contiguous copies: safetensors refuses views of shared memory.
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in named.items()}
            save_file(whole, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = sorted(temporary.iterdir())
        manifest = {
            "step": step,
            "files": {file.name: _facts(file) for file in files},
            "tensors": _shapes(tensors),
        }
        for file in files:
            sync(file)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(temporary / MANIFEST)
        sync(temporary)
        temporary.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        hint = "free some space; `--resume` goes on from the last checkpoint"
        raise DiskError(f"can't save: {error}", where=str(final), hint=hint) from None
    return final


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    Raises:
        CheckpointError: there is none.
    """
    passed: list[str] = []
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:06d}"
        try:
            return read(path), passed
        except CheckpointError as error:
            passed.append(f"{path.name}: {error.what}")
    hint = "; ".join(passed) or "leave --resume out to start anew"
    raise CheckpointError("no usable checkpoint", where=str(folder), hint=hint)


def read(path: Path) -> Checkpoint:
    """A checkpoint, every file checked against its manifest.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    try:
        manifest = _read_manifest(path)
        for name, facts in manifest["files"].items():
            if _facts(path / name) != facts:
                raise CheckpointError(f"{name} is not what was written", where=str(path))
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {name: load_file(path / f"{name}.safetensors") for name in manifest["tensors"]}
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise CheckpointError(f"{missing} is missing", where=str(path)) from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"can't be read: {error}", where=str(path)) from None
    if _shapes(tensors) != manifest["tensors"]:
        raise CheckpointError(f"{MANIFEST} names other tensors", where=str(path))
    return Checkpoint(path, state, tensors)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{MANIFEST} can't be read: {error}", where=str(path)) from None
    fields = {"step": int, "files": dict, "tensors": dict}
    if not isinstance(manifest, dict) or {k: type(v) for k, v in manifest.items()} != fields:
        raise CheckpointError(f"{MANIFEST} is not what was written", where=str(path))
    if path.name != f"step-{manifest['step']:06d}":
        raise CheckpointError(f"{MANIFEST} is of another step", where=str(path))
    return manifest


def _shapes(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, list[int]]]:
    return {
        name: {key: list(tensor.shape) for key, tensor in named.items()}
        for name, named in tensors.items()
    }


def steps(folder: Path) -> list[int]:
    """Steps that have a committed checkpoint, in order."""
    return sorted(
        int(path.name.removeprefix("step-"))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    )


def rotate(folder: Path, keep: int, protected: set[int]) -> None:
    """Delete all but the last `keep` and those protected; and what a crash left half-written."""
    everything = steps(folder)
    doomed_steps = [step for step in everything if step not in protected][:-keep]
    if doomed_steps:
        try:
            read(folder / f"step-{everything[-1]:06d}")
        except CheckpointError:
            return  # nothing good is deleted for the sake of something spoiled
    for step in doomed_steps:
        # Renamed first: a crash while deleting must not leave half a checkpoint under its name.
        doomed = folder / f".tmp-{step}-{uuid.uuid4().hex}"
        (folder / f"step-{step:06d}").rename(doomed)
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
