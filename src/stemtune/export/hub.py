"""A folder onto the Hub: what of it, under whose name, and whether it arrived as it lies here.

The token is the Hub client's own business: it is in the environment, or where `hf auth login` put
it, and never an argument.
"""

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from stemtune.errors import ConfigError, ModelError, StemtuneError
from stemtune.model.names import CARD, PROMPT_FILE, shared_name
from stemtune.network import first_line, http_error, is_offline, network_error, retried
from stemtune.redact import holds_token, redacted

log = logging.getLogger(__name__)
Found = TypeVar("Found")

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
LARGE = 10_000_000  # bytes: such a file is sent by itself, and told
TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
LOGIN = "`hf auth login`, or set HF_TOKEN, with a token that may write"


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


# -- what is pushed ---------------------------------------------------------------------------


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


# -- who pushes -------------------------------------------------------------------------------


def login() -> str:
    """Where the Hub's client has a token from, never the token; empty without one."""
    if not get_token():
        return ""
    names = (name for name in TOKEN_NAMES if os.environ.get(name))
    return next(names, "hf auth login")


def account() -> str:
    """Whose token it is, asked of the Hub.

    Raises:
        ModelError: there is none, or the Hub does not know it or can't be reached.
    """
    _require_login()
    try:
        return str(_tried(HfApi().whoami)["name"])
    except Exception as error:  # the Hub's own kinds, and those of its network library
        raise _explained("", error) from error


def _require_login() -> None:
    if is_offline():
        hint = "unset it, where there is a network"
        raise ModelError("HF_HUB_OFFLINE is set: nothing can be pushed", hint=hint)
    if not login():
        raise ModelError("there is no login for the Hub", hint=LOGIN)


# -- pushing ----------------------------------------------------------------------------------


def push(
    run: Path,
    repo_id: str,
    *,
    private: bool = True,
    create: bool = True,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    include: Seq[str] = (),
    exclude: Seq[str] = (),
) -> str:
    """Upload what `push_folder` and `files_to_push` find, in one commit, and compare what arrived.

    What failed on the way and may pass is tried again; what arrived before is not sent twice.

    Args:
        repo_id: `owner/name`; a name alone is of whoever is logged in.
        private: of a repository that is made. One that is public already is left alone then.
        create: make the repository, and the branch, where they are not there yet.
        revision: a branch; `main`, if not given.
        create_pr: propose it as a pull request instead.

    Returns:
        The address of the repository, of the branch, or of the pull request.

    Raises:
        ConfigError: nothing to push, a bad name, or a public repository for what is private.
        ModelError: what the Hub or the network said, and what can be done about it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        hint = "write it as owner/name"
        raise ConfigError(first_line(error), where=repr(repo_id), hint=hint) from None
    folder = push_folder(run)
    uploads = files_to_push(folder, include, exclude)
    log.info("pushing %s to %s at %s", shown_files(uploads), repo_id, constants.ENDPOINT)
    log.info("logged in as %s", account())
    api = HfApi()
    try:
        if create:
            made = _tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            repo_id = made.repo_id
            if revision and not revision.startswith("refs/"):
                _tried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        if private and not _tried(lambda: api.model_info(repo_id)).private:
            hint = "--public (or private=False, output.hub_private_repo: false) says that you know"
            what = "this repository is there already, and everybody can read it"
            raise ConfigError(what, where=repo_id, hint=hint)
        message = commit_message or f"{_what(folder)} by stemtune"
        return _commit(api, repo_id, uploads, message, revision, create_pr)
    except StemtuneError:
        raise
    except Exception as error:  # the Hub's own kinds, and those of its network library
        raise _explained(repo_id, error) from error


def _what(folder: Path) -> str:
    if folder.is_file() or not any((folder / name).is_file() for name in MARKS):
        return "GGUF files"
    return "Adapter" if (folder / MARKS[0]).is_file() else "Model"


def _commit(
    api: HfApi,
    repo_id: str,
    uploads: Seq[Upload],
    message: str,
    revision: str | None,
    create_pr: bool,
) -> str:
    additions = [upload.addition() for upload in uploads]

    def send(one: CommitOperationAdd) -> None:
        api.preupload_lfs_files(
            repo_id, [one], revision=revision, create_pr=create_pr, free_memory=False
        )

    def commit() -> CommitInfo:
        nonlocal additions
        try:
            return api.create_commit(
                repo_id, additions, commit_message=message, revision=revision, create_pr=create_pr
            )
        except Exception:
            # It may be the answer that was lost: new ones ask what is there before they are sent.
            additions = [upload.addition() for upload in uploads]
            raise

    for upload, addition in zip(uploads, additions, strict=True):
        if upload.size > LARGE:
            _tried(partial(send, addition))
            log.info("uploaded %s (%s)", upload.name, shown_size(upload.size))
    # Sent again after an answer that was lost, a second pull request would be opened.
    made = commit() if create_pr else _tried(commit)
    _verify(api, repo_id, uploads, made.oid)
    address = f"{api.endpoint}/{repo_id}"
    return made.pr_url or (f"{address}/tree/{revision}" if revision else address)


def _verify(api: HfApi, repo_id: str, uploads: Seq[Upload], commit: str) -> None:
    """Compare what the Hub has with what lies here.

    Raises:
        ModelError: a file is not there, or has other bytes.
    """
    names = [upload.name for upload in uploads]
    paths = _tried(lambda: api.get_paths_info(repo_id, names, revision=commit))
    there = {path.path: path for path in paths if isinstance(path, RepoFile)}
    for upload in uploads:
        if upload.name not in there or not upload.is_the_same(there[upload.name]):
            what = f"{upload.name} did not arrive as it lies here"
            hint = "push again: what did arrive is not sent twice"
            raise ModelError(what, where=repo_id, hint=hint)


def _tried(call: Callable[[], Found]) -> Found:
    """`call`, tried again while what fails may pass. A proxy's page where JSON should be is a
    server that is down."""

    def once() -> Found:
        try:
            return call()
        except json.JSONDecodeError as error:
            raise ConnectionError("the Hub's answer is no JSON") from error

    return retried(once)


def _explained(repo_id: str, error: BaseException) -> ModelError:
    """One line for a person."""
    status = http_error(error)
    again = "push again later: what arrived is not sent twice"
    if "Invalid metadata" in str(error):
        problems = [line.lstrip("- ") for line in str(error).splitlines()[1:]]
        what, hint = f"the Hub refuses the card: {'; '.join(problems)}", f"correct {CARD}"
    elif isinstance(error, RevisionNotFoundError):
        what, hint = "it has no such branch", "look at its page for one"
    elif status == 401 and not isinstance(error, RepositoryNotFoundError):
        what, hint = f"the Hub does not know the token of {login()} (401)", LOGIN
    elif isinstance(error, RepositoryNotFoundError):
        what, hint = "there is no such repository, or this login may not see it", LOGIN
    elif status == 403:
        what = "this login may not write there (403)"
        hint = "it takes a token that may write: https://huggingface.co/settings/tokens"
    elif status in (409, 412):
        what, hint = f"somebody else is writing to it ({status})", again
    elif status == 429:
        what, hint = "the Hub asks for fewer requests (429)", again
    elif status is not None:
        what, hint = f"the Hub answered {status}", again
    elif network_error(error) is not None:
        what, hint = "the Hub can't be reached", f"is the network there? Then {again}"
    else:
        what, hint = f"can't push: {first_line(error)}", again
    said = _server_message(error)
    return ModelError(f"{what}: {said}" if said else what, where=repo_id, hint=hint)


def _server_message(error: BaseException) -> str:
    """What the server itself says about it, in one line."""
    said = error.server_message if isinstance(error, HfHubHTTPError) else None
    return " ".join(redacted(said or "").split())


# -- for people -------------------------------------------------------------------------------


def push_command(run: Path, repo_id: str, *, private: bool) -> str:
    """What to type to push it once more."""
    public = "" if private else " --public"
    return f"stemtune push {shlex.quote(str(run))} {repo_id}{public}"


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
