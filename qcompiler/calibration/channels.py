"""Per-channel statistics of a few activations, reduced inside the graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.engine import Engine, EngineOptions, Feeds
from qcompiler.ir.graph import rank_of
from qcompiler.ir.rewriter import Rewriter


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of each index of the last axis.

    Attributes:
        low: smallest value per channel, float64 [channels].
        high: largest value per channel.
        mean_square: E[x^2] per channel, averaged over the feeds' means.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    mean_square: npt.NDArray[np.float64]

    @property
    def reach(self) -> npt.NDArray[np.float64]:
        """Return the largest absolute value per channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


_REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceMean")
"""The last one over the square."""


def observe_channels(
    model: ir.Model, names: Sequence[str], feeds: Iterable[Feeds], engine: Engine
) -> dict[str, ChannelStatistics]:
    """Run all feeds and reduce the named values over all axes but the last, inside the graph.

    Args:
        model: canonical FLOAT graph; not changed.
        names: values of the main graph with a known rank of at least 2.
        feeds: re-iterable feeds.
        engine: runs the model, optimizations off.
    """
    clone = model.clone()
    rewriter = Rewriter(clone)
    made = {str(v.name): v for node in clone.graph for v in node.outputs}
    taps: dict[str, tuple[str, ...]] = {}
    for name in names:
        value = made.get(name)
        rank = rank_of(value)
        if value is None or rank is None or rank < 2:
            continue
        producer = value.producer()
        assert producer is not None
        axes = rewriter.constant(np.arange(rank - 1, dtype=np.int64), f"{name}:axes")
        outputs = []
        for reduction in _REDUCTIONS:
            source, place = value, producer
            if reduction == "ReduceMean":
                place = rewriter.node("Mul", [value, value], after=producer)
                source = place.outputs[0]
                source.type, source.shape = value.type, value.shape
            node = rewriter.node(reduction, [source, axes], after=place, attributes={"keepdims": 0})
            assert value.shape is not None
            node.outputs[0].type, node.outputs[0].shape = value.type, ir.Shape([value.shape[-1]])
            clone.graph.outputs.append(node.outputs[0])
            outputs.append(str(node.outputs[0].name))
        taps[name] = tuple(outputs)
    if not taps:
        return {}
    runner = engine.load(clone, EngineOptions(threads=1, optimize=False))
    low: dict[str, npt.NDArray[np.float64]] = {}
    high: dict[str, npt.NDArray[np.float64]] = {}
    square: dict[str, npt.NDArray[np.float64]] = {}
    feeds_seen = 0
    for feed in feeds:
        feeds_seen += 1
        results = runner.run(feed, [o for outputs in taps.values() for o in outputs])
        for name, (small, large, power) in taps.items():
            a, b, c = (results[o].astype(np.float64) for o in (small, large, power))
            low[name] = np.minimum(low[name], a) if name in low else a
            high[name] = np.maximum(high[name], b) if name in high else b
            square[name] = square[name] + c if name in square else c
    return {n: ChannelStatistics(low[n], high[n], square[n] / max(1, feeds_seen)) for n in taps}
