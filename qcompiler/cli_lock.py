"""``qcompiler lock``: one file that reproduces a build byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli_data import DataSettings, Images, Synthetic, Tokenizer, read_source_options
from qcompiler.cli_files import check_outputs
from qcompiler.cli_options import (
    SOURCE_HELP,
    Emit,
    Model,
    Quiet,
    RandomFeeds,
    ShapeRanges,
    Source,
    Target,
    Threads,
    load_metric,
    parse_shape_ranges,
)
from qcompiler.cli_progress import progress_lines


def lock_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.lock", help="The lock.")],
    compiled: Annotated[
        Path | None, typer.Option("--compiled", metavar="OUT", help="Write the compiled model, too.")
    ] = None,
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
        list[str] | None, typer.Option(metavar="B", help="A bound: drop<=0.5pt, drop<=1% or sqnr>=30.")
    ] = None,
    metric: Annotated[str | None, typer.Option(metavar="FILE.py:F", help="As for compile.")] = None,
    evaluation: Annotated[str | None, typer.Option(metavar="SRC", help=f"Feeds for the metric: {SOURCE_HELP}.")] = None,
    shapes: ShapeRanges = None,
    decisions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lock the decisions of an earlier build, without timing.")
    ] = None,
    emit: Annotated[Emit | None, typer.Option(help="Force one form of the output; chosen by default.")] = None,
    opset: Annotated[int | None, typer.Option(min=1, metavar="N", help="ONNX operator set of the output.")] = None,
    threads: Threads = None,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help="Measure speed and accuracy.")] = True,
    quiet: Quiet = False,
) -> None:
    """Compile, and write what reproduces the result byte for byte.

    The lock holds decisions and options, the versions of the compiler and its engine, and digests of the model, the
    calibration data (or statistics), recipe, overrides, target table and result. `compile --locked FILE.lock` repeats
    the build, and names everything that differs if it cannot.

    \b
    Examples:
      qcompiler lock model.onnx --calibration feeds.npz -o model.lock --compiled model.int8.onnx
      qcompiler lock model.onnx --calibration feeds.npz --decisions model.int8.decisions.json -o model.lock
      qcompiler compile model.onnx --calibration feeds.npz --locked model.lock -o model.int8.onnx
    """
    from qcompiler.compiled import decisions_path, staged_text
    from qcompiler.compiler import compile_model
    from qcompiler.explaining.lock import make_lock
    from qcompiler.options import Options

    record = None if compiled is None else decisions_path(compiled)
    written = {"lock": output, "compiled model": compiled, "decisions record": record if record != decisions else None}
    check_outputs(written, {"model": model, "override file": override})
    options = Options(
        target=target, recipe=recipe, calibration=calibration, overrides=override, budget=budget,
        metric=None if metric is None else load_metric(metric), evaluation=evaluation,
        shapes=parse_shape_ranges(shapes) or None, decisions=decisions, threads=threads, guard=guard,
        emit="auto" if emit is None else emit.value, random_calibration=random_calibration or 0, opset=opset,
        synthetic_calibration=synthetic or 0, sources=read_source_options(images, tokenizer, data),
    )  # fmt: skip
    with progress_lines(quiet) as progress:
        made = compile_model(str(model), replace(options, progress=progress))
        lock = make_lock(str(model), options, made)
        with staged_text(output, lock.to_json()):
            files = [] if compiled is None else list(made.save(compiled).files)
    if not quiet:
        print(f"locked {lock.output_bytes} bytes with digest {lock.output[:12]}, {len(lock.decisions.forms)} groups")
        for path in (*files, output):
            print(f"wrote {path}")
