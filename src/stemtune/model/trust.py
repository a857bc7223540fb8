"""Adapters and bases may come from anybody: what their folders ask for, and where they lead."""

import os
from pathlib import Path

from stemtune.config import Model
from stemtune.errors import ModelError

TRUSTED = "STEMTUNE_TRUST_REMOTE_CODE"  # a commit whose code the user has looked at


def require_trust(model: Model, folder: Path) -> None:
    """Refuse an adapter that would have its base's code run, unless the user names that commit: it
    may be somebody else's, and say what it likes.

    Args:
        model: as the adapter's folder has it.

    Raises:
        ModelError: see above.
    """
    if not model.trust_remote_code or os.environ.get(TRUSTED) == model.revision:
        return
    what = f"this adapter wants to run the code of {model.base}"
    hint = f"look at that code first; if you trust it: {TRUSTED}={model.revision}"
    raise ModelError(what, where=str(folder), hint=hint)


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a link out of a folder: what it leads to would be read, and copied to others.

    Args:
        path: of a file in the folder; the links of the Hub's cache to its own blobs are fine.

    Raises:
        ModelError: see above.
    """
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append(folder.parent.parent.resolve() / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        hint = "don't trust this folder; or if it is yours, copy the file into it"
        raise ModelError("this link leads out of its folder", where=str(path), hint=hint)


def require_own_files(folder: Path) -> None:
    """Refuse an adapter some of whose files lie elsewhere.

    Raises:
        ModelError: with the link.
    """
    for path in sorted(folder.glob("*")):
        require_inside(path, folder)
