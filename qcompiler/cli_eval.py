"""``qcompiler eval``: how good a compiled model is, and where its error is born."""

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


def eval_command(
    model: Model,
    compiled: Annotated[
        Path,
        typer.Argument(
            metavar="COMPILED", help="What was compiled from it: .onnx, .xml, .plan or .qc.", show_default=False
        ),
    ],
    evaluation: Annotated[str, typer.Option(metavar="SRC", help=f"Feeds to evaluate on: {SOURCE_HELP}.")],
    metric: Annotated[
        str | None, typer.Option(metavar="FILE.py:F", help="F(outputs, feeds) -> float, more is better.")
    ] = None,
    images: Images = None,
    tokenizer: Tokenizer = None,
    data: DataSettings = None,
    shapes: Shapes = None,
    decisions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The decisions record, if not beside COMPILED.")
    ] = None,
    layer_feeds: Annotated[int, typer.Option(min=0, metavar="N", help="Feeds to trace layers on; 0: no layers.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws behind the intervals.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads inside one operator; 0: all.")] = 1,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of each table.")] = 8,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; - for stdout.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write one page with figures that needs nothing else.")
    ] = None,
    build_report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="What compile --report wrote, for the page; found beside COMPILED."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a compiled model against its float model on data.

    Shown are the metric of both with the 95 % interval of their paired difference, SQNR, cosine and arg-max agreement
    per output, where error is born and where it grows in the network, and the samples that are farthest from float.
    A layer's error is "born" there if float, computed from the same inputs, does not have it.

    \b
    Examples:
      qcompiler eval model.onnx model.int8.onnx --evaluation feeds.npz
      qcompiler eval model.onnx model.int8.onnx --evaluation feeds.npz --metric score.py:top1 --report eval.html
      qcompiler eval model.onnx model.int8.onnx --evaluation feeds.npz --json eval.json --quiet
    """
    from qcompiler.evaluating.evaluate import evaluate
    from qcompiler.evaluating.evaluation_text import evaluation_dict, show_evaluation

    to_stdout = as_json is not None and str(as_json) == "-"
    check_outputs(
        {"JSON": None if to_stdout else as_json, "report": report},
        {"model": model, "compiled model": compiled, "build report": build_report},
    )
    score = None if metric is None else load_metric(metric)
    sources = read_source_options(images, tokenizer, data)
    with progress_lines(quiet or to_stdout) as progress:
        found = evaluate(
            str(model), compiled, evaluation, metric=score, threads=threads, shapes=parse_shapes(shapes) or None,
            sources=sources, decisions=decisions, layer_feeds=layer_feeds, seed=seed, progress=progress,
        )  # fmt: skip
    title = f"{compiled.name} against {model.name}"
    written = write_json(as_json, evaluation_dict(found))
    if report is not None:
        from qcompiler.evaluating.page_sections import evaluation_sections
        from qcompiler.report.eval_page import write_page

        written.append(write_page(report, evaluation_sections(found, build_report), title=title))
    if not (quiet or to_stdout):
        show_evaluation(found, stdout_console(), top)
        for path in written:
            print(f"wrote {path}")


def write_json(as_json: Path | None, data: object) -> list[Path]:
    """Write data as JSON where it is wanted; ``-`` is stdout."""
    if as_json is None:
        return []
    text = json.dumps(data, indent=1, allow_nan=False)
    if str(as_json) == "-":
        print(text)
        return []
    from qcompiler.compiled import staged_text

    with staged_text(as_json, text + "\n"):
        pass
    return [as_json]
