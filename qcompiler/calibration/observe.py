"""Observation: run the FLOAT graph with the wanted values as extra outputs, and reduce each at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized

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
        CalibrationError: there is no feed, or a tensor holds NaN (names the sample and the tensor). Infinities that
            the model computes are left out: the masks of attention are infinite on purpose.
    """
    wanted = list(dict.fromkeys(names))
    statistics = Statistics({name: TensorStatistics() for name in wanted})
    first = next(iter(feeds), None)
    if first is None:
        raise CalibrationError("the calibration source is empty; give at least one feed")
    cap = memory or default_memory()
    work = [(group, 0) for group in _by_memory(_sizes(model, wanted, first), wanted, cap)]
    counter = _Counter(progress, _length(feeds), len(work))
    while work:
        group, start = work.pop(0)
        tapped, outputs, inputs = tap(model, group)
        runner = engine.load(tapped, EngineOptions(threads=threads, optimize=False))
        for index, feed in enumerate(feeds):
            if index < start:
                continue
            sizes = dict.fromkeys(group, 0)
            for name in inputs:
                _reduce(statistics, name, np.asarray(feed[name]), index, feed)
            results = runner.run(feed, list(outputs)) if outputs else {}
            while results:
                output, value = results.popitem()
                sizes[outputs[output]] = value.nbytes
                _reduce(statistics, outputs[output], value, index, feed)
                del value
            statistics.feeds = max(statistics.feeds, index + 1)
            counter.step()
            smaller = _by_memory(sizes, group, cap)
            if len(smaller) > 1:
                # This feed was larger than the first: the rest of the feeds go through smaller groups.
                work[:0] = [(part, index + 1) for part in smaller]
                counter.regroup(len(smaller) - 1, index + 1)
                break
    return statistics


class _Counter:
    """Tell how many runs are done, and of how many where the number of feeds is known."""

    def __init__(self, progress: Progress | None, feeds: int | None, groups: int) -> None:
        self._progress, self._feeds, self._done = progress, feeds, 0
        self._total = None if feeds is None else feeds * groups

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def regroup(self, more: int, start: int) -> None:
        if self._total is not None and self._feeds is not None:
            self._total += more * (self._feeds - start)


def _length(feeds: Iterable[Feeds]) -> int | None:
    try:
        return len(feeds) if isinstance(feeds, Sized) else None
    except TypeError:  # a source that does not know before its first pass
        return None


def _reduce(statistics: Statistics, name: str, value: Array, sample: int, feed: Feeds) -> None:
    """Take in one feed's tensor, less what is infinite: masks of attention are so on purpose."""
    if value.size == 0:
        return
    array = value if value.dtype == np.float32 else value.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if np.isnan(low) or np.isnan(high):
        if any(
            a.dtype.kind in "fV" and not np.isfinite(a.astype(np.float32)).all() for a in map(np.asarray, feed.values())
        ):
            raise CalibrationError(
                f"sample {sample}: tensor {name!r} holds NaN, and so do the inputs or infinity: mend them"
            )
        raise CalibrationError(
            f"sample {sample}: tensor {name!r} holds NaN although the inputs are finite; the float model itself "
            "computes it: look at the operators in front of that tensor"
        )
    finite = np.isfinite(low) and np.isfinite(high)
    statistics.tensors[name].add(array if finite else array[np.isfinite(array)], sample)


def _by_memory(sizes: Mapping[str, int], names: Sequence[str], memory: int) -> list[list[str]]:
    """Cut the names into groups whose tensors fit the cap together; a single larger one is a group of its own."""
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
    """Estimate the bytes of the named values when the model runs on a feed.

    The lengths of named axes are read off the inputs; other open axes take the longest of those, and a value of unknown
    rank counts as large as the largest one known.
    """
    lengths: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.shape is not None and value.name is not None and value.name in feed:
            axes = zip(value.shape, np.asarray(feed[value.name]).shape, strict=False)
            lengths.update({str(d.value): n for d, n in axes if isinstance(d, ir.SymbolicDim) and d.value is not None})
    longest = max(lengths.values(), default=1)
    wanted = set(names)
    found = [v for graph in all_graphs(model) for node in graph for v in node.outputs if v.name in wanted]
    sizes: dict[str, int] = {}
    for value in found:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else lengths.get(str(d.value), longest) for d in value.shape]
            sizes[str(value.name)] = math.prod(dims) * 4
    largest = max(sizes.values(), default=0)
    return {str(v.name): sizes.get(str(v.name), largest) for v in found}


def tap(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str], list[str]]:
    """Return a clone with the named values as outputs, output name to value name, and the names that are inputs.

    A value inside an If branch becomes a further output of the If; the other branch gives an empty tensor there, which
    counts as not executed. Values in bodies of Loop and Scan are left out.
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
    """Return (wanted name, float32 or float16 value of this graph that carries it), If bodies included."""
    found: list[tuple[str, ir.Value]] = []
    for node in list(graph):
        for value in list(node.outputs):
            if value.name in wanted and value.dtype in _FLOATS and isinstance(value.type, ir.TensorType):
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
            empty = ir.tensor(np.zeros(0, dtype.numpy()), dtype=dtype)
            branch.outputs.append(_append(rewriter, branch, ir.node("Identity", [value]), f"{name}:copy"))
            other.outputs.append(_append(rewriter, other, ir.node("Constant", [], {"value": empty}), f"{name}:none"))
            for output in (branch.outputs[-1], other.outputs[-1]):
                output.dtype = dtype
            extra.append((name, dtype))
    first = len(node.outputs)
    node.resize_outputs(first + len(extra))
    lifted = []
    for value, (name, dtype) in zip(node.outputs[first:], extra, strict=True):
        value.name, value.dtype = rewriter.unique(f"{name}:tap"), dtype
        lifted.append((name, value))
    return lifted


def _append(rewriter: Rewriter, graph: ir.Graph, node: ir.Node, name: str) -> ir.Value:
    """Append a node of one output to a branch and return that; its shape is left to the engine to infer."""
    node.name = rewriter.unique(f"{name}:node")
    node.outputs[0].name = rewriter.unique(name)
    graph.append(node)
    return node.outputs[0]
