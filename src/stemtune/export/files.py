"""What of a folder goes onto the Hub: the files that belong to others as well."""

import hashlib
import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from stemtune.errors import ConfigError
from stemtune.model.names import PROMPT_FILE, shared_name
from stemtune.redact import holds_token

MARKS = ("adapter_config.json", "config.json")  # of an adapter, of a whole model
NEVER = (  # of a run, but nothing that an adapter or a model consists of
    "checkpoints/*",
    "tensorboard/*",
    "events.out.*",
    "optimizer*",
    "run.json",
    "config.yaml",
    "metrics.jsonl",
    "log.txt",
    "*.log",
    "*.lock",
    "*.tmp",
)
TEXTS = (".json", ".jsonl", ".jinja", ".md", ".txt", "")


@dataclass(frozen=True)
class Upload:
    """A file as it is to be in the repository, and what it holds or where that lies."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """In bytes."""
        content = self.content
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def addition(self) -> CommitOperationAdd:
        """For the Hub's client."""
        content = self.content if isinstance(self.content, bytes) else str(self.content)
        return CommitOperationAdd(self.name, content)

    def is_the_same(self, there: RepoFile) -> bool:
        """Whether a file of the Hub has this content, by the hash that it has there."""
        if there.size != self.size:
            return False
        if there.lfs is None:
            content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
            header = b"blob %d\0" % len(content)
            git = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
            return git == there.blob_id
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest() == there.lfs.sha256
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256


def push_folder(run: Path) -> Path:
    """What of a path is pushed: the adapter of a run, or the folder of an adapter, of a model, of
    GGUF files; or one such file.

    Raises:
        ConfigError: it is nothing of that.
    """
    if run.is_file() and run.suffix == ".gguf":
        return run
    for folder in (run / "adapter", run):
        if any((folder / name).is_file() for name in MARKS) or any(folder.glob("*.gguf")):
            return folder
    hint = "give the folder of a finished run, of an adapter or of a model, or a .gguf file"
    raise ConfigError("there is nothing to push here", where=str(run), hint=hint)


def files_to_push(folder: Path, include: Seq[str] = (), exclude: Seq[str] = ()) -> list[Upload]:
    """The files of a folder (from `push_folder`) that belong to others as well: nothing hidden, no
    links, nothing of a run's own, and without the names of folders on this machine.

    Args:
        include: patterns such as `*.safetensors`, one of which a file must match; all, if empty.
        exclude: patterns of what is left out.

    Raises:
        ConfigError: nothing is left, or a file holds a token.
    """
    if folder.is_file():
        return [Upload(folder.name, folder)]
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in found]
    kept = filter_repo_objects(
        [name for name in names if not any(part.startswith(".") for part in name.split("/"))],
        allow_patterns=list(include) or None,
        ignore_patterns=[*NEVER, *exclude],
    )
    uploads = [Upload(name, _shareable(folder / name)) for name in kept]
    if not uploads:
        hint = "look at --include and --exclude"
        raise ConfigError("no file is left to push", where=str(folder), hint=hint)
    _refuse_tokens(uploads, folder)
    return uploads


def _shareable(path: Path) -> bytes | Path:
    """A file, or its content with a base called as others know it."""
    if path.name not in ("adapter_config.json", PROMPT_FILE):
        return path
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        named = [(values, "base_model_name_or_path")]
        if path.name == PROMPT_FILE:
            named = [(values["model"], "base"), (values.get("memories") or {}, "by")]
    except (ValueError, KeyError, TypeError):
        hint = "the adapter is damaged: take a copy, or train it again"
        raise ConfigError("this is not what a run wrote", where=str(path), hint=hint) from None
    for section, key in named:
        if Path(section.get(key) or "").is_absolute():
            section[key] = shared_name(section[key])
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def _refuse_tokens(uploads: Seq[Upload], folder: Path) -> None:
    for upload in uploads:
        if Path(upload.name).suffix not in TEXTS:
            continue
        content = (
            upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
        )
        if holds_token(content.decode(errors="replace")):
            hint = "take it out, or leave the file out by --exclude"
            where = str(folder / upload.name)
            raise ConfigError("this file holds a token of the Hub", where=where, hint=hint)


def shown_files(uploads: Seq[Upload]) -> str:
    """How many, and how large."""
    size = shown_size(sum(upload.size for upload in uploads))
    return f"{len(uploads)} file{'' if len(uploads) == 1 else 's'} ({size})"


def shown_size(size: int) -> str:
    """Of some bytes."""
    for unit, many in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= many:
            return f"{size / many:.1f} {unit}"
    return f"{size} bytes"
