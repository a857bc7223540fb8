"""What bases and files are called: no more than names, and nothing heavy is imported for them."""

import re
from pathlib import Path

SMOLLM2 = "smollm2"
HUB_NAMES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
PROMPT_FILE = "stemtune.json"  # in an adapter's folder: how its prompts are made
CARD = "README.md"
CACHED = re.compile(r".*/models--([^/]+)--([^/]+)/snapshots/[^/]+")


def shared_name(base: str) -> str:
    """What a base is called elsewhere: its name on the Hub, or where it has none, that of its
    folder or file, without where it lies."""
    if base in HUB_NAMES:
        return HUB_NAMES[base]
    path = Path(base)
    if not path.is_absolute():
        return base
    cached = CACHED.fullmatch(path.as_posix())
    return f"{cached[1]}/{cached[2]}" if cached else path.name


def is_hub_name(name: str) -> bool:
    """Whether a `shared_name` is that of a repository of the Hub."""
    return name.count("/") == 1
