"""Empirical bias correction as a treatment: measure the shift of each product's mean, in program order.

Nagel et al. 2019 (arXiv:1906.04721), appendix D, and Finkelstein et al. 2019, Fighting Quantization Bias With Bias
(arXiv:1906.03193): a channel's bias takes back E[quantized] - E[float], measured with what was corrected in front of it
already. Both means are taken behind the Relu or Clip that follows: what it stops has errors of its own, and a
correction of those would move what it lets through (docs/treatments.md has the figures of a network with ReLU6).
The quantized model is run once, product by product with all feeds side by side: what a product gives is corrected where
it is, and the rest runs on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.observe import PIECE_BYTES, default_memory
from qcompiler.calibration.segments import SCAN_WITHOUT_BATCH, Block, Cutter, Segment, segment_model
from qcompiler.calibration.stepper import Stepper
from qcompiler.engine import Array, Engine, EngineOptions, EngineValue, Feeds
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import const_array, consumers, is_op, rank_of
from qcompiler.passes.correct_bias import correctable, correction_key
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.targets.groups import Group
from qcompiler.treatments.treatment import Case, Parameters, counted, whole
from qcompiler.workshop import Workshop

MOST_FEEDS = 64
"""Feeds that means are taken over at most."""
LEAST_FEEDS = 4
"""Feeds from which on their differences say how sure a mean is."""
LEAST_SHARE = 1e-3
"""A product without a bias gets one only for a shift of at least this share of its output's standard deviation."""

CERTAINTY = 2.0
"""Standard errors below which a shift is taken for chance."""
LEAST_PASSING = 0.05
"""Share of a channel's numbers that pass the Relu or Clip behind it; with fewer there is no telling."""
ALL = (-np.inf, np.inf)

Float = npt.NDArray[np.float64]
Look = Callable[[ir.Value, list[Array]], list[Array]]


@dataclass(frozen=True)
class CorrectBiases:
    """Add to each product's bias what quantization takes from the mean of its channels.

    Parameters: what is added per channel, by group and form (`qcompiler.passes.correct_bias.correction_key`).

    Attributes:
        appends: whether a MatMul without an Add gets one, which takes time.
    """

    appends: bool = True
    name: str = "correct-bias"
    least_gain_db: float = 0.1
    costs_time: bool = False

    def choose(self, case: Case) -> Parameters:
        """Return the corrections of all variants; of two variants with one form of a group the first one's."""
        found: Parameters = {}
        for forms in case.variants.values():
            for key, correction in measure_corrections(case.workshop, forms, case.feeds, appends=self.appends).items():
                found.setdefault(key, correction)
        return found

    def parts(self, parameters: Parameters) -> list[Parameters]:
        """Return all of it: it is tried together."""
        return whole(parameters)

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        """Return how many places are touched."""
        return counted(parameters)

    def apply(self, case: Case, parameters: Parameters) -> Case:
        """Return the case over a state with the corrections."""
        state = case.workshop.base.clone()
        state.quantized = {}  # by names, which corrected biases share
        state.bias_corrections = {key: tuple(map(float, numbers)) for key, numbers in parameters.items()}
        return replace(case, workshop=replace(case.workshop, base=state))


def measure_corrections(
    workshop: Workshop,
    forms: Mapping[str, Form],
    feeds: Iterable[Feeds],
    *,
    most: int = MOST_FEEDS,
    memory: int | None = None,
    appends: bool = True,
) -> dict[str, list[float]]:
    """Return what each product's bias lacks in the given forms, by group and form.

    Args:
        workshop: builds the model; corrections that its base state has are left out of account.
        forms: form per group.
        feeds: real data, of which the first are used.
        most: feeds at most.
        memory: bytes that the values of all feeds may take at a time; fewer feeds are used where they would take more.
        appends: whether a MatMul without an Add is corrected.

    Raises:
        CalibrationError: there is no feed.
    """
    state = _quantized(workshop, forms)
    watched = {n: each for n, each in _watched(state, workshop).items() if appends or not _needs_add(each[0])}
    if not watched:
        return {}
    taken = [feed for _, feed in zip(range(most), feeds, strict=False)]
    if not taken:
        raise CalibrationError("the calibration source is empty; give at least one feed")
    run = _Run.of(state.model, [value for _, value in watched.values()], workshop.truth)
    count = run.fitting(taken, memory or default_memory() // 2)
    passing = {name: _passing(group.float_result) for name, (group, _) in watched.items()}
    wanted = _float_means(
        workshop, {name: group.float_result for name, (group, _) in watched.items()}, passing, taken[:count]
    )
    names = {value: name for name, (_, value) in watched.items()}
    found: dict[str, list[float]] = {}

    def correct(value: ir.Value, arrays: list[Array]) -> list[Array]:
        name = names[value]
        axis = _channel_axis(watched[name][0])
        shift = _shift(wanted[name], arrays, axis, passing[name]).astype(np.float32)
        least = LEAST_SHARE * wanted[name].deviation if _is_bare(watched[name][0]) else 0.0
        if not np.isfinite(shift).all() or np.abs(shift).max(initial=0.0) < least:
            return arrays
        found[correction_key(name, state.plan.form(name))] = [float(x) for x in shift]
        return [a + shift.reshape(_along(a.ndim, axis)) for a in arrays]

    run.go(taken[:count], correct)
    return found


def _passing(value: ir.Value) -> tuple[float, float]:
    """Return between which numbers a value passes the Relu or Clip that alone reads it; all if there is none."""
    readers = consumers(value)
    if len(readers) != 1 or value.is_graph_output():
        return ALL
    if is_op(readers[0], "Relu"):
        return 0.0, np.inf
    if not is_op(readers[0], "Clip"):
        return ALL
    ends = [const_array(v) if v is not None else np.array(end) for v, end in zip(_ends(readers[0]), ALL, strict=True)]
    if any(end is None or end.size != 1 for end in ends):
        return ALL
    low, high = (float(end.reshape(-1)[0]) for end in ends if end is not None)
    return low, high


def _ends(clip: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    given = [*clip.inputs[1:3], None, None]
    return given[0], given[1]


def _shift(wanted: _Mean, arrays: list[Array], axis: int, passing: tuple[float, float]) -> Float:
    """Return what to add to each channel so that its mean behind the Relu or Clip is that of the float model.

    In front of it the mean is also that of numbers of which nothing is left behind it, and whose errors are others: a
    correction of those moves the numbers that do pass. One step of Newton's method from no correction at all.
    """
    found = _mean([_within(a, passing) for a in arrays], axis)
    sure = sure_shift(wanted.feeds - found.feeds, wanted.rows)
    if passing == ALL:
        return sure
    inside = _mean([((a > passing[0]) & (a < passing[1])).astype(np.float32) for a in arrays], axis)
    share = (inside.feeds * inside.rows[:, None]).sum(axis=0) / max(1.0, float(inside.rows.sum()))
    return np.where(share >= LEAST_PASSING, sure / np.maximum(share, LEAST_PASSING), 0.0)


def _within(array: Array, passing: tuple[float, float]) -> Array:
    return array if passing == ALL else np.clip(array, *passing, dtype=np.float32)


def _needs_add(group: Group) -> bool:
    return group.root.op_type == "MatMul" and group.bias is None


def _is_bare(group: Group) -> bool:
    """Return whether a product has no bias."""
    return group.bias is None and not (len(group.root.inputs) > 2 and group.root.inputs[2] is not None)


def _quantized(workshop: Workshop, forms: Mapping[str, Form]) -> CompileState:
    """Return the QDQ state of a choice of forms, without the corrections that the base state has."""
    state = workshop.base.clone()
    state.bias_corrections = {}
    state.engine_forms = dict(workshop.engine_forms)
    state.forms = {
        g.name: "float" if g.name in workshop.refused else forms.get(g.name, "float") for g in workshop.groups
    }
    passes = workshop.passes(())
    upto = next(i for i, step in enumerate(passes) if isinstance(step, InsertQdq))
    Pipeline(passes[: upto + 1]).run(state)
    return state


def _watched(state: CompileState, workshop: Workshop) -> dict[str, tuple[Group, ir.Value]]:
    """Return, per quantized product of the main graph, its group in the FLOAT graph and its result in the QDQ graph."""
    nodes = {str(node.name): node for node in state.model.graph}
    found = {}
    for group in workshop.groups:
        node = nodes.get(str((group.bias or group.root).name))
        if node is not None and state.plan.form(group.name) != "float" and correctable(group):
            found[group.name] = (group, node.outputs[0])
    return found


@dataclass(frozen=True)
class _Mean:
    """Standard deviation over everything, mean per channel and rows of each feed."""

    deviation: float
    feeds: Float
    rows: Float


def sure_shift(differences: Float, rows: Float) -> Float:
    """Return by how much each channel's mean is off, less what may be chance between feeds.

    The share of a shift that is kept is 1 - (c se / shift)^2 (James and Stein's shrinkage, channel by channel), with
    the standard error from how much the shift differs between feeds, and c = `CERTAINTY`.

    Args:
        differences: float mean - quantized mean of each feed, [feeds, channels].
        rows: rows behind each feed's means, [feeds].

    Returns:
        float64 [channels].
    """
    weight = (rows / max(1.0, float(rows.sum())))[:, None]
    shift = (weight * differences).sum(axis=0)
    if len(rows) < LEAST_FEEDS:
        return np.asarray(shift)
    error = (weight * np.square(differences - shift)).sum(axis=0) / (len(rows) - 1)
    return np.asarray(shift * np.maximum(0.0, 1.0 - CERTAINTY**2 * error / np.maximum(np.square(shift), 1e-30)))


def _float_means(
    workshop: Workshop,
    values: Mapping[str, ir.Value],
    passing: Mapping[str, tuple[float, float]],
    feeds: list[Feeds],
) -> dict[str, _Mean]:
    """Return the mean per channel of each product's result in the float model, behind its Relu or Clip."""
    group_of = {str(value.name): name for name, value in values.items()}
    axes = {g.name: _channel_axis(g) for g in workshop.groups if g.name in values}
    kept: dict[str, list[tuple[Float, float, int]]] = {name: [] for name in values}

    def sink(name: str, array: Array) -> None:
        group = group_of[name]
        kept[group].append(_sums(_within(array, passing[group]), axes[group]))

    options = EngineOptions(threads=workshop.options.threads, optimize=False, shared_pool=True)
    stepper = Stepper(workshop.base.model, frozenset(group_of), workshop.truth, options, PIECE_BYTES)
    for feed in feeds:
        stepper.run(feed, sink)
    return {name: _joined(parts) for name, parts in kept.items()}


def _joined(parts: list[tuple[Float, float, int]]) -> _Mean:
    rows = max(1, sum(count for _, _, count in parts))
    total = np.sum([s for s, _, _ in parts], axis=0) / rows
    power = sum(p for _, p, _ in parts) / rows / max(1, total.size)
    deviation = float(np.sqrt(max(0.0, power - float(np.square(total).mean()))))
    feeds = np.stack([s / max(1, count) for s, _, count in parts])
    return _Mean(deviation, feeds, np.array([float(count) for _, _, count in parts]))


def _mean(arrays: list[Array], axis: int) -> _Mean:
    return _joined([_sums(array, axis) for array in arrays])


def _sums(array: Array, axis: int) -> tuple[Float, float, int]:
    """Return the sum per channel, the sum of squares and the number of rows."""
    wide = array.astype(np.float32, copy=False)
    channels = array.shape[axis]
    if axis == -1:
        total = wide.reshape(-1, channels).sum(axis=0, dtype=np.float64)
    else:  # [batch, channels, ...]: along what is contiguous NumPy adds float32 numbers in pairs
        total = wide.reshape(array.shape[0], channels, -1).sum(axis=2).sum(axis=0, dtype=np.float64)
    flat = wide.reshape(-1)
    return total, float(flat @ flat), array.size // max(1, channels)


def _channel_axis(group: Group) -> int:
    """Return the channel axis of a product's result, counted from the end."""
    return (
        1 - (rank_of(group.root.outputs[0]) or rank_of(group.root.inputs[1]) or 2)
        if group.root.op_type == "Conv"
        else -1
    )


def _along(rank: int, axis: int) -> tuple[int, ...]:
    shape = [1] * rank
    shape[axis] = -1
    return tuple(shape)


@dataclass
class _Run:
    """A model cut behind each watched value, run on all feeds piece by piece."""

    model: ir.Model
    engine: Engine
    watched: frozenset[ir.Value]
    program: Block
    options: EngineOptions = field(default_factory=lambda: EngineOptions(threads=1, optimize=False, shared_pool=True))

    @staticmethod
    def of(model: ir.Model, values: list[ir.Value], engine: Engine) -> _Run:
        names = {str(v.name): 1 for v in values}
        opset = model.graph.opset_imports.get("", SCAN_WITHOUT_BATCH)
        # A limit of 0 bytes makes every watched value end a piece.
        cutter = Cutter(frozenset(names), names, 0, opset)
        return _Run(model, engine, frozenset(values), cutter.block(model.graph, needed=()))

    def fitting(self, feeds: list[Feeds], memory: int) -> int:
        """Return how many feeds may be run side by side, by what the first one takes."""
        most = self.go(feeds[:1], lambda value, arrays: arrays)
        return max(1, min(len(feeds), memory // max(1, most)))

    def go(self, feeds: list[Feeds], look: Look) -> int:
        """Run all feeds; hand what a watched value is in all of them to ``look`` and go on with what it returns.

        Returns:
            The bytes that values of all feeds took at most at a time.
        """
        live: list[dict[ir.Value, EngineValue]] = [
            {v: self.engine.value(np.asarray(feed[str(v.name)])) for v in self.model.graph.inputs} for feed in feeds
        ]
        sizes: dict[ir.Value, int] = {}
        most = 0
        for step, dying in zip(self.program.steps, self.program.dying, strict=True):
            segment = step if isinstance(step, Segment) else step.whole
            if segment.outputs:
                self._run_segment(segment, live, sizes)
                most = max(most, sum(sizes.values()))
                for value in segment.outputs:
                    if value in self.watched:
                        made = look(value, [scope[value].array() for scope in live])
                        for scope, array in zip(live, made, strict=True):
                            scope[value] = self.engine.value(np.ascontiguousarray(array))
            for value in dying:
                sizes.pop(value, None)
                for scope in live:
                    scope.pop(value, None)
        return most

    def _run_segment(
        self, segment: Segment, live: list[dict[ir.Value, EngineValue]], sizes: dict[ir.Value, int]
    ) -> None:
        runners = {}
        for scope in live:
            values = {str(v.name): self._value(v, scope) for v in segment.inputs}
            types = tuple(repr(v.type) for v in values.values())
            if types not in runners:
                model = segment_model(segment, self.model, {n: v.type for n, v in values.items()})
                runners[types] = self.engine.load(model, self.options)
            made = runners[types].run_values(values, [str(v.name) for v in segment.outputs])
            for value in segment.outputs:
                scope[value] = made[str(value.name)]
                sizes[value] = sizes.get(value, 0) + _bytes(scope[value])

    def _value(self, value: ir.Value, scope: Mapping[ir.Value, EngineValue]) -> EngineValue:
        if value in scope:
            return scope[value]
        if value.const_value is None:
            raise CalibrationError(f"value {value.name!r} has not been computed; the graph is not in program order")
        return self.engine.value(value.const_value.numpy())


def _bytes(value: EngineValue) -> int:
    return int(value.array().nbytes) if isinstance(value.type, ir.TensorType) else 0
