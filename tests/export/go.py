"""As much of Go's text/template as Ollama's templates need, written from its documentation
(https://pkg.go.dev/text/template), and Ollama's reading of a Modelfile (its `parser/parser.go`)."""

import re
from dataclasses import dataclass
from typing import Any

ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.S)
WORD = re.compile(r'\(|\)|"(?:[^"\\]|\\.)*"|[^\s()]+')


@dataclass
class Block:
    """`range` or `if`: a condition for each branch, nothing for `else`."""

    kind: str
    branches: list[tuple[str, list[Any]]]


def render(template: str, messages: list[tuple[str, str]]) -> str:
    """What Ollama makes of a conversation of (role, text)."""
    system = "\n\n".join(text for role, text in messages if role == "system")
    root = {
        "System": system,
        "Messages": [{"Role": role, "Content": text} for role, text in messages],
    }
    return _run(_parse(template), root, {"$": root})


def _parse(template: str) -> list[Any]:
    top: list[Any] = []
    stack: list[tuple[Block | None, list[Any]]] = [(None, top)]
    end = 0
    for found in ACTION.finditer(template):
        text = template[end : found.start()]
        stack[-1][1].append(text.rstrip() if found[1] else text)
        assert not found[3], "no trimming to the right is written"
        end = found.end()
        verb, _, rest = found[2].strip().partition(" ")
        if verb in ("if", "range"):
            block = Block(verb, [(rest, [])])
            stack[-1][1].append(block)
            stack.append((block, block.branches[0][1]))
        elif verb == "else":
            block, _ = stack.pop()
            assert block is not None
            block.branches.append((rest.removeprefix("if "), []))
            stack.append((block, block.branches[-1][1]))
        elif verb == "end":
            stack.pop()
        else:
            stack[-1][1].append((found[2].strip(),))
    top.append(template[end:])
    assert len(stack) == 1, "a block has no end"
    return top


def _run(nodes: list[Any], dot: Any, names: dict[str, Any]) -> str:
    written = ""
    for node in nodes:
        if isinstance(node, str):
            written += node
        elif isinstance(node, tuple):
            written += str(_value(node[0], dot, names))
        elif node.kind == "if":
            chosen = (body for test, body in node.branches if not test or _value(test, dot, names))
            written += _run(next(chosen, []), dot, names)
        else:
            declared, _, over = node.branches[0][0].rpartition(":=")
            for number, one in enumerate(_value(over, dot, names)):
                both = dict(zip(re.findall(r"\$\w+", declared), (number, one), strict=False))
                written += _run(node.branches[0][1], one, names | both)
    return written


def _value(text: str, dot: Any, names: dict[str, Any]) -> Any:
    words = WORD.findall(text)
    value, rest = _pipe(words, dot, names)
    assert not rest
    return value


def _pipe(words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
    arguments: list[Any] = []
    name, words = words[0], words[1:]
    if name not in FUNCTIONS:
        return _operand(name, dot, names), words
    while words and words[0] != ")":
        if words[0] == "(":
            value, words = _pipe(words[1:], dot, names)
            words = words[1:]
        else:
            value, words = _operand(words[0], dot, names), words[1:]
        arguments.append(value)
    return FUNCTIONS[name](*arguments), words


FUNCTIONS: dict[str, Any] = {
    "and": lambda *values: next((v for v in values if not v), values[-1]),
    "not": lambda value: not value,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "len": len,
    "slice": lambda values, start: values[start:],
}


def _operand(word: str, dot: Any, names: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1]
    if word.isdecimal():
        return int(word)
    first, *fields = word.split(".")
    value = names[first] if first else dot
    for name in fields:
        value = value[name]
    return value


def commands(modelfile: str) -> list[tuple[str, str]]:
    """(instruction, its text) as Ollama's parser reads them: rune by rune, closing quotes are
    looked for at each line's end."""
    found: list[tuple[str, str]] = []
    name, value = "", None
    for rune in f"{modelfile}\n":
        if value is None:
            if rune.isalpha():
                name += rune
            elif name:
                value = ""
            continue
        if rune not in "\n\r":
            if rune.isprintable() or rune in " \t":
                value += rune
            continue
        text = value.strip()
        for quote in ('"""', '"'):
            if text.startswith(quote):
                closed = len(text) >= 2 * len(quote) and text.endswith(quote)
                text = text[len(quote) : -len(quote)] if closed else None
                break
        if text is None:
            value += rune
            continue
        found.append((name.lower(), text))
        name, value = "", None
    assert value is None, "an instruction has no end"
    return found
