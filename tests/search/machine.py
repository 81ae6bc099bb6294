"""A stopwatch whose machine is invented: the engine's own graphs, and times that depend on operator and name alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import INTEGER_KERNELS
from qcompiler.engine import EngineOptions, ModelLike, NodeCost, Profile
from qcompiler.ir.graph import all_nodes
from qcompiler.search.timing import Timing

FLOAT_US = {"Conv": 200.0, "MatMul": 200.0, "FusedMatMul": 200.0, "Gemm": 200.0, "FusedGemm": 200.0, "LSTM": 400.0}
_TOKEN = re.compile(r"_token_\d+$")
CONVERSION_US = 5.0
OTHER_US = 10.0


@dataclass
class InventedMachine:
    """Time every executed node by its kind.

    Attributes:
        slow: says of an integer kernel's name whether this machine is slow at it.
        slow_us: what such a kernel takes.
        integer_us: what any other integer kernel takes.
        from_profile: the first profile (counted from 0) in which slow kernels show.
        profiles: how many profiles were taken.
        compared: names of the comparisons that were made.
    """

    slow: Callable[[str], bool] = lambda name: False
    slow_us: float = 5000.0
    integer_us: float = 50.0
    from_profile: int = 0
    profiles: int = 0
    compared: list[tuple[str, ...]] = field(default_factory=list)

    def profile(self, model: ModelLike) -> tuple[Profile, ir.Model]:
        """Return invented node times and the graph that the engine would execute."""
        executed = OrtEngine().optimized_graph(model, EngineOptions(threads=1))
        number, self.profiles = self.profiles, self.profiles + 1
        return self._profile(executed, number >= self.from_profile), executed

    def compare(self, models: Mapping[str, ModelLike]) -> dict[str, Timing]:
        """Return the sums over all nodes, as seconds."""
        self.compared.append(tuple(models))
        found = {}
        for name, model in models.items():
            executed = OrtEngine().optimized_graph(model, EngineOptions(threads=1))
            total = self._profile(executed, True).total
            found[name] = Timing(total * 1e-6, total * 1e-6, 1)
        return found

    def _profile(self, executed: ir.Model, slow: bool) -> Profile:
        return Profile(tuple(NodeCost(str(n.name), n.op_type, self._us(n, slow)) for n in all_nodes(executed)))

    def _us(self, node: ir.Node, slow: bool) -> float:
        if node.op_type in INTEGER_KERNELS:
            return self.slow_us if slow and self.slow(_TOKEN.sub("", str(node.name))) else self.integer_us
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            return CONVERSION_US
        return FLOAT_US.get(node.op_type, OTHER_US)
