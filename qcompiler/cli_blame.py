"""``qcompiler blame``: where the error of a compiled model is born, and how to mend it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli_data import DataSettings, Images, Tokenizer, read_source_options
from qcompiler.cli_files import check_outputs
from qcompiler.cli_options import SOURCE_HELP, Model, Quiet, Shapes, load_metric, parse_shapes
from qcompiler.cli_progress import progress_lines
from qcompiler.cli_show import stdout_console
from qcompiler.errors import PassError


def blame_command(
    model: Model,
    compiled: Annotated[Path, typer.Argument(metavar="COMPILED", help="The quantized model.", show_default=False)],
    evaluation: Annotated[str, typer.Option(metavar="SRC", help=f"Feeds to measure on: {SOURCE_HELP}.")],
    metric: Annotated[
        str | None, typer.Option(metavar="FILE.py:F", help="F(outputs, feeds) -> float that --apply restores.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(metavar="B", help="What --apply reaches: drop<=0.5pt, drop<=1% or sqnr>=30.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="SRC", help="Data or .qcal to find ranges anew with; else they are kept.")
    ] = None,
    decisions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The decisions record, if not beside COMPILED.")
    ] = None,
    feeds: Annotated[int, typer.Option(min=1, metavar="N", help="Feeds to measure on at most.")] = 8,
    images: Images = None,
    tokenizer: Tokenizer = None,
    data: DataSettings = None,
    shapes: Shapes = None,
    apply: Annotated[bool, typer.Option("--apply", help="Recompile with overrides until the bounds hold.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="With --apply: the model.")
    ] = None,
    override: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="With --apply: write the overrides there, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: all places, nothing cut.")] = False,
    quiet: Quiet = False,
) -> None:
    """Rank the places of a quantized model by the error that is born there.

    "own" is the error that a place adds to exact inputs, "alone" what is left of the outputs if it were the only one,
    "accumulated" the error of its value with all that came before. A model of another tool is compared value by value.
    --apply needs the decisions record beside COMPILED, and exits with 1 if the bounds cannot be met.

    \b
    Examples:
      qcompiler blame model.onnx model.int8.onnx --evaluation feeds.npz
      qcompiler blame model.onnx model.int8.onnx --evaluation feeds.npz --apply -o better.onnx \\
          --metric score.py:top1 --budget "drop<=1%" --override better.toml
    """
    from qcompiler.compiled import staged_text
    from qcompiler.explaining.blame_run import accuse, measure, mend, overrides_toml
    from qcompiler.explaining.blame_text import blame_dict, show_blame, show_mended
    from qcompiler.options import Options

    if apply != (output is not None):
        raise PassError("--apply writes the mended model: give both --apply and -o OUT, or neither")
    if override is not None and not apply:
        raise PassError("--override names where the overrides of --apply go: give --apply as well")
    check_outputs({"output": output, "override file": override}, {"model": model, "compiled model": compiled})
    score = None if metric is None else load_metric(metric)
    sources = read_source_options(images, tokenizer, data)
    with progress_lines(quiet or as_json) as progress:
        options = Options(
            metric=score, budget=budget, shapes=parse_shapes(shapes) or None, progress=progress, sources=sources
        )
        accused = accuse(
            str(model), compiled, evaluation, decisions=decisions, calibration=calibration, options=options, feeds=feeds
        )
        result = measure(accused)
        mended = mend(accused, result) if apply else None
    console = stdout_console()
    written: list[Path] = []
    if mended is not None and output is not None:
        if override is not None:
            with staged_text(override, overrides_toml(mended.rows)):
                written = [*mended.compiled.save(output).files, override]
        else:
            written = list(mended.compiled.save(output).files)
    if as_json:
        print(json.dumps(blame_dict(accused, result, mended), indent=1))
    else:
        show_blame(accused, result, console)
        if mended is not None:
            show_mended(mended, console)
            for path in written:
                print(f"wrote {path}")
    if mended is not None and not mended.met:
        raise typer.Exit(1)
