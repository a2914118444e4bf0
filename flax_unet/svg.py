"""Plots of the report as SVG: learning curves, reliability diagram, confusion matrix.

Each is a text of HTML, empty if there is nothing to draw. `report.STYLE` has the colours.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_unet.metrics import Reliability

CURVES = {"loss": "Loss", "dice_per_image": "Dice, mean over images"}
#: Classes up to which the cells of a confusion matrix have numbers.
NUMBERED = 16


def escaped(value: Any) -> str:
    """Any value as text that HTML takes literally."""
    return html.escape(str(value)).encode(errors="replace").decode()  # half of a surrogate pair


def number(value: Any, digits: int = 4) -> str:
    """A number with all of its digits as the element's value."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–" if value is None else escaped(value)
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return f'<data value="{value!r}">{shown}</data>'


class _Axes:
    """The frame of a plot, and where a value is in it: x and y in the given ranges."""

    left, top, width, height = 52, 12, 420, 220

    def __init__(self, x: tuple[float, float], y: tuple[float, float], labels: tuple[str, str]):
        self.ranges, self.parts = (x, y), []
        for value in ticks(*y):
            _, at = self.at(x[0], value)
            self.add(f"<path class=grid d='M{self.left} {at:.1f}h{self.width}'/>")
            self.add(f"<text class='end soft' x={self.left - 8} y={at + 5:.1f}>{value:g}</text>")
        bottom = self.top + self.height
        for value in ticks(*x, whole=labels[0] == "epoch"):
            at, _ = self.at(value, y[0])
            self.add(f"<text class='middle soft' x={at:.1f} y={bottom + 20}>{value:g}</text>")
        middle = self.left + self.width / 2
        self.add(f"<text class='middle soft' x={middle} y={bottom + 40}>{labels[0]}</text>")
        self.label = labels[1]

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.ranges
        across, up = (x - x0) / (x1 - x0 or 1), (y - y0) / (y1 - y0 or 1)
        return self.left + self.width * across, self.top + self.height * (1 - up)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def line(self, points: Sequence[tuple[float, float, str]], kind: str) -> None:
        """A line through points (x, y, what is shown of it under the mouse)."""
        places = [(*self.at(x, y), text) for x, y, text in points if math.isfinite(y)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        self.add(f"<polyline class={kind} points='{joined}'/>")
        if len(places) <= 200:
            radius = 3.5 if len(places) <= 40 else 1.5
            for x, y, text in places:
                title = f"<title>{text}</title>"
                self.add(f"<circle class={kind} cx={x:.1f} cy={y:.1f} r={radius}>{title}</circle>")

    def svg(self) -> str:
        size = f"0 0 {self.left + self.width + 16} {self.top + self.height + 48}"
        parts = "".join(self.parts)
        return f'<svg viewBox="{size}" role=img aria-label="{self.label}">{parts}</svg>'


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers from low to high."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (power * k) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [round(i * step, 12) for i in range(first, last + 1)]
    return [value for value in values if not whole or value == int(value)]


def curves(history: Sequence[Mapping[str, Any]], step: int | None) -> str:
    """Loss and Dice of training and validation by epoch; `step` is that of the checkpoint."""
    if not history:
        return ""
    last, figures = max(2, history[-1]["epoch"]), []
    for key, name in CURVES.items():
        lines = {"one": ("training", key), "two": ("validation", f"val_{key}")}
        values = [r[k] for r in history for _, k in lines.values() if math.isfinite(r[k])]
        top = 1.0 if key != "loss" else 1.05 * max([*values, 1e-9])
        axes = _Axes((1, last), (min(0, *values, 0), top), ("epoch", name))
        for record in history:
            if record.get("step") == step:
                x, y = axes.at(record["epoch"], top)
                axes.add(f"<path class=dash d='M{x:.1f} {y:.1f}v{axes.height}'/>")
        for kind, (label, k) in lines.items():
            points = [
                (r["epoch"], r[k], f"{label}, epoch {r['epoch']}: {r[k]:.4f}") for r in history
            ]
            axes.line(points, kind)
        figures.append(f"<figure><figcaption><b>{name}</b></figcaption>{axes.svg()}</figure>")
    colours = {"one": "training", "two": "validation"}
    words = ", ".join(f"<b style='color: var(--{k})'>{v}</b>" for k, v in colours.items())
    dashed = "; dashed: the evaluated checkpoint" if step is not None else ""
    return f"<div class=pair>{''.join(figures)}</div><p class=soft>{words}{dashed}</p>"


def reliability_diagram(r: Reliability | None, error: float | None) -> str:
    """The fraction that is right by probability, and how many pixels have it.

    Args:
        r: the counts.
        error: `metrics.calibration_error` of them.
    """
    if r is None or not np.sum(r.pixels):
        return ""
    diagram = _Axes((0, 1), (0, 1), ("mean probability of the bin", "Reliability diagram"))
    (x0, y0), (x1, y1) = diagram.at(0, 0), diagram.at(1, 1)
    diagram.add(f"<path class=dash d='M{x0} {y0}L{x1} {y1}'/>")
    points = [
        (s / n, p / n, f"{n:,} pixels: probability {s / n:.3f}, fraction {p / n:.3f}")
        for n, s, p in zip(*(np.asarray(x).tolist() for x in r), strict=True)
        if n
    ]
    diagram.line(points, "one")
    top, k = math.ceil(math.log10(max(r.pixels))) or 1, len(r.pixels)
    bars = _Axes((0, 1), (0, top), ("probability", "Pixels by probability"))
    for i, n in enumerate(np.asarray(r.pixels).tolist()):
        if n:
            (x0, y0), (x1, y1) = bars.at((i + 0.06) / k, 0), bars.at((i + 0.94) / k, math.log10(n))
            size = f"width={x1 - x0:.1f} height={max(1, y0 - y1):.1f}"
            bars.add(f"<rect class=one x={x0:.1f} y={min(y1, y0 - 1):.1f} {size}>")
            bars.add(f"<title>{n:,} pixels</title></rect>")
    texts = "Fraction that is right", "Pixels per bin, as powers of 10"
    figures = "".join(
        f"<figure><figcaption><b>{text}</b></figcaption>{axes.svg()}</figure>"
        for text, axes in zip(texts, (diagram, bars), strict=True)
    )
    note = f"Calibration error {number(error)}; a calibrated model is on the dashed line."
    return f"<div class=pair>{figures}</div><p class=soft>{note}</p>"


def confusion_matrix(
    matrix: Sequence[Sequence[int]] | None, evaluation: Mapping[str, Any] | None
) -> str:
    """Of each true class, the percent of its pixels that are predicted as each class.

    Args:
        matrix: pixels by true (row) and predicted class (column), [K, K].
        evaluation: of which `classes` has the names.
    """
    if not matrix or evaluation is None:
        return ""
    names, k, parts = evaluation["classes"], len(matrix), []
    side, left, top = (44 if k <= NUMBERED else max(6, 700 // k)), 160, 30
    bottom = top + side * k
    parts.append(f"<text class='end soft' x={left - 8} y=18>true</text>")
    parts.append(f"<text class=soft x={left} y=18>predicted</text>")
    for i, row in enumerate(matrix):
        y, total, name = top + side * i, max(1, sum(row)), escaped(names[i][:20])
        parts.append(f"<text class=end x={left - 8} y={y + side / 2 + 5}>{name}</text>")
        turned = f"translate({left + side * (i + 0.5) - 3} {bottom + 12}) rotate(45)"
        parts.append(f"<text transform='{turned}'>{name}</text>")
        for j, n in enumerate(row):
            fraction, x = n / total, left + side * j
            text = (
                f"{escaped(names[i])} as {escaped(names[j])}: {n:,} pixels, {100 * fraction:.2f} %"
            )
            size = f"x={x} y={y} width={side - 1} height={side - 1}"
            parts.append(f"<rect class=cell fill-opacity={0.04 + 0.55 * fraction:.3f} {size}>")
            parts.append(f"<title>{text}</title></rect>")
            if k <= NUMBERED:
                place = f"x={x + side / 2} y={y + side / 2 + 5}"
                parts.append(f"<text class=middle {place}>{100 * fraction:.1f}</text>")
    longest = 6 * max(len(name[:20]) for name in names)
    width, height = left + side * k + longest, bottom + 24 + longest
    svg = f'<svg viewBox="0 0 {width} {height}" style="max-width: {width}px" role=img '
    svg += f'aria-label="Confusion matrix">{"".join(parts)}</svg>'
    note = "Percent of the pixels of each true class (row) that are predicted as each class."
    return f"{svg}<p class=soft>{note}</p>"
