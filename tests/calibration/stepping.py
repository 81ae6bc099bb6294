"""What the tests of stepping have in common: a sink that keeps everything, and native runs to compare with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.stepper import Stepper
from qcompiler.engine import Array, Engine, EngineOptions, Feeds
from qcompiler.ir.graph import all_graphs, all_nodes
from qcompiler.ir.text import parse_text

OFF = EngineOptions(threads=1, optimize=False, shared_pool=True)
LIMITS = (1, 200, 1 << 40)
F = np.float32
HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'

Seen = dict[str, list[Array]]


def every_name(model: Any) -> list[str]:
    given = [v for graph in all_graphs(model) for v in graph.inputs]
    return [str(v.name) for v in (*given, *(v for n in all_nodes(model) for v in n.outputs)) if v.name]


def stepped(
    model: Any, feeds: Sequence[Feeds], names: Sequence[str] | None = None, limit: int = 1, engine: Engine | None = None
) -> Seen:
    """Return what the sink got, in its order."""
    found: Seen = defaultdict(list)
    stepper = Stepper(model, every_name(model) if names is None else names, engine or OrtEngine(), OFF, limit)
    for feed in feeds:
        stepper.run(feed, lambda name, array: found[name].append(np.array(array)))
    return dict(found)


def same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def assert_same(one: Mapping[str, Sequence[Array]], other: Mapping[str, Sequence[Array]]) -> None:
    assert {n: len(a) for n, a in one.items()} == {n: len(a) for n, a in other.items()}
    different = [n for n, a in one.items() if not all(same(x, y) for x, y in zip(a, other[n], strict=True))]
    assert different == []


def native(proto: onnx.ModelProto, feed: Feeds, names: Sequence[str] = ()) -> dict[str, Array]:
    """Return the outputs and the named values of the main graph as ONNX Runtime gives them in one run."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    have = [o.name for o in made.graph.output]
    made.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    wanted = [o.name for o in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, dict(feed)), strict=True))


def of_text(text: str) -> tuple[Any, onnx.ModelProto]:
    return parse_text(HEAD + text), onnx.parser.parse_model(HEAD + text)


def check_main_graph(model: Any, proto: onnx.ModelProto, feeds: Sequence[Feeds]) -> None:
    """Compare every float value of the main graph with a native run, and every limit with every other."""
    at_limits = [stepped(model, feeds, limit=limit) for limit in LIMITS]
    for other in at_limits[1:]:
        assert_same(at_limits[0], other)
    names = [str(v.name) for node in model.graph for v in node.outputs if v.name]
    for index, feed in enumerate(feeds):
        wanted = native(proto, feed, names)
        compared = [n for n in names if wanted[n].dtype in (np.float32, np.float16)]
        assert compared
        assert [n for n in compared if not same(at_limits[0][n][index], wanted[n])] == []


X = np.arange(12, dtype=F).reshape(3, 4) - 5
