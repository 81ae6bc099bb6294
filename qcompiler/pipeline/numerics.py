"""How far two graphs are apart, in the units of a numeric contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.engine import Array, Engine, EngineOptions, Feeds, Runner
from qcompiler.ir.graph import ORIGIN, attr_int, const_array, consumers, is_op
from qcompiler.pipeline.changed import FED, exposed, fed, find_cuts
from qcompiler.pipeline.contract import Contract, Exact, Lossy, Reassociates, WithinStep

REFERENCE = EngineOptions(threads=1, optimize=False)
"""Both sides of a comparison run as written."""

_KEEPS_STEP = (
    "Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Relu", "Clip", "MaxPool", "Slice",
    "Gather", "Split", "Expand", "Tile", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
_FALLBACK_STEPS = 255
_ROUNDINGS = 4
"""How many roundings of its own type a reassociated result may differ by (matters below float32 only)."""
_STEP_SLACK = 1e-3
"""Share of a step by which float32 arithmetic on both sides may exceed a whole number of steps."""


@dataclass(frozen=True)
class ValueFigure:
    """The error at one value, both graphs fed the same inputs.

    Attributes:
        value: name of the value.
        node: the node that computes it in the later graph.
        op_type: that node's operator.
        origins: the imported nodes it comes from.
        error: in the contract's unit: elements that differ (Exact, Lossy), largest difference over largest
            magnitude (Reassociates), largest difference in quantization steps (WithinStep).
        bound: what the contract allows; None is no bound.
        sqnr_db: signal to noise in dB over all feeds; inf if equal.
    """

    value: str
    node: str
    op_type: str
    origins: tuple[str, ...]
    error: float
    bound: float | None
    sqnr_db: float

    @property
    def exceeded(self) -> bool:
        """Return whether the error is over the bound (an error that is not a number is)."""
        return self.bound is not None and not self.error <= self.bound

    @property
    def excess(self) -> float:
        """Return error over bound, for ordering; 0 without a bound."""
        if self.bound is None:
            return 0.0
        return self.error / self.bound if self.bound > 0 else math.inf if self.error > 0 else 0.0


@dataclass
class Noise:
    """Signal and noise power of one value, summed over feeds."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Array, actual: Array) -> None:
        """Add one pair; arrays that cannot be subtracted count as all noise unless equal."""
        if reference.shape != actual.shape or reference.dtype.kind in "OSU":
            self.noise += 0.0 if np.array_equal(reference, actual) else math.inf
            return
        wanted = _wide(reference)
        with np.errstate(over="ignore"):
            self.signal += float(np.sum(np.where(np.isfinite(wanted), wanted, 0.0) ** 2))
        if _same_bytes(reference, actual):
            return
        found = _wide(actual)
        with np.errstate(invalid="ignore", over="ignore"):
            same = (wanted == found) | (np.isnan(wanted) & np.isnan(found))
            difference = np.where(same, 0.0, wanted - found)
            self.noise += float(np.sum(difference**2)) if np.isfinite(difference).all() else math.inf

    @property
    def sqnr_db(self) -> float:
        """Return 10 log10(signal / noise): inf without noise, -inf without signal."""
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or math.isinf(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


def sqnr_db(reference: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Return the signal to quantization noise ratio of each output in dB, pooled over feeds, never over outputs.

    Args:
        reference: outputs by name, one mapping per feed.
        actual: outputs by name of the other model, in the same order; every reference output must be there.
    """
    noises: dict[str, Noise] = {}
    for wanted, found in zip(reference, actual, strict=True):
        for name, array in wanted.items():
            noises.setdefault(name, Noise()).add(array, found[name])
    return {name: noise.sqnr_db for name, noise in noises.items()}


def run_outputs(engine: Engine, model: ir.Model, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """Run a model as written on every feed and return its tensor outputs.

    Raises:
        ModelError: the engine refuses the model.
        CalibrationError: a feed does not fit.
    """
    runner = engine.load(model, REFERENCE)
    return [_run(runner, feed) for feed in feeds]


def compare_changed(
    before: ir.Model, after: ir.Model, engine: Engine, feeds: Sequence[Feeds], contract: Contract
) -> tuple[ValueFigure, ...]:
    """Measure every changed region of ``after`` on the inputs it has in ``before``, in program order.

    A pass that edits a node in place can give a name another meaning (a Conv that took in its BatchNorm keeps the
    name of its output). So where a value is over the bound and a reader of it vanished, a second run does not cut
    there; only if something is still over its bound do the first figures stand.

    Raises:
        ModelError: the engine refuses one of the graphs.
        CalibrationError: a feed does not fit.
    """
    cuts = find_cuts(before, after)
    if not cuts.compared:
        return ()
    pair = _Pair(before, after, engine, feeds, contract)
    figures = pair.measure(cuts.compared, cuts.fed_only)
    doubted = {f.value for f in figures if f.exceeded} & _with_vanished_reader(before, after)
    if doubted:
        kept = tuple(name for name in cuts.compared if name not in doubted)
        uncut = tuple(dict.fromkeys((*kept, *_shared_outputs(before, after))))
        second = pair.measure(uncut, cuts.fed_only)
        if not any(f.exceeded for f in second):
            return second
    return figures


def _with_vanished_reader(before: ir.Model, after: ir.Model) -> set[str]:
    """Return the values one of whose readers computed something that the later graph has no name for."""
    left = {v.name for node in after.graph for v in node.outputs}
    return {
        value.name
        for node in before.graph
        for value in node.outputs
        if value.name and any(o.name not in left for reader in consumers(value) for o in reader.outputs)
    }


def _shared_outputs(before: ir.Model, after: ir.Model) -> tuple[str, ...]:
    old = {v.name for v in before.graph.outputs}
    return tuple(
        str(v.name)
        for v in after.graph.outputs
        if v.name in old and v.producer() is not None and (v.type is None or isinstance(v.type, ir.TensorType))
    )


@dataclass(frozen=True)
class _Pair:
    """Two graphs and how they are to be compared."""

    before: ir.Model
    after: ir.Model
    engine: Engine
    feeds: Sequence[Feeds]
    contract: Contract

    def measure(self, compared: Sequence[str], fed_only: Sequence[str]) -> tuple[ValueFigure, ...]:
        names = (*compared, *fed_only)
        first = self.engine.load(exposed(self.before, names), REFERENCE)
        second: Runner | None = None
        meters: dict[str, _Meter] = {}
        for feed in self.feeds:
            wanted = _run(first, feed, names)
            names = tuple(n for n in names if n in wanted)
            if second is None:
                second = self.engine.load(fed(self.after, names, wanted), REFERENCE)
            found = _run(second, {**feed, **{n + FED: wanted[n] for n in names}}, names)
            for name in compared:
                if name in wanted and name in found and wanted[name].dtype == found[name].dtype:
                    if name not in meters:
                        meters[name] = _Meter(self.contract, quantization_step(name, self.before, self.after))
                    meters[name].add(wanted[name], found[name])
        places = {v.name: node for node in self.after.graph for v in node.outputs}
        return tuple(meter.figure(name, places[name]) for name, meter in meters.items())


def _run(runner: Runner, feed: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
    known = {info.name for info in runner.inputs}
    results = runner.run({name: array for name, array in feed.items() if name in known}, outputs)
    # Sequences and optionals come back as lists; they are not compared.
    return {name: array for name, array in results.items() if isinstance(array, np.ndarray)}


@dataclass(frozen=True)
class Step:
    """Size of a quantization step: [] or [channels] along ``axis``."""

    scale: npt.NDArray[np.float64]
    axis: int = 0

    def over(self, array: Array) -> npt.NDArray[np.float64]:
        """Return the step shaped so that it broadcasts against ``array``."""
        if self.scale.ndim == 0 or self.scale.size == 1:
            return self.scale.reshape(())
        if self.scale.ndim > 1 or not -array.ndim <= self.axis < array.ndim:
            return np.asarray(self.scale.max())
        shape = [1] * array.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)


def quantization_step(name: str, *models: ir.Model) -> Step | None:
    """Return the constant scale of the Q or DQ that writes or reads a value in any of the models, or None."""
    for model in models:
        value = next((v for node in model.graph for v in node.outputs if v.name == name), None)
        if value is not None and (found := _step_of(value)) is not None:
            return found
    return None


def _step_of(value: ir.Value) -> Step | None:
    node, moved = value.producer(), False
    while node is not None:
        if is_op(node, "DequantizeLinear", "QuantizeLinear"):
            found = _scale(node)
            return None if found is None or (moved and found.scale.size > 1) else found
        if not is_op(node, *_KEEPS_STEP) or not node.inputs or node.inputs[0] is None:
            break
        node, moved = node.inputs[0].producer(), True
    for reader in consumers(value):
        if is_op(reader, "QuantizeLinear") and reader.inputs[0] is value and (found := _scale(reader)) is not None:
            return found
    return None


def _scale(node: ir.Node) -> Step | None:
    array = const_array(node.inputs[1])
    return None if array is None else Step(np.asarray(array, np.float64), attr_int(node, "axis", 1))


def _wide(array: Array) -> npt.NDArray[np.float64]:
    """Return float64 (complex parts side by side)."""
    if np.iscomplexobj(array):
        return np.stack([array.real, array.imag]).astype(np.float64)
    return np.asarray(array).astype(np.float64)


class _Meter:
    """Collects the error at one value over feeds."""

    def __init__(self, contract: Contract, step: Step | None) -> None:
        self.contract, self.step = contract, step
        self.noise = Noise()
        self.worst, self.low, self.high = 0.0, 0.0, 0.0
        self.differing = 0
        self.bound_dtype = np.dtype(np.float32)

    def add(self, reference: Array, actual: Array) -> None:
        self.noise.add(reference, actual)
        self.bound_dtype = reference.dtype
        if reference.shape != actual.shape:
            self.differing, self.worst = self.differing + max(reference.size, 1), math.inf
            return
        if reference.size == 0 or reference.dtype.kind in "OSU":
            self.differing += _differing(reference, actual)
            return
        wanted = _wide(reference)
        finite = wanted[np.isfinite(wanted)]
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        if _same_bytes(reference, actual):
            return
        self.differing += _differing(reference, actual)
        found = _wide(actual)
        with np.errstate(invalid="ignore"):
            same = (wanted == found) | (np.isnan(wanted) & np.isnan(found))
            distance = np.where(same, 0.0, np.abs(wanted - found))
        if isinstance(self.contract, WithinStep) and self.step is not None and _is_float(reference.dtype):
            distance = distance / self.step.over(reference)
        self.worst = max(self.worst, float(distance.max()) if np.isfinite(distance).all() else math.inf)

    def error(self) -> tuple[float, float | None]:
        """Return error and bound in the contract's unit."""
        contract, integers = self.contract, not _is_float(self.bound_dtype)
        if isinstance(contract, Exact):
            return float(self.differing), 0.0
        if isinstance(contract, Lossy):
            return float(self.differing), None
        if self.bound_dtype.kind in "OSU":
            return float(self.differing), 0.0
        if isinstance(contract, Reassociates):
            if integers:
                # A value on the border of two steps may fall on either side; wider integers are indices.
                return self.worst, 1.0 if self.bound_dtype.itemsize == 1 and self.bound_dtype.kind != "b" else 0.0
            return _ratio(self.worst, max(-self.low, self.high)), max(
                contract.rel, _ROUNDINGS * _epsilon(self.bound_dtype)
            )
        bound = contract.steps + _STEP_SLACK
        if integers or self.step is not None:
            return self.worst, bound
        # No scale is known there: take the step that 8 bits over the value's own range would have.
        return _ratio(self.worst, (self.high - self.low) / _FALLBACK_STEPS), bound

    def figure(self, name: str, node: ir.Node) -> ValueFigure:
        error, bound = self.error()
        tags = node.metadata_props.get(ORIGIN, "")
        made = tuple(tags.split(";")) if tags else ()
        return ValueFigure(name, node.name or "", node.op_type, made, error, bound, self.noise.sqnr_db)


def _ratio(value: float, unit: float) -> float:
    return 0.0 if value == 0 else math.inf if unit == 0 else value / unit


def _is_float(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind in "fc" or dtype.name in ("bfloat16",) or dtype.name.startswith("float")


def _epsilon(dtype: np.dtype[np.generic]) -> float:
    if dtype.name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(dtype.name).eps) if dtype.kind in "fc" else 0.0


def _same_bytes(reference: Array, actual: Array) -> bool:
    """Return whether two arrays of one shape are bit-equal; the common case, and much cheaper than counting."""
    if reference.dtype != actual.dtype or reference.size == 0:
        return reference.dtype == actual.dtype
    first, second = np.ascontiguousarray(reference), np.ascontiguousarray(actual)
    return bool(np.array_equal(first.reshape(-1).view(np.uint8), second.reshape(-1).view(np.uint8)))


def _differing(reference: Array, actual: Array) -> int:
    """Return how many elements are not bit-equal; any NaN equals any NaN."""
    if reference.dtype.kind in "OSU":
        return int(np.sum(reference != actual))
    first = np.ascontiguousarray(reference).reshape(-1)
    second = np.ascontiguousarray(actual).reshape(-1)
    if first.size == 0:
        return 0
    width = first.dtype.itemsize
    unequal = (first.view(np.uint8).reshape(-1, width) != second.view(np.uint8).reshape(-1, width)).any(axis=1)
    if _is_float(first.dtype):
        unequal &= ~(np.isnan(first) & np.isnan(second))
    return int(np.sum(unequal))
