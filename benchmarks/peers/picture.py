"""A picture of what compare.py measured.

    python benchmarks/peers/picture.py compare.json docs/peers.svg

Bars are median seconds of a step, lines from the shortest to the longest round; beside them the
median of the ratios to stemtune's step of the same round.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from xml.sax.saxutils import escape

NAMES = {
    "stemtune": "stemtune",
    "hand": "a plain loop",
    "trl_head": "TRL, head on targets",
    "trl": "TRL",
    "swift": "ms-swift",
    "llamafactory": "LLaMA-Factory",
}
WIDTH, LEFT, BAR, GAP, TOP = 720, 170, 22, 12, 40
STYLE = "text{font:13px sans-serif;fill:#444}@media(prefers-color-scheme:dark){text{fill:#ccc}}"


def bars(seconds: dict[str, list[float]]) -> list[str]:
    """A bar, a line and two texts for each contestant, from top to bottom."""
    scale = (WIDTH - LEFT - 130) / max(max(values) for values in seconds.values())
    base = seconds["stemtune"]
    lines: list[str] = []
    for row, (name, values) in enumerate(seconds.items()):
        top, middle = TOP + row * (BAR + GAP), median(values)
        line = top + BAR / 2
        color = "#2a7f62" if name == "stemtune" else "#9aa5b1"
        low, high = LEFT + min(values) * scale, LEFT + max(values) * scale
        ratio = median(theirs / ours for theirs, ours in zip(values, base, strict=True))
        times = "" if name == "stemtune" else f", {ratio:.1f}×"
        lines += [
            f'<text x="{LEFT - 10}" y="{line + 4}" text-anchor="end">{escape(NAMES[name])}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{middle * scale:.1f}" height="{BAR}" '
            f'fill="{color}"/>',
            f'<path d="M{low:.1f} {line}H{high:.1f}" stroke="#333" stroke-width="2"/>',
            f'<text x="{high + 10:.1f}" y="{line + 4}">{middle:.1f} s{times}</text>',
        ]
    return lines


def main() -> None:
    """Read the figures, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="Seconds of a step")
    options = parser.parse_args()
    document = json.loads(options.figures.read_text(encoding="utf-8"))
    seconds: dict[str, list[float]] = {}
    for record in sorted(document["records"], key=lambda record: record["round"]):
        seconds.setdefault(record["contestant"], []).append(record["seconds"])
    ordered = {name: seconds[name] for name in NAMES if name in seconds}
    height = TOP + len(ordered) * (BAR + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(options.title)}</title><style>{STYLE}</style>",
        f'<text x="10" y="20">{escape(options.title)}</text>',
        *bars(ordered),
        "</svg>",
    ]
    options.picture.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
