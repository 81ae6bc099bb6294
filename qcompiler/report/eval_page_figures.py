"""Drawings of the evaluation page: the latency waterfall, the error along the network, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qcompiler.report.calibration_svg import Axis
from qcompiler.search.quality import CEILING

WIDTH = 1180.0
MOST_STEPS = 18
"""Groups that a waterfall shows one by one; the others are one step."""
_LABEL, _FIGURES = 330.0, 110.0
_ROW = 22.0
_SHORT = 48
_TOO_GOOD = 100.0
"""SQNR in dB above which a layer adds nothing: drawn at the top of the plot."""


def at(place: float) -> str:
    """Return a coordinate as text."""
    return f"{place:.2f}".rstrip("0").rstrip(".")


def short(name: str, width: int = _SHORT) -> str:
    """Return a name that is cut in the middle if it is long."""
    half = (width - 3) // 2
    return name if len(name) <= width else f"{name[:half]}...{name[-half:]}"


def svg(width: float, height: float, parts: Sequence[str], label: str, kind: str) -> str:
    """Return a drawing that scales with the page."""
    inside = "\n".join(parts)
    return (
        f'<svg class="{kind}" viewBox="0 0 {at(width)} {at(height)}" role="img" aria-label="{escape(label)}">\n'
        f"{inside}\n</svg>"
    )


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Return a span with some room at both ends; never empty."""
    room = (high - low) * share or max(abs(high), 1.0) * share
    return low - room, high + room


def legend(*entries: tuple[str, str]) -> str:
    """Return a legend of (CSS variable, meaning)."""
    spans = "".join(f'<span><i style="background:var(--{name})"></i>{escape(text)}</span>' for name, text in entries)
    return f'<div class="legend">{spans}</div>'


# ---- waterfall ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one group changes: microseconds after - before, so below 0 is a gain."""

    name: str
    microseconds: float


@dataclass(frozen=True)
class Waterfall:
    """From the float model's latency, group by group, to the compiled model's.

    Attributes:
        before: microseconds per run of the float model.
        steps: what each group changes, in any order; what is left to ``after`` is a step of its own.
        after: microseconds per run of the compiled model.
        about: a sentence in front.
        title: heading.
    """

    before: float
    steps: tuple[Step, ...]
    after: float
    about: str = ""
    title: str = "Latency"

    def rows(self) -> tuple[Step, ...]:
        """Return the steps that are drawn: the largest, the largest gain first, and the others as one."""
        largest = sorted(self.steps, key=lambda s: -abs(s.microseconds))[:MOST_STEPS]
        shown = sorted(largest, key=lambda s: s.microseconds)
        others = len(self.steps) - len(shown)
        rest = self.after - self.before - sum(s.microseconds for s in shown)
        if others or abs(rest) > 1e-6 * max(self.before, 1e-9):
            shown.append(Step(f"{others} others" if others else "not of any group", rest))
        return tuple(shown)

    def body(self) -> str:
        """Return the drawing."""
        rows = self.rows()
        height = _ROW * (len(rows) + 2) + 34
        levels = [self.before]
        for step in rows:
            levels.append(levels[-1] + step.microseconds)
        across = Axis(min(0.0, *levels), 1.04 * max(*levels, self.after, 1e-9), _LABEL, WIDTH - _FIGURES)
        bottom = _ROW * (len(rows) + 2) + 6
        parts = [
            f'<line class="grid" x1="{at(x)}" x2="{at(x)}" y1="4" y2="{at(bottom)}"/>'
            f'<text class="tick" x="{at(x)}" y="{at(bottom + 14)}" text-anchor="middle">{tick:g}</text>'
            for tick in across.ticks(8)
            for x in (across.position(tick),)
        ]
        parts.append(
            f'<text class="axis-title" x="{at(WIDTH - _FIGURES)}" y="{at(bottom + 27)}" text-anchor="end">'
            "microseconds per run</text>"
        )
        zero = across.position(0.0)
        parts.append(self._bar(0, "float", zero, across.position(self.before), "bar-total", f"{self.before:,.1f}"))
        for number, step in enumerate(rows, 1):
            start, end = across.position(levels[number - 1]), across.position(levels[number])
            kind = "bar-gain" if step.microseconds <= 0 else "bar-loss"
            y = _ROW * number + 4
            parts.append(
                f'<line class="link" x1="{at(start)}" x2="{at(start)}" y1="{at(y - 4)}" y2="{at(y + _ROW - 6)}"/>'
            )
            text = f"{step.microseconds:+,.1f}"
            parts.append(self._bar(number, step.name, min(start, end), max(start, end), kind, text))
        end = across.position(self.after)
        parts.append(self._bar(len(rows) + 1, "compiled", zero, end, "bar-end", f"{self.after:,.1f}"))
        label = f"latency from {self.before:.1f} to {self.after:.1f} microseconds"
        about = f"<p>{escape(self.about)}</p>" if self.about else ""
        return f"{about}<figure>{svg(WIDTH, height, parts, label, 'waterfall')}</figure>"

    def _bar(self, row: int, name: str, start: float, end: float, kind: str, text: str) -> str:
        y = _ROW * row + 4
        width = max(end - start, 1.0)
        return (
            f'<g class="step"><title>{escape(name)}: {text} us</title>'
            f'<text x="{at(_LABEL - 10)}" y="{at(y + 13)}" text-anchor="end">{escape(short(name))}</text>'
            f'<rect class="{kind}" x="{at(start)}" y="{at(y + 1)}" width="{at(width)}" height="{at(_ROW - 6)}"/>'
            f'<text x="{at(start + width + 6)}" y="{at(y + 13)}">{text}</text></g>'
        )


# ---- error along the network ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPoint:
    """One layer: SQNR in dB of what is born there, and of its value with all that came before."""

    name: str
    born_db: float
    accumulated_db: float


@dataclass(frozen=True)
class LayerErrors:
    """Error born and accumulated along the network.

    Attributes:
        layers: in the order of the network.
        about: a sentence in front.
        key: of the table with a row per layer, which points link to; empty for none.
        title: heading.
    """

    layers: tuple[LayerPoint, ...]
    about: str = ""
    key: str = ""
    title: str = "Error along the network"

    def body(self) -> str:
        """Return the drawing."""
        about = f"<p>{escape(self.about)}</p>" if self.about else ""
        if not self.layers:
            return f"{about}<p>No layer was measured.</p>"
        marks = legend(
            ("born", "born: what the layer adds to exact inputs"),
            ("accumulated", "accumulated: its value against float, with all that came before"),
        )
        return f"{about}<figure>{marks}{self._drawing()}</figure>"

    def _drawing(self) -> str:
        left, right, top, base = 58.0, WIDTH - 16.0, 16.0, 286.0
        known = [d for p in self.layers for d in (p.born_db, p.accumulated_db) if -CEILING < d < _TOO_GOOD]
        low, high = padded(min(known, default=0.0), max(known, default=_TOO_GOOD))
        up = Axis(low, high, base, top)
        count = len(self.layers)
        places = [left + (i + 0.5) / count * (right - left) for i in range(count)]
        heights = [(up.position(_within(p.born_db, low, high)), up.position(_within(p.accumulated_db, low, high)))
                   for p in self.layers]  # fmt: skip
        parts = [
            f'<line class="grid" x1="{at(left)}" x2="{at(right)}" y1="{at(y)}" y2="{at(y)}"/>'
            f'<text class="tick" x="{at(left - 8)}" y="{at(y + 4)}" text-anchor="end">{tick:g}</text>'
            for tick in up.ticks(7)
            for y in (up.position(tick),)
        ]
        parts.append(
            f'<text class="axis-title" x="{at(left - 50)}" y="{at(top - 4)}">SQNR dB (higher is better)</text>'
        )
        points = " ".join(f"{at(x)},{at(y)}" for x, (_, y) in zip(places, heights, strict=True))
        parts.append(f'<polyline class="accumulated" points="{points}"/>')
        radius = at(max(1.8, min(4.5, 0.3 * (right - left) / count)))
        for number, (layer, x, (own, all_of)) in enumerate(zip(self.layers, places, heights, strict=True)):
            told = f"{layer.name}: born {_db(layer.born_db)}, accumulated {_db(layer.accumulated_db)}"
            dots = (
                f'<line class="stem" x1="{at(x)}" x2="{at(x)}" y1="{at(own)}" y2="{at(base)}"/>'
                f'<circle class="dot" cx="{at(x)}" cy="{at(all_of)}" r="{radius}"/>'
                f'<circle class="born" cx="{at(x)}" cy="{at(own)}" r="{radius}"/>'
            )
            inside = f"<title>{escape(told)}</title>{dots}"
            parts.append(f'<a href="#{escape(self.key)}-{number}">{inside}</a>' if self.key else f"<g>{inside}</g>")
        parts += self._labels(places, heights, (left, right))
        parts.append(f'<line class="base" x1="{at(left)}" x2="{at(right)}" y1="{at(base)}" y2="{at(base)}"/>')
        parts.append(f'<text class="axis-title" x="{at(right)}" y="{at(base + 16)}" text-anchor="end">'
                     f"{count} layers in the order of the network</text>")  # fmt: skip
        return svg(WIDTH, base + 24, parts, f"error born and accumulated in {count} layers", "layers")

    def _labels(
        self, places: Sequence[float], heights: Sequence[tuple[float, float]], span: tuple[float, float]
    ) -> list[str]:
        """Return the names of the layers in which most error is born."""
        order = sorted(range(len(self.layers)), key=lambda i: self.layers[i].born_db)[:3]
        made = []
        taken: list[tuple[float, float, float]] = []
        for i in order:
            if self.layers[i].born_db >= _TOO_GOOD:
                continue
            text = short(self.layers[i].name, 40)
            width = 6.6 * len(text)
            x = min(max(places[i], span[0] + width / 2), span[1] - width / 2)
            y = heights[i][0] + 17
            if any(abs(x - a) < (width + w) / 2 and abs(y - b) < 13 for a, b, w in taken):
                continue
            taken.append((x, y, width))
            made.append(f'<text class="halo" x="{at(x)}" y="{at(y)}" text-anchor="middle">{escape(text)}</text>')
        return made


def _within(db: float, low: float, high: float) -> float:
    return min(max(db, low), high)


def _db(db: float) -> str:
    return "exact" if db >= CEILING else "not finite" if db <= -CEILING else f"{db:.1f} dB"


# ---- Pareto ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParetoPoint:
    """One build: less of ``cost`` and more of ``quality`` is better."""

    name: str
    cost: float
    quality: float
    chosen: bool = False


@dataclass(frozen=True)
class Pareto:
    """Builds by cost and quality, and the front of those that no other one beats in both.

    Attributes:
        points: the builds.
        cost: what the first axis is, with its unit.
        quality: what the second axis is, with its unit.
        about: a sentence in front.
        title: heading.
    """

    points: tuple[ParetoPoint, ...]
    cost: str = "latency, microseconds"
    quality: str = "SQNR, dB"
    about: str = ""
    title: str = "Cost against quality"

    def front(self) -> tuple[ParetoPoint, ...]:
        """Return the points that no other one beats, by rising cost."""
        made: list[ParetoPoint] = []
        for point in sorted(self.points, key=lambda p: (p.cost, -p.quality)):
            if not made or point.quality > made[-1].quality:
                made.append(point)
        return tuple(made)

    def body(self) -> str:
        """Return the drawing and the points as text."""
        about = f"<p>{escape(self.about)}</p>" if self.about else ""
        finite = [p for p in self.points if math.isfinite(p.cost) and math.isfinite(p.quality)]
        if not finite:
            return f"{about}<p>No build was measured.</p>"
        front = Pareto(tuple(finite)).front()
        rows = "".join(
            f"<tr><td>{escape(p.name)}</td><td class=n>{p.cost:,.4g}</td><td class=n>{p.quality:.4g}</td>"
            f"<td>{', '.join(w for w, yes in (('front', p in front), ('chosen', p.chosen)) if yes)}</td></tr>"
            for p in sorted(finite, key=lambda p: p.cost)
        )
        table = (
            f"<table><thead><tr><th>build</th><th class=n>{escape(self.cost)}</th>"
            f"<th class=n>{escape(self.quality)}</th><th></th></tr></thead><tbody>{rows}</tbody></table>"
        )
        return f"{about}<figure>{self._drawing(finite, front)}</figure>{table}"

    def _drawing(self, points: Sequence[ParetoPoint], front: Sequence[ParetoPoint]) -> str:
        left, right, top, base = 64.0, WIDTH - 150.0, 18.0, 330.0
        across = Axis(*padded(min(p.cost for p in points), max(p.cost for p in points)), left, right)
        up = Axis(*padded(min(p.quality for p in points), max(p.quality for p in points)), base, top)
        parts = []
        for tick in up.ticks(7):
            y = at(up.position(tick))
            parts += [
                f'<line class="grid" x1="{at(left)}" x2="{at(right)}" y1="{y}" y2="{y}"/>',
                f'<text class="tick" x="{at(left - 8)}" y="{y}" dy="4" text-anchor="end">{tick:g}</text>',
            ]
        for tick in across.ticks(8):
            x = at(across.position(tick))
            parts += [
                f'<line class="grid" x1="{x}" x2="{x}" y1="{at(top)}" y2="{at(base)}"/>',
                f'<text class="tick" x="{x}" y="{at(base + 15)}" text-anchor="middle">{tick:g}</text>',
            ]
        stairs = []
        for number, p in enumerate(front):
            x, y = at(across.position(p.cost)), at(up.position(p.quality))
            stairs.append(f"M{x} {y}" if number == 0 else f"H{x}V{y}")
        parts.append(f'<path class="front" d="{"".join(stairs)}"/>')
        taken: list[tuple[float, float]] = []
        for p in sorted(points, key=lambda p: (not p.chosen, p.cost)):
            x, y = at(across.position(p.cost)), at(up.position(p.quality))
            drop = _free(across.position(p.cost), up.position(p.quality) + 4, taken)
            ring = f'<circle class="chosen" cx="{x}" cy="{y}" r="8.5"/>' if p.chosen else ""
            kind = "on-front" if p in front else "point"
            parts.append(
                f'<g class="build"><title>{escape(p.name)}: {p.cost:,.4g}, {p.quality:.4g}</title>{ring}'
                f'<circle class="{kind}" cx="{x}" cy="{y}" r="4.5"/>'
                f'<text class="halo" x="{x}" y="{at(drop)}" dx="11">{escape(short(p.name, 26))}</text></g>'
            )
        parts.append(f'<text class="axis-title" x="{at(right)}" y="{at(base + 31)}" text-anchor="end">'
                     f"{escape(self.cost)}</text>")  # fmt: skip
        parts.append(f'<text class="axis-title" x="8" y="{at(top - 6)}">{escape(self.quality)}</text>')
        return svg(WIDTH, base + 38, parts, f"{len(points)} builds by cost and quality", "pareto")


def _free(x: float, y: float, taken: list[tuple[float, float]]) -> float:
    """Return the height nearest to ``y`` at which a label at ``x`` covers no other one, and take it."""
    for drop in (0, -14, 14, -28, 28, -42, 42):
        if all(abs(x - a) > 150 or abs(y + drop - b) >= 13 for a, b in taken):
            y += drop
            break
    taken.append((x, y))
    return y
