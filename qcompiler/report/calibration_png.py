"""The picture of a calibration as PNG files, six tensors each; only here is matplotlib imported."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.calibration.container import replace_file
from qcompiler.errors import CalibrationError
from qcompiler.report.calibration_figures import CHANNEL_FACTOR, TensorFigure
from qcompiler.report.calibration_page import colours
from qcompiler.report.calibration_svg import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_FILE = 6
_COLUMNS = 2
_DASHES = ("-", (0, (6, 3)), (0, (1.5, 1.5)), "-.")


def draw(found: Sequence[TensorFigure], path: Path, estimators: Sequence[str]) -> tuple[Path, ...]:
    """Draw tensors, `PER_FILE` to a file: ``FILE.png``, ``FILE-2.png`` ...

    Args:
        found: the tensors, in the order to draw them in.
        path: the first file.
        estimators: whose ranges are drawn.

    Returns:
        The files written.

    Raises:
        CalibrationError: matplotlib is not installed, or a file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise CalibrationError(
            "a .png needs matplotlib: pip install 'qcompiler[plot]', or name an .html file, which needs nothing"
        )
    written = []
    for place, first in enumerate(range(0, len(found), PER_FILE)):
        target = path if place == 0 else path.with_name(f"{path.stem}-{place + 1}{path.suffix}")
        data = io.BytesIO()
        sheet(found[first : first + PER_FILE], estimators).savefig(data, format="png", metadata={"Software": None})
        replace_file(target, data.getvalue())
        written.append(target)
    return tuple(written)


def sheet(found: Sequence[TensorFigure], estimators: Sequence[str]) -> Figure:
    """Return one sheet: per tensor its histogram with the ranges, and below it the extremes per channel if known."""
    from matplotlib.figure import Figure

    palette = colours(estimators)
    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(7.5 * columns, 3.9 * rows + 0.4), dpi=110, layout="constrained")
    grids = figure.add_gridspec(rows, columns)
    for place, tensor in enumerate(found):
        cell = grids[place // columns, place % columns]
        if tensor.channels is None:
            _histogram(figure.add_subplot(cell), tensor, palette)
            continue
        parts = cell.subgridspec(2, 1, height_ratios=(3, 1))
        _histogram(figure.add_subplot(parts[0, 0]), tensor, palette)
        _channels(figure.add_subplot(parts[1, 0]), tensor)
    return figure


def _plain(text: str) -> str:
    """Return a name with every letter that the font may lack written as its code."""
    return text.encode("ascii", "backslashreplace").decode()


def _histogram(axes: Axes, tensor: TensorFigure, palette: dict[str, str]) -> None:
    lefts, rights, counts = zip(*tensor.bars, strict=True) if tensor.bars else ((), (), ())
    widths = [b - a for a, b in zip(lefts, rights, strict=True)]
    axes.bar(lefts, counts, widths, align="edge", color="#8fa3b8", linewidth=0)
    if tensor.tensor.zeros:
        axes.vlines(0.0, 0.5, tensor.tensor.zeros, color="#1c2530", linewidth=1.2)
        axes.plot([0.0], [tensor.tensor.zeros], "o", mfc="white", mec="#1c2530", markersize=5)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_xlim(*tensor.view)
    for place, found in enumerate(tensor.ranges):
        if found.problem:
            continue
        label = f"{found.estimator}  {number(found.low)} ... {number(found.high)}"
        label += "" if found.sqnr_db is None else f"  {found.sqnr_db:.1f} dB{' *' if found == tensor.best else ''}"
        for end, text in ((found.low, label), (found.high, None)):
            axes.axvline(
                end, color=palette[found.estimator], linestyle=_DASHES[place % len(_DASHES)], linewidth=1.3, label=text
            )
    axes.legend(fontsize=7, loc="upper right", framealpha=0.85)
    axes.tick_params(labelsize=7)
    title = (
        f"{_plain(tensor.name)[-70:]}\noutlier ratio {tensor.outlier_ratio:.3g}, {100 * tensor.zero_share:.3g} % zeros"
    )
    axes.set_title(title, fontsize=8.5, loc="left", parse_math=False)


def _channels(axes: Axes, tensor: TensorFigure) -> None:
    channels = tensor.channels
    assert channels is not None
    beyond = [channel for channel, _ in channels.outliers]
    plain = [c for c in range(channels.low.size) if c not in set(beyond)]
    for numbers, colour in ((plain, "#7f97ae"), (beyond, "#c4122f")):
        axes.vlines(numbers, channels.low[numbers], channels.high[numbers], color=colour, linewidth=1.0)
    for channel in beyond[:6]:
        axes.annotate(str(channel), (channel, float(channels.high[channel])), fontsize=7, color="#c4122f")
    bound = CHANNEL_FACTOR * channels.median
    if beyond:
        for value in (-bound, bound):
            axes.axhline(value, color="#c4122f", linestyle="--", linewidth=0.7)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(
        f"channel (axis {channels.axis}); {len(beyond)} of {channels.low.size} beyond {CHANNEL_FACTOR:g} x the median",
        fontsize=7,
    )
