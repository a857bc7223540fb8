"""What took long, kept on disk for the next run.

An entry is a folder named by a key of everything that it depends on, so that it can't be stale:
other contents, settings or code make another key. It is written beside its place and renamed:
another process finds it whole or not at all, and two that write the same leave one.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

from stemtune.cache import cache_folder
from stemtune.errors import DiskError

WORTH_KEEPING = 8 * 2**20  # bytes of rows; what is smaller is made anew in a moment
# What reading a damaged entry may raise, Arrow's own errors among them.
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile)
log = logging.getLogger(__name__)
ABANDONED = 7 * 86_400  # seconds without a change
MOST = 20 * 2**30  # bytes of all entries; those that were not used for longest go


def make_key(*parts: object) -> str:
    """A key of values that JSON can hold, and of this code itself."""
    whole = json.dumps([_code(), *parts], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()


@cache
def _code() -> str:
    """Of all that reads, understands and renders rows."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), here.parent / "config.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find(key: str) -> Path | None:
    """The folder of an entry, if there is one."""
    folder = _place(key)
    if not key or not folder.is_dir():
        return None
    with suppress(OSError):
        os.utime(folder)  # used just now
    return folder


def discard(folder: Path) -> None:
    """Remove an entry that can't be read: a disk was full, a copy was cut."""
    log.warning("prepared data were damaged and are made anew: %s", folder)
    shutil.rmtree(folder, ignore_errors=True)


def keep(key: str, fill: Callable[[Path], None]) -> Path:
    """Make an entry.

    Args:
        fill: writes files into the folder that it is given.

    Returns:
        The entry's folder.

    Raises:
        DiskError: it can't be written.
    """
    folder = _place(key)
    temporary = folder.with_name(f".{key[:16]}-{uuid4().hex}")
    try:
        temporary.mkdir(parents=True, mode=0o700)
        fill(temporary)
        temporary.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():
            return folder  # another process was faster
        what = f"can't keep prepared data: {error.strerror or error}"
        hint = "free some space, or set STEMTUNE_CACHE to another folder"
        raise DiskError(what, where=str(folder.parent), hint=hint) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _make_room(folder)
    return folder


def _place(key: str) -> Path:
    return cache_folder() / "data" / key


def _make_room(newest: Path) -> None:
    """Remove what was not used for longest; whoever still reads it keeps its mapping."""
    others = [path for path in newest.parent.iterdir() if path.is_dir() and path != newest]
    entries = [path for path in others if not path.name.startswith(".")]
    with suppress(OSError):
        # What begins with a dot is being written by another process, or was by one that was killed.
        for path in set(others) - set(entries):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
        entries.sort(key=lambda path: -path.stat().st_mtime)
        total = _size(newest)
        for path in entries:
            total += _size(path)
            if total > MOST:
                shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
