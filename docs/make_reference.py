"""Writes docs/run-file.md from the classes of stemtune/config.py."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stemtune.config import Config
from stemtune.runfile import sections_in, type_name

HEAD = """# The run file

Made by `make docs` from `src/stemtune/config.py`. A value can be overridden on the command line as
`section.key=value`. Unknown keys are refused.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        kinds = sections_in(field.annotation)
        if len(kinds) == 1:
            parts += describe(name, kinds[0], "##")
            continue
        parts.append(f"\n## {name}\n\n{field.description}\n")
        for kind in kinds:  # told apart by their type
            parts += describe(f"{name}: {kind.model_fields['type'].default}", kind, "###")
    return "".join(parts)


def describe(name: str, kind: type[BaseModel], level: str) -> Iterator[str]:
    """A section, and the sections in it."""
    yield f"\n{level} {name}\n\n{kind.__doc__}\n\n| key | value | default | |\n|---|---|---|---|\n"
    for key, field in kind.model_fields.items():
        default = field.default
        shown = "**required**" if default is PydanticUndefined else f"`{yaml_word(default)}`"
        if isinstance(default, BaseModel):
            shown = "see below"
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        what = type_name(field.annotation).replace("|", "\\|")
        yield f"| `{key}` | {what} | {shown} | {text} |\n"
    seen: set[type[BaseModel]] = set()
    for key, field in kind.model_fields.items():
        for inner in sections_in(field.annotation):
            if inner not in seen:
                seen.add(inner)
                yield from describe(f"{name}.{key}", inner, "###")


def yaml_word(value: object) -> str:
    """A default as one would write it in YAML."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    return str(value).replace("'", "")


if __name__ == "__main__":
    page = Path(__file__).with_name("run-file.md")
    if "--check" in sys.argv:
        sys.exit(0 if page.read_text(encoding="utf-8") == reference() else "run `make docs`")
    page.write_text(reference(), encoding="utf-8")
