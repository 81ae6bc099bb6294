"""``qcompiler explore``: what accuracy and size cost in time, before a budget is set."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from qcompiler.cli_data import DataSettings, Images, Synthetic, Tokenizer, read_source_options
from qcompiler.cli_files import check_outputs
from qcompiler.cli_options import (
    Model,
    Quiet,
    RandomFeeds,
    ShapeRanges,
    Source,
    Target,
    Threads,
    parse_shape_ranges,
)
from qcompiler.cli_progress import progress_lines
from qcompiler.cli_show import show_report, stdout_console
from qcompiler.errors import BudgetError

if TYPE_CHECKING:
    from qcompiler.exploring import Exploration
    from qcompiler.search.front import Against

_PICTURES = (".png", ".svg")


class Weighed(StrEnum):
    """What latency is weighed against."""

    NOISE = "noise"
    BYTES = "bytes"


def explore_command(
    model: Model,
    target: Target = "host",
    recipe: Annotated[str, typer.Option(help="int8, int8-static, int8-dynamic, or the path of a .toml.")] = "int8",
    calibration: Source = None,
    synthetic: Synthetic = None,
    random_calibration: RandomFeeds = None,
    images: Images = None,
    tokenizer: Tokenizer = None,
    data: DataSettings = None,
    override: Annotated[Path | None, typer.Option(metavar="FILE", help="A .toml with [[override]] rows.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="B", help="A bound that every point holds, like bytes<=4MB or sqnr>=25; may be repeated."),
    ] = None,
    against: Annotated[
        Weighed | None, typer.Option(help="One front alone; by default one against noise and one against bytes.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, max=100, metavar="N", help="Points tried per front.")] = 16,
    shapes: ShapeRanges = None,
    threads: Threads = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time every form here; off: costs from a table that ships.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the fronts as a .png or .svg.")] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every point with its forms as JSON.")
    ] = None,
    build: Annotated[int | None, typer.Option(min=1, metavar="N", help="Compile the point of this number.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="Where --build writes.")] = None,
    quiet: Quiet = False,
) -> None:
    """Show what accuracy and size cost in time: the choices of forms that nothing beats.

    Costs, noise and bytes are those that compile plans with, measured in the same way; the points are predictions, and
    --build proves the one it compiles. "*" marks the point that compile starts from.

    \b
    Examples:
      qcompiler explore model.onnx --calibration feeds.npz
      qcompiler explore model.onnx --calibration feeds.npz --plot front.png --json front.json
      qcompiler explore model.onnx --calibration feeds.npz --against bytes --budget "sqnr>=25"
      qcompiler explore model.onnx --calibration feeds.npz --build 3 -o model.int8.onnx
    """
    from qcompiler.exploring import FRONTS, Explorer
    from qcompiler.options import Options
    from qcompiler.results import plain_json, write_results

    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise BudgetError(f"cannot draw {plot}: expected a name that ends in {' or '.join(_PICTURES)}")
    if (build is None) != (output is None):
        raise BudgetError("--build N and -o OUT go together: the point to compile, and where it goes")
    check_outputs({"JSON file": as_json, "plot": plot, "output": output}, {"model": model})
    weighed: tuple[Against, ...] = FRONTS if against is None else (against.value,)
    with progress_lines(quiet) as progress:
        options = Options(
            target=target, recipe=recipe, calibration=calibration, overrides=override, budget=budget,
            shapes=parse_shape_ranges(shapes) or None, threads=threads, progress=progress, measure=measure,
            random_calibration=random_calibration or 0, synthetic_calibration=synthetic or 0,
            sources=read_source_options(images, tokenizer, data),
        )  # fmt: skip
        explorer = Explorer(str(model), options)
        found = explorer.explore(weighed, points)
        if build is not None and build > len(found.points):
            raise BudgetError(f"there is no point {build}: the fronts have points 1 to {len(found.points)}")
        made = explorer.build(found.points[build - 1]) if build is not None else None
        if as_json is not None:
            as_json.write_text(plain_json(found.to_dict()), encoding="utf-8")
        if plot is not None:
            from qcompiler.report.front_plot import plot_fronts

            plot_fronts(found.fronts, plot, found.chosen, model.stem)
        written = write_results(made, output) if made is not None and output is not None else None
    if not quiet:
        stdout_console().print(_table(found))
        for path in (as_json, plot):
            if path is not None:
                print(f"wrote {path}")
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if made is not None and written is not None and not quiet:
        show_report(made.report, stdout_console(), f"{model} -> {output}, point {build}", written.files)


def _table(found: Exploration) -> Table:
    """Return the points as a table, float last."""
    noisy = any(front.against == "noise" for front in found.fronts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("point", "latency us", "speed", *(["SQNR dB"] if noisy else []), "kB", "bits"):
        table.add_column(name, justify="right")
    table.add_column("forms")
    for number in range(1, len(found.points) + 1):
        row = found.row(number)
        decibels = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        speed = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        table.add_row(
            f"{'*' if row['chosen'] else ''}{number}", f"{row['latency_us']:.1f}", speed,
            *([decibels] if noisy else []), f"{row['bytes'] / 1000:.1f}", f"{row['bits']:.2f}",
            ", ".join(f"{count} {form}" for form, count in row["forms"].items()),
        )  # fmt: skip
    plain = found.float_point
    table.add_row(
        "float", f"{plain.cost_us:.1f}", "1.00x", *(["exact"] if noisy else []), f"{plain.bytes / 1000:.1f}",
        f"{plain.bits:.2f}", "",
    )  # fmt: skip
    return table
