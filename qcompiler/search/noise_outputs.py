"""What noise is told at: the float outputs of a graph, and the power of an error there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import is_op
from qcompiler.search.scores import expose_scores

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Power:
    """Power of the signal and of the error at one output, over all feeds so far.

    Attributes:
        signal: sum of squares of what float gives.
        noise: sum of squares of the error; infinity where a result is not finite or has another shape.
    """

    signal: float = 0.0
    noise: float = 0.0

    def add(self, wanted: Wanted, actual: Array) -> None:
        """Add one pair, as `qcompiler.search.quality.Judge` does."""
        self.signal += wanted.signal
        if actual is wanted.array:
            return
        if actual.shape != wanted.array.shape:
            self.noise = math.inf
            return
        error = np.subtract(actual, wanted.array, dtype=np.float64).ravel()
        if wanted.finite is not None:
            error = error[wanted.finite]
        noise = float(error @ error)
        self.noise += noise if math.isfinite(noise) else math.inf

    @property
    def relative(self) -> float:
        """Return error power over signal power."""
        if self.noise <= 0:
            return 0.0
        return self.noise / self.signal if self.signal > 0 else math.inf


class Wanted:
    """What float gives at one output, and its power; where it is not finite, nothing is compared."""

    def __init__(self, array: Array) -> None:
        flat = array.astype(np.float64).ravel()
        mask = np.isfinite(flat)
        self.array, self.finite = array, None if mask.all() else mask
        kept = flat if self.finite is None else flat[mask]
        self.signal = float(kept @ kept)


def float_outputs(model: ir.Model) -> tuple[ir.Model, tuple[str, ...], dict[str, str]]:
    """Return a copy of a graph that hands out floats alone, their names, and the scores behind them.

    Behind an arg-max or a non-maximum suppression there is no signal to compare: a graph without any float output
    hands out the floats nearest to its outputs instead. The scores of an output are what its final Softmax, Sigmoid or
    Tanh reads; they are handed out, too.
    """
    clone = model.clone()
    found = [v for v in clone.graph.outputs if _is_float(v)]
    scores: dict[str, str] = {}
    for value, copy in zip(clone.graph.outputs, expose_scores(clone).graph.outputs, strict=True):
        producer = copy.producer()
        name = producer.inputs[0] if is_op(producer, "Identity") else None
        if value in found and name is not None and copy.producer() is not None:
            scores[str(value.name)] = str(name.name)
    found = found or _nearest_floats(clone.graph)
    values = {str(v.name): v for node in clone.graph for v in node.outputs}
    scores = {name: score for name, score in scores.items() if score in values and values[score].dtype is not None}
    more = [values[score] for score in scores.values()]
    clone.graph.outputs.extend(v for v in dict.fromkeys((*found, *more)) if v not in clone.graph.outputs)
    return clone, tuple(dict.fromkeys(str(v.name) for v in found)), scores


def _is_float(value: ir.Value) -> bool:
    return value.dtype in _FLOATS and not isinstance(value.type, ir.SequenceType | ir.OptionalType)


def _nearest_floats(graph: ir.Graph) -> list[ir.Value]:
    """Return the first float values met on the way back from a graph's outputs."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Node] = set()
    work = [v.producer() for v in graph.outputs]
    while work:
        node = work.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        read = [v for v in node.inputs if v is not None and v.producer() is not None]
        found.update((v, None) for v in read if _is_float(v))
        work += [v.producer() for v in read if not _is_float(v)]
    return list(found)
