"""``qcompiler sensitivity``: which groups the error comes from, before anything is decided."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli_data import DataSettings, Images, Synthetic, Tokenizer, read_source_options
from qcompiler.cli_files import check_outputs
from qcompiler.cli_options import (
    SOURCE_HELP,
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
from qcompiler.cli_show import stdout_console
from qcompiler.errors import CalibrationError


def sensitivity_command(
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
    evaluation: Annotated[
        str | None, typer.Option(metavar="SRC", help=f"Feeds to measure on without calibration: {SOURCE_HELP}.")
    ] = None,
    shapes: ShapeRanges = None,
    threads: Threads = None,
    evaluations: Annotated[
        float, typer.Option(min=1.0, metavar="N", help="Most work, in evaluations of the calibration set.")
    ] = 20.0,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="Rows to show; 0 for all.")] = 20,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all rows and points as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a .png or .svg: noise along program order, per output.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Show how much noise every fusion group adds to the outputs in every integer form, the largest share first.

    "alone" is the SQNR at the worst output if the group alone had the form, "share" its part of the noise of the whole
    variant (all static or all dynamic), "from" the quantized points it is made of: value:NAME is an activation that the
    group stores with calibrated scales, read:NAME a float that it reads with such, dynamic:NAME one that it reads with
    scales found at run time, weight:GROUP its integer weights. Nothing is timed and nothing is compiled.

    \b
    Examples:
      qcompiler sensitivity model.onnx --calibration feeds.npz
      qcompiler sensitivity model.onnx --calibration feeds.npz --top 0 --json noise.json --plot noise.png
    """
    from qcompiler.options import Options
    from qcompiler.report.sensitivity_plot import SUFFIXES, draw_sensitivity
    from qcompiler.sensitivity import sensitivity
    from qcompiler.sensitivity_rows import sensitivity_dict, sensitivity_rows, show_sensitivity

    if plot is not None and plot.suffix not in SUFFIXES:
        raise CalibrationError(f"cannot draw {plot}: expected a name that ends in {' or '.join(SUFFIXES)}")
    check_outputs({"JSON file": as_json, "plot": plot}, {"model": model})
    with progress_lines(quiet) as progress:
        options = Options(
            target=target, recipe=recipe, calibration=calibration, overrides=override, evaluation=evaluation,
            shapes=parse_shape_ranges(shapes) or None, threads=threads, progress=progress,
            random_calibration=random_calibration or 0, synthetic_calibration=synthetic or 0,
            sources=read_source_options(images, tokenizer, data),
        )  # fmt: skip
        found = sensitivity(str(model), options, budget=evaluations)
    if as_json is not None:
        as_json.write_text(json.dumps(sensitivity_dict(found), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw_sensitivity(sensitivity_rows(found), found.table.outputs, plot)
    if not quiet:
        show_sensitivity(found, stdout_console(), top)
        for path in (as_json, plot):
            if path is not None:
                print(f"wrote {path}")
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
