"""The picture of a sensitivity: noise per group along program order, one panel per output; needs matplotlib."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.calibration.container import replace_file
from qcompiler.errors import CalibrationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from qcompiler.sensitivity_rows import Row

SUFFIXES = (".png", ".svg")
_MOST_OUTPUTS = 6
_MOST_LABELS = 60
_COLOURS = {"static": "#c4622d", "dynamic": "#2d6fa8"}


def draw_sensitivity(rows: Sequence[Row], outputs: Sequence[str], path: Path) -> None:
    """Draw the noise of every group along program order, the first outputs where there are many.

    Args:
        rows: what to draw.
        outputs: one panel each.
        path: a .png or .svg.

    Raises:
        CalibrationError: matplotlib is not installed, or the file has another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise CalibrationError(f"cannot draw {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CalibrationError("--plot needs matplotlib: pip install 'qcompiler[plot]', or use --json")
    import matplotlib as mpl

    data = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    # Same rows, same bytes: no date, and no random ids.
    with mpl.rc_context({"svg.hashsalt": "qcompiler"}):
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        sheet(rows, outputs[:_MOST_OUTPUTS]).savefig(data, format=kind, metadata=metadata)
    replace_file(path, data.getvalue())


def sheet(rows: Sequence[Row], outputs: Sequence[str]) -> Figure:
    """Return the figure: bars of SQNR alone, upwards the more noise there is."""
    from matplotlib.figure import Figure

    places = {row.place: row.group for row in rows}
    names = [places[place] for place in sorted(places)]
    width = min(24.0, max(7.0, 0.22 * len(names) + 2.0))
    labelled = len(names) <= _MOST_LABELS
    longest = max((len(_short(name)) for name in names), default=0) if labelled else 0
    count = max(1, len(outputs))
    figure = Figure(figsize=(width, 2.6 * count + 0.8 + 0.07 * longest), dpi=110, layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for place, output in enumerate(outputs):
        _panel(axes[place], rows, output, names)
    last = axes[-1]
    if labelled:
        last.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize=6.5)
    last.set_xlabel("fusion groups in program order", fontsize=8)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], output: str, names: Sequence[str]) -> None:
    place = {name: index for index, name in enumerate(names)}
    variants = list(dict.fromkeys(row.variant for row in sorted(rows, key=lambda row: row.variant, reverse=True)))
    # What adds nothing, or could not be measured, has no bar: its decibels stand for zero and for infinity.
    drawn = [row for row in rows if -200.0 < row.sqnr_db.get(output, 200.0) < 200.0]
    floor = max((row.sqnr_db[output] for row in drawn), default=0.0) + 3.0
    thick = 0.8 / max(1, len(variants))
    for index, variant in enumerate(variants):
        own = [row for row in drawn if row.variant == variant]
        axes.bar(
            [place[row.group] + (index - (len(variants) - 1) / 2) * thick for row in own],
            [row.sqnr_db[output] - floor for row in own],
            thick, bottom=floor, color=_COLOURS.get(variant, "#6a7a3a"), label=variant,
        )  # fmt: skip
    if drawn:
        axes.set_ylim(floor, min(row.sqnr_db[output] for row in drawn) - 3.0)
        axes.legend(fontsize=7, loc="best", framealpha=0.85)
    axes.set_ylabel("SQNR alone (dB)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_title(f"{_plain(output)}: higher bars add more noise", fontsize=9, loc="left", parse_math=False)


def _short(name: str) -> str:
    plain = _plain(name)
    return plain if len(plain) <= 36 else f"...{plain[-33:]}"


def _plain(text: str) -> str:
    """Return a name with every letter that the font may lack written as its code."""
    return text.encode("ascii", "backslashreplace").decode().replace("$", r"\$")
