"""``qcompiler compile``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from qcompiler.cli_files import check_new_folder, check_outputs
from qcompiler.cli_options import (
    SOURCE_HELP,
    Emit,
    Goal,
    Links,
    Models,
    Quiet,
    RandomFeeds,
    SavedAs,
    ShapeRanges,
    Sources,
    Target,
    Threads,
    check_decibels,
    load_metric,
    parse_shape_ranges,
)
from qcompiler.cli_progress import progress_lines
from qcompiler.cli_show import show_report, stdout_console
from qcompiler.cli_together import Request, compile_several, only
from qcompiler.errors import CalibrationError, PassError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcompiler.calibration.source_options import SourceOptions
    from qcompiler.compiled import CompiledModel
    from qcompiler.options import Objective


def compile_command(
    models: Models,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The compiled model; of several models a folder.")
    ],
    target: Target = "host",
    recipe: Annotated[str, typer.Option(help="int8, int8-static, int8-dynamic, or the path of a .toml.")] = "int8",
    calibration: Sources = None,
    synthetic: Synthetic = None,
    random_calibration: RandomFeeds = None,
    images: Images = None,
    tokenizer: Tokenizer = None,
    data: DataSettings = None,
    memory: Memory = None,
    executor: ExecutorName = None,
    scheduler: Scheduler = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A .toml with [[override]] rows: match (glob), form, estimator."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B",
            help="A bound: drop<=0.5pt, drop<=1%, sqnr>=30, bytes<=4MB, bits<=4.65, latency<=3ms or latency<=60% (of "
            "float's); may be repeated.",
        ),
    ] = None,
    objective: Annotated[
        Goal | None, typer.Option(help="What to make small within the budgets; latency by default.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py:F", help="F(outputs, feeds) -> float over the evaluation feeds."),
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(metavar="SRC", help=f"Feeds for the metric: {SOURCE_HELP}.")
    ] = None,
    shapes: ShapeRanges = None,
    link: Links = None,
    save_as: Annotated[
        SavedAs | None,
        typer.Option(help="Of several models: kind of the files; ONNX with one weights file, or what the target runs."),
    ] = None,
    min_sqnr: Annotated[float | None, typer.Option(metavar="DB", help="Least SQNR of every output in dB.")] = None,
    decisions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Repeat the decisions of an earlier build without timing.")
    ] = None,
    locked: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Repeat the build that this lock is of, byte for byte (see: lock)."),
    ] = None,
    emit: Annotated[Emit | None, typer.Option(help="Force one form of the output; chosen by default.")] = None,
    opset: Annotated[int | None, typer.Option(min=1, metavar="N", help="ONNX operator set of the output.")] = None,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Write what every pass did.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the whole report.")] = None,
    threads: Threads = None,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help="Measure speed and accuracy; undo losses.")] = True,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time every form here; off: costs from a table that ships.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Compile a float or QDQ model into a smaller, faster one, and prove it.

    What loses speed or accuracy goes back to float. The decisions record OUT.decisions.json is written beside OUT;
    give it to --decisions to get the same bytes again without timing.

    Several models (encoder and decoder, plain and cached decoder) are compiled together: weights that they share are
    quantized alike and stored once, in one file. OUT is then a folder with NAME.onnx of each model, NAME being its
    file's name without the suffix, and decisions.json. --calibration, --evaluation, --metric, --budget, --override and
    --shapes take NAME=VALUE for one of them; a bare VALUE is for all.

    \b
    Examples:
      qcompiler compile model.onnx -o model.int8.onnx --calibration feeds.npz
      qcompiler compile model.onnx -o out.onnx --calibration data.py:feeds --budget "sqnr>=30" --report out.json
      qcompiler compile model.onnx -o out.onnx --calibration c.npz --evaluation e.npz \\
          --metric score.py:top1 --budget "drop<=0.5pt"
      qcompiler compile model.onnx -o small.onnx --calibration feeds.npz --objective bytes --budget "sqnr>=25"
      qcompiler compile model.onnx -o again.onnx --calibration feeds.npz --decisions model.int8.decisions.json
      qcompiler compile model.onnx -o model.plan --target tensorrt-sm89 --calibration feeds.npz \\
          --shapes x:1x3x224x224..8x3x224x224
      qcompiler compile decoder.onnx decoder_with_past.onnx -o out/ -c decoder=plain.npz -c decoder_with_past=cached.npz
      qcompiler compile encoder.onnx decoder.onnx -o out/ -c encoder=audio.npz -c decoder=tokens.npz \\
          --link decoder.encoder_hidden_states=encoder.last_hidden_state
    """
    check_decibels(min_sqnr)
    if sum(bool(given) for given in (calibration, synthetic, random_calibration)) > 1:
        raise CalibrationError("give one of --calibration, --synthetic and --random-calibration")
    request = Request(
        target, recipe, calibration, synthetic or 0, random_calibration or 0,
        read_source_options(images, tokenizer, data), parse_memory(memory), executor, scheduler, override, budget,
        metric, evaluation, shapes, min_sqnr, decisions, "auto" if emit is None else emit.value, opset, dump, report,
        threads, guard, quiet, _objective(objective), measure,
    )  # fmt: skip
    if len(models) > 1:
        if locked is not None:
            raise PassError("a lock is of one graph: give --decisions FILE for several models")
        compile_several(models, output, request, link or (), None if save_as is None else save_as.value)
        return
    if link:
        raise CalibrationError("--link joins several models; give them all")
    if save_as is not None:
        raise PassError("--save-as is for several models; of one model the suffix of -o says it")
    _compile_one(models[0], output, request, locked)


def _objective(goal: Goal | None) -> Objective:
    return "bytes" if goal is Goal.BYTES else "latency"


def _compile_one(model: Path, output: Path, request: Request, locked: Path | None) -> None:
    """Compile one model into one file."""
    from qcompiler.compiled import decisions_path

    calibration, evaluation = only(request.calibration, "--calibration"), only(request.evaluation, "--evaluation")
    override, metric = only(request.override, "--override"), only(request.metric, "--metric")
    rows = None if override is None else Path(override)
    check_outputs({"output": output}, {"model": model})
    record = decisions_path(output)
    check_outputs(
        {
            "output": output,
            "decisions record": record if record != request.decisions else None,
            "report": request.report,
        },
        {"model": model, "override file": rows},
    )
    check_new_folder(request.dump, "the dump")
    score = None if metric is None else load_metric(metric)
    lengths = parse_shape_ranges(request.shapes)

    from qcompiler.api import compile as compile_api
    from qcompiler.results import write_results

    with progress_lines(request.quiet) as progress:
        if locked is not None:
            compiled = _locked(
                model, locked, request.recipe, calibration, rows, request.dump, request.sources, progress
            )  # fmt: skip
        else:
            compiled = compile_api(
                str(model), target=request.target, recipe=request.recipe, calibration=calibration, overrides=override,
                budget=request.budget, metric=score, evaluation=evaluation, shapes=lengths or None,
                decisions=request.decisions, dump=request.dump, threads=request.threads, guard=request.guard,
                emit=request.emit, min_sqnr=request.min_sqnr, random_calibration=request.random, opset=request.opset,
                progress=progress, synthetic_calibration=request.synthetic, sources=request.sources,
                calibration_memory=request.memory, executor=request.executor, scheduler=request.scheduler,
                objective=request.objective, measure=request.measure,
            )  # fmt: skip
        written = write_results(compiled, output, request.report)
    if request.quiet:
        for warning in compiled.report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if written.note:
            print(written.note, file=sys.stderr)
        return
    files = [*written.files, *([request.dump] if request.dump else [])]
    show_report(compiled.report, stdout_console(), f"{model} -> {output}", files)
    if written.note:
        print(written.note)


def _locked(
    model: Path, lock: Path, recipe: str, calibration: str | None, override: Path | None, dump: Path | None,
    sources: SourceOptions, progress: Callable[[str], None] | None,
) -> CompiledModel:  # fmt: skip
    """Repeat a locked build; target, recipe and all settings are the lock's; the user's own files are given."""
    from qcompiler.explaining.lock import compile_locked, read_lock
    from qcompiler.options import Options

    given = Options(
        recipe=recipe, calibration=calibration, overrides=override, dump=dump, sources=sources, progress=progress
    )
    return compile_locked(str(model), read_lock(lock), given)
