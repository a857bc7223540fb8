"""What the documents say is so."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import stemtune as st
from tests.cli.command import stemtune_here

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_FILES = [*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "src/stemtune/starter/run.yaml"]


def shell_commands(page: Path) -> list[list[str]]:
    """The words of every `stemtune …` in a page's shell blocks and between its backticks."""
    text = page.read_text(encoding="utf-8")
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    # What stands after `#`, as it does in a shell, is for the reader.
    lines += re.findall(r"`(stemtune [a-z][^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    words = [shlex.split(line, comments=True) for line in lines]
    return [found[1:] for found in words if found[:1] == ["stemtune"]]


COMMANDS = sorted({tuple(command) for page in PAGES for command in shell_commands(page)})


def test_there_are_commands() -> None:
    assert {command[0] for command in COMMANDS} >= {"init", "check", "train", "eval", "chat"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_there(command: tuple[str, ...], tmp_path: Path) -> None:
    verbs = command[: 2 if command[0] == "export" else 1]
    arguments = command[len(verbs) :]
    shown = stemtune_here(*verbs, "--help", cwd=tmp_path)
    assert shown.code == 0, shown.err
    options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown.out))
    assert {a.partition("=")[0] for a in arguments if a.startswith("-")} <= options
    overrides = [a for a in arguments if re.match(r"[a-z_]+\.[a-z_]+=", a)]
    st.load_config(RUN_FILES[-1], overrides)


def test_every_option_that_the_readme_names_is_one(tmp_path: Path) -> None:
    """Also in the comments beside the commands."""
    for line in re.findall(r"^stemtune .*", (ROOT / "README.md").read_text(), re.M):
        shown = stemtune_here(line.split()[1], "--help", cwd=tmp_path)
        for option in re.findall(r"(?<![\w-])--[a-z-]+", line):
            assert option in shown.out, line


def links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if "://" not in target]


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in heading_anchors(there), target


def test_the_reference_of_the_run_file_is_up_to_date() -> None:
    script = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = script.with_name("run-file.md").read_text(encoding="utf-8")
    assert page == module.reference(), "run `make docs`"


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_run_file_loads(path: Path) -> None:
    assert st.load_config(path).data.path


def test_make_has_what_the_readme_types() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    typed = re.findall(r"^make ([a-z-]+)", "\n".join(blocks), re.M)
    assert typed and set(typed) <= targets
