"""``qcompiler calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from qcompiler.cli_data import (
    DataSettings,
    ExecutorName,
    Images,
    Memory,
    Scheduler,
    Synthetic,
    Tokenizer,
    parse_memory,
    read_source_options,
)
from qcompiler.cli_files import check_outputs
from qcompiler.cli_options import Model, Quiet, Shapes, Source, parse_shapes
from qcompiler.cli_progress import progress_feeds
from qcompiler.cli_show import stdout_console
from qcompiler.errors import CalibrationError

if TYPE_CHECKING:
    from qcompiler.calibration.statistics import Statistics
    from qcompiler.calibrator import Calibration

_SHOWN = 10
_PLOTS = (".html", ".png")
_EXPORTS = (".cache", ".json")


def calibrate_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.qcal", help="The statistics.")],
    calibration: Source = None,
    synthetic: Synthetic = None,
    estimator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="E",
            help="A range estimator to show: min-max, moving-average, percentile:99.99, entropy, mse, "
            "sqnr, std; may be repeated.",
        ),
    ] = None,
    memory: Memory = None,
    executor: ExecutorName = None,
    scheduler: Scheduler = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")] = False,
    until_stable: Annotated[
        bool, typer.Option("--until-stable", help="Stop as soon as more feeds no longer move the ranges (by 1 %).")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw histograms, ranges and outlier channels, as .html or .png."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write ranges of the first estimator: TensorRT's .cache or a .json."),
    ] = None,
    images: Images = None,
    tokenizer: Tokenizer = None,
    data: DataSettings = None,
    shapes: Shapes = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads inside one operator.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Gather calibration statistics once, for any target, recipe and estimator.

    One pass of bounded memory over the feeds; Ctrl-C leaves OUT.qcal.partial, from which --resume goes on. If OUT.qcal
    is there and the model, the data and the engine are the same, nothing runs.

    \b
    Examples:
      qcompiler calibrate model.onnx --calibration feeds.npz -o stats.qcal --plot stats.html
      qcompiler calibrate model.onnx --calibration photos/ --image size=224 --image mean=0.485,0.456,0.406 -o s.qcal
      qcompiler calibrate model.onnx --calibration lines.txt --tokenizer tokenizer.json -o stats.qcal
      qcompiler calibrate model.onnx --calibration feeds.py:feeds -o s.qcal --executor dask --scheduler tcp://host:8786
      qcompiler compile model.onnx -o model.int8.onnx --calibration stats.qcal --evaluation eval.npz
    """
    if (calibration is None) == (synthetic is None):
        raise CalibrationError("give either --calibration SRC or --synthetic N")
    if output.suffix != ".qcal":
        raise CalibrationError(f"the output is {output}; expected a name that ends in .qcal")
    for path, known in ((plot, _PLOTS), (export, _EXPORTS)):
        if path is not None and path.suffix not in known:
            raise CalibrationError(f"cannot write {path}: expected a name that ends in {' or '.join(known)}")
    check_outputs({"output": output, "plot": plot, "export": export}, {"model": model})
    sources = read_source_options(images, tokenizer, data)
    lengths, size = parse_shapes(shapes), parse_memory(memory)

    from qcompiler.calibrator import DEFAULT_ESTIMATORS, CalibrationOptions, calibrate_model

    estimators = tuple(estimator) if estimator else DEFAULT_ESTIMATORS
    with progress_feeds(quiet) as progress:
        options = CalibrationOptions(
            estimators, size, executor, scheduler, threads, lengths or None, sources, synthetic or 0,
            until_stable=0.01 if until_stable else None, output=output, resume=resume, progress=progress,
        )  # fmt: skip
        try:
            done = calibrate_model(str(model), calibration, options)
        except KeyboardInterrupt:
            typer.echo(f"interrupted; {output}.partial holds what was seen: go on with --resume", err=True)
            raise typer.Exit(130) from None
    written = [output, *_further(done.statistics, estimators, plot, export)]
    if not quiet:
        _show(done, estimators, written)


def _further(statistics: Statistics, estimators: tuple[str, ...], plot: Path | None, export: Path | None) -> list[Path]:
    written: list[Path] = []
    if plot is not None:
        from qcompiler.report.calibration_plot import plot_calibration

        written += plot_calibration(statistics, plot, estimators=estimators)
    if export is not None:
        from qcompiler.calibration.exchange import write_onnxruntime, write_tensorrt

        write = write_tensorrt if export.suffix == ".cache" else write_onnxruntime
        write(statistics, export, estimators[0])
        written.append(export)
    return written


def _show(done: Calibration, estimators: tuple[str, ...], written: list[Path]) -> None:
    console = stdout_console()
    statistics = done.statistics
    seen = [n for n in statistics if statistics.observed(n)]
    elements = sum(statistics.tensors[n].count for n in seen)
    first = "still valid, nothing ran: " if done.reused else ""
    console.print(f"{first}{statistics.feeds} feeds, {len(seen)} tensors, {elements:,} numbers")
    if missing := [n for n in statistics if not statistics.observed(n)]:
        console.print(Text(f"never executed, so they stay float: {len(missing)}, such as {missing[0]}"))
    if done.stopped:
        console.print("the ranges were stable before the feeds ended")
    if statistics.synthetic:
        console.print(Text(f"synthetic data: {statistics.synthetic}"))
    for note in done.notes:
        console.print(Text(f"note: {note}"))
    moved = statistics.movement()
    grown = sorted(moved, key=lambda n: -moved[n])
    if grown and moved[grown[0]] > 0:
        many = sum(share > 0.01 for share in moved.values())
        console.print(
            Text(f"over the last tenth of the feeds {many} ranges grew by more than 1 %, most {grown[0]} by "
                 f"{moved[grown[0]]:.1%}")
        )  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("most outlying tensors", "reach / rms", *estimators):
        table.add_column(name, justify="left" if name.startswith("most") else "right", overflow="fold")
    for name in sorted(seen, key=lambda n: -_peak(statistics, n))[:_SHOWN]:
        ranges = (statistics.range(name, e) for e in estimators)
        table.add_row(Text(name), f"{_peak(statistics, name):.1f}", *(f"{lo:.4g} .. {hi:.4g}" for lo, hi in ranges))
    console.print(table)
    for path in written:
        console.print(Text(f"wrote {path}"))


def _peak(statistics: Statistics, name: str) -> float:
    """Return the largest magnitude over the root mean square: large where a few outliers stretch the range."""
    tensor = statistics.tensors[name]
    power = tensor.mean_square
    return max(-tensor.minimum, tensor.maximum) / power**0.5 if power > 0 else 0.0
