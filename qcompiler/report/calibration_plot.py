"""Draw calibration statistics: histograms with each estimator's range, outlier channels flagged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from qcompiler.calibration.container import replace_file
from qcompiler.calibration.statistics import Statistics
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec
from qcompiler.report.calibration_figures import DEFAULT_SPEC, figures
from qcompiler.report.calibration_page import page

PLOTTED = ("min-max", "percentile:99.99", "entropy", "mse")
"""Estimators that a picture compares by default."""


def plot_calibration(
    statistics: Statistics,
    path: str | Path,
    estimators: Sequence[str] = PLOTTED,
    names: Iterable[str] | None = None,
    spec: QuantSpec | None = None,
    most: int = 12,
) -> tuple[Path, ...]:
    """Draw tensors, the most outlying first.

    Args:
        statistics: what calibration kept.
        path: ``.html`` for one page with every tensor, sorted and searchable, that needs no network; ``.png`` for the
            most outlying tensors, six to a picture (needs the extra ``plot``).
        estimators: whose ranges to draw.
        names: which tensors; all by default.
        spec: what the ranges are quantized to; unsigned 8 bits by default.
        most: tensors that are drawn to ``.png``; those beyond six go to files with ``-2``, ``-3`` ... in their names.

    Returns:
        The files written.

    Raises:
        CalibrationError: another suffix, an unknown name or estimator, nothing observed, or the file cannot be written.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in (".html", ".htm", ".png"):
        raise CalibrationError(f"a picture is an .html or a .png file, not {target.name!r}")
    wanted = tuple(dict.fromkeys(estimators))
    chosen = None if names is None else list(dict.fromkeys(names))
    found = figures(statistics, wanted, chosen, spec)
    if suffix == ".png":
        from qcompiler.report.calibration_png import draw

        return draw(found[:most], target, wanted)
    silent = [n for n in (chosen if chosen is not None else statistics) if not statistics.observed(n)]
    replace_file(target, page(found, statistics, wanted, _spec_text(spec or DEFAULT_SPEC), silent).encode())
    return (target,)


def _spec_text(spec: QuantSpec) -> str:
    return f"{spec.format}{', symmetric' if spec.symmetric else ''}"
