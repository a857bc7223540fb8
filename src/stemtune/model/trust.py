"""Code that a base brings along: an adapter's own word is not enough to run it."""

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
