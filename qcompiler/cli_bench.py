"""``qcompiler bench``: time two models against each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from qcompiler.cli_options import SOURCE_HELP, Shapes, parse_shapes
from qcompiler.cli_show import stdout_console
from qcompiler.errors import BudgetError, CalibrationError, ModelError, QCompilerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcompiler.engine import Feeds, Runner, TensorInfo

_MOST_FEEDS = 16
"""Feeds on which the outputs of the two are compared."""


def bench_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A model.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another with the same inputs.", show_default=False)],
    feeds: Annotated[str | None, typer.Option(metavar="SRC", help=f"Feeds: {SOURCE_HELP}; random without.")] = None,
    shapes: Shapes = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads inside one operator; 0: all.")] = 1,
    seconds: Annotated[float, typer.Option(help="Least time to measure, both models together.")] = 2.0,
) -> None:
    """Time two models on ONNX Runtime in interleaved rounds, and compare their outputs.

    The ratio is A / B: above 1, B is the faster one. The first feed is timed; outputs are compared on all (up to 16),
    section by section where they join quantities of different scale.

    \b
    Examples:
      qcompiler bench model.onnx model.int8.onnx --feeds feeds.npz
      qcompiler bench model.onnx model.int8.onnx --shapes x:1x3x224x224 --threads 4 --seconds 5
    """
    from qcompiler.backends.onnxruntime import OrtEngine
    from qcompiler.engine import EngineOptions
    from qcompiler.search.timing import interleave

    if not 0 < seconds < 3600:
        raise BudgetError(f"--seconds is {seconds:g}; expected more than 0 and less than 3600")
    for path in (first, second):
        if not path.is_file():
            raise ModelError(f"cannot read {path}: no such file")
    options = EngineOptions(threads=threads)
    a, b = OrtEngine().load(first, options), OrtEngine().load(second, options)
    if missing := {i.name for i in a.inputs} ^ {i.name for i in b.inputs}:
        raise ModelError(f"{first} and {second} have different inputs: {sorted(missing)[0]!r} is in one of them only")
    data = _feeds(feeds, parse_shapes(shapes), a.inputs)
    times = interleave({"A": a, "B": b}, data[0], rounds=30, seconds=seconds, most=1_000_000)
    one, two = times["A"], times["B"]
    console = stdout_console()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "min ms", "median ms", "model"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for name, timing, path in (("A", one, first), ("B", two, second)):
        table.add_row(name, f"{timing.minimum * 1e3:.4f}", f"{timing.median * 1e3:.4f}", Text(str(path)))
    table.add_row("A / B", f"{one.minimum / two.minimum:.3f}", f"{one.median / two.median:.3f}", "")
    console.print(table)
    console.print(f"{one.rounds} interleaved rounds, threads {threads}" + ("" if feeds else ", random data"))
    for name, db in _closeness(first, a, b, data).items():
        console.print(Text(f"{name}: {'equal' if db == float('inf') else f'{db:.1f} dB SQNR of B against A'}"))


def _feeds(source: str | None, shapes: Mapping[str, Sequence[int]], inputs: Sequence[TensorInfo]) -> list[Feeds]:
    from dataclasses import replace

    from qcompiler.calibration.readers import as_feed_source, random_feeds

    if unknown := set(shapes) - {i.name for i in inputs}:
        raise CalibrationError(
            f"--shapes names {sorted(unknown)[0]!r}; the inputs are: {', '.join(i.name for i in inputs)}"
        )
    fixed = [replace(i, shape=tuple(shapes[i.name])) if i.name in shapes else i for i in inputs]
    if source is None:
        return list(random_feeds(fixed, 1))
    return [*itertools.islice(as_feed_source(source, fixed), _MOST_FEEDS)]


def _closeness(model: Path, a: Runner, b: Runner, feeds: Sequence[Feeds]) -> dict[str, float]:
    """Return SQNR in dB of the outputs that both models have, or of their sections."""
    from qcompiler.ir.importer import import_model
    from qcompiler.pipeline.numerics import sqnr_db
    from qcompiler.search.sections import cut, find_sections

    both = [o.name for o in a.outputs if o.name in {p.name for p in b.outputs}]
    if not both:
        return {}
    wanted, found = ([runner.run(f, both) for f in feeds] for runner in (a, b))
    try:
        sections = find_sections(import_model(model), wanted)
    except QCompilerError:  # what runs can be timed, whether we can compile it or not
        sections = {}
    return sqnr_db([cut(w, sections) for w in wanted], [cut(f, sections) for f in found])
