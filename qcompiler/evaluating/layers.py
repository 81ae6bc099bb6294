"""SQNR layer by layer: where the error of a compiled model is born, and where it grows.

Each value that both models have is looked at three times: as float computes it, as the compiled model has it, and as
float computes it from the values that the compiled model has in front of it. The last two differ by what is *born* in
the layer; the first and the last by what came with the inputs, which the layer may have made larger: it *grows* there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.decisions import Decisions
from qcompiler.engine import Array, Engine, EngineOptions, Feeds, Runner
from qcompiler.evaluating.intervals import Doubles
from qcompiler.evaluating.pair import Pair, align
from qcompiler.explaining.blame import Power
from qcompiler.explaining.blame_units import Unit, foreign_units, own_units
from qcompiler.explaining.stored_values import Numbers, stored_numbers
from qcompiler.ir.channels import channel_classes
from qcompiler.ir.graph import is_float, origins
from qcompiler.passes.smooth_activations import MARK
from qcompiler.pipeline.changed import FED, exposed, fed
from qcompiler.search.quality import CEILING

_AS_WRITTEN = EngineOptions(threads=1, optimize=False)
MOST_FEEDS = 8
"""Feeds that layers are measured on."""
MOST_HISTOGRAMS = 6
BINS = 120
ALIKE = 100.0
"""SQNR in dB from which on a difference is float arithmetic in another order, no quantization."""


@dataclass(frozen=True)
class LayerFigure:
    """One layer: what a quantized group hands on, or a float output of the model.

    Attributes:
        name: the group's or node's name, which is its origin in the canonical graph.
        operator: its operator.
        value: the float value.
        form: form of the group; empty in a model of another tool.
        own_db: SQNR of the error that is born here: float from the same inputs against the compiled value.
        carried_db: SQNR of the error that comes with the inputs: float from float inputs against float from these.
        accumulated_db: SQNR of the value against float, with everything that came before.
        inputs_db: least accumulated SQNR of the layers that it reads from; None at the front.
        clipped: share of the elements outside the stored range.
        reach: ends of the stored range; None where it is not stored as integers.
        origins: the nodes of the model as given behind it, where they are known.
    """

    name: str
    operator: str
    value: str
    form: str
    own_db: float
    carried_db: float
    accumulated_db: float
    inputs_db: float | None = None
    clipped: float = 0.0
    reach: tuple[float, float] | None = None
    origins: tuple[str, ...] = ()

    @property
    def growth_db(self) -> float:
        """Return by how much the error of the inputs grows here relative to the signal; 0 where nothing comes in."""
        if self.inputs_db is None or self.inputs_db >= ALIKE:
            return 0.0
        return self.inputs_db - self.carried_db


@dataclass(frozen=True)
class TensorHistogram:
    """How the values of one tensor lie, float and compiled.

    Attributes:
        name: of the value.
        edges: float64 [bins + 1].
        reference: elements of the float model per bin, int64 [bins].
        compiled: the same of the compiled model.
        reach: ends of the stored range; None where it is not stored as integers.
        clipped: share of the elements outside.
        step: distance of two stored values; 0 where there is more than one scale.
        db: SQNR of the value against float.
    """

    name: str
    edges: Doubles
    reference: Array
    compiled: Array
    reach: tuple[float, float] | None
    clipped: float
    step: float
    db: float


@dataclass(frozen=True)
class LayerTrace:
    """All layers in the order of the network.

    Attributes:
        layers: the layers.
        feeds: feeds that they were measured on.
        histograms: of the tensors in which most error is born.
        unaligned: quantized groups of which nothing has a known name in the compiled model.
        note: why there is nothing, or what limits it.
    """

    layers: tuple[LayerFigure, ...] = ()
    feeds: int = 0
    histograms: tuple[TensorHistogram, ...] = ()
    unaligned: tuple[str, ...] = ()
    note: str = ""

    @property
    def born(self) -> tuple[LayerFigure, ...]:
        """Return the layers that add error, the one that adds most first."""
        return tuple(sorted((f for f in self.layers if f.own_db < ALIKE), key=lambda f: f.own_db))

    @property
    def grown(self) -> tuple[LayerFigure, ...]:
        """Return the layers in which the error of the inputs grows by 0.5 dB or more, the most first."""
        return tuple(sorted((f for f in self.layers if f.growth_db >= 0.5), key=lambda f: -f.growth_db))


def trace_layers(pair: Pair, feeds: Sequence[Feeds], most: int = MOST_FEEDS) -> LayerTrace:
    """Return where error is born and where it grows.

    Args:
        pair: both models; only of an ONNX model can single values be seen.
        feeds: evaluation feeds; the first ``most`` are used.
        most: number of feeds.

    Raises:
        ModelError: an engine refuses a graph, or the decisions record is of another model.
        CalibrationError: a feed does not fit.
    """
    if pair.compiled is None:
        kind = pair.path.suffix or "folder"
        return LayerTrace(note=f"layers are not shown: single values of a {kind} cannot be read, only of an .onnx")
    aligned = align(pair.given, pair.record)
    graph, compiled = aligned.graph, pair.compiled
    if pair.record is None:
        units = foreign_units(graph, compiled)
        note = "no decisions record beside the model: values were compared by name"
    else:
        units = own_units(graph, compiled, aligned.groups, pair.record.forms)
        note = ""
    units, more = _comparable(units, graph, pair)
    if not units:
        return LayerTrace(note=note or "nothing of the model is quantized under a name that the float model has")
    tracer = _Tracer(OrtEngine(), graph, compiled, units)
    chosen = list(feeds[:most])
    trace = tracer.run(chosen)
    met = {n for f in tracer.units.values() for n in (f.name, *f.others)}
    forms = {} if pair.record is None else pair.record.forms
    unaligned = tuple(n for n, form in forms.items() if form != "float" and n not in met)
    return replace(trace, unaligned=unaligned, note="; ".join(t for t in (note, more) if t))


def _comparable(units: Sequence[Unit], graph: ir.Model, pair: Pair) -> tuple[tuple[Unit, ...], str]:
    """Return the units whose values are the same in both models, and the float outputs of the model as further ones."""
    scaled = set() if pair.record is None else _scaled(graph, pair.record)
    kept = [u for u in units if u.value not in scaled and not u.value.endswith(MARK)]
    note = ""
    if len(kept) < len(units):
        left = len(units) - len(kept)
        note = f"{left} values that a treatment scales are left out; their error counts where they are read"
    there = {u.value for u in kept}
    computed = {str(v.name) for n in (pair.compiled.graph if pair.compiled is not None else ()) for v in n.outputs}
    for value in graph.graph.outputs:
        node = value.producer()
        name = str(value.name)
        if node is not None and is_float(value) and name in computed and name not in there:
            kept.append(Unit(str(node.name), node.op_type, name, "", "float"))
    return tuple(kept), note


def _scaled(graph: ir.Model, record: Decisions) -> set[str]:
    """Return the values whose channels a treatment of the build scaled, which other numbers stand for than in float."""
    classes = record.treatments.get("equalize-layers", {})
    found = {str(v.name) for each in channel_classes(graph) if each.name in classes for v, _ in each.values}
    return found | set(record.treatments.get("smooth-activations", {}))


@dataclass
class _Sums:
    """What is summed up of one unit over the feeds."""

    own: Power = field(default_factory=Power)
    carried: Power = field(default_factory=Power)
    accumulated: Power = field(default_factory=Power)
    clipped: int = 0
    elements: int = 0
    low: float = np.inf
    high: float = -np.inf


class _Tracer:
    """Runs both models as they are written and compares values."""

    def __init__(self, engine: Engine, graph: ir.Model, compiled: ir.Model, units: Sequence[Unit]) -> None:
        self.engine, self.graph, self.compiled = engine, graph, compiled
        self.numbers: dict[str, Numbers] = stored_numbers(compiled)
        by_value = {u.value: u for u in units}
        order = {str(v.name): i for i, n in enumerate(graph.graph) for v in n.outputs}
        self.units = {n: by_value[n] for n in sorted((n for n in by_value if n in order), key=order.__getitem__)}
        self.sums = {name: _Sums() for name in self.units}

    def run(self, feeds: Sequence[Feeds]) -> LayerTrace:
        names = list(self.units)
        reference, quantized = self._runners(names)
        locally: Runner | None = None
        for feed in feeds:
            wanted = reference.run(_fitting(reference, feed))
            here = self._compiled_values(quantized.run(_fitting(quantized, feed)), wanted)
            if locally is None:
                locally = self.engine.load(fed(self.graph, list(here), here), _AS_WRITTEN)
            inlets = {n + FED: a.astype(wanted[n].dtype) for n, a in here.items()}
            local = locally.run({**_fitting(locally, feed), **inlets})
            for name, array in here.items():
                self._add(name, wanted[name], local[name], array)
        seen = [n for n in names if self.sums[n].elements]
        parents = _parents(self.graph, seen)
        figures = tuple(self._figure(n, parents[n]) for n in seen)
        stored = [f for f in figures if f.own_db < ALIKE]
        worst = sorted(stored, key=lambda f: f.own_db)[:MOST_HISTOGRAMS]
        return LayerTrace(figures, len(feeds), self._histograms(worst, feeds))

    def _runners(self, names: Sequence[str]) -> tuple[Runner, Runner]:
        shown = [self.units[n].stored or n for n in names]
        return (
            self.engine.load(exposed(self.graph, names), _AS_WRITTEN),
            self.engine.load(exposed(self.compiled, shown), _AS_WRITTEN),
        )

    def _compiled_values(self, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, Array]:
        """Return the compiled model's values as floats, where they have the float model's shape."""
        made = {}
        for name, unit in self.units.items():
            array = found.get(unit.stored or name)
            if not isinstance(array, np.ndarray) or name not in wanted:
                continue  # not there, or a sequence: there is no one array to compare
            floats = self.numbers[unit.stored].floats(array) if unit.stored else array.astype(np.float64)
            if floats.shape == wanted[name].shape:
                made[name] = np.asarray(floats)
        return made

    def _add(self, name: str, wanted: Array, local: Array, array: Array) -> None:
        sums, unit = self.sums[name], self.units[name]
        sums.own.add(local, array)
        sums.carried.add(wanted, local)
        sums.accumulated.add(wanted, array)
        sums.elements += array.size
        for values in (wanted, array):
            fine = values[np.isfinite(values)]
            if fine.size:
                sums.low, sums.high = min(sums.low, float(fine.min())), max(sums.high, float(fine.max()))
        if unit.stored:
            sums.clipped += int(self.numbers[unit.stored].clips(local).sum())

    def _figure(self, name: str, parents: Iterable[str]) -> LayerFigure:
        unit, sums = self.units[name], self.sums[name]
        alike = sum(u.name == unit.name for u in self.units.values()) > 1  # an If or a Loop hands on several values
        behind = [self.sums[p].accumulated.db for p in parents]
        named = [n for n in self.graph.graph if n.name == unit.name]
        return LayerFigure(
            name=f"{unit.name} ({name})" if alike else unit.name,
            operator=unit.operator,
            value=name,
            form=unit.form,
            own_db=sums.own.db,
            carried_db=sums.carried.db,
            accumulated_db=sums.accumulated.db,
            inputs_db=min(behind) if behind else None,
            clipped=sums.clipped / max(sums.elements, 1),
            reach=self.numbers[unit.stored].reach if unit.stored else None,
            origins=tuple(dict.fromkeys(o for n in named for o in origins(n))),
        )

    def _histograms(self, worst: Sequence[LayerFigure], feeds: Sequence[Feeds]) -> tuple[TensorHistogram, ...]:
        """Count the values of some tensors, in bins over all that either model has; the feeds run once more."""
        if not worst:
            return ()
        names = [f.value for f in worst]
        reference, quantized = self._runners(names)
        steps = {n: self._step(n) for n in names}
        edges = {n: _edges(self.sums[n].low, self.sums[n].high, steps[n]) for n in names}
        counts = {n: (np.zeros(e.size - 1, np.int64), np.zeros(e.size - 1, np.int64)) for n, e in edges.items()}
        for feed in feeds:
            wanted = reference.run(_fitting(reference, feed), names)
            here = self._compiled_values(quantized.run(_fitting(quantized, feed)), wanted)
            for name, array in here.items():
                for place, values in enumerate((wanted[name], array)):
                    counts[name][place][:] += np.histogram(values[np.isfinite(values)].astype(np.float64), edges[name])[
                        0
                    ]
        made = []
        for figure in worst:
            name = figure.value
            made.append(TensorHistogram(
                name, edges[name], *counts[name], figure.reach, figure.clipped, steps[name], figure.accumulated_db
            ))  # fmt: skip
        return tuple(made)

    def _step(self, name: str) -> float:
        """Return the distance of two stored values; 0 where there are several scales, or none."""
        stored = self.units[name].stored
        scale = self.numbers[stored].scale if stored else np.zeros(0)
        return float(scale.reshape(-1)[0]) if scale.size == 1 else 0.0


def _edges(low: float, high: float, step: float) -> Doubles:
    """Return the ends of about `BINS` bins; each holds as many stored values as any other, so that none looks empty."""
    if not low < high:
        low, high = low - 0.5, high + 0.5
    levels = (high - low) / step if step > 0 else np.inf
    if not 2.0 <= levels < 1e6:
        return np.linspace(low, high, BINS + 1)
    width = max(1, int(np.ceil(levels / BINS))) * step
    first = (np.floor(low / step) - 0.5) * step
    return np.asarray(first + width * np.arange(int(np.ceil((high - first) / width)) + 1))


def _fitting(runner: Runner, feed: Feeds) -> dict[str, Array]:
    known = {i.name for i in runner.inputs}
    return {name: array for name, array in feed.items() if name in known}


def _parents(model: ir.Model, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each of some values, those of them that it is computed from without another one between."""
    wanted = set(names)
    nearest: dict[ir.Value, frozenset[str]] = {}
    found: dict[str, tuple[str, ...]] = {}
    for node in model.graph:  # a graph lists producers before their readers
        read = [*(v for v in node.inputs if v is not None), *_captured(node)]
        behind: frozenset[str] = frozenset().union(
            *(frozenset({str(v.name)}) if v.name in wanted else nearest.get(v, frozenset()) for v in read)
        )
        for value in node.outputs:
            nearest[value] = behind
            if value.name in wanted:
                found[str(value.name)] = tuple(sorted(behind))
    return found


def _captured(node: ir.Node) -> list[ir.Value]:
    """Return the outer values that the bodies of a node read."""
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [v for body in bodies for inner in body.all_nodes() for v in inner.inputs if v is not None]


def worst_db(trace: LayerTrace) -> float:
    """Return the least accumulated SQNR of all layers."""
    return min((f.accumulated_db for f in trace.layers), default=CEILING)
