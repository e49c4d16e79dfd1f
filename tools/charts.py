"""Curves as paths for inline SVG, in a square of 1000 x 1000 that the page stretches, with round numbers along the axes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

SIDE = 1000
MOST_POINTS = 1200  # of a curve: more than a screen has columns
_STEPS = (1, 2, 2.5, 5, 10)
_SMOOTHED_OVER = 1 / 40  # of the run: less than the shape of the curve, more than the noise of a batch


@dataclass(frozen=True)
class Curve:
    """Values over iterations.

    Attributes:
        label: in the legend.
        kind: "main", "faint" (behind another of the same colour) or "second".
        dots: mark every point: there are few.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "main"
    dots: bool = False


@dataclass
class Chart:
    """One plot.

    Attributes:
        title, unit: above it.
        curves: those with points.
        format: a value for people.
        from_zero: the axis starts there.
    """

    title: str
    unit: str
    curves: list[Curve]
    format: Callable[[float], str]
    from_zero: bool = False
    x_range: tuple[float, float] = (0, 1)
    y_ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.curves = [_thinned(curve) for curve in self.curves if len(curve.xs)]
        values = [value for curve in self.curves for value in curve.ys] or [0.0, 1.0]
        self.y_ticks = ticks(min(0.0, *values) if self.from_zero else min(values), max(values))

    @property
    def y_range(self) -> tuple[float, float]:
        """Of the axis: from its first to its last tick."""
        return self.y_ticks[0], self.y_ticks[-1]

    def path(self, curve: Curve) -> str:
        """SVG's path of a curve."""
        return "M" + "L".join(f"{x:.5g} {y:.5g}" for x, y in self.points(curve))

    def points(self, curve: Curve) -> list[tuple[float, float]]:
        """Of a curve, in the square."""
        return [
            (_place(x, self.x_range), SIDE - _place(y, self.y_range)) for x, y in zip(curve.xs, curve.ys, strict=True)
        ]

    def y_labels(self) -> Iterator[tuple[float, str]]:
        """(per cent from the top, text)."""
        for value in self.y_ticks:
            yield 100 - _place(value, self.y_range) * 100 / SIDE, self.format(value)

    def x_labels(self) -> Iterator[tuple[float, str]]:
        """(per cent from the left, text): whole iterations."""
        for value in ticks(*self.x_range, most=6):
            if float(value).is_integer() and self.x_range[0] <= value <= self.x_range[1]:
                yield _place(value, self.x_range) * 100 / SIDE, f"{int(value):,}"

    def data(self) -> dict[str, Any]:
        """For the script that shows values under the pointer."""
        return {
            "range": self.x_range,
            "curves": [
                {
                    "label": curve.label,
                    "kind": curve.kind,
                    "x": list(curve.xs),
                    "place": [round(y, 1) for _, y in self.points(curve)],
                    "text": [self.format(y) for y in curve.ys],
                }
                for curve in self.curves
                if curve.kind != "faint"
            ],
        }


def _place(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return SIDE * (value - low) / (high - low) if high > low else SIDE / 2


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers at equal distances, at most ``most`` + 1 of them, from below ``low`` to above ``high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / (most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in _STEPS if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _thinned(curve: Curve) -> Curve:
    """Of every run of neighbours the least and the greatest, so that no peak is lost."""
    count = len(curve.xs)
    if count <= MOST_POINTS:
        return curve
    kept = [0, count - 1]
    edges = [round(count * number / (MOST_POINTS // 2)) for number in range(MOST_POINTS // 2 + 1)]
    for first, end in pairwise(edges):
        kept += [min(range(first, end), key=curve.ys.__getitem__), max(range(first, end), key=curve.ys.__getitem__)]
    order = sorted(set(kept))
    xs, ys = ([values[at] for at in order] for values in (curve.xs, curve.ys))
    return Curve(curve.label, xs, ys, curve.kind, curve.dots)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a fortieth of the run on either side, so that the curve does not lag behind its values."""
    reach, count = round(len(values) * _SMOOTHED_OVER), len(values)
    sums = [0.0, *accumulate(values)]
    spans = ((max(0, at - reach), min(count, at + reach + 1)) for at in range(count))
    return [(sums[end] - sums[first]) / (end - first) for first, end in spans]
