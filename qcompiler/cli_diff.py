"""``qcompiler diff``: what differs between two builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli_show import stdout_console


def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A compiled model, dump or report.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    first_report: Annotated[
        Path | None, typer.Option("--report-a", metavar="FILE.json", help="The report of A: kernels, speed, accuracy.")
    ] = None,
    second_report: Annotated[
        Path | None, typer.Option("--report-b", metavar="FILE.json", help="The report of B.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: all differences, nothing cut.")] = False,
) -> None:
    """Compare two builds, aligned by origin: settings, forms, formats, scales, kernels, operators, figures.

    A build is a compiled model (with OUT.decisions.json beside it, and OUT.report.json if there), the folder of a
    --dump, or the file of a --report. The exit code is 0 if nothing differs and 1 if something does.

    \b
    Examples:
      qcompiler diff old.onnx new.onnx
      qcompiler diff old.onnx new.onnx --report-a old.json --report-b new.json
      qcompiler diff dump-before/ dump-after/ --json
    """
    from qcompiler.explaining.build_diff import diff_dict, diff_sides, show_diff
    from qcompiler.explaining.build_sides import read_side

    a, b = read_side(first, first_report), read_side(second, second_report)
    found = diff_sides(a, b)
    if as_json:
        print(json.dumps(diff_dict(a, b, found), indent=1))
    else:
        show_diff(a, b, found, stdout_console())
    if found:
        raise typer.Exit(1)
