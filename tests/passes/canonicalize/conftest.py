"""A small laboratory: run one pass on a graph given as text, and check what every pass must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.ir.graph import all_nodes
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import parse_text, print_model
from qcompiler.ir.verify import verify
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Exact, Reassociates
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target

_TYPES = {"float32": "float", "float16": "float16", "int64": "int64", "bool": "bool", "int32": "int32"}


@dataclass
class Result:
    """What a pass left."""

    model: ir.Model
    changes: int
    state: CompileState
    reasons: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ops(self) -> dict[str, int]:
        return dict(Counter(node.op_type for node in all_nodes(self.model)))

    @property
    def text(self) -> str:
        return print_model(self.model)

    def node(self, op_type: str) -> ir.Node:
        return next(node for node in all_nodes(self.model) if node.op_type == op_type)

    def reason(self, rule: str) -> str:
        (found,) = self.reasons[rule]
        return found


def _initializer(name: str, array: np.ndarray) -> str:
    shape = f"[{','.join(map(str, array.shape))}]" if array.ndim else ""
    bits = array.view(np.uint16) if array.dtype == np.float16 else array * 1 if array.dtype == bool else array
    values = ",".join(repr(v.item()) for v in bits.reshape(-1))
    return f"{_TYPES[array.dtype.name]}{shape} {name} = {{{values}}}"


def make_text(
    inputs: str, outputs: str, body: str, weights: Mapping[str, np.ndarray] | None = None, opset: int = 21
) -> str:
    constants = ", ".join(_initializer(name, array) for name, array in (weights or {}).items())
    head = f'<ir_version: 10, opset_import: ["": {opset}]> agraph ({inputs}) => ({outputs})'
    return f"{head} {f'<{constants}>' if constants else ''} {{ {body} }}"


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def random_feeds(model: ir.Model, size: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else size for d in (value.shape or [])]
        assert value.dtype is not None
        kind = value.dtype.numpy()
        if kind.kind == "b":
            feeds[value.name] = rng.integers(0, 2, shape).astype(bool)
        elif kind.kind in "iu":
            feeds[value.name] = rng.integers(0, 3, shape).astype(kind)
        else:
            feeds[value.name] = rng.normal(0, 2, shape).astype(kind)
    return feeds


def assert_same(before: ir.Model, after: ir.Model, contract: object, sizes: tuple[int, ...] = (1, 3)) -> None:
    """Compare the outputs of two models on random feeds by a pass's contract."""
    first, second = session(before), session(after)
    rel = contract.rel if isinstance(contract, Reassociates) else 0.0
    assert isinstance(contract, Exact | Reassociates)
    for seed, size in enumerate(sizes):
        feeds = random_feeds(before, size, seed)
        for x, y in zip(first.run(None, feeds), second.run(None, feeds), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            if rel == 0.0 or x.dtype.kind in "iub":
                np.testing.assert_array_equal(x, y)
            elif x.size:
                # Half precision has 11 bits; the contract's bound is for float32.
                bound = max(rel, 4 * float(np.finfo(x.dtype).eps))
                scale = float(np.abs(x.astype(np.float64)).max())
                assert float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max()) <= bound * scale


def apply(step: Pass, text: str, *, compare: bool = True, sizes: tuple[int, ...] = (1, 3)) -> Result:
    """Run a pass and check what holds for all of them: sound graph, kept numbers, kept interface, a fixpoint."""
    model = parse_text(text)
    original = model.clone()
    state = CompileState(model, load_target("ort-x86"))
    changes = step.run(state)
    verify(model, Phase.FLOAT)
    interface = [[(v.name, v.dtype) for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    assert interface == [[(v.name, v.dtype) for v in g] for g in (original.graph.inputs, original.graph.outputs)]
    if not changes:
        assert print_model(model) == print_model(original)
    if compare:
        assert_same(original, model, step.numerics, sizes)
    settled = print_model(model)
    assert step.run(state) == 0
    assert print_model(model) == settled
    reasons: dict[str, list[str]] = {}
    for remark in state.remarks:
        if not remark.done:
            reasons.setdefault(remark.rule, []).append(remark.reason)
    return Result(model, changes, state, reasons)


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    return apply


@pytest.fixture(scope="session")
def text() -> Callable[..., str]:
    return make_text


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
