"""Folders of the cache that hold a base, or an adapter, in another form: made once, whole or not at
all."""

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from stemtune.cache import cache_folder
from stemtune.errors import DiskError


def converted_once(name: str, marker: str, convert: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache, made on the first call.

    Args:
        name: changes when what is converted does.
        marker: a file that a whole one holds.
        convert: writes into an empty folder.

    Raises:
        DiskError: there is no room for it.
    """
    target = cache_folder() / name
    if (target / marker).exists():
        return target
    # Into a folder of its own, then renamed: a second process, or a crash, sees all or nothing.
    temporary = target.with_name(f".{name}-{uuid.uuid4().hex}")
    try:
        try:
            temporary.mkdir(parents=True)
            convert(temporary)
            temporary.rename(target)
        except OSError as error:
            if not (target / marker).exists():
                hint = "free some space, or set STEMTUNE_CACHE to another disk"
                what = f"can't keep what was converted: {error.strerror or error}"
                raise DiskError(what, where=str(target.parent), hint=hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def digest_of(files: Iterable[Path], *more: object) -> str:
    """What changes when one of the files does, by its place, size and time, or one of `more`."""
    digest = hashlib.sha256(repr(more).encode())
    for path in sorted(files):
        facts = path.stat()
        digest.update(repr((str(path.resolve()), facts.st_size, facts.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def reason_of(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
