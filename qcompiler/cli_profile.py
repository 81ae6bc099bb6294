"""``qcompiler profile``: time per operator, of one model or of a float one beside a compiled one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli_data import DataSettings, Images, Tokenizer, read_source_options
from qcompiler.cli_eval import write_json
from qcompiler.cli_files import check_outputs
from qcompiler.cli_options import SOURCE_HELP, Shapes, parse_shapes
from qcompiler.cli_show import stdout_console
from qcompiler.errors import BudgetError, CalibrationError


def profile_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A model; with B the float one.", show_default=False)],
    second: Annotated[
        Path | None, typer.Argument(metavar="B", help="What was compiled from it.", show_default=False)
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", metavar="SRC", help=f"Feeds: {SOURCE_HELP}; random without.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(metavar="SRC", help="The same, as the other commands call it.")
    ] = None,
    images: Images = None,
    tokenizer: Tokenizer = None,
    data: DataSettings = None,
    shapes: Shapes = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads inside one operator; 0: all.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds under the engine's profiler.")] = 12,
    seconds: Annotated[float, typer.Option(help="Least time for interleaved runs of the whole.")] = 1.0,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of each table.")] = 12,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; - for stdout.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write one page with figures that needs nothing else.")
    ] = None,
    build_report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="What compile --report wrote, for the page; found beside B."),
    ] = None,
) -> None:
    """Show the time per executed operator; of two models also by origin, float beside compiled.

    The times per operator come from the engine's profiler, the totals from interleaved runs without it. A group's time
    includes the conversions of its result between float and integers. The first feed is timed.

    \b
    Examples:
      qcompiler profile model.onnx
      qcompiler profile model.onnx model.int8.onnx --evaluation feeds.npz --top 20
      qcompiler profile model.onnx model.int8.onnx --report profile.html --json profile.json
    """
    from qcompiler.evaluating.profile_text import profile_dict, show_profile
    from qcompiler.evaluating.profiling import profile_models

    if not 0 < seconds < 3600:
        raise BudgetError(f"--seconds is {seconds:g}; expected more than 0 and less than 3600")
    if calibration is not None and evaluation is not None:
        raise CalibrationError("--calibration and --evaluation both name the feed to time; give one of them")
    to_stdout = as_json is not None and str(as_json) == "-"
    check_outputs(
        {"JSON": None if to_stdout else as_json, "report": report},
        {"model": first, "compiled model": second, "build report": build_report},
    )
    found = profile_models(
        str(first), second, feeds=calibration if calibration is not None else evaluation,
        sources=read_source_options(images, tokenizer, data), shapes=parse_shapes(shapes) or None, threads=threads,
        rounds=rounds, seconds=seconds,
    )  # fmt: skip
    written = write_json(as_json, profile_dict(found))
    if report is not None:
        from qcompiler.evaluating.page_sections import profile_sections
        from qcompiler.report.eval_page import write_page

        title = f"{second.name} beside {first.name}" if second is not None else f"Profile of {first.name}"
        written.append(write_page(report, profile_sections(found, build_report), title=title))
    if not to_stdout:
        show_profile(found, stdout_console(), top)
        for path in written:
            print(f"wrote {path}")
