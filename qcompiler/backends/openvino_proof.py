"""Planned against fused on OpenVINO: by the kernels of the layers that it executes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.backends.openvino import holds
from qcompiler.backends.readback import Miss, Planned, Proof

_INTEGER = ("_i8", "_u8")
"""How the name of a kernel ends that computes with 8-bit integers; ``_I8`` reads unsigned ones."""
_MOVERS = frozenset(
    {
        "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "DepthToSpace",
        "Split", "MaxPool", "Resize",
    }
)  # fmt: skip


def prove_layers(planned: Sequence[Planned], executed: ir.Model) -> Proof:
    """Match every planned fusion with the layers that OpenVINO executes.

    A fusion happened if the layer that the group's operator was fused into has an 8-bit kernel. An operator that only
    moves data may also have vanished, or move what it is given: it costs no arithmetic.

    Args:
        planned: fused calls, from `planned_fusions`.
        executed: the executed graph, from `OvRunner.executed`.
    """
    nodes = [node for node in executed.graph if node.op_type not in ("Input", "Output", "Const")]
    fused: dict[str, str] = {}
    missed = []
    for plan in planned:
        layers = [node for node in nodes if holds(node, plan.group, *plan.outputs)]
        kernels = [n for n in layers if n.metadata_props["kernel"].lower().endswith(_INTEGER)]
        if kernels:
            fused[plan.group] = f"{kernels[0].op_type} {kernels[0].metadata_props['kernel']}"
        elif plan.kind in _MOVERS and not layers:
            fused[plan.group] = "moved away"
        elif layers:
            text = f"the engine executes {layers[0].op_type} as {layers[0].metadata_props['kernel']}"
            missed.append(Miss(plan.group, plan.kind, "engine-kept-float", text))
        else:
            text = "no layer of the executed graph carries the group's name"
            missed.append(Miss(plan.group, plan.kind, "engine-renamed", text))
    return Proof(len(planned), fused, tuple(missed))
