"""`stemtune push`: an adapter, a merged model or GGUF files onto the Hub."""

import json
from pathlib import Path
from typing import Annotated

import typer

from stemtune.cli.common import Json, err, log_to_stderr, run_folder

Patterns = list[str] | None


def push(
    run: Annotated[
        Path, typer.Argument(help="A run, or the folder of an adapter, a model or GGUF files.")
    ],
    repo_id: Annotated[str, typer.Argument(help="The repository, as owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody can read it; else only you.")
    ] = False,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Of the commit.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch; main, if not given.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Propose it as a pull request.")] = False,
    include: Annotated[
        Patterns, typer.Option(help="Only files like this, such as '*.safetensors'; repeatable.")
    ] = None,
    exclude: Annotated[Patterns, typer.Option(help="No files like this; repeatable.")] = None,
    no_create: Annotated[
        bool, typer.Option("--no-create", help="Only into a repository that is there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Push to the Hub, privately unless told otherwise; log in by `hf auth login` or HF_TOKEN."""
    log_to_stderr()
    from stemtune.export import files, hub

    if run.suffix in (".yaml", ".yml"):
        run = run_folder(run)
    patterns = {"include": include or [], "exclude": exclude or []}
    uploads = files.files_to_push(files.push_folder(run), **patterns)
    told = [{"path": upload.name, "size": upload.size} for upload in uploads]
    if dry_run:
        if as_json:
            print(json.dumps({"files": told}))
            return
        for upload in uploads:
            print(f"{files.shown_size(upload.size):>12}  {upload.name}")
        err.print(f"{files.shown_files(uploads)}; nothing was sent")
        return
    url = hub.push(
        run,
        repo_id,
        private=not public,
        create=not no_create,
        commit_message=message,
        revision=revision,
        create_pr=pr,
        **patterns,
    )
    print(json.dumps({"url": url, "files": told}) if as_json else url)
