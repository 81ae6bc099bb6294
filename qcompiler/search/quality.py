"""How far a compiled model's outputs are from float: SQNR per output, agreement of the arg-max, a user's metric."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array, Engine, EngineOptions, Feeds, ModelLike, Runner
from qcompiler.ir.graph import is_op
from qcompiler.search.flips import Flips
from qcompiler.search.sections import cut, find_sections

Metric = Callable[[Sequence[Mapping[str, Array]], Sequence[Feeds]], float]
"""A user's metric over all evaluation feeds: outputs and feeds in, one number out; more is better."""

CEILING = 200.0
"""SQNR in dB reported for outputs that are equal bit for bit; its negative for outputs that are not finite."""

_BFLOAT16 = ir.DataType.BFLOAT16.numpy()


@dataclass(frozen=True)
class Quality:
    """Closeness of a candidate to the reference.

    Attributes:
        sqnr_db: per floating-point output, 10 log10(signal power / error power) over all set-aside feeds; per section
            of an output that joins quantities of different scale (`qcompiler.search.sections`).
        agreement: per class-like output, the share of rows with the same arg-max.
        rows: per class-like output, the number of rows behind that share.
        differing: per output of another type, the share of differing elements.
        metric: the user's metric, if one was given.
        likely: per class-like output, the share of rows expected to keep their arg-max on other data
            (`qcompiler.search.flips`).
    """

    sqnr_db: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    differing: dict[str, float] = field(default_factory=dict)
    metric: float | None = None
    rows: dict[str, int] = field(default_factory=dict)
    likely: dict[str, float] = field(default_factory=dict)

    def disagreement(self, bound: float) -> float:
        """Return by how much the worst class-like output falls below a bound on the agreement, 0 if none does.

        What counts is the agreement expected on other data. One differing row is always allowed: among few rows a
        single tie that tips over says nothing.
        """
        return max(
            (min(bound, 1.0 - 1.0 / self.rows.get(n, 1_000_000)) - share for n, share in self._expected().items()),
            default=0.0,
        )

    def _expected(self) -> dict[str, float]:
        return {name: self.likely.get(name, share) for name, share in self.agreement.items()}

    @property
    def worst(self) -> float:
        """Return the least SQNR over the outputs in dB (the ceiling if there is no float output)."""
        return min(self.sqnr_db.values(), default=CEILING)

    @property
    def least_agreement(self) -> float:
        """Return the least arg-max agreement that is expected of the class-like outputs on other data."""
        return min(self._expected().values(), default=1.0)


@dataclass
class _Power:
    signal: float = 0.0
    noise: float = 0.0
    rows: int = 0
    equal_rows: int = 0
    elements: int = 0
    different: int = 0
    flips: Flips = field(default_factory=Flips)


class Judge:
    """Compare candidates with a reference model on feeds that range-finding never saw.

    The reference outputs are computed once and kept: set-aside feeds are few and outputs are small beside activations.
    They come from another engine (``truth``) where the candidates' own computes float in less than float32.

    A model with a state is run in a loop: each feed but the first gets the state that the model itself gave for the
    feed before, so that errors accumulate as they will in use. The reference runs in a loop of its own.

    Attributes:
        sections: sections of the outputs that are not judged as a whole; found in ``graph``, if that is given.
    """

    def __init__(
        self,
        engine: Engine,
        reference: ModelLike,
        feeds: Sequence[Feeds],
        class_like: Sequence[str] = (),
        options: EngineOptions = EngineOptions(),
        metric: Metric | None = None,
        metric_feeds: Sequence[Feeds] = (),
        truth: Engine | None = None,
        graph: ir.Model | None = None,
    ) -> None:
        self.engine, self.feeds, self.options = engine, list(feeds), options
        self.class_like = frozenset(class_like)
        self.metric, self.metric_feeds = metric, list(metric_feeds)
        runner = (truth or engine).load(reference, options)
        self.states = carried_states(self.feeds[0], runner.run(self.feeds[0])) if self.feeds else {}
        results = list(self._run(runner))
        found = find_sections(graph, results) if graph is not None else {}
        self.sections = {n: parts for n, parts in found.items() if n not in self.class_like and n not in self.states}
        self.expected = [cut(each, self.sections) for each in results]
        self.reference_metric = self._metric(runner)

    def on(self, engine: Engine, options: EngineOptions) -> Judge:
        """Return a judge with the same expectations that runs candidates on another engine."""
        made = copy.copy(self)
        made.engine, made.options = engine, options
        return made

    @property
    def carried(self) -> tuple[str, ...]:
        """Return the names of the outputs that are a state."""
        return tuple(self.states)

    def _run(self, runner: Runner) -> Iterator[dict[str, Array]]:
        """Run all feeds, each on the state that the one before left, where its shape is the same."""
        left: dict[str, Array] = {}
        for feed in self.feeds:
            fitting = {name: array for name, array in left.items() if array.shape == feed[name].shape}
            results = runner.run({**feed, **fitting})
            left = {given: results[name] for name, given in self.states.items()}
            yield results

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the model's outputs, and of the sections of those that are judged in sections."""
        return tuple(self.expected[0]) if self.expected else ()

    def __call__(self, model: ModelLike) -> Quality:
        """Run a candidate on all feeds and compare."""
        runner = self.engine.load(model, self.options)
        power: dict[str, _Power] = {}
        results = (cut(each, self.sections) for each in self._run(runner))
        for actual, expected in zip(results, self.expected, strict=True):
            for name, wanted in expected.items():
                if not isinstance(wanted, np.ndarray):
                    continue  # a sequence or an absent optional: there is no one array to compare
                _add(power.setdefault(name, _Power()), wanted, actual[name], name in self.class_like)
        return Quality(
            {n: _decibel(p.signal, p.noise) for n, p in power.items() if p.signal or p.noise},
            {n: p.equal_rows / p.rows for n, p in power.items() if p.rows},
            {n: p.different / p.elements for n, p in power.items() if p.elements},
            self._metric(runner),
            {n: p.rows for n, p in power.items() if p.rows},
            {n: p.flips.kept(p.rows, p.equal_rows) for n, p in power.items() if p.rows},
        )

    def _metric(self, runner: Runner) -> float | None:
        if self.metric is None:
            return None
        return float(self.metric([runner.run(f) for f in self.metric_feeds], self.metric_feeds))


def _add(power: _Power, wanted: Array, actual: Array, class_like: bool) -> None:
    floating = wanted.dtype.kind == "f" or wanted.dtype == _BFLOAT16
    if not floating and (wanted.dtype.itemsize > 1 or wanted.dtype.kind in "bSUO"):
        power.elements += wanted.size
        power.different += int(np.sum(wanted != actual)) if wanted.shape == actual.shape else wanted.size
        return
    a, b = wanted.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    power.signal += float(np.square(a[finite]).sum())
    power.noise += float(np.square(a[finite] - b[finite]).sum()) if np.isfinite(b[finite]).all() else float("inf")
    if class_like and a.ndim >= 2 and a.shape[-1] > 1:
        power.rows += a[..., 0].size
        power.equal_rows += int((a.argmax(-1) == b.argmax(-1)).sum())
        power.flips.add(a, b)


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0:
        return CEILING
    if not np.isfinite(noise):
        return -CEILING  # a NaN or an infinity that float does not have
    return min(CEILING, max(-CEILING, 10.0 * float(np.log10(max(signal, 1e-300) / noise))))


def decibels(noise: float) -> float:
    """Return the SQNR in dB of a relative noise power; for none `CEILING`, for one without bound its negative."""
    return _decibel(1.0, noise)


def sqnr_db(wanted: Array, actual: Array) -> float:
    """Return 10 log10(signal power / error power) of one tensor in dB."""
    power = _Power()
    _add(power, wanted, actual, class_like=False)
    return _decibel(power.signal, power.noise)


def class_like_outputs(model: ir.Model) -> tuple[str, ...]:
    """Return the float outputs that are scores over classes: a Softmax, or a Gemm/MatMul (and its bias) at the end."""
    found = []
    for value in model.graph.outputs:
        node = value.producer()
        for _ in range(4):
            source = node.inputs[0] if node is not None and node.inputs else None
            passing = is_op(node, "Add", "Identity", "Reshape", "Squeeze", "Cast", "QuantizeLinear")
            if node is None or source is None or not passing:
                break
            node = source.producer()
        if is_op(node, "Softmax", "LogSoftmax", "Gemm", "MatMul"):
            found.append(str(value.name))
    return tuple(found)


def carried_states(feed: Feeds, outputs: Mapping[str, Array]) -> dict[str, str]:
    """Return output to input, of the outputs that look like a state for the next step: errors in them accumulate.

    Such an output has the shape and type of a float input beside others, and its name begins like that input's
    (``state`` and ``stateN``, ``h0`` and ``hn``). An input is the state of one output.
    """
    if len(feed) < 2:
        return {}
    found: dict[str, str] = {}
    for name, array in outputs.items():
        for source, given in feed.items():
            stem = source.rstrip("0123456789_.").removesuffix("_in").lower()
            alike = stem and name.lower().startswith(stem) and source not in found.values()
            if alike and given.dtype == array.dtype and given.dtype.kind == "f" and given.shape == array.shape:
                found[name] = source
                break
    return found
