"""The command line: thin commands over the public functions.

Nothing heavy is imported before a command needs it: `stemtune --help` and every complaint about a
run file or a row come before torch.
"""

import os
import sys
import traceback

import typer

from stemtune import __version__
from stemtune.cli import chat, check, env, eval_, export, init, merge, push, serve, train
from stemtune.cli.common import is_first_process, quieten_libraries
from stemtune.errors import Interrupted, StemtuneError
from stemtune.redact import redacted

app = typer.Typer(
    name="stemtune",
    help="Fine-tune open language models; every shared token is computed once.",
    epilog="Start with `stemtune init`. With --debug, an error shows where it was raised.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init.init)
app.command("check")(check.check)
app.command("train")(train.train)
app.command("eval")(eval_.evaluate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.add_typer(export.app, name="export")
app.command("push")(push.push)
app.command("serve")(serve.serve)
app.command("env")(env.env)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def _print_traceback() -> None:
    """Where it was raised; what was raised may quote what stands in an address."""
    print(redacted(traceback.format_exc()), file=sys.stderr, end="")


def main() -> None:
    """Run the command line; errors become a few lines and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    quieten_libraries()
    try:
        app(arguments, prog_name="stemtune")
    except StemtuneError as error:
        if debug:
            _print_traceback()
        if isinstance(error, Interrupted) and not is_first_process():
            return  # a launcher that sees one process fail ends the first one, which still writes
        kind = "interrupted" if isinstance(error, Interrupted) else "error"
        print(f"{kind}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the results has enough of them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            _print_traceback()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            print("error: out of memory\nhint: `stemtune check` says what fits", file=sys.stderr)
            sys.exit(8)
        what = f"error: {type(error).__name__}: {error}\nhint: this looks like a bug of stemtune's"
        print(f"{redacted(what)}; the same command with --debug shows where", file=sys.stderr)
        sys.exit(1)
