"""Small passes for the tests of the pipeline; some are broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import Feeds
from qcompiler.ir.graph import all_nodes, const_array, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.ir.text import parse_text
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Exact, Lossy, Reassociates, WithinStep
from qcompiler.pipeline.registry import PassRegistry
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import OpRow, Target

TARGET = Target("sample", "onnxruntime", rows=(OpRow(("MatMul",), "weighted", ("static",), data=(0,), weight=1),))

CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
chain (float[N,4] x) => (float[N,4] y)
<float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float one = {1.0}, float third = {0.333}> {
  a = MatMul (x, w)
  b = Identity (a)
  c = Mul (b, one)
  d = Relu (c)
  e = Mul (d, third)
  f = Identity (e)
  g = Sigmoid (f)
  y = Mul (g, one)
}
"""


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Remove Identity.

    A second paragraph that no listing shows.
    """

    def run(self, state: CompileState) -> int:
        rewriter = Rewriter(state.model)
        for node in list(all_nodes(state.model)):
            if is_op(node, "Identity") and not node.outputs[0].is_graph_output():
                source = node.inputs[0]
                assert source is not None
                rewriter.replace(node.outputs[0], source)
                rewriter.erase(node)
                state.remark(self.name(), node, "removed", "an Identity does nothing", done=True)
        return rewriter.changes


@dataclass(frozen=True)
class ScaleFactors(Pass):
    """Multiply the constant of every Mul by a factor: right for 1.0 only."""

    numerics: ClassVar[Contract] = Reassociates(1e-5)
    factor: float = 1.0
    only: str | None = None

    def run(self, state: CompileState) -> int:
        rewriter = Rewriter(state.model)
        for node in list(all_nodes(state.model)):
            factor = const_array(node.inputs[1]) if is_op(node, "Mul") else None
            if factor is None or not state.allow("scale-factor", node):
                continue
            wrong = self.factor if self.only in (None, node.outputs[0].name) else 1.0
            rewriter.set_input(node, 1, rewriter.constant(np.asarray(factor * np.float32(wrong)), "factor"))
        return rewriter.changes


@dataclass(frozen=True)
class SilentlyScale(Pass):
    """Double the constant of one Mul without asking whether it may."""

    numerics: ClassVar[Contract] = Lossy()

    def run(self, state: CompileState) -> int:
        node = next(n for n in all_nodes(state.model) if n.outputs[0].name == "e")
        rewriter = Rewriter(state.model)
        rewriter.set_input(node, 1, rewriter.constant(np.float32(0.666), "doubled"))
        return rewriter.changes


@dataclass(frozen=True)
class BreakGraph(Pass):
    """Give two nodes the same name."""

    def run(self, state: CompileState) -> int:
        nodes = list(state.model.graph)
        nodes[1].name = nodes[0].name
        return 1


@dataclass(frozen=True)
class AskRange(Pass):
    """Ask for the range of a value, then fail on request."""

    needs: ClassVar[tuple[Phase, ...]] = (Phase.FLOAT, Phase.PLANNED)
    value: str = "a"
    fail: bool = False

    def run(self, state: CompileState) -> int:
        assert state.statistics is not None
        low, high = state.statistics.range(self.value, "min-max")
        state.remark(self.name(), "", "range", f"{low} to {high}")
        if self.fail:
            raise RuntimeError("asked to fail")
        return 0


@dataclass(frozen=True)
class PlanNothing(Pass):
    """Go to the planned phase."""

    gives: ClassVar[Phase | None] = Phase.PLANNED

    def run(self, state: CompileState) -> int:
        return 0


@dataclass(frozen=True)
class InsertNothing(Pass):
    """Go to the Q/DQ phase."""

    needs: ClassVar[Phase | tuple[Phase, ...]] = Phase.PLANNED
    gives: ClassVar[Phase | None] = Phase.QDQ
    numerics: ClassVar[Contract] = WithinStep(1)

    def run(self, state: CompileState) -> int:
        return 0


@dataclass(frozen=True)
class ManyOptions(Pass):
    """Have an option of every type."""

    pass_name: ClassVar[str] = "many"
    numerics: ClassVar[Contract] = Exact()
    flag: bool = True
    count: int = 3
    ratio: float = 0.5
    label: str = "plain"
    limit: int | None = None
    either: int | float | str | bool | None = None
    mode: Literal["min-max", "percentile"] = "min-max"
    names: tuple[str, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is at least 0, found {self.count}")

    def run(self, state: CompileState) -> int:
        return 0


@dataclass(frozen=True)
class NeedsFormat(Pass):
    """Have an option without a default."""

    format: str

    def run(self, state: CompileState) -> int:
        return 0


REGISTRY = PassRegistry(
    (
        DropIdentity,
        ScaleFactors,
        SilentlyScale,
        BreakGraph,
        AskRange,
        PlanNothing,
        InsertNothing,
        ManyOptions,
        NeedsFormat,
    )
)


class FixedRanges:
    """Statistics that know the value ``a`` only."""

    def observed(self, name: str) -> bool:
        return name == "a"

    def range(self, name: str, estimator: str = "min-max", spec: object = None) -> tuple[float, float]:
        return (-1.5, 0.1)


def chain_state(text: str = CHAIN) -> CompileState:
    """Return a fresh state over a model in text."""
    return CompileState(parse_text(text), TARGET)


def chain_feeds(count: int = 2) -> list[Feeds]:
    """Return feeds of different batch sizes for `CHAIN`."""
    random = np.random.default_rng(0)
    return [{"x": random.uniform(-0.1, 0.1, (n + 1, 4)).astype(np.float32)} for n in range(count)]


def engine() -> OrtEngine:
    """Return the engine that the tests run graphs on."""
    return OrtEngine()


def node_of(model: ir.Model, value: str) -> ir.Node:
    """Return the node that computes a value."""
    return next(n for n in all_nodes(model) if any(v.name == value for v in n.outputs))
