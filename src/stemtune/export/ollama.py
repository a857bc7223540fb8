"""A run for Ollama: a GGUF file and a Modelfile with the template, the stop tokens and the system
text of training.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md; what its parser takes stands in
`parser/parser.go`, what it takes for a name in `types/model/name.go`.
"""

import logging
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune.data.renderer import Renderer
from stemtune.errors import ConfigError, ModelError
from stemtune.export.gguf import (
    Run,
    export_gguf,
    file_name,
    renderer_of,
    require_new,
    written_whole,
)
from stemtune.export.gguf_vocabulary import adds_bos
from stemtune.export.go_template import LAST_TEXT, Turn, turns_of
from stemtune.rundir import write_text

log = logging.getLogger(__name__)
PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
NAME = re.compile(rf"([A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{PART}(:{PART})?")
QUOTES = '"""'


@dataclass(frozen=True)
class ForOllama:
    """What was written: the folder, and the name to give to `ollama create`."""

    folder: Path
    name: str


def export_ollama(
    run: Run, target: Path, kind: str, *, name: str | None = None, system: str | None = None
) -> ForOllama:
    """Write a folder that `ollama create` takes, whole or not at all.

    Args:
        target: a folder that is not there yet.
        kind: of the weights, one of `stemtune.export.gguf.KINDS`.
        name: of the model; of base and run, if not given.
        system: what the model is told before each conversation; as in training, if not given.

    Raises:
        ConfigError: the target is there, or Ollama takes no such name or system text.
        ModelError: Ollama's language can't say the template, or llama.cpp can't run the model.
        DiskError: there is no room for it.
    """
    require_new(target)
    name = run.name.lower() if name is None else name
    if not NAME.fullmatch(name):
        hint = "letters, digits, _ - and . as in hamlet, or me/hamlet:latest"
        raise ConfigError(f"Ollama takes no such name: {name!r}", where="--name", hint=hint)
    renderer = renderer_of(run)
    told = run.prompt["system"] if system is None else system
    file = file_name(run, kind)
    where = str(run.adapter.folder)
    text = modelfile(file, template_of(renderer, where), _stops(renderer), told or "")
    with written_whole(target) as folder:
        folder.mkdir()
        write_text(folder / "Modelfile", text)
        export_gguf(run, folder / file, kind)
    return ForOllama(target, name)


def template_of(renderer: Renderer, where: str) -> str:
    """Training's chat template in Ollama's language.

    Raises:
        ModelError: there is no saying it.
    """
    if renderer.plain:
        return LAST_TEXT
    tokenizer: Any = renderer.tokenizer
    if "strftime_now" in tokenizer.get_chat_template():
        log.warning("the template writes the date: Ollama will always be told today's")
    # Ollama puts it before every prompt, as the file's own setting says.
    bos = tokenizer.bos_token if adds_bos(renderer) else ""

    def write(turns: Seq[Turn], prompt: bool) -> str:
        chat = [{"role": role, "content": text} for role, text in turns]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        return str(text).removeprefix(bos)

    return turns_of(write, where).in_go()


def _stops(renderer: Renderer) -> list[str]:
    tokenizer: Any = renderer.tokenizer
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(renderer.stop_ids())]


def modelfile(file: str, template: str, stops: list[str], system: str) -> str:
    """The Modelfile's text.

    Raises:
        ConfigError: the system text can't be written there.
        ModelError: the template can't.
    """
    lines = [f"FROM ./{file}"]
    reason = _lost(template)
    if reason:
        hint = "`stemtune export gguf` writes the file with its own template"
        raise ModelError(f"Ollama would read another template: {reason}", hint=hint)
    lines.append(f"TEMPLATE {QUOTES}{template}{QUOTES}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    reason = _lost(system)
    if reason:
        hint = "give another one with --system"
        what = f"Ollama would read another system text: {reason}"
        raise ConfigError(what, where="data.system", hint=hint)
    if system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    return "\n".join([*lines, ""])


def _lost(text: str) -> str:
    """What of a text Ollama's parser would lose between quotes, which nothing escapes; empty for
    nothing."""
    # It drops what Go's strconv.IsPrint says no to, but for these.
    dropped = next((c for c in text if not c.isprintable() and c not in "\n\r\t"), None)
    if dropped is not None:
        return f"it drops the character U+{ord(dropped):04X}"
    before = QUOTES
    for line in text.splitlines(keepends=True)[: None if text.endswith(("\n", "\r")) else -1]:
        before += line
        if len(before.strip()) > len(QUOTES) and before.rstrip().endswith(QUOTES):
            return f"{QUOTES} at the end of a line ends it"
    return ""
