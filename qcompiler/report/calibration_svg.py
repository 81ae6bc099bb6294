"""The drawings of a calibration as SVG text: histogram with ranges, extremes per channel, and a small one for lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from xml.sax.saxutils import quoteattr

import numpy as np

from qcompiler.report.calibration_figures import CHANNEL_FACTOR, ChannelFigure, RangeFigure, TensorFigure, bars

COLOURS = ("#0067b1", "#c94b00", "#00805a", "#a8387f", "#6a4fb3", "#8a6a00", "#3d4852", "#b3263a")
"""One per estimator, in turn; told apart in print by dashes too."""
DASHES = ("", "6 3", "2 2", "8 2 2 2")

WIDTH, LEFT, RIGHT = 960.0, 128.0, 660.0
"""Width of a drawing, and where its plot begins and ends; labels on the left, figures on the right."""
_TOP, _BASE = 16.0, 156.0
_LANES, _LANE = 184.0, 17.0
_STRIP = 110.0
_LABELLED = 6
"""Outlier channels that carry their number."""
_FLOOR = 0.25
"""Decades below one element: a bar of one must be seen."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to places in a drawing.

    Attributes:
        low: value at ``start``.
        high: value at ``end``; more than ``low``.
        start: place, in user units.
        end: place; may be less than ``start``, as upward axes are.
    """

    low: float
    high: float
    start: float
    end: float

    def position(self, value: float) -> float:
        """Return the place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 7) -> list[float]:
        """Return round values inside, about ``most`` of them: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(f for f in (1.0, 2.0, 5.0, 10.0) if f * power >= rough * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class Heights:
    """A logarithmic scale from numbers of elements to heights; one element is a little above the base."""

    most: int
    base: float
    top: float

    def position(self, count: int) -> float:
        """Return the place of a number of elements, at least 1."""
        share = (math.log10(count) + _FLOOR) / (math.log10(max(self.most, 10)) + _FLOOR)
        return self.base + share * (self.top - self.base)


def value_axis(figure: TensorFigure, start: float = LEFT, end: float = RIGHT) -> Axis:
    """Return the horizontal axis of a tensor's histogram."""
    return Axis(*figure.view, start, end)


def heights(figure: TensorFigure, base: float = _BASE, top: float = _TOP) -> Heights:
    """Return the vertical axis of a tensor's histogram."""
    return Heights(max([figure.tensor.zeros, 1, *(count for _, _, count in figure.bars)]), base, top)


def number(value: float) -> str:
    """Return a number for people: four digits."""
    return f"{value:.4g}"


def share(value: float) -> str:
    """Return a share as percent that does not round a little to nothing."""
    percent = 100.0 * value
    if value == 0 or percent >= 0.01:
        return f"{percent:.3g} %" if percent < 99.995 or value == 1 else "99.99 %"
    return "&lt; 0.01 %"


def _at(place: float) -> str:
    return f"{place:.2f}".rstrip("0").rstrip(".")


def _bars(drawn: Iterable[tuple[float, float, int]], across: Axis, up: Heights) -> str:
    """Return the path of all bars; each is at least half a unit wide."""
    parts = []
    base = _at(up.base)
    for left, right, count in drawn:
        start = across.position(left)
        end = max(across.position(right), start + 0.5)
        parts.append(f"M{_at(start)} {base}V{_at(up.position(count))}H{_at(end)}V{base}z")
    return "".join(parts)


# ---- histogram -----------------------------------------------------------------------------------------------------


def histogram(figure: TensorFigure, colours: Mapping[str, str]) -> str:
    """Draw the histogram with every estimator's range: counts on a logarithmic scale, one lane per range below it.

    Args:
        figure: the tensor.
        colours: by estimator.
    """
    across, up = value_axis(figure), heights(figure)
    bottom = _LANES + _LANE * len(figure.ranges)
    parts = [
        f'<svg class="histogram" viewBox="0 0 {_at(WIDTH)} {_at(bottom)}" role="img" '
        f"aria-label={quoteattr('histogram of ' + figure.name)}>",
        *_grid(across, up),
        f'<path class="bars" d="{_bars(figure.bars, across, up)}"/>',
        *_zeros(figure, across, up),
    ]
    for place, found in enumerate(figure.ranges):
        lane = _LANES + _LANE * place
        dash = DASHES[place % len(DASHES)]
        parts += _range(found, across, lane, colours[found.estimator], dash, found == figure.best)
    return "".join([*parts, "</svg>"])


def _grid(across: Axis, up: Heights) -> list[str]:
    parts = []
    decades = range(math.floor(math.log10(max(up.most, 10))) + 1)
    every = max(1, math.ceil(len(decades) / 5))
    for decade in decades[::every]:
        y = _at(up.position(10**decade))
        label = f"{10**decade:,}" if decade < 4 else f'10<tspan dy="-4" class="up">{decade}</tspan>'
        parts.append(f'<line class="grid" x1="{_at(across.start)}" x2="{_at(across.end)}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{_at(across.start - 6)}" y="{y}" dy="3.5" text-anchor="end">{label}</text>'
        )
    for value in across.ticks():
        x = _at(across.position(value))
        kind = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{_at(up.top)}" y2="{_at(up.base + 4)}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{_at(up.base + 16)}" text-anchor="middle">{number(value)}</text>')
    return parts


def _zeros(figure: TensorFigure, across: Axis, up: Heights) -> list[str]:
    """Draw exact zeros as a pin: they are in no bar."""
    if not figure.tensor.zeros:
        return []
    x, y = _at(across.position(0.0)), _at(up.position(figure.tensor.zeros))
    return [
        f'<line class="zeros" x1="{x}" x2="{x}" y1="{_at(up.base)}" y2="{y}"/><circle class="zeros" cx="{x}" cy="{y}" '
        f'r="3.5"><title>{figure.tensor.zeros:,} exact zeros, {share(figure.zero_share)}</title></circle>'
    ]


def _range(found: RangeFigure, across: Axis, lane: float, colour: str, dash: str, best: bool) -> list[str]:
    """Draw one estimator's range: two lines through the histogram, a bar in its lane, and figures beside it."""
    key = quoteattr(found.estimator)
    label = (
        f'<text class="label{" best" if best else ""}" x="{_at(across.start - 6)}" y="{_at(lane + 9)}" '
        f'text-anchor="end" style="fill:{colour}">{escape(found.estimator)}</text>'
    )
    if found.problem:
        return [label, f'<text class="tick" x="{_at(across.start)}" y="{_at(lane + 9)}">{escape(found.problem)}</text>']
    ends = [_at(across.position(v)) for v in (found.low, found.high)]
    style = f'stroke="{colour}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    lines = [
        f'<line class="range" data-estimator={key} data-end="{end}" x1="{x}" x2="{x}" y1="{_at(_TOP - 6)}" '
        f'y2="{_at(lane + 5)}" {style}/>'
        for end, x in zip(("low", "high"), ends, strict=True)
    ]
    width = max(across.position(found.high) - across.position(found.low), 1.0)
    bar = f'<rect class="lane" x="{ends[0]}" y="{_at(lane + 1)}" width="{_at(width)}" height="8" fill="{colour}"/>'
    cells = [
        (0.0, "start", f"{number(found.low)} … {number(found.high)}"),
        (226.0, "end", f"{share(found.clipped)} clipped" if found.clipped else ""),
        (276.0, "end", "" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"),
        (292.0, "end", "★" if best else ""),
    ]
    texts = [
        f'<text class="figures{" best" if best else ""}" x="{_at(across.end + 10 + x)}" y="{_at(lane + 9)}" '
        f'text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in cells
        if text
    ]
    return [*lines, bar, label, *texts]


# ---- channels ------------------------------------------------------------------------------------------------------


def channel_axes(channels: ChannelFigure) -> tuple[Axis, Axis]:
    """Return (channel number -> left end of its column, value -> height) of the drawing of extremes per channel."""
    low, high = min(0.0, float(channels.low.min())), max(0.0, float(channels.high.max()))
    room = 0.04 * (high - low) or 1.0
    return Axis(0.0, float(channels.low.size), LEFT, RIGHT), Axis(low - room, high + room, _STRIP - 18.0, 14.0)


def channel_strip(channels: ChannelFigure) -> str:
    """Draw smallest to largest value of every channel side by side, outlier channels in red with their number.

    Where there are more channels than places, neighbours share a column; an outlier keeps its own.
    """
    across, up = channel_axes(channels)
    parts = [
        f'<svg class="channels" viewBox="0 0 {_at(WIDTH)} {_at(_STRIP)}" role="img" aria-label="extremes per channel">'
    ]
    for value in up.ticks(4):
        y = _at(up.position(value))
        kind = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_at(LEFT)}" x2="{_at(RIGHT)}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{_at(LEFT - 6)}" y="{y}" dy="3.5" text-anchor="end">{number(value)}</text>'
        )
    for bound in (-CHANNEL_FACTOR * channels.median, CHANNEL_FACTOR * channels.median):
        if channels.median and up.low < bound < up.high:
            y = _at(up.position(bound))
            parts.append(f'<line class="bound" x1="{_at(LEFT)}" x2="{_at(RIGHT)}" y1="{y}" y2="{y}"/>')
    beyond = {channel for channel, _ in channels.outliers}
    parts.append(f'<path class="channel" d="{_columns(channels, across, up, beyond)}"/>')
    wide = max((RIGHT - LEFT) / channels.low.size, 2.0)
    for place, (channel, factor) in enumerate(channels.outliers):
        top, bottom = up.position(float(channels.high[channel])), up.position(float(channels.low[channel]))
        x = across.position(channel)
        parts.append(
            f'<rect class="outlier" data-channel="{channel}" x="{_at(x)}" y="{_at(top)}" width="{_at(wide)}" '
            f'height="{_at(max(bottom - top, 1.0))}"><title>channel {channel}: {factor:.1f} x the median</title></rect>'
        )
        if place < _LABELLED:
            late = x > RIGHT - 40
            parts.append(
                f'<text class="outlier" x="{_at(x - 2 if late else x + wide + 2)}" y="{_at(_label(top, bottom))}" '
                f'text-anchor="{"end" if late else "start"}">{channel}</text>'
            )
    parts.append(_legend(channels))
    return "".join([*parts, "</svg>"])


def _label(top: float, bottom: float) -> float:
    """Return where to write an outlier's number: at its far end."""
    middle = (14.0 + _STRIP - 18.0) / 2
    return max(top + 8.0, 9.0) if middle - top > bottom - middle else bottom


def _columns(channels: ChannelFigure, across: Axis, up: Axis, beyond: set[int]) -> str:
    """Return the path of all channels that are no outliers, at most one column per unit of width."""
    size = channels.low.size
    plain = np.array([c for c in range(size) if c not in beyond], np.int64)
    column = (plain * min(size, int(RIGHT - LEFT))) // size
    found, first = np.unique(column, return_index=True)
    if not found.size:
        return ""
    lows = np.minimum.reduceat(channels.low[plain], first)
    highs = np.maximum.reduceat(channels.high[plain], first)
    wide = (RIGHT - LEFT) / min(size, int(RIGHT - LEFT))
    parts = []
    for place, low, high in zip(found, lows, highs, strict=True):
        top, bottom = up.position(float(high)), up.position(float(low))
        x = across.start + int(place) * wide
        body = max(bottom - top, 0.6)
        parts.append(f"M{_at(x)} {_at(top)}h{_at(max(wide * 0.85, 0.6))}v{_at(body)}H{_at(x)}z")
    return "".join(parts)


def _legend(channels: ChannelFigure) -> str:
    lines = [f"{channels.low.size} channels, axis {channels.axis}"]
    if channels.outliers:
        worst, factor = channels.outliers[0]
        lines.append(f"{len(channels.outliers)} beyond {CHANNEL_FACTOR:g} × the median")
        lines.append(f"farthest: {worst}, {factor:.1f} × the median")
    else:
        lines.append("none is an outlier")
    texts = [
        f'<text class="figures" x="{_at(RIGHT + 8)}" y="{24 + 15 * i}">{line}</text>' for i, line in enumerate(lines)
    ]
    ends = (
        f'<text class="tick" x="{_at(LEFT)}" y="{_at(_STRIP - 3)}">0</text>'
        f'<text class="tick" x="{_at(RIGHT)}" y="{_at(_STRIP - 3)}" text-anchor="end">{channels.low.size - 1}</text>'
    )
    return "".join(texts) + ends


# ---- in lists ------------------------------------------------------------------------------------------------------

SPARK_WIDTH, SPARK_HEIGHT = 180.0, 30.0
_SPARK_BARS = 90


def spark(figure: TensorFigure, colours: Mapping[str, str]) -> str:
    """Draw a small histogram with one thin line per range below it."""
    base = SPARK_HEIGHT - 2.0 - 2.5 * len(figure.ranges)
    drawn = bars(figure.tensor, _SPARK_BARS)
    across = value_axis(figure, 0.0, SPARK_WIDTH)
    up = Heights(max([1, *(count for _, _, count in drawn)]), base, 1.0)
    zero = _at(across.position(0.0))
    parts = [
        f'<svg class="spark" viewBox="0 0 {_at(SPARK_WIDTH)} {_at(SPARK_HEIGHT)}" aria-hidden="true">',
        f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{_at(base)}"/>',
        f'<path class="bars" d="{_bars(drawn, across, up)}"/>',
    ]
    for place, found in enumerate(figure.ranges):
        if found.problem:
            continue
        start, end = across.position(found.low), across.position(found.high)
        parts.append(
            f'<rect x="{_at(start)}" y="{_at(base + 1.5 + 2.5 * place)}" width="{_at(max(end - start, 1.0))}" '
            f'height="1.8" fill="{colours[found.estimator]}"/>'
        )
    return "".join([*parts, "</svg>"])
