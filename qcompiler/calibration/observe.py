"""Observation: run the FLOAT graph with the wanted values as extra outputs, and reduce each at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.statistics import Statistics, TensorStatistics
from qcompiler.engine import Array, Engine, EngineOptions, Feeds
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import all_graphs, is_op
from qcompiler.ir.rewriter import Rewriter

Progress = Callable[[int, int | None], None]


def default_memory() -> int:
    """Return a quarter of the free memory in bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def observe(
    model: ir.Model,
    names: Sequence[str],
    feeds: Iterable[Feeds],
    engine: Engine,
    *,
    threads: int = 1,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run all feeds and gather statistics of the named float values.

    Engine optimizations are off, since with them a tensor's value depends on which others are observed. At most one
    feed's values of one group of tensors are alive at a time; groups respect the memory cap.

    Args:
        model: canonical FLOAT graph; not changed.
        names: value names, in any graph outside Loop and Scan bodies (values inside those stay unobserved).
        feeds: re-iterable feeds.
        engine: runs the model.
        threads: threads inside one operator.
        memory: bytes that observed tensors of one feed may take; default a quarter of what is free.
        progress: called with feeds done and, where known, their number.

    Raises:
        CalibrationError: NaN or infinity in a tensor; names the sample, the tensor and whether its feed was finite.
    """
    wanted = list(dict.fromkeys(names))
    statistics = Statistics({name: TensorStatistics() for name in wanted})
    groups = _by_memory(model, wanted, feeds, memory or default_memory())
    total = len(feeds) if hasattr(feeds, "__len__") else None
    done = 0
    for group in groups:
        tapped, outputs, inputs = tap(model, group)
        runner = engine.load(tapped, EngineOptions(threads=threads, optimize=False))
        for index, feed in enumerate(feeds):
            for name in inputs:
                _reduce(statistics, name, feed[name], index)
            if outputs:
                for output, value in runner.run(feed, list(outputs)).items():
                    _reduce(statistics, outputs[output], value, index)
            done += 1
            if progress is not None:
                progress(done, None if total is None else total * len(groups))
        statistics.feeds = index + 1
    return statistics


def _reduce(statistics: Statistics, name: str, value: Array, sample: int) -> None:
    if value.size == 0:
        return
    array = value if value.dtype == np.float32 else value.astype(np.float32)
    tensor = statistics.tensors[name]
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        if np.isnan(low) or np.isnan(high):
            raise CalibrationError(
                f"sample {sample}: tensor {name!r} holds NaN although the inputs are finite; the float model itself "
                "computes it: look at the operators in front of that tensor"
            )
        array = array[np.isfinite(array)]  # masks of attention are infinite on purpose
        if array.size == 0:
            return
    tensor.add(array)


def _by_memory(model: ir.Model, names: Sequence[str], feeds: Iterable[Feeds], memory: int) -> list[list[str]]:
    """Cut the names into groups whose tensors fit the cap together, by a first feed's sizes."""
    sizes = _sizes(model, names, next(iter(feeds)))
    groups: list[list[str]] = [[]]
    used = 0
    for name in names:
        size = sizes.get(name, 0)
        if groups[-1] and used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _sizes(model: ir.Model, names: Sequence[str], feed: Feeds) -> dict[str, int]:
    """Estimate bytes per value: symbolic axes take the largest length that any input axis has in the feed."""
    longest = max((d for a in feed.values() for d in a.shape[:1]), default=1)
    wanted = set(names)
    sizes = {}
    for graph in all_graphs(model):
        for node in graph:
            for value in node.outputs:
                if value.name in wanted and value.shape is not None:
                    dims = [d if isinstance(d, int) else longest for d in value.shape]
                    sizes[str(value.name)] = int(np.prod(dims, dtype=np.int64)) * 4
    return sizes


def tap(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str], list[str]]:
    """Return a clone with the named values as outputs, output name to value name, and the names that are inputs.

    A value inside an If branch becomes an extra output of the If; the other branch gives an empty tensor there, which
    counts as not executed.
    """
    clone = model.clone()
    rewriter = Rewriter(clone)
    wanted = set(names)
    inputs = [str(v.name) for v in clone.graph.inputs if v.name in wanted]
    outputs: dict[str, str] = {}
    present = {str(v.name) for v in clone.graph.outputs}
    for name, value in _tapped(rewriter, clone.graph, wanted):
        if str(value.name) not in present:
            clone.graph.outputs.append(value)
            present.add(str(value.name))
        outputs[str(value.name)] = name
    return clone, outputs, inputs


def _tapped(rewriter: Rewriter, graph: ir.Graph, wanted: set[str]) -> list[tuple[str, ir.Value]]:
    """Return (wanted name, float32 or float16 value of this graph that carries it); lift those of If bodies outwards."""
    found: list[tuple[str, ir.Value]] = []
    for node in list(graph):
        for value in list(node.outputs):
            if value.name in wanted and value.dtype in _FLOATS:
                found.append((value.name, _readable(rewriter, node, value)))
        if is_op(node, "If"):
            found += _lift_branches(rewriter, node, wanted)
    return found


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _readable(rewriter: Rewriter, node: ir.Node, value: ir.Value) -> ir.Value:
    """Return the value, cast where it is bfloat16, a type that engines do not hand out as an array."""
    if value.dtype != ir.DataType.BFLOAT16:
        return value
    made = rewriter.node(
        "Cast", [value], after=node, name=f"{value.name}:cast", attributes={"to": int(ir.DataType.FLOAT)}
    )
    made.outputs[0].dtype = ir.DataType.FLOAT
    return made.outputs[0]


def _lift_branches(rewriter: Rewriter, node: ir.Node, wanted: set[str]) -> list[tuple[str, ir.Value]]:
    """Make the wanted values of both branches further outputs of the If.

    Each is an output of both branches at the same place, or the branches would not agree in number and order. The node
    is extended in place: its own outputs may be wanted too.
    """
    then_branch, else_branch = (node.attributes[key].as_graph() for key in ("then_branch", "else_branch"))
    extra: list[tuple[str, ir.DataType]] = []
    for branch, other in ((then_branch, else_branch), (else_branch, then_branch)):
        for name, value in _tapped(rewriter, branch, wanted):
            dtype = value.dtype or ir.DataType.FLOAT
            branch.outputs.append(_append(rewriter, branch, "Identity", [value], f"{name}:copy", dtype))
            other.outputs.append(_append(rewriter, other, "Constant", [], f"{name}:none", dtype))
            extra.append((name, dtype))
    first = len(node.outputs)
    node.resize_outputs(first + len(extra))
    lifted = []
    for value, (name, dtype) in zip(node.outputs[first:], extra, strict=True):
        value.name, value.dtype = rewriter.unique(f"{name}:tap"), dtype
        lifted.append((name, value))
    return lifted


def _append(
    rewriter: Rewriter, graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType
) -> ir.Value:
    """Append a copy (Identity) or an empty tensor (Constant) to a branch; its shape is left to the engine to infer."""
    empty = {"value": ir.tensor(np.zeros(0, dtype.numpy()), dtype=dtype)}
    made = ir.node(
        op_type, inputs, attributes=empty if op_type == "Constant" else None, name=rewriter.unique(f"{name}:node")
    )
    made.outputs[0].name, made.outputs[0].dtype = rewriter.unique(name), dtype
    graph.append(made)
    return made.outputs[0]
