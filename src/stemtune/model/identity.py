"""Which base an adapter belongs on. A folder may hold another one by now, of the same shape."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from stemtune.config import Model
from stemtune.errors import ModelError
from stemtune.model import weights
from stemtune.model.load import base_source
from stemtune.model.names import PROMPT_FILE, shared_name

log = logging.getLogger(__name__)


def identity(model: Model) -> dict[str, str]:
    """What `stemtune.json` keeps of a base: its name, and the SHA-256 of a row of each weight in
    its files, which does not depend on dtype, device or quantization of the run; no hash where they
    are pickles.

    Raises:
        ModelError: the base can't be read.
    """
    return {"name": shared_name(model.base), "rows": _rows(base_source(model))}


def _rows(source: Path) -> str:
    files = [source / name for name in weights.shard_names(source, allow_pickled=True)]
    rows = [row for file in files for row in weights.rows(file)]
    digest = hashlib.sha256()
    for name, row in sorted(rows, key=lambda named: named[0]):
        digest.update(f"{name}{row.dtype}".encode())
        digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if rows else ""


def require_same_base(folder: Path, model: Model) -> None:
    """Refuse a base whose weights are not those that an adapter was trained on. One that somebody
    named in its place is taken, and said.

    Args:
        folder: of an adapter; one that does not say what it was trained on is let pass.

    Raises:
        ModelError: see above.
    """
    path = folder / PROMPT_FILE
    kept = _kept(path)
    if not kept.get("rows"):
        return
    found = identity(model)
    if found["rows"] in ("", kept["rows"]):
        return
    if found["name"] != kept.get("name"):
        log.warning("this adapter was trained on %s, whose weights are others", kept.get("name"))
        return
    what = "the base's weights are not those that this adapter was trained on"
    hint = f'give it that base; if this one is meant, delete "base" from {path}'
    raise ModelError(what, where=model.base, hint=hint)


def _kept(path: Path) -> dict[str, Any]:
    """What an adapter says of its base; nothing, if it has no such file, or it is an older one's.

    Raises:
        ModelError: no run wrote this.
    """
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
        return {**prompt.get("base", {})}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        hint = "the adapter is damaged: take a copy, or choose another one"
        raise ModelError("this is not what a run wrote", where=str(path), hint=hint) from None
