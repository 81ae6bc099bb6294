"""Histograms of the evaluation page: float values, what the compiled model stores for them, and where it clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qcompiler.report.calibration_svg import Axis, Heights
from qcompiler.report.eval_page_figures import at, legend, svg

_WIDTH, _LEFT, _RIGHT, _TOP, _BASE = 560.0, 46.0, 548.0, 8.0, 132.0


@dataclass(frozen=True)
class ValueHistogram:
    """How the values of one tensor lie.

    Attributes:
        name: of the tensor.
        edges: ends of the bins, one more than bins.
        reference: float elements per bin.
        compiled: elements of the compiled model per bin.
        reach: ends of the stored range; None where it is not stored as integers.
        text: figures, one sentence.
    """

    name: str
    edges: tuple[float, ...]
    reference: tuple[int, ...]
    compiled: tuple[int, ...]
    reach: tuple[float, float] | None
    text: str


@dataclass(frozen=True)
class Histograms:
    """Histograms, two beside each other.

    Attributes:
        tensors: in the order to show them in.
        about: a sentence in front.
        title: heading.
    """

    tensors: tuple[ValueHistogram, ...]
    about: str = ""
    title: str = "Values of the worst tensors"

    def body(self) -> str:
        """Return the drawings."""
        about = f"<p>{escape(self.about)}</p>" if self.about else ""
        if not self.tensors:
            return f"{about}<p>No tensor is stored as integers under a name that float has.</p>"
        marks = legend(
            ("float", "float"),
            ("compiled", "compiled, as floats"),
            ("bad", "ends of the stored range: beyond is clipped"),
        )
        drawn = "".join(
            f"<figure><h3>{escape(t.name)}</h3>{_drawing(t)}<p>{escape(t.text)}</p></figure>" for t in self.tensors
        )
        return f'{about}{marks}<div class="pair">{drawn}</div>'


def _drawing(tensor: ValueHistogram) -> str:
    low, high = tensor.edges[0], tensor.edges[-1]
    across = Axis(low, high, _LEFT, _RIGHT)
    up = Heights(max(1, *tensor.reference, *tensor.compiled), _BASE, _TOP)
    parts = [
        f'<text class="tick" x="{at(across.position(t))}" y="{at(_BASE + 15)}" text-anchor="middle">{t:g}</text>'
        for t in across.ticks(7)
    ]
    parts += [
        f'<line class="grid" x1="{at(_LEFT)}" x2="{at(_RIGHT)}" y1="{at(y)}" y2="{at(y)}"/>'
        f'<text class="tick" x="{at(_LEFT - 6)}" y="{at(y + 4)}" text-anchor="end">{_power(power)}</text>'
        for power in range(0, math.floor(math.log10(max(up.most, 1))) + 1, 1 + (up.most > 10**5))
        for y in (up.position(10**power),)
    ]
    parts.append(f'<path class="float-values" d="{_bars(tensor.edges, tensor.reference, across, up)}"/>')
    parts.append(f'<path class="compiled-values" d="{_outline(tensor.edges, tensor.compiled, across, up)}"/>')
    for place, end in enumerate(tensor.reach or ()):
        if low <= end <= high:
            x = across.position(end)
            start, width = (_LEFT, x - _LEFT) if place == 0 else (x, _RIGHT - x)
            parts.append(
                f'<rect class="outside" x="{at(start)}" y="{at(_TOP)}" width="{at(width)}" '
                f'height="{at(_BASE - _TOP)}"/>'
                f'<line class="reach" x1="{at(x)}" x2="{at(x)}" y1="{at(_TOP)}" y2="{at(_BASE)}"/>'
            )
    parts.append(f'<line class="base" x1="{at(_LEFT)}" x2="{at(_RIGHT)}" y1="{at(_BASE)}" y2="{at(_BASE)}"/>')
    return svg(_WIDTH, _BASE + 20, parts, f"histogram of {tensor.name}", "values")


def _power(power: int) -> str:
    return f"{10**power}" if power < 4 else f"1e{power}"


def _bars(edges: Sequence[float], counts: Sequence[int], across: Axis, up: Heights) -> str:
    base = at(up.base)
    return "".join(
        f"M{at(across.position(edges[i]))} {base}V{at(up.position(n))}H{at(across.position(edges[i + 1]))}V{base}z"
        for i, n in enumerate(counts)
        if n
    )


def _outline(edges: Sequence[float], counts: Sequence[int], across: Axis, up: Heights) -> str:
    parts = [f"M{at(across.position(edges[0]))} {at(up.base)}"]
    for i, n in enumerate(counts):
        parts.append(f"V{at(up.position(n) if n else up.base)}H{at(across.position(edges[i + 1]))}")
    return "".join([*parts, f"V{at(up.base)}"])
