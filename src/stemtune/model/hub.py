"""A base from the Hub: bounded retries, verified bytes, and for every fault what it is.

Only what a model needs is fetched, and no pickles and no code unless they were asked for.
"""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stemtune.config import Model
from stemtune.errors import DiskError, ModelError
from stemtune.model.weights import indexed
from stemtune.network import first_line, http_error, is_offline, network_error, retried

SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
WEIGHTS = ["*.safetensors"]
PICKLED = ["*.bin"]
CODE = ["*.py"]


def fetch(config: Model, *, weights: bool = True) -> Path:
    """The folder of a base of the Hub, downloaded where it is not there yet; its name is the
    commit.

    Args:
        weights: false for configuration and tokenizer alone.

    Raises:
        ModelError: no such base or revision, no access, no network, or other bytes than promised.
        DiskError: no space for it.
    """
    patterns = [*SMALL, *(CODE if config.trust_remote_code else [])]
    if weights:
        patterns += [*WEIGHTS, *(PICKLED if config.allow_pickled else [])]

    def call() -> str:
        return snapshot_download(config.base, revision=config.revision, allow_patterns=patterns)

    try:
        folder = Path(retried(call))
    except OSError as error:
        if http_error(error) is None and network_error(error) is None and error.errno:
            hint = "free some space, or set HF_HOME to another disk"
            raise DiskError(
                f"can't keep the base: {error.strerror}", where="model.base", hint=hint
            ) from None
        raise _explained(config, error) from error
    except Exception as error:  # the Hub's own kinds, and those of its network library
        raise _explained(config, error) from error
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Compare every file of a snapshot with the hash that the Hub promised, which is the name of
    what it links to. What was compared once is not read again while it is the same.

    Raises:
        ModelError: with the file; it is deleted, so that the next download gets it anew.
    """
    seen_file = folder.parent.parent / ".stemtune-verified.json"
    try:
        seen: dict[str, list[int]] = json.loads(seen_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        seen = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        blob = path.resolve()
        try:
            facts = [blob.stat().st_size, blob.stat().st_mtime_ns]
        except OSError:
            continue
        if seen.get(blob.name) == facts:
            continue
        if not _is_promised(blob):
            blob.unlink()
            hint = "it was deleted: the next try downloads it again"
            what = f"{path.name} is not what the Hub promised"
            raise ModelError(what, where=str(path), hint=hint)
        seen[blob.name] = facts
    try:
        seen_file.write_text(json.dumps(seen), encoding="utf-8")
    except OSError:  # a shared cache that is read-only: it is verified again next time
        return


def file_hashes(folder: Path) -> dict[str, str]:
    """By file what the Hub promised of weights, configuration and tokenizer, as `verify` saw it;
    empty for a folder that is not of its cache."""
    files = ("config.json", "tokenizer.json", "tokenizer.model")
    weights = [path for end in ("safetensors", "bin") for path in folder.glob(f"*.{end}")]
    names = [*weights, *(folder / name for name in files)]
    return {path.name: path.resolve().name for path in sorted(names) if path.is_symlink()}


def require_plain_weights(folder: Path, allow_pickled: bool) -> None:
    """Refuse weights that lie outside of the folder or that only a pickle holds; of a base of the
    Hub, such a pickle was not even fetched.

    Raises:
        ModelError: see above.
    """
    for index in folder.glob("*.index.json"):
        indexed(index)
    has_plain, has_pickled = (any(folder.glob(f"*.{end}")) for end in ("safetensors", "bin"))
    if has_pickled and not has_plain and not allow_pickled:
        what = "the weights are pickled (.bin), which can run code"
        hint = "take a base with safetensors, or set model.allow_pickled: true"
        raise ModelError(what, where=str(folder), hint=hint)
    if not has_pickled and not has_plain:
        hint = "a base has safetensors, or .bin files and model.allow_pickled: true"
        raise ModelError("there are no weights here", where=str(folder), hint=hint)


def _is_promised(blob: Path) -> bool:
    """A blob is named by the SHA-256 of its content, or as git names it."""
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        with blob.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        header = b"blob %d\0" % len(content)
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == blob.name
    return True


def _explained(config: Model, error: BaseException) -> ModelError:
    """One line for a person."""
    name = repr(config.base)
    status = http_error(error)
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{config.base}"
        what, hint = f"{name} is gated", f"ask for access at {page}, then `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        what, hint = f"{name} has no revision {config.revision!r}", "look at its page for one"
    elif isinstance(error, RepositoryNotFoundError):
        what = f"there is no base {name} on the Hub, or it is private"
        hint = "is the name right? For a private one: `hf auth login`"
    elif status == 401:
        what, hint = f"the Hub does not know this token (401), for {name}", "`hf auth login`"
    elif status is not None:
        what, hint = f"the Hub answered {status} for {name}", "try again later"
    elif is_offline():
        what = f"{name} is not in the cache, and HF_HUB_OFFLINE is set"
        hint = "download it where there is a network: `hf download`"
    elif network_error(error) is not None or isinstance(error, LocalEntryNotFoundError):
        what, hint = f"the Hub can't be reached for {name}", "is the network there?"
    else:
        what, hint = f"can't load {name}: {first_line(error)}", "is the name right?"
    return ModelError(what, where="model.base", hint=hint)
