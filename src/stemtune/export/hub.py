"""A folder onto the Hub: under whose name, and whether it arrived as it lies here.

The token is the Hub client's own business: it is in the environment, or where `hf auth login` put
it, and never an argument.
"""

import json
import logging
import os
import shlex
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from stemtune.errors import ConfigError, ModelError, StemtuneError
from stemtune.export.files import (
    MARKS,
    Upload,
    files_to_push,
    push_folder,
    shown_files,
    shown_size,
)
from stemtune.model.names import CARD
from stemtune.network import first_line, http_error, is_offline, network_error, retried
from stemtune.redact import redacted

log = logging.getLogger(__name__)
Found = TypeVar("Found")

LARGE = 10_000_000  # bytes: such a file is sent by itself, and told
TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
LOGIN = "`hf auth login`, or set HF_TOKEN, with a token that may write"


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
