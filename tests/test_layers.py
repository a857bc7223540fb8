"""Imports point down: what docs/architecture.md says of the floors."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "stemtune"


def imports(path: Path) -> set[str]:
    """The rooms of stemtune that a file imports from, anywhere in it."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    modules = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return {m.split(".")[1] for m in modules if m.startswith("stemtune.")}


@pytest.mark.parametrize(
    ("room", "below"),
    [
        ("kernels", {"kernels"}),
        ("tree", {"tree", "kernels"}),
        ("plan", {"plan", "tree"}),
        ("objectives", {"objectives", "tree"}),
        ("config.py", set()),
        ("redact.py", set()),
        ("errors.py", {"redact"}),
        ("cache.py", set()),
        ("network.py", set()),
        ("sampling.py", set()),
        ("data", {"data", "config", "errors", "tree", "cache", "network"}),
        (
            "export",
            {"export", "model", "data", "config", "errors", "redact", "network", "rundir"},
        ),
        ("model", {"model", "config", "errors", "tree", "kernels", "rundir", "cache", "network"}),
    ],
)
def test_a_room_imports_only_from_below(room: str, below: set[str]) -> None:
    place = SOURCE / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    assert files
    found = {file.name: imports(file) - below for file in files}
    assert not {name: rooms for name, rooms in found.items() if rooms}


def test_nothing_below_knows_the_command_line() -> None:
    others = [p for p in SOURCE.rglob("*.py") if "cli" not in p.parts and p.name != "__main__.py"]
    assert len(others) > 20
    assert not [str(path) for path in others if "cli" in imports(path)]
