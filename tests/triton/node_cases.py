"""The onnx package's test cases of single operators, as the executor can run them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx.backend.test.case.node import collect_testcases

from qcompiler.backends.triton.operators import TORCH_OPERATORS
from qcompiler.engine import Array

_UNSUPPORTED = {onnx.TensorProto.STRING, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
_NARROW = {
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1", "FLOAT8E8M0")
    if hasattr(onnx.TensorProto, name)
}


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    feeds: dict[str, Array]
    wanted: dict[str, Array]
    rtol: float
    atol: float


def operators_of(graph: onnx.GraphProto) -> set[str]:
    found = set()
    for node in graph.node:
        found.add(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}")
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                found |= operators_of(body) if body.node else set()
    return found


def why_not(model: onnx.ModelProto) -> str:
    """Return why a case is none for the executor, empty if it is one."""
    unknown = operators_of(model.graph) - TORCH_OPERATORS - {"If", "Loop", "Scan"}
    if unknown:
        return f"operators without a step: {', '.join(sorted(unknown))}"
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.HasField("tensor_type"):
            return "a sequence or an optional"
        if value.type.tensor_type.elem_type in _UNSUPPORTED:
            return "strings or complex numbers"
        if value.type.tensor_type.elem_type in _NARROW:
            return "an input or output of fewer than 8 bits, or of scales"
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset < 9 and "Scan" in operators_of(model.graph):
        return "Scan of opset 8, which import converts"
    if any("train" in i.name for n in model.graph.node if n.op_type == "Dropout" for i in model.graph.input) or any(
        n.op_type == "Dropout" and len(n.input) > 2 and n.input[2] for n in model.graph.node
    ):
        return "Dropout in training mode"
    return ""


def cases() -> Iterator[tuple[Case, str]]:
    """Yield (case, reason why it is none for the executor, or empty) in the package's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases compute infinities and NaN on purpose
        collected = collect_testcases(None)
    for found in collected:
        why = why_not(found.model)
        inputs, outputs = found.data_sets[0]
        feeds = {} if why else dict(zip((v.name for v in found.model.graph.input), map(_array, inputs), strict=True))
        wanted = {} if why else dict(zip((v.name for v in found.model.graph.output), map(_array, outputs), strict=True))
        yield Case(found.name, found.model, feeds, wanted, found.rtol, found.atol), why


def _array(value: Any) -> Array:
    return np.asarray(onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value)
