"""Time per operator of one model, or of a float model beside what was compiled from it, aligned by origin."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from qcompiler.backends.catalog import engine_backend, engine_of
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.readers import random_feeds
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.engine import Engine, EngineOptions, Feeds, Profile, Runner
from qcompiler.errors import ModelError
from qcompiler.evaluating.pair import Pair, align, open_pair, read_feeds
from qcompiler.ir.graph import all_nodes, origins
from qcompiler.ir.importer import import_model
from qcompiler.options import Calibration, ModelSource
from qcompiler.search.attribution import Owners, attribute
from qcompiler.search.timing import Timing, interleave

ROUNDS = 12
"""Rounds under the engine's profiler."""
SLOWER = 1.02
"""Ratio from which a group counts as slower than in float, and by one microsecond at least."""
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True)
class OperatorTime:
    """Executed operators of one type.

    Attributes:
        operator: what the engine calls it.
        count: nodes.
        microseconds: per run of the model, all together.
        conversion: whether it only quantizes or dequantizes.
    """

    operator: str
    count: int
    microseconds: float
    conversion: bool = False


@dataclass(frozen=True)
class GroupTime:
    """One origin: a fusion group, or a node outside of all.

    Attributes:
        name: of the group or node.
        operator: its operator in the float model.
        form: form in the compiled model; empty without a record.
        before: microseconds in the first model; None if only one was profiled.
        after: microseconds in the compiled one, conversions at its result included.
        conversions: of these, microseconds for conversions.
        kernels: the engine's operators in the compiled model.
    """

    name: str
    operator: str
    form: str
    before: float | None
    after: float
    conversions: float = 0.0
    kernels: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """Return microseconds won; below 0 it became slower."""
        return 0.0 if self.before is None else self.before - self.after

    @property
    def slower(self) -> bool:
        """Return whether it is slower by more than noise."""
        return self.before is not None and self.after > SLOWER * self.before + 1.0


@dataclass(frozen=True)
class ModelTime:
    """One profiled model.

    Attributes:
        name: its path.
        engine: name and version of the engine.
        operators: executed operators by type, the longest first.
        total: sum over its operators in microseconds per run.
        timing: of whole runs without the profiler.
    """

    name: str
    engine: str
    operators: tuple[OperatorTime, ...]
    total: float
    timing: Timing

    @property
    def conversions(self) -> float:
        """Return the share of the operators' time that only converts between float and integers."""
        return sum(o.microseconds for o in self.operators if o.conversion) / max(self.total, 1e-12)


@dataclass(frozen=True)
class ProfileResult:
    """One or two profiled models.

    Attributes:
        models: one, or the float one and the compiled one.
        groups: by origin, in the order of the network.
        threads: threads inside one operator.
        rounds: interleaved rounds of the whole.
        data: where the feed comes from.
        notes: what a user should know.
    """

    models: tuple[ModelTime, ...]
    groups: tuple[GroupTime, ...]
    threads: int
    rounds: int
    data: str
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        """Return first / second by the minimum of whole runs; None of one model."""
        if len(self.models) < 2:
            return None
        return self.models[0].timing.minimum / self.models[1].timing.minimum

    @property
    def slower(self) -> tuple[GroupTime, ...]:
        """Return the groups that became slower, the one that lost most first."""
        return tuple(sorted((g for g in self.groups if g.slower), key=lambda g: g.gain))


@dataclass(frozen=True)
class _Side:
    """A loaded model with its engine."""

    name: str
    engine: Engine
    label: str
    runner: Runner
    model: ir.Model | Path
    options: EngineOptions = field(default_factory=EngineOptions)

    def profile(self, feed: Feeds, rounds: int) -> tuple[Profile, ir.Model]:
        found = self.engine.profile(self.model, feed, self.options, rounds)
        return found, found.executed or self.engine.optimized_graph(self.model, self.options)


def profile_models(
    first: ModelSource,
    second: str | Path | None = None,
    *,
    feeds: Calibration | None = None,
    sources: SourceOptions | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    threads: int = 1,
    rounds: int = ROUNDS,
    seconds: float = 1.0,
) -> ProfileResult:
    """Profile a model, or a float model and the compiled one.

    Args:
        first: a model; with ``second`` the float one.
        second: the compiled model.
        feeds: data, of which the first feed is timed; random by default.
        sources: how files become feeds.
        shapes: lengths of open axes.
        threads: threads inside one operator.
        rounds: rounds under the profiler.
        seconds: least time for the interleaved runs of the whole.

    Raises:
        ModelError: a file cannot be loaded, or the two do not belong together.
        TargetError: the engine is not here, or cannot profile.
        CalibrationError: a feed does not fit.
    """
    options = EngineOptions(threads=threads)
    if second is None:
        return _one(first, feeds, sources, shapes, options, rounds, seconds)
    pair = open_pair(first, second, threads=threads, shapes=shapes)
    feed, data = _feed(pair.reference, feeds, sources)
    name = str(first) if isinstance(first, str | Path) else "float"
    a = _Side(name, OrtEngine(), f"onnxruntime {OrtEngine().version}", pair.reference, pair.given, options)
    engine, label = _engine(pair.path)
    b = _Side(str(pair.path), engine, label, pair.runner, pair.path, options)
    costs = [side.profile(feed, rounds) for side in (a, b)]
    times = interleave({"a": a.runner, "b": b.runner}, feed, rounds=30, seconds=seconds, most=100_000)
    groups, notes = _groups(pair, costs)
    models = tuple(
        _model_time(side, profile, times[key]) for side, (profile, _), key in zip((a, b), costs, "ab", strict=True)
    )
    return ProfileResult(models, groups, threads, times["a"].rounds, data, (*pair.notes, *notes))


def _one(
    source: ModelSource, feeds: Calibration | None, sources: SourceOptions | None,
    shapes: Mapping[str, tuple[int, ...]] | None, options: EngineOptions, rounds: int, seconds: float,
) -> ProfileResult:  # fmt: skip
    """Profile one model, as it is in its file."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and not path.exists():
        raise ModelError(f"cannot read {path}: no such file")
    if path is not None and not shapes:
        engine, label = _engine(path)
        model: ir.Model | Path = path
    else:
        engine, label, model = OrtEngine(), f"onnxruntime {OrtEngine().version}", import_model(source, shapes=shapes)
    runner = engine.load(model, options)
    side = _Side(str(path or "model"), engine, label, runner, model, options)
    feed, data = _feed(runner, feeds, sources)
    profile, executed = side.profile(feed, rounds)
    timing = interleave({"a": runner}, feed, rounds=30, seconds=seconds, most=100_000)["a"]
    types = {c.name: c.op_type for c in profile.nodes}
    order = {str(n.name): i for i, n in enumerate(all_nodes(executed))}
    nodes = sorted(profile.nodes, key=lambda c: order.get(c.name, len(order)))
    groups = tuple(GroupTime(c.name, types[c.name], "", None, c.microseconds, 0.0, (c.op_type,)) for c in nodes)
    return ProfileResult((_model_time(side, profile, timing),), groups, options.threads, timing.rounds, data)


def _engine(path: Path) -> tuple[Engine, str]:
    if path.suffix == ".plan":
        raise ModelError(f"{path} is a TensorRT engine, which has no profile per operator here; use trtexec")
    backend = engine_backend(engine_of(path))
    return backend.engine, f"{backend.engine.name} {backend.engine.version}"


def _feed(runner: Runner, feeds: Calibration | None, sources: SourceOptions | None) -> tuple[Feeds, str]:
    if feeds is None:
        return random_feeds(runner.inputs, 1)[0], "random data"
    return read_feeds(runner.inputs, feeds, sources, 1)[0], "the first feed of the data"


def _model_time(side: _Side, profile: Profile, timing: Timing) -> ModelTime:
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for node in profile.nodes:
        times[node.op_type] += node.microseconds
        counts[node.op_type] += 1
    operators = [OperatorTime(op, counts[op], us, op in _CONVERSIONS) for op, us in times.items()]
    operators.sort(key=lambda o: -o.microseconds)
    return ModelTime(side.name, side.label, tuple(operators), profile.total, timing)


def _groups(pair: Pair, costs: Sequence[tuple[Profile, ir.Model]]) -> tuple[tuple[GroupTime, ...], tuple[str, ...]]:
    """Return the times of both models by origin, in the order of the network."""
    aligned = align(pair.given, pair.record)
    owners = _with_origins(Owners.of(aligned.graph, aligned.groups), aligned.graph, pair.given)
    before, after = (_times(profile, executed, owners) for profile, executed in costs)
    forms: Mapping[str, str] = {} if pair.record is None else pair.record.forms
    inputs = {str(v.name) for v in aligned.graph.graph.inputs}  # what quantizes an input belongs to no node
    order = {str(n.name): i for i, n in enumerate(all_nodes(aligned.graph))}
    names = sorted({*before, *after}, key=lambda n: -1 if n in inputs else order.get(n, len(order)))
    known = {g.name for g in aligned.groups}
    made = []
    for name in names:
        node, spent = owners.nodes.get(name), after.get(name, _Spent())
        operator = (
            node.op_type
            if node is not None
            else "input"
            if name in inputs
            else "/".join(spent.kernels or before.get(name, spent).kernels)
        )
        form = (forms.get(name, "float") if name in known else "float") if pair.record is not None else ""
        kernels = tuple(sorted(spent.kernels, key=lambda k: -spent.kernels[k]))
        first = before.get(name, _Spent()).total
        made.append(GroupTime(name, operator, form, first, spent.total, spent.conversions, kernels))
    strange = [n for n in names if n not in order and n not in inputs]
    note = f"{len(strange)} executed operators have no origin in MODEL: {', '.join(strange[:3])}" if strange else ""
    return tuple(made), (note,) if note else ()


def _with_origins(owners: Owners, graph: ir.Model, given: ir.Model) -> Owners:
    """Return an index that knows the nodes and values of the imported model, too, by the origins of canonical nodes.

    The float model runs as it was given, and an engine names a fused operator after any node that went into it.
    """
    groups, lone = dict(owners.groups), dict(owners.lone)
    results = {str(n.name): [str(v.name) for v in n.outputs] for n in all_nodes(given)}
    for book in (groups, lone):
        for node in all_nodes(graph):
            if (owner := book.get(str(node.name))) is None:
                continue
            for origin in origins(node):
                for name in (origin, *results.get(origin, ())):
                    if name not in groups and name not in lone:
                        book[name] = owner
    return Owners(groups, lone, owners.nodes)


@dataclass
class _Spent:
    """Microseconds of one origin: by the engine's operators, and those of conversions."""

    kernels: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.kernels.values())

    @property
    def conversions(self) -> float:
        return sum(us for kernel, us in self.kernels.items() if kernel in _CONVERSIONS)


def _times(profile: Profile, executed: ir.Model, owners: Owners) -> dict[str, _Spent]:
    """Return the times by origin; a conversion goes with who computes the value."""
    made: dict[str, _Spent] = defaultdict(_Spent)
    for node in profile.nodes:
        costs = attribute(Profile((node,)), executed, owners)
        name = next(iter((*costs.groups, *costs.others, *costs.conversions)), node.name)
        owner = owners.groups.get(name) or owners.lone.get(name) or name
        spent = made[owner].kernels
        spent[node.op_type] = spent.get(node.op_type, 0.0) + node.microseconds
    return made
