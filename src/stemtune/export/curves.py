"""A run's curves as pictures. PNG: the Hub shows SVG files not everywhere."""

import io
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

WIDTH, HEIGHT = 1280, 520  # in pixels, for a picture that is shown at half of that
LEFT, RIGHT, TOP, BOTTOM = 110, 30, 70, 70
SMOOTH = 3  # lines are drawn larger by this, and made smaller: PIL's own have steps
MOST = 200  # points of a curve; of more, neighbours are averaged
FONT = ImageFont.load_default(26)
INK, GRID, TRAINED, HELD_OUT = "#444b55", "#e3e6ea", "#7aa7d9", "#2f9e5b"
PICTURES = {
    "loss.png": ("Loss", "loss", "eval_loss"),
    "accuracy.png": ("Pairs won", "rewards_accuracy", "eval_rewards_accuracy"),
}


@dataclass(frozen=True)
class Curve:
    """Points (step, value) with a name and a colour."""

    name: str
    colour: str
    points: list[Point]


def curves(lines: Seq[dict[str, Any]]) -> dict[str, tuple[str, list[Curve]]]:
    """By file name a picture's title and what it shows: the loss of steps and of held-out records,
    and of preferences how many pairs are won.

    Args:
        lines: of `metrics.jsonl`.
    """
    found: dict[str, tuple[str, list[Curve]]] = {}
    for file, (title, trained, held_out) in PICTURES.items():
        both = [
            Curve("training", TRAINED, _averaged(_points(lines, trained))),
            Curve("held out", HELD_OUT, _points(lines, held_out)),
        ]
        if any(len(curve.points) > 1 for curve in both):
            found[file] = title, [curve for curve in both if curve.points]
    return found


def pictures(lines: Seq[dict[str, Any]]) -> dict[str, bytes]:
    """The same drawn, as PNG files."""
    return {file: draw(title, shown) for file, (title, shown) in curves(lines).items()}


def _points(lines: Seq[dict[str, Any]], name: str) -> list[Point]:
    values = [(line["step"], line.get(name)) for line in lines]
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def _averaged(points: list[Point]) -> list[Point]:
    """At most `MOST` points, each the mean of some neighbours."""
    size = -(-len(points) // MOST) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def draw(title: str, shown: Seq[Curve]) -> bytes:
    """Curves over steps, as a PNG file."""
    places = [point for curve in shown for point in curve.points]
    xs, ys = ticks([x for x, _ in places]), ticks([y for _, y in places])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    lines = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), "white")
    pen = ImageDraw.Draw(lines)
    for y in ys:
        _line(pen, [at(xs[0], y), at(xs[-1], y)], GRID, 2)
    for curve in shown:
        spots = [at(*point) for point in curve.points]
        _line(pen, spots, curve.colour, 4)
        for x, y in spots if len(spots) < 30 else ():
            box = [SMOOTH * value for value in (x - 5, y - 5, x + 5, y + 5)]
            pen.ellipse(box, fill=curve.colour)
    image = lines.reduce(SMOOTH)
    pen = ImageDraw.Draw(image)
    _write_head(pen, title, shown)
    for x in xs:
        across, up = at(x, ys[0])
        pen.text((across, up + 14), f"{x:g}", fill=INK, font=FONT, anchor="ma")
    for y in ys:
        across, up = at(xs[0], y)
        pen.text((across - 16, up), f"{y:g}", fill=INK, font=FONT, anchor="rm")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _line(pen: ImageDraw.ImageDraw, spots: Seq[Point], colour: str, width: int) -> None:
    larger = [(SMOOTH * x, SMOOTH * y) for x, y in spots]
    pen.line(larger, fill=colour, width=SMOOTH * width, joint="curve")


def _write_head(pen: ImageDraw.ImageDraw, title: str, shown: Seq[Curve]) -> None:
    """The title, and at the other end what the colours mean."""
    pen.text((LEFT, 18), title, fill=INK, font=FONT)
    right = WIDTH - RIGHT
    for curve in reversed(shown):
        right -= pen.textlength(curve.name, font=FONT)
        pen.text((right, 18), curve.name, fill=curve.colour, font=FONT)
        right -= 30


def ticks(values: Seq[float]) -> list[float]:
    """Round numbers around all values, four to nine of them."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * n for n in (1, 2, 5, 10) if span / (power * n) <= 7)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = last if last > first else first + 1
    return [round(number * step, 12) for number in range(first, last + 1)]
