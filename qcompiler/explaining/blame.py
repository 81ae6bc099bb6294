"""Where the error of a quantized model is born.

Both models run on a few feeds. Each place where they can be compared is computed once more in float, from the values
that the quantized model has in front of it: the difference is the place's own error, whatever came before. Added alone
to the float model at that place, that error shows what it does to the outputs. So places are measured one at a time,
without a build for each, and a foreign model is measured as our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array, Engine, EngineOptions, Feeds, Runner
from qcompiler.explaining.blame_units import Unit
from qcompiler.explaining.stored_values import Numbers, stored_numbers
from qcompiler.ir.graph import is_float
from qcompiler.pipeline.changed import FED, exposed, fed
from qcompiler.search.quality import CEILING

_AS_WRITTEN = EngineOptions(threads=1, optimize=False)
_NOISE = ":noise"
_MOSTLY = 0.5
"""Share of a place's own error from which on it is said to be the reason."""
_EXPLAINS = 4.0
"""An input's relative error explains that of the result if it is at least one over this as large."""
_TOO_WIDE = 3.0
"""A stored range this many times as wide as the values is too wide."""


@dataclass
class Power:
    """Signal and error power over all feeds."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, wanted: Array, actual: Array) -> None:
        """Add one pair of arrays of the same shape; errors without bound count as infinite."""
        a, b = wanted.astype(np.float64), actual.astype(np.float64)
        fine = np.isfinite(a)
        self.signal += float(np.square(a[fine]).sum())
        self.noise += float(np.square(a[fine] - b[fine]).sum()) if np.isfinite(b[fine]).all() else float("inf")

    @property
    def ratio(self) -> float:
        """Return error power over signal power."""
        return self.noise / max(self.signal, 1e-300)

    @property
    def db(self) -> float:
        """Return the SQNR in dB, within the ceiling."""
        if self.noise <= 0:
            return CEILING
        if not np.isfinite(self.noise):
            return -CEILING
        return float(np.clip(-10.0 * np.log10(self.ratio), -CEILING, CEILING))


@dataclass(frozen=True)
class Fault:
    """One place with its error.

    Attributes:
        unit: the place.
        local_db: SQNR of its own error, computed from the same inputs.
        accumulated_db: SQNR of its value against float, with everything that came before.
        output_db: SQNR of the worst output if this were the only error.
        share: share of the quantized model's error at that output that this alone makes.
        kind: ``clipped`` (values outside the stored range), ``too-wide`` (the range is much wider than the values),
            ``rounded`` (stored with 8 bits, which is too few here) or ``inside`` (weights, inputs, arithmetic).
        text: one sentence with the figures.
    """

    unit: Unit
    local_db: float
    accumulated_db: float
    output_db: float
    share: float
    kind: str
    text: str


@dataclass(frozen=True)
class BlameResult:
    """All places, the worst first.

    Attributes:
        faults: ranked by what each alone does to the outputs.
        output_db: SQNR of each float output of the quantized model.
        feeds: number of feeds.
        unaligned: quantized groups that could not be compared: nothing of theirs has a name in the compiled model.
        notes: what a user should know.
    """

    faults: tuple[Fault, ...]
    output_db: Mapping[str, float]
    feeds: int
    unaligned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def worst_db(self) -> float:
        """Return the least SQNR of the outputs."""
        return min(self.output_db.values(), default=CEILING)


@dataclass
class _Tally:
    """What is summed up of one place over the feeds."""

    local: Power = field(default_factory=Power)
    accumulated: Power = field(default_factory=Power)
    outputs: dict[str, Power] = field(default_factory=dict)
    storing: float = 0.0
    clipping: float = 0.0
    clipped: int = 0
    elements: int = 0
    low: float = np.inf
    high: float = -np.inf
    inputs: dict[str, _Reading] = field(default_factory=dict)


@dataclass
class _Reading:
    """What quantizing an input costs: signal, error, the part of the error that is clipping; extremes of the values."""

    error: Power = field(default_factory=Power)
    clipping: float = 0.0
    clipped: int = 0
    elements: int = 0
    low: float = np.inf
    high: float = -np.inf

    def add(self, numbers: Numbers, values: Array) -> None:
        rounded = numbers.rounded(values)
        self.error.add(values, rounded)
        outside = numbers.clips(values)
        self.clipping += float(np.square(rounded - values.astype(np.float64))[outside].sum())
        self.clipped += int(outside.sum())
        self.elements += values.size
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


class Blamer:
    """Measure places of a quantized model against its float model."""

    def __init__(self, engine: Engine, graph: ir.Model, compiled: ir.Model, units: Sequence[Unit]) -> None:
        """Take both models.

        Args:
            engine: runs both, as they are written.
            graph: the float model, whose values have the names that the units say.
            compiled: the quantized model.
            units: the places.
        """
        self.engine, self.graph, self.compiled = engine, graph, compiled
        self.units = {u.value: u for u in units}
        self.numbers: dict[str, Numbers] = stored_numbers(compiled)
        self.outputs = [str(v.name) for v in graph.graph.outputs if is_float(v)]
        self.tallies = {name: _Tally() for name in self.units}
        self.total: dict[str, Power] = {name: Power() for name in self.outputs}

    def run(self, feeds: Sequence[Feeds]) -> BlameResult:
        """Run both models and rank the places.

        Raises:
            ModelError: an engine refuses a model.
            CalibrationError: a feed does not fit.
        """
        names = list(self.units)
        shown = {u.stored or u.value: u for u in self.units.values()}
        reference = self.engine.load(exposed(self.graph, names), _AS_WRITTEN)
        reads = [name for unit in self.units.values() for name in unit.inputs]
        quantized = self.engine.load(exposed(self.compiled, [*shown, *reads]), _AS_WRITTEN)
        locally: Runner | None = None
        noisy, places = _with_noise(self.graph, names)
        alone = self.engine.load(noisy, _AS_WRITTEN)
        for feed in feeds:
            wanted = reference.run(_fitting(reference, feed))
            found = quantized.run(_fitting(quantized, feed))
            here = {u.value: self._floats(u, found) for u in self.units.values() if (u.stored or u.value) in found}
            here = {n: a for n, a in here.items() if a.shape == wanted[n].shape}
            if locally is None:
                locally = self.engine.load(fed(self.graph, list(here), here), _AS_WRITTEN)
            inlets = {n + FED: a.astype(wanted[n].dtype) for n, a in here.items()}
            local = locally.run({**_fitting(locally, feed), **inlets})
            for name in self.outputs:
                if name in found and found[name].shape == wanted[name].shape:
                    self.total[name].add(wanted[name], found[name])
            for name, array in here.items():
                self._add(name, wanted, local[name], array)
                for read in self.units[name].inputs:
                    values = found.get(read, feed.get(read))
                    if values is not None:
                        self.tallies[name].inputs.setdefault(read, _Reading()).add(self.numbers[f"{read}:q"], values)
                error = (array - local[name]).astype(wanted[name].dtype)
                if error.any():
                    result = alone.run({**_fitting(alone, feed), name + _NOISE: error})
                    for output in self.outputs:
                        power = self.tallies[name].outputs.setdefault(output, Power())
                        power.add(wanted[output], result[places.get(output, output)])
        faults = [self._fault(u, self.tallies[n]) for n, u in self.units.items() if self.tallies[n].elements]
        faults.sort(key=lambda f: (f.output_db, f.local_db))
        return BlameResult(tuple(faults), {n: p.db for n, p in self.total.items() if p.signal}, len(feeds))

    def _floats(self, unit: Unit, found: Mapping[str, Array]) -> Array:
        array = found[unit.stored or unit.value]
        return self.numbers[unit.stored].floats(array) if unit.stored else np.asarray(array.astype(np.float64))

    def _add(self, name: str, wanted: Mapping[str, Array], local: Array, array: Array) -> None:
        tally, unit = self.tallies[name], self.units[name]
        tally.local.add(local, array)
        tally.accumulated.add(wanted[name], array)
        tally.elements += array.size
        if array.size:
            tally.low, tally.high = min(tally.low, float(local.min())), max(tally.high, float(local.max()))
        if unit.stored:
            numbers = self.numbers[unit.stored]
            error = np.square(numbers.rounded(local) - local.astype(np.float64))
            outside = numbers.clips(local)
            tally.storing += float(error.sum())
            tally.clipping += float(error[outside].sum())
            tally.clipped += int(outside.sum())

    def _fault(self, unit: Unit, tally: _Tally) -> Fault:
        worst = max(tally.outputs, key=lambda o: tally.outputs[o].ratio, default="")
        alone = tally.outputs.get(worst, Power())
        total = self.total[worst].noise if worst else 0.0
        share = alone.noise / total if total > 0 and np.isfinite(total) else 0.0
        kind, text = self._kind(unit, tally)
        return Fault(unit, tally.local.db, tally.accumulated.db, alone.db, share, kind, text)

    def _kind(self, unit: Unit, tally: _Tally) -> tuple[str, str]:
        """Return what kind of error a place makes, and a sentence with the figures."""
        noise = tally.local.noise
        if not unit.stored or noise <= 0 or tally.storing < _MOSTLY * noise:
            return self._kind_of_inputs(tally) or (
                "inside", "the error is made inside: weights, quantized inputs, arithmetic"
            )  # fmt: skip
        low, high = self.numbers[unit.stored].reach
        values = f"values reach from {tally.low:.4g} to {tally.high:.4g}, the stored range from {low:.4g} to {high:.4g}"
        if tally.clipping > _MOSTLY * tally.storing:
            return "clipped", f"{tally.clipped / max(tally.elements, 1):.2%} of the elements are clipped: {values}"
        if high - low > _TOO_WIDE * max(tally.high - min(tally.low, 0.0), 1e-30):
            return (
                "too-wide",
                f"the range is {(high - low) / (tally.high - min(tally.low, 0.0)):.1f} times too wide: {values}",
            )
        clipped = tally.clipping / max(tally.storing, 1e-300)
        beyond = f", {clipped:.0%} of its error by clipping" if tally.clipped else ""
        return "rounded", f"8 bits over the stored range are too few{beyond}: {values}"

    def _kind_of_inputs(self, tally: _Tally) -> tuple[str, str] | None:
        """Return what is wrong with the range that an input is quantized with, if that explains the error."""
        for name, reading in tally.inputs.items():
            if _EXPLAINS * reading.error.ratio < tally.local.ratio:
                continue
            low, high = self.numbers[f"{name}:q"].reach
            width = reading.high - min(reading.low, 0.0)
            values = (
                f"{name} reaches from {reading.low:.4g} to {reading.high:.4g}, its range from {low:.4g} to {high:.4g}"
            )
            if reading.clipping > _MOSTLY * reading.error.noise:
                return "clipped", f"{reading.clipped / reading.elements:.2%} of an input is clipped: {values}"
            if high - low > _TOO_WIDE * max(width, 1e-30):
                return (
                    "too-wide",
                    f"the range of an input is {(high - low) / max(width, 1e-30):.1f} times too wide: {values}",
                )
        return None


def _fitting(runner: Runner, feed: Feeds) -> dict[str, Array]:
    known = {i.name for i in runner.inputs}
    return {name: array for name, array in feed.items() if name in known}


def _with_noise(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str]]:
    """Return a copy that adds an input ``NAME:noise`` to each named value, and the new names of graph outputs.

    The inputs default to 0, so that a run names only those it wants.
    """
    copy = model.clone()
    graph = copy.graph
    renamed: dict[str, str] = {}
    values = {str(v.name): v for node in graph for v in node.outputs}
    for name in names:
        value = values[name]
        readers = tuple(value.uses())
        kind = value.dtype or ir.DataType.FLOAT
        inlet = ir.Value(name=name + _NOISE, type=ir.TensorType(kind))
        inlet.const_value = ir.tensor(np.zeros((), kind.numpy()), name=inlet.name)
        graph.inputs.append(inlet)
        graph.initializers[str(inlet.name)] = inlet
        node = ir.Node("", "Add", [value, inlet], name=f"{name}:add-noise")
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, node)
        node.outputs[0].name, node.outputs[0].type = f"{name}:noisy", ir.TensorType(kind)
        for user, index in readers:
            user.replace_input_with(index, node.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = node.outputs[0]
                renamed[name] = f"{name}:noisy"
    return copy, renamed


def override_rows(fault: Fault, names: Sequence[str], estimator: str = "") -> list[dict[str, Any]]:
    """Return ``[[override]]`` rows that mend a fault: an estimator for its group, or float for the named groups."""
    if estimator:
        return [{"match": escaped(fault.unit.name), "estimator": estimator}]
    return [{"match": escaped(name), "form": "float"} for name in names]


def escaped(name: str) -> str:
    """Return a glob that matches just this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
