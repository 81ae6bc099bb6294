"""The two models of an evaluation: loaded, known to belong together, and run on the same feeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.backends.catalog import engine_backend, engine_of
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import INTEGER_KERNELS
from qcompiler.calibration.readers import as_feed_source
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Statistics
from qcompiler.compiled import decisions_path
from qcompiler.decisions import Decisions
from qcompiler.engine import Array, EngineOptions, Feeds, Runner, TensorInfo
from qcompiler.errors import CalibrationError, ModelError, QCompilerError
from qcompiler.explaining.given import is_conversion
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.importer import import_model
from qcompiler.ir.reader import read_model
from qcompiler.options import Calibration, ModelSource, read_decisions
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.recipes.recipe import load_recipe
from qcompiler.runnable import load_runnable
from qcompiler.search.quality import carried_states
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.target import Target, load_target

ONNX = ".onnx"
_GENERIC = "ort-generic"
Results = Mapping[str, Array]


@dataclass(frozen=True)
class Pair:
    """A float model and what was compiled from it.

    Attributes:
        given: the float model as it runs here.
        reference: its runner.
        runner: the compiled model's runner.
        path: of the compiled model.
        compiled: its graph; None where it is no ONNX model.
        record: the decisions record beside it; None of another tool's.
        notes: what a user should know.
    """

    given: ir.Model
    reference: Runner
    runner: Runner
    path: Path
    compiled: ir.Model | None
    record: Decisions | None
    notes: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the outputs that both have, in the float model's order."""
        there = {o.name for o in self.runner.outputs}
        return tuple(o.name for o in self.reference.outputs if o.name in there)


@dataclass(frozen=True)
class Aligned:
    """The canonical float graph, whose names a compiled model keeps, and its fusion groups."""

    graph: ir.Model
    groups: tuple[Group, ...] = field(default=())


def open_pair(
    source: ModelSource,
    compiled: str | Path,
    *,
    threads: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    decisions: str | Path | None = None,
) -> Pair:
    """Load both models and make sure that one can have been made of the other.

    Args:
        source: the float model.
        compiled: what `qcompiler.load` takes, or a TensorRT .plan.
        threads: threads inside one operator.
        shapes: lengths of open axes of the float model.
        decisions: the record, where it does not lie beside the compiled model.

    Raises:
        ModelError: a file cannot be loaded, the two are swapped, or are different models.
        TargetError: the compiled model's engine is not here.
    """
    path = Path(compiled)
    if not path.exists():
        raise ModelError(f"cannot read {path}: no such file")
    given = import_model(source, shapes=shapes)
    graph = read_model(path) if path.suffix == ONNX else None
    beside = decisions_path(path)
    record = read_decisions(decisions if decisions is not None else beside if beside.is_file() else None)
    if graph is not None:
        _refuse_swapped(source, given, path, graph, record)
    options = EngineOptions(threads=threads)
    given, reference, note = load_runnable(given, OrtEngine(), options, load_target(_GENERIC))
    runner = load_compiled(path, threads)
    _refuse_different(reference, runner, path)
    return Pair(given, reference, runner, path, graph, record, (note,) if note else ())


def load_compiled(path: Path, threads: int) -> Runner:
    """Load a compiled model of any engine.

    Raises:
        ModelError: the file cannot be loaded.
        TargetError: its engine is not here.
    """
    if path.suffix == ".plan":
        from qcompiler.backends.tensorrt.runtime import TrtEngine

        return TrtEngine().load(path)
    return engine_backend(engine_of(path)).engine.load(path, EngineOptions(threads=threads))


def is_quantized(model: ir.Model) -> bool:
    """Return whether a graph has quantized operators or conversions."""
    return any(is_conversion(n) or n.op_type in INTEGER_KERNELS for n in all_nodes(model))


def _refuse_swapped(
    source: ModelSource, given: ir.Model, path: Path, graph: ir.Model, record: Decisions | None
) -> None:
    if record is not None or is_quantized(graph):
        return
    named = Path(source) if isinstance(source, str | Path) else None
    recorded = named is not None and decisions_path(named).is_file() and decisions_path(named) != decisions_path(path)
    if recorded or is_quantized(given):
        raise ModelError(
            f"the models look swapped: {named or 'MODEL'} is quantized and {path} is not; expected the float model "
            "first, then the compiled one"
        )


def _refuse_different(reference: Runner, runner: Runner, path: Path) -> None:
    mine, other = {i.name: i for i in reference.inputs}, {i.name: i for i in runner.inputs}
    if missing := sorted(mine.keys() ^ other.keys()):
        raise ModelError(
            f"the models do not belong together: input {missing[0]!r} is in one of them only; MODEL has "
            f"{', '.join(mine)}, {path} has {', '.join(other)}"
        )
    for name, info in mine.items():
        if info.dtype != other[name].dtype:
            raise ModelError(
                f"the models do not belong together: input {name!r} is {info.dtype} in MODEL and {other[name].dtype} "
                f"in {path}"
            )
        lengths, theirs = info.shape, other[name].shape
        if lengths is not None and theirs is not None and not _fits(lengths, theirs):
            raise ModelError(
                f"the models do not belong together: input {name!r} is {list(lengths)} in MODEL and {list(theirs)} in "
                f"{path}"
            )
    outputs, others = [o.name for o in reference.outputs], {o.name for o in runner.outputs}
    if lacking := [name for name in outputs if name not in others]:
        raise ModelError(
            f"the models do not belong together: {path} has no output {lacking[0]!r}; it has "
            f"{', '.join(sorted(others))}"
        )


def _fits(a: tuple[int | str | None, ...], b: tuple[int | str | None, ...]) -> bool:
    if len(a) != len(b):
        return False
    return all(x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in zip(a, b, strict=True))


def read_feeds(
    inputs: Sequence[TensorInfo], source: Calibration, options: SourceOptions | None = None, most: int | None = None
) -> list[Feeds]:
    """Return the feeds of a source of data.

    Raises:
        CalibrationError: there is none, or one does not fit the inputs.
    """
    if isinstance(source, Statistics) or (isinstance(source, str | Path) and Path(source).suffix == ".qcal"):
        raise CalibrationError("evaluation needs feeds, found statistics; give the data that they were gathered from")
    feeds: list[Feeds] = [*itertools.islice(as_feed_source(source, inputs, options), most)]
    if not feeds:
        raise CalibrationError("the evaluation data has no feed")
    return feeds


def run_both(pair: Pair, feeds: list[Feeds]) -> Iterator[tuple[Feeds, Results, Results]]:
    """Yield feed, float outputs and compiled outputs.

    A model with a state runs in a loop of its own, as `qcompiler.search.quality.Judge` does it.

    Raises:
        CalibrationError: an engine refuses a feed, or an output has another shape.
    """
    states: dict[str, str] = {}
    left: list[dict[str, Array]] = [{}, {}]
    for number, feed in enumerate(feeds):
        made = []
        for place, runner in enumerate((pair.reference, pair.runner)):
            kept = {n: a for n, a in left[place].items() if a.shape == feed[n].shape}
            made.append(runner.run({**feed, **kept}))
        if number == 0:
            states = carried_states(feed, made[0])
        left = [{given: results[name] for name, given in states.items()} for results in made]
        _check_shapes(pair, made[0], made[1], number)
        yield feed, made[0], made[1]


def _check_shapes(pair: Pair, wanted: Results, found: Results, number: int) -> None:
    for name in pair.outputs:
        a, b = wanted[name], found[name]
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.ndim != b.ndim:
            raise ModelError(
                f"the models do not belong together: for feed {number} output {name!r} is {list(a.shape)} of MODEL and "
                f"{list(b.shape)} of {pair.path}"
            )


def align(given: ir.Model, record: Decisions | None) -> Aligned:
    """Return the graph that the names in a compiled model come from, and its fusion groups.

    Args:
        given: the float model, imported; left as it is.
        record: what names the target and recipe; without one the groups of a generic table.
    """
    target = _target_of(record)
    state = CompileState(given.clone(), target)
    Pipeline(front_passes()).run(state)
    groups = find_groups(state.model, target)
    if record is not None and (unknown := sorted(set(record.forms) - {g.name for g in groups})):
        raise ModelError(
            f"the decisions record is of another model: it names {unknown[0]!r}, which MODEL does not have"
        )
    return Aligned(state.model, groups)


def _target_of(record: Decisions | None) -> Target:
    if record is None:
        return load_target(_GENERIC)
    name = record.context.get("recipe", "int8")
    try:
        recipe = load_recipe(name)
    except QCompilerError:
        recipe = load_recipe("int8")  # a recipe of the user's own that is not here: what it decided is in the record
    return recipe.on(load_target(record.context.get("target", _GENERIC)))
