"""`stemtune env`: what this machine has."""

import json
from typing import Annotated

import typer

from stemtune.cli.common import Json


def env(
    whoami: Annotated[
        bool, typer.Option("--whoami", help="Ask the Hub whose login it is.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, device, memory and login: what to send along with a question."""
    from stemtune.environment import environment
    from stemtune.export.hub import account

    facts = environment()
    if whoami:
        facts["hub_account"] = account()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print(f"{name:24} {value}")
