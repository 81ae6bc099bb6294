"""``qcompiler tune``: find fast configurations of the kernels: compile candidates anywhere, time them on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qcompiler.cli_kernels import require_triton
from qcompiler.cli_show import stdout_console
from qcompiler.errors import TargetError

tune_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Find fast configurations of the Triton kernels: compile candidates anywhere, then time them on a GPU.",
)


@tune_app.command("compile")
def compile_command(
    kernel: Annotated[str, typer.Argument(help="Such as int8_matmul; qcompiler kernels lists them.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of candidates.")],
    shapes: Annotated[
        str, typer.Option(help="MxNxK or names, such as B=16xS=8192; separated by commas. The case's by default.")
    ] = "",
    arch: Annotated[str, typer.Option(help="Architecture of the GPU, such as sm90.")] = "sm90",
    case: Annotated[str, typer.Option(help="Label of a case whose options are tuned; the kernel's first.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another option of the kernel.")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Most survivors of a shape.")] = 20,
    most: Annotated[int, typer.Option(min=1, help="Most candidates of a shape to compile, about a second each.")] = 64,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compile candidates without a GPU, drop what spills or does not fit, and keep the most promising ones.

    \b
    Examples:
      qcompiler tune compile int8_matmul --shapes 4096x4096x4096,64x8192x8192 -o candidates
      qcompiler tune compile decode_attention --shapes B=16xS=8192,B=1xS=32768 -o candidates
      qcompiler tune compile fp8_matmul --case "per block" --arch sm89 -o candidates

    An interrupted run goes on where it stopped.
    """
    require_triton()
    from qcompiler.kernels.catalog import implementation_of
    from qcompiler.kernels.proof.compiling import compile_for
    from qcompiler.kernels.tuning.compiling import compile_work
    from qcompiler.kernels.tuning.work import choose_case, make_work

    chosen = choose_case(implementation_of(kernel).cases(arch), case)
    options = dict(_pair(text) for text in option or ())
    works = [make_work(kernel, arch, chosen, shape.strip(), options) for shape in shapes.split(",")]
    console = stdout_console()
    for work in works:
        with _progress(quiet, f"compile {work.shape}") as say:
            found = compile_work(work, output, compile_for, _triton_version(), keep=keep, most=most, say=say)
        dropped = ", ".join(f"{count} {why}" for why, count in found.dropped.items()) or "none"
        console.print(Text(f"{kernel} {work.shape}: {len(found.kept)} kept, dropped: {dropped}"), soft_wrap=True)
    console.print(Text(f"time them on a GPU ({arch}): qcompiler tune time {output}"), soft_wrap=True)


@tune_app.command("time")
def time_command(
    candidates: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that tune compile wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Tables to write; the user's by default.")
    ] = None,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for each shape.")] = 10.0,
    again: Annotated[bool, typer.Option(help="Also what is known of this device and version of Triton.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Time the survivors on this machine's GPU and write the fastest to the user's tables, which come first.

    \b
    Examples:
      qcompiler tune time candidates
      qcompiler tune time candidates --budget 30 --again
      qcompiler tune time candidates -o kernels-h200

    Data is random, caches are cold, each figure the median of at least 3 runs. The shipped configuration stays unless
    another is faster by more than the spread.
    """
    from qcompiler.kernels.config import user_folder
    from qcompiler.kernels.tuning.compiling import read_folder
    from qcompiler.kernels.tuning.timing import time_all

    sets = read_folder(candidates)
    require_triton()
    from qcompiler.backends.triton.stopwatch import GpuTimer

    timer, folder = GpuTimer.open(), output or user_folder()
    with _progress(quiet, "time") as say:
        results = time_all(sets, timer, folder, budget, again=again, say=say)
    table = Table("kernel", "shape", "best", "us", "spread", "gain", "timed", "failed", box=None)
    for r in results:
        cells = (r.work.kernel, r.work.shape, str(r.best.config), f"{r.best.median:.2f}", f"{r.best.spread:.1%}")
        table.add_row(*map(Text, (*cells, f"{r.gain:.3f}x", str(r.timed), str(len(r.failed)))))
    console = stdout_console()
    if results:
        console.print(table)
    console.print(Text(f"{len(results)} of {len(sets)} shapes timed, tables in {folder}"), soft_wrap=True)


@tune_app.command("show")
def show_command(
    kernel: Annotated[str | None, typer.Argument(help="Only this one.", show_default=False)] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Tables; the user's by default.")
    ] = None,
) -> None:
    """Show the configurations that were timed on this machine, and which are stale.

    \b
    Examples:
      qcompiler tune show
      qcompiler tune show int8_matmul --folder kernels-h200

    Entries of another minor version of Triton are used, but stale: time them again.
    """
    from qcompiler.kernels.catalog import kernel_names
    from qcompiler.kernels.config import user_folder
    from qcompiler.kernels.tuning.timing import read_rows

    if kernel is not None and kernel not in kernel_names():
        raise TargetError(f"unknown kernel {kernel!r}; expected one of {', '.join(kernel_names())}")
    where, installed = folder or user_folder(), _triton_version()
    table = Table("kernel", "arch", "shape", "config", "us", "gain", "device", "triton", "date", "state", box=None)
    count = 0
    for name in kernel_names() if kernel is None else (kernel,):
        for row in read_rows(where, name):
            count += 1
            shape = " ".join(f"{axis}={length}" for axis, length in row.get("dims", {}).items())
            tile = "x".join(str(n) for _, n in sorted(row["tile"].items()))
            stale = installed and row["triton"].split(".")[:2] != installed.split(".")[:2]
            state = f"stale: Triton here is {installed}" if stale else ""
            figures = (f"{row['microseconds']:g}", f"{row.get('gain', 1):.3f}x")
            cells = (name, row["arch"], shape, f"{tile} w{row['warps']} s{row['stages']}", *figures)
            table.add_row(*map(Text, (*cells, row["device"], row["triton"], row.get("date", ""), state)))
    console: Console = stdout_console()
    if count:
        console.print(table)
    console.print(Text(f"{count} entries in {where}"), soft_wrap=True)


def _triton_version() -> str:
    """Return the installed version, empty if there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise TargetError(f"cannot read --option {text!r}; expected NAME=VALUE")
    return name, value


@contextmanager
def _progress(quiet: bool, title: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """Give what takes (done, in all, what is at hand) and shows a bar on stderr; None where nobody would look."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)
