"""Replace a fused call by its body, the Q/DQ form that engines match."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.rewriter import Rewriter
from qcompiler.patterns.outline import ROOT


def inline(rewriter: Rewriter, call: ir.Node, function: ir.Function) -> None:
    """Replace a call by its body; the root keeps the call's name, the other nodes extend it."""
    mapping: dict[ir.Value, ir.Value | None] = dict(zip(function.inputs, call.inputs, strict=True))
    group = call.name or ""
    kind = function.metadata_props[ROOT]
    for node in function:
        name = f"{group}/{node.op_type}" if node.op_type != kind else f"{group}:node"
        made = rewriter.node(
            node.op_type,
            [None if v is None else mapping[v] for v in node.inputs],
            before=call,
            origin=[call],
            name=name,
            domain=node.domain,
            outputs=len(node.outputs),
        )
        for attribute in node.attributes.values():
            made.attributes[attribute.name] = attribute
        for old, new in zip(node.outputs, made.outputs, strict=True):
            mapping[old] = new
            if not old.name:
                new.name = ""
        if node.op_type == kind:
            call.name = rewriter.unique(f"{group}:was")
            made.name = group
    for old, inner in zip(call.outputs, function.outputs, strict=True):
        result = mapping[inner]
        assert result is not None
        rewriter.take_over(old, result)
        rewriter.replace(old, result)
    rewriter.erase(call)
