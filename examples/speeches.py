"""Long speeches of the tragedies beside Hamlet, each behind what it answers: the manner.

    python examples/speeches.py speeches.jsonl

From the same package as `hamlet.py`, whose rules for text hold here too. A row looks like this:

    {"prompt": "This is the air-drawn dagger...", "completion": "Prithee, see there! behold! ..."}

A speech counts as long from 60 words on (`--least`), and keeps its first sentences, at most 100
words. Of what it answers there are just the last sentences, at most 25 words: it is the speech that
is learned.
"""

import argparse
import json
import random
import sys
from itertools import pairwise
from pathlib import Path

from hamlet import SENTENCE_END, count_words, parse_play, play_path, shorten

LONG, MOST = 60, 100
ASKED = 25


def long_speeches(least: int = LONG) -> list[dict[str, str]]:
    """Those of so many words, in the order of the plays."""
    plays = sorted(set(play_path().parent.glob("*.md")) - {play_path()})
    return [
        {"prompt": last_sentences(before.text), "completion": shorten(said, False, MOST)}
        for play in plays
        for scene in parse_play(play.read_text(encoding="utf-8"))
        for before, turn in pairwise(scene.turns)
        if count_words(said := shorten(turn.text, keep_end=False)) >= least
    ]


def last_sentences(text: str) -> str:
    """As many as `ASKED` words allow; of one that is longer, its end."""
    starts = [0, *(found.end() for found in SENTENCE_END.finditer(text))]
    fitting = [text[start:] for start in starts if count_words(text[start:]) <= ASKED]
    return fitting[0] if fitting else " ".join(text.split()[-ASKED:])


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Speeches of the other tragedies.")
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--most", type=int, default=300, help="how many (default: 300)")
    what = f"words that make a speech long (default: {LONG})"
    parser.add_argument("--least", type=int, default=LONG, help=what)
    arguments = parser.parse_args()
    rows = long_speeches(arguments.least)
    random.Random(0).shuffle(rows)
    chosen = rows[: arguments.most]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    arguments.out.write_text("".join(lines), encoding="utf-8")
    words = sum(count_words(row["completion"]) for row in chosen)
    print(f"{arguments.out}: {len(chosen)} speeches with {words} words", file=sys.stderr)


if __name__ == "__main__":
    main()
