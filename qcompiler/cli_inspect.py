"""``qcompiler inspect``: show a dump in the terminal, as a page, or a stage of it in Netron."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from qcompiler.cli_show import stdout_console

if TYPE_CHECKING:
    from qcompiler.report.dumps import Dump


def inspect_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What --dump wrote, or a model.qc.", show_default=False)
    ],
    stage: Annotated[int | None, typer.Option("--stage", metavar="N", help="Show the graph of stage N.")] = None,
    diff: Annotated[int | None, typer.Option("--diff", metavar="N", help="Show what stage N changed.")] = None,
    side: Annotated[
        bool, typer.Option("--side-by-side", "-y", help="With --diff: before on the left, after on the right.")
    ] = False,
    remarks: Annotated[int | None, typer.Option("--remarks", metavar="N", help="Show the remarks of stage N.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write all of it as one page for a browser.")
    ] = None,
    netron: Annotated[int | None, typer.Option("--netron", metavar="N", help="Open stage N in Netron.")] = None,
) -> None:
    """Show a dump: the passes, what each changed, and why; or the plan of a model compiled for Triton.

    \b
    Examples:
      qcompiler inspect dump/
      qcompiler inspect dump/ --diff 5 --side-by-side
      qcompiler inspect dump/ --remarks 3
      qcompiler inspect dump/ --html dump.html
      qcompiler inspect model.qc
    """
    from qcompiler.report.dumps import DumpError, load_dump
    from qcompiler.report.dumps_text import render, render_diff, render_remarks, render_side_by_side, render_stage

    if folder.suffix == ".qc":
        from qcompiler.backends.triton.artifact import read_plan_text

        print(read_plan_text(folder), end="")
        return
    if side and diff is None:
        raise DumpError("--side-by-side says how --diff N is shown: give both")
    dump, console = load_dump(folder), stdout_console()
    if stage is not None:
        render_stage(dump, stage, console)
    if diff is not None:
        (render_side_by_side if side else render_diff)(dump, diff, console)
    if remarks is not None:
        render_remarks(dump, remarks, console)
    if html is not None:
        from qcompiler.report.viewer import write_page

        console.print(Text(f"wrote {write_page(dump, html)}"), soft_wrap=True)
    if netron is not None:
        open_in_netron(dump, netron)
    if all(wanted is None for wanted in (stage, diff, remarks, html, netron)):
        render(dump, console)


def open_in_netron(dump: Dump, number: int) -> None:
    """Serve a stage's ONNX file with the Python package netron, in a browser, until interrupted.

    Raises:
        DumpError: there is no such stage, its ONNX file is missing, or netron is not installed.
    """
    from qcompiler.report.dumps import DumpError

    model = dump.model_path(number)
    if not model.is_file():
        raise DumpError(f"the dump is incomplete: expected {model}")
    try:
        netron = importlib.import_module("netron")
    except ImportError as error:
        raise DumpError(f"netron is not installed: run 'pip install netron', or open {model} at netron.app") from error
    print(f"netron shows {model}; stop it with Ctrl-C", file=sys.stderr)
    netron.start(str(model), browse=True)
    netron.wait()
