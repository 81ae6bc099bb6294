"""``qcompiler opt``: run any pipeline, watch it, replay a failure, find who is to blame."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from qcompiler.cli_files import check_new_folder, check_outputs
from qcompiler.cli_options import RandomFeeds, Shapes, Source, Target, parse_shapes
from qcompiler.cli_show import stdout_console
from qcompiler.errors import CalibrationError, PassError, QCompilerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from qcompiler.calibration.readers import FeedSource
    from qcompiler.calibration.statistics import Statistics
    from qcompiler.engine import Feeds
    from qcompiler.pipeline.instruments.numerics import PassNumerics
    from qcompiler.pipeline.instruments.timing import PassTime
    from qcompiler.pipeline.pipeline import Instrument, Pipeline
    from qcompiler.pipeline.registry import PassRegistry
    from qcompiler.pipeline.state import CompileState

_MOST_FEEDS = 4
"""Feeds on which graphs are compared; statistics are taken from all."""


def opt_command(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="An ONNX model.", show_default=False)] = None,
    passes: Annotated[
        str | None, typer.Option(metavar="PIPELINE", help="Passes with options, as in canonicalize{rounds=1},... .")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the graph.")] = None,
    print_graph: Annotated[bool, typer.Option("--print", help="Print the graph as text.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Write what every pass did.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the graph after every pass.")] = True,
    numerics: Annotated[
        bool, typer.Option("--numerics/--no-numerics", help="Hold every pass to its numeric contract; needs feeds.")
    ] = False,
    bisect: Annotated[
        str | None,
        typer.Option(
            metavar="DB|contract", help="Find the pass, rule and node that first breaks the bound; needs feeds."
        ),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run a failed pass again from the folder that the failure left.")
    ] = None,
    target: Target = "host",
    calibration: Source = None,
    random_calibration: RandomFeeds = None,
    shapes: Shapes = None,
    pass_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.py", help="Also offer the passes of a file; may be repeated.")
    ] = None,
) -> None:
    """Run a pipeline of passes on a model.

    A pass that fails leaves the folder NAME.qcreplay (or replay/ in the dump), which --replay runs again.
    --bisect ends with code 1 if it finds a culprit and 0 if the bound holds.

    \b
    Examples:
      qcompiler opt model.onnx --passes canonicalize -o clean.onnx
      qcompiler opt model.onnx --passes "import-qdq,canonicalize,plan-quantization,insert-qdq" \\
          --calibration feeds.npz --dump dump/
      qcompiler opt model.onnx --passes "canonicalize,my-pass" --pass-file my_pass.py \\
          --random-calibration 2 --bisect contract
      qcompiler opt --replay model.qcreplay
    """
    from qcompiler.pipeline.pipeline import Pipeline

    check_outputs({"output": output}, {"model": model})
    check_new_folder(dump, "the dump")
    registry = _registry(pass_file or ())
    run = _Run(output, print_graph, dump, verify)
    if replay is not None:
        if model is not None or passes is not None or bisect is not None:
            raise PassError("--replay runs what its folder holds; give no model, no --passes and no --bisect with it")
        run.replay(replay, registry)
        return
    if model is None or passes is None:
        raise PassError("give a model and --passes PIPELINE, or --replay DIR; see: qcompiler opt --help")
    pipeline = Pipeline.parse(passes, registry)
    bound = None if bisect is None else _bound(bisect)
    state, feeds = _start(model, pipeline, target, parse_shapes(shapes), calibration, random_calibration)
    if (numerics or bisect is not None) and feeds is None:
        raise CalibrationError("--numerics and --bisect need feeds: give --calibration SRC or --random-calibration N")
    few = list(itertools.islice(feeds, _MOST_FEEDS)) if feeds is not None else []
    if bisect is not None:
        _bisect(state, pipeline, few, bound)
        return
    run.run(state, pipeline, few if numerics else None, (dump / "replay") if dump else Path(f"{model.stem}.qcreplay"))


class _Run:
    """Run a pipeline or a replay, and hand out the result."""

    def __init__(self, output: Path | None, print_graph: bool, dump: Path | None, verify: bool) -> None:
        self.output, self.print_graph, self.dump, self.verify = output, print_graph, dump, verify

    def run(self, state: CompileState, pipeline: Pipeline, feeds: Sequence[Feeds] | None, left: Path) -> None:
        """Run a pipeline; ``left`` is the folder that a failure leaves."""
        from qcompiler.backends.onnxruntime import OrtEngine
        from qcompiler.pipeline.instruments.dump import DumpInstrument
        from qcompiler.pipeline.instruments.numerics import NumericsInstrument
        from qcompiler.pipeline.instruments.replay import ReplayInstrument
        from qcompiler.pipeline.instruments.timing import TimeInstrument

        times, keep = TimeInstrument(), ReplayInstrument(left)
        measure = NumericsInstrument(OrtEngine(), feeds) if feeds is not None else None
        instruments: list[Instrument] = [DumpInstrument(self.dump, times, measure)] if self.dump is not None else []
        instruments += [keep, *([measure] if measure is not None else []), *self._verifiers(), times]
        try:
            pipeline.run(state, instruments)
        except QCompilerError as error:
            if keep.written:
                raise PassError(f"{error}; run it again with: qcompiler opt --replay {left}") from error
            raise
        self._finish(state.model, times.times, measure.results if measure is not None else ())

    def replay(self, folder: Path, registry: PassRegistry) -> None:
        """Run the pass of a replay folder."""
        from qcompiler.pipeline.instruments.timing import TimeInstrument
        from qcompiler.pipeline.replay import load_case, replay

        for change in load_case(folder).version_changes():
            print(f"warning: {change} since the failure was recorded", file=sys.stderr)
        times = TimeInstrument()
        state, _ = replay(folder, registry, [*self._dumps(times), *self._verifiers(), times])
        self._finish(state.model, times.times, ())

    def _dumps(self, times: object) -> list[Instrument]:
        from qcompiler.pipeline.instruments.dump import DumpInstrument
        from qcompiler.pipeline.instruments.timing import TimeInstrument

        assert isinstance(times, TimeInstrument)
        return [DumpInstrument(self.dump, times)] if self.dump is not None else []

    def _verifiers(self) -> list[Instrument]:
        from qcompiler.pipeline.instruments.verify import VerifyInstrument

        return [VerifyInstrument()] if self.verify else []

    def _finish(self, model: ir.Model, times: Sequence[PassTime], figures: Sequence[PassNumerics]) -> None:
        from qcompiler.ir.serialize import save_model
        from qcompiler.ir.text import print_model

        if self.output is not None:
            save_model(model, self.output, strip=True)
        if self.print_graph:
            sys.stdout.write(print_model(model))
            return
        console = stdout_console()
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for name in ("pass", "changes", "ms", *(("least SQNR dB",) if figures else ())):
            table.add_column(name, justify="left" if name == "pass" else "right", overflow="fold")
        worst = {f.text: min(f.sqnr_db.values(), default=float("inf")) for f in figures}
        for entry in times:
            row = [entry.text, str(entry.changes), f"{entry.seconds * 1e3:.1f}"]
            if figures:
                row.append(f"{worst[entry.text]:.1f}" if entry.text in worst else "")
            table.add_row(*map(Text, row))
        console.print(table)
        for path in (self.output, self.dump):
            if path is not None:
                console.print(Text(f"wrote {path}"))


def _start(
    model: Path,
    pipeline: Pipeline,
    target: str,
    shapes: dict[str, tuple[int, ...]],
    calibration: str | None,
    random_calibration: int | None,
) -> tuple[CompileState, FeedSource | None]:
    """Import the model, refuse an illegal order, and read the data."""
    from dataclasses import replace

    from qcompiler.backends.onnxruntime import OrtEngine
    from qcompiler.calibration.readers import as_feed_source, random_feeds
    from qcompiler.dataset import read_statistics
    from qcompiler.engine import EngineOptions
    from qcompiler.ir.importer import import_model
    from qcompiler.ir.phase import Phase
    from qcompiler.pipeline.state import CompileState
    from qcompiler.targets.host import detect, host_target_name
    from qcompiler.targets.target import load_target

    table = load_target(host_target_name(detect())[0] if target == "host" else target)
    pipeline.phase_after(Phase.FLOAT)
    state = CompileState(import_model(model, shapes=shapes or None), table)
    if calibration is None and random_calibration is None:
        return state, None
    if calibration is not None and (known := read_statistics(Path(calibration))) is not None:
        state.statistics = known
        return state, None
    inputs = OrtEngine().load(state.model, replace(EngineOptions(), optimize=False)).inputs
    source = calibration if calibration is not None else random_feeds(inputs, random_calibration or 1)
    feeds = as_feed_source(source, inputs)
    state.statistics = _observed(state, pipeline, feeds)
    return state, feeds


def _observed(state: CompileState, pipeline: Pipeline, feeds: FeedSource) -> Statistics | None:
    """Calibrate the graph that the planning pass will meet, if the pipeline has one."""
    from qcompiler.backends.onnxruntime import OrtEngine
    from qcompiler.calibration.observe import observe
    from qcompiler.ir.phase import Phase
    from qcompiler.observed import wanted_values
    from qcompiler.pipeline.pipeline import Pipeline
    from qcompiler.targets.groups import find_groups

    planners = [i for i, step in enumerate(pipeline.passes) if step.gives is Phase.PLANNED]
    if not planners:
        return None
    ahead = state.clone()
    Pipeline(pipeline.passes[: planners[0]]).run(ahead)
    names = list(dict.fromkeys(wanted_values(ahead.model, find_groups(ahead.model, ahead.target))))
    return observe(ahead.model, names, feeds, OrtEngine(), threads=1)


def _bound(text: str) -> float | None:
    if text == "contract":
        return None
    try:
        return float(text)
    except ValueError:
        raise PassError(
            f"--bisect is {text!r}; expected a number of dB, or contract for each pass's own bound"
        ) from None


def _bisect(state: CompileState, pipeline: Pipeline, feeds: Sequence[Feeds], bound: float | None) -> None:
    from qcompiler.backends.onnxruntime import OrtEngine
    from qcompiler.pipeline.bisect import bisect

    found = bisect(state, pipeline, OrtEngine(), feeds, bound)
    console = stdout_console()
    if found is None:
        console.print("every pass holds its contract" if bound is None else f"the pipeline holds {bound:g} dB")
        return
    console.print(Text(str(found)), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("value", "node", "origin", "error", "SQNR dB"):
        table.add_column(name, overflow="fold")
    loud = sorted(found.values, key=lambda v: v.sqnr_db)[:8]
    for value in loud:
        row = (value.value, value.node, ", ".join(value.origins), f"{value.error:.4g}", f"{value.sqnr_db:.1f}")
        table.add_row(*map(Text, row))
    if loud:
        console.print(table)
    raise typer.Exit(1)


def _registry(files: Sequence[Path]) -> PassRegistry:
    from qcompiler.passes.catalog import shipped_passes

    return shipped_passes().with_entry_points().with_passes(cls for file in files for cls in _passes_of(file))


def _passes_of(file: Path) -> list[type]:
    """Load a Python file and return the pass classes that it defines."""
    import inspect

    from qcompiler.pipeline.base import Pass

    if not file.is_file():
        raise PassError(f"cannot load passes from {file}: no such file")
    name = "qcompiler_pass_file_" + re.sub(r"\W", "_", str(file.resolve()))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PassError(f"cannot load passes from {file}: expected a .py file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up to resolve annotations.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise PassError(f"cannot load passes from {file}: {type(error).__name__}: {error}") from error
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, Pass) and not inspect.isabstract(cls) and cls.__module__ == name
    ]
    if not found:
        raise PassError(f"{file} defines no pass: expected a dataclass derived from qcompiler.pipeline.base.Pass")
    return found
