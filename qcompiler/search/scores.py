"""Compare candidates row by row, by the scores in front of a final Softmax or Sigmoid."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.engine import Array, Engine, EngineOptions, Feeds
from qcompiler.ir.graph import is_op
from qcompiler.ir.rewriter import Rewriter
from qcompiler.search.sections import cut, find_sections

MOST_FEEDS = 32
"""Feeds on which candidates are compared at most."""
LEAST_FEEDS = 4
"""Feeds of which there are at least so many, if there are."""
FAIR_SAMPLE = 1 << 16
"""Output elements after which more feeds than those set aside are not needed."""
_DEFAULT_OPTIONS = EngineOptions()
_SATURATING = ("Softmax", "LogSoftmax", "Sigmoid", "Tanh")
_PASSING = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Transpose")


def expose_scores(model: ir.Model) -> ir.Model:
    """Return a copy in which every output that a Softmax, Sigmoid or Tanh computes gives that operator's input instead.

    Behind a Softmax the error of a decided row is nearly zero, and what is left in a few undecided rows says little
    about the error on other data; in front of it every row counts. Measured on set-aside feeds of classifiers, the
    order of candidates in front of the Softmax foretells the order of their outputs on fresh data better than the
    order of those outputs themselves.

    Args:
        model: any graph; not changed. Outputs keep their names and order, and may change in shape.
    """
    clone = model.clone()
    rewriter = Rewriter(clone)
    for index, value in enumerate(clone.graph.outputs):
        source, producer = _score(value), value.producer()
        if source is None or producer is None:
            continue
        copy = rewriter.node("Identity", [source], after=producer).outputs[0]
        rewriter.declare(copy, source.dtype or value.dtype, source.shape)
        name = value.name
        value.name, copy.name = rewriter.unique(f"{name}:behind"), name
        clone.graph.outputs[index] = copy
    return clone


def _score(value: ir.Value) -> ir.Value | None:
    """Return what the operator that saturates an output reads, or None if there is no such operator."""
    node = value.producer()
    while node is not None and is_op(node, *_PASSING) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and is_op(node, *_SATURATING) else None


class ScoreErrors:
    """Tell the error of every row of a candidate's scores.

    The sum over all rows is the noise-to-signal ratio of the outputs (their sum where there are several, or several
    sections of one that joins quantities of different scale: `qcompiler.search.sections`); single rows
    tell whether two candidates differ by more than chance.
    """

    def __init__(
        self,
        engine: Engine,
        reference: ir.Model,
        held_out: Iterable[Feeds],
        more: Iterable[Feeds] = (),
        options: EngineOptions = _DEFAULT_OPTIONS,
        truth: Engine | None = None,
    ) -> None:
        """Run the reference on as many feeds as make a fair sample.

        Args:
            engine: runs the models.
            reference: the FLOAT graph that candidates are built from.
            held_out: feeds that ranges have not seen, of which at most `MOST_FEEDS` are used.
            more: feeds to add as long as there are too few.
            options: threads.
            truth: runs the reference, where it is another engine.
        """
        self.engine, self.options = engine, options
        exposed = expose_scores(reference)
        runner = (truth or engine).load(exposed, options)
        self.feeds: list[Feeds] = []
        self.expected: list[dict[str, Array]] = []
        elements = 0
        for source, enough in ((held_out, MOST_FEEDS), (more, LEAST_FEEDS)):
            for feed in source:
                if len(self.feeds) >= MOST_FEEDS or (len(self.feeds) >= enough and elements >= FAIR_SAMPLE):
                    break
                results = {n: a for n, a in runner.run(feed).items() if _is_float(a)}
                self.feeds.append(feed)
                self.expected.append(results)
                elements += sum(a.size for a in results.values())
        self.sections = find_sections(exposed, self.expected)
        self.expected = [cut(results, self.sections) for results in self.expected]
        self.signal: dict[str, float] = {}
        for results in self.expected:
            for name, array in results.items():
                self.signal[name] = self.signal.get(name, 0.0) + float(_rows(np.square(_finite(array))).sum())

    def __call__(self, model: ir.Model) -> npt.NDArray[np.float64]:
        """Return the error power of each row over the signal power of all its output's rows, float64 [rows]."""
        runner = self.engine.load(expose_scores(model), self.options)
        errors = []
        for feed, expected in zip(self.feeds, self.expected, strict=True):
            actual = cut(runner.run(feed), self.sections)
            errors += [_errors(a, actual[n]) / self.signal[n] for n, a in expected.items() if self.signal[n] > 0]
        return np.concatenate(errors) if errors else np.zeros(0)


def _is_float(array: object) -> bool:
    return isinstance(array, np.ndarray) and (array.dtype.kind == "f" or array.dtype.name == "bfloat16")


def _finite(array: Array) -> npt.NDArray[np.float64]:
    wide = array.astype(np.float64)
    return np.where(np.isfinite(wide), wide, 0.0)


def _rows(power: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum over the last axis; what has one axis only is one row per element."""
    return power.sum(axis=-1).reshape(-1) if power.ndim > 1 else power.reshape(-1)


def _errors(wanted: Array, actual: Array) -> npt.NDArray[np.float64]:
    """Return the error power per row; all of the signal where shapes differ, infinity where a number is lost."""
    if wanted.shape != actual.shape:
        return _rows(np.square(_finite(wanted)))
    difference = np.where(np.isfinite(wanted.astype(np.float64)), actual.astype(np.float64) - wanted, 0.0)
    return _rows(np.square(np.where(np.isfinite(difference), difference, np.inf)))
