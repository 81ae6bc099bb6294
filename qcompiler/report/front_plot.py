"""The picture of Pareto fronts as .png or .svg; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.container import replace_file
from qcompiler.errors import BudgetError
from qcompiler.search.front import Front
from qcompiler.search.quality import CEILING
from qcompiler.search.solution import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE, _CHOSEN, _FLOAT, _TEXT = "#2f6f9f", "#c4452d", "#6b7785", "#1c2530"
_UNITS = ((1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def plot_fronts(fronts: Sequence[Front], path: str | Path, chosen: Point | None = None, title: str = "") -> Path:
    """Draw fronts side by side: latency across (us, and as a share of float), SQNR in dB or bytes upwards.

    Args:
        fronts: one or more, each in a panel of its own.
        path: a ``.png`` or ``.svg`` file; the same fronts give the same bytes.
        chosen: the point to mark in every panel.
        title: a line above the panels, such as the model's name.

    Returns:
        The file written.

    Raises:
        BudgetError: another suffix, no front, or matplotlib is not installed.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise BudgetError(f"a picture of fronts is a .png or an .svg file, not {target.name!r}")
    if not fronts:
        raise BudgetError("there is no front to draw; expected at least one")
    if importlib.util.find_spec("matplotlib") is None:
        raise BudgetError("a picture of fronts needs matplotlib: pip install 'qcompiler[plot]'")
    import matplotlib

    data = io.BytesIO()
    # A fixed salt and no date: the same fronts give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "qcompiler", "svg.fonttype": "none"}):
        stamp = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
        sheet(fronts, chosen, title).savefig(data, format=suffix[1:], metadata=stamp)
    replace_file(target, data.getvalue())
    return target


def sheet(fronts: Sequence[Front], chosen: Point | None, title: str) -> Figure:
    """Return the figure, one panel per front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(fronts), 4.6), dpi=110, layout="constrained")
    for place, front in enumerate(fronts):
        _panel(figure.add_subplot(1, len(fronts), place + 1), front, chosen)
    if title:
        figure.suptitle(title.encode("ascii", "backslashreplace").decode(), color=_TEXT)
    return figure


def _panel(axes: Axes, front: Front, chosen: Point | None) -> None:
    """Draw one front, the all-float point and the chosen one."""
    everything = [*front.points, front.all_float, *([] if chosen is None else [chosen])]
    if front.against == "noise":
        top = _top(everything)
        heights = {id(p): min(p.worst_db, top) for p in everything}
        axes.set_ylabel("least SQNR over the outputs (dB)")
        if any(p.worst_db >= CEILING for p in everything):
            _exact_tick(axes, [p.worst_db for p in everything if p.worst_db < CEILING], top)
    else:
        scale, unit = next((s, u) for s, u in _UNITS if s == 1.0 or max(p.bytes for p in everything) >= s)
        heights = {id(p): p.bytes / scale for p in everything}
        axes.set_ylabel(f"size ({unit})")
    across = [p.cost_us for p in front.points]
    axes.plot(
        across, [heights[id(p)] for p in front.points], "o-", color=_LINE, markersize=4, linewidth=1.3, label="front"
    )
    float_ = front.all_float
    axes.plot([float_.cost_us], [heights[id(float_)]], "s", color=_FLOAT, markersize=7, label="all float")
    if chosen is not None:
        label = f"chosen: {chosen.cost_us:.4g} us, " + (
            _db(chosen) if front.against == "noise" else f"{heights[id(chosen)]:.4g} {unit}"
        )
        axes.plot(
            [chosen.cost_us], [heights[id(chosen)]], "*", color=_CHOSEN, markersize=15, markeredgecolor="white",
            label=label,
        )  # fmt: skip
    _dress(axes, float_.cost_us)


def _dress(axes: Axes, float_us: float) -> None:
    """Label the axes; above, latency as a share of all-float."""
    axes.set_xlabel("predicted latency (us)")
    axes.grid(color="#e3e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.margins(0.06)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, loc="best")
    if float_us > 0:

        def shared(us: npt.ArrayLike) -> npt.ArrayLike:
            return np.asarray(us, np.float64) / float_us

        def timed(part: npt.ArrayLike) -> npt.ArrayLike:
            return np.asarray(part, np.float64) * float_us

        above = axes.secondary_xaxis("top", functions=(shared, timed))
        above.set_xlabel("share of all float")


def _top(points: Sequence[Point]) -> float:
    """Return where points without noise are drawn: a little above the rest."""
    finite = [p.worst_db for p in points if p.worst_db < CEILING]
    if not finite:
        return CEILING
    return max(finite) + max(3.0, 0.15 * (max(finite) - min(finite))) if len(finite) < len(points) else max(finite)


def _exact_tick(axes: Axes, finite: Sequence[float], top: float) -> None:
    """Mark the height of points without noise by a word: no number of dB is true of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    inner = [t for t in MaxNLocator(6).tick_values(min(finite), max(finite)) if t <= max(finite)] if finite else []
    axes.yaxis.set_major_locator(FixedLocator([*inner, top]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "exact" if y == top else f"{y:g}"))


def _db(point: Point) -> str:
    return "exact" if point.worst_db >= CEILING else f"{point.worst_db:.1f} dB"
