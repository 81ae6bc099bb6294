"""The proof: read the engine's own graph back and say which planned fusions happened, and why the others did not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx_ir as ir

from qcompiler.ir.graph import all_nodes
from qcompiler.patterns.outline import DOMAIN, ROOT
from qcompiler.quant.plan import QuantPlan

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
        "MatMulNBits", "QGemm", "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearConv",
        "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMatMul", "QLinearMul", "QLinearSigmoid",
        "QLinearSoftmax", "QLinearWhere",
    }
)  # fmt: skip
_WEIGHTED = frozenset({"Conv", "MatMul", "Gemm", "LSTM"})
_ARITHMETIC = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax"})
_TOKEN = re.compile(r"(_token_\d+|_nhwc|/duplicated)+$")


ENGINE_REFUSED = "engine-refused"
"""Reason of a miss where the engine takes the model as a whole not."""


@dataclass(frozen=True)
class Planned:
    """One fused call that lowering started from.

    Attributes:
        group: the group's name, which the computing node carries.
        kind: operator type of the root.
        inputs: tensors read at the border.
        outputs: tensors written at the border.
    """

    group: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Miss:
    """A planned fusion that the engine did not make."""

    group: str
    kind: str
    reason: str
    text: str


@dataclass(frozen=True)
class Proof:
    """Planned against fused, read from the engine's graph.

    Attributes:
        planned: number of fused calls handed to the engine.
        fused: group to the engine's kernel.
        missed: the rest, each with a reason.
        note: what limits the proof: where it was found, or why there is none.
    """

    planned: int = 0
    fused: dict[str, str] = field(default_factory=dict)
    missed: tuple[Miss, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "planned": self.planned,
            "fused": len(self.fused),
            "missed": [asdict(m) for m in self.missed],
            "note": self.note,
            "kernels": dict(sorted(self.fused.items())),
        }


def planned_fusions(fused: ir.Model, plan: QuantPlan | None = None) -> tuple[Planned, ...]:
    """List the fused calls of a FUSED graph, and what the plan puts on integers without a call.

    Args:
        fused: a FUSED graph.
        plan: its plan; groups that it does not leave in float and that no call carries (a Split has several quantized
            outputs, which no call has) are listed by their root, so that they are proven like all others.
    """
    kinds = {identifier: f.metadata_props[ROOT] for identifier, f in fused.functions.items() if f.domain == DOMAIN}
    wanted = {name for name, choice in plan.choices.items() if choice.form != "float"} if plan is not None else set()
    found = []
    for node in all_nodes(fused):
        if node.op_identifier() in kinds or node.name in wanted:
            inputs = tuple(str(v.name) for v in node.inputs if v is not None)
            outputs = tuple(str(v.name) for v in node.outputs)
            found.append(Planned(str(node.name), kinds.get(node.op_identifier(), node.op_type), inputs, outputs))
    return tuple(found)


def prove(planned: Sequence[Planned], executed: ir.Model) -> Proof:
    """Match every planned fusion with what the engine executes.

    A fusion happened if none of the group's own Q/DQ nodes is left and an integer kernel carries the group's name or
    writes its border tensor (an operator that only moves data needs no kernel: it may have vanished).

    Args:
        planned: fused calls, from `planned_fusions`.
        executed: the engine's graph after its optimizations.
    """
    nodes = list(all_nodes(executed))
    by_name: dict[str, list[ir.Node]] = {}
    writers: dict[str, ir.Node] = {}
    for node in nodes:
        by_name.setdefault(_TOKEN.sub("", str(node.name)), []).append(node)
        for value in node.outputs:
            writers[str(value.name)] = node
    left = _left_over(nodes, {p.group for p in planned})
    fused: dict[str, str] = {}
    missed = []
    for plan in planned:
        kernel, miss = _judge(plan, by_name.get(plan.group, []), writers, left)
        if miss is None:
            fused[plan.group] = kernel
        else:
            missed.append(miss)
    return Proof(len(planned), fused, tuple(missed))


def _left_over(nodes: Iterable[ir.Node], groups: set[str]) -> Mapping[str, str]:
    """Return group to the name of a Q/DQ node of its body that the engine still executes."""
    found = {}
    for node in nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            head, _, tail = _TOKEN.sub("", str(node.name)).rpartition("/")
            if head in groups and tail.startswith(("QuantizeLinear", "DequantizeLinear")):
                found[head] = str(node.name)
    return found


def _judge(
    plan: Planned, named: Sequence[ir.Node], writers: Mapping[str, ir.Node], left: Mapping[str, str]
) -> tuple[str, Miss | None]:
    border = [writers[o] for o in plan.outputs if o in writers]
    kernels = [n.op_type for n in (*named, *border) if n.op_type in INTEGER_KERNELS]
    if plan.group in left:
        floats = [n.op_type for n in named if n.op_type not in INTEGER_KERNELS]
        text = f"the engine still executes {left[plan.group]}"
        if floats:
            text += f" and {floats[0]} in float"
        return "", Miss(plan.group, plan.kind, "engine-left-dequantize", text)
    if kernels:
        return kernels[0], None
    if plan.kind in _WEIGHTED or plan.kind in _ARITHMETIC:
        text = f"no integer kernel carries the group's name or writes {', '.join(plan.outputs)}"
        return "", Miss(plan.group, plan.kind, "engine-kept-float", text)
    return named[0].op_type if named else "moved away", None
