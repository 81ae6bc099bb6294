"""One ONNX Runtime operator at a time, as the yardstick of the NumPy truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper


def run_operator(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    domain: str = "",
    outputs: int = 1,
    attributes: Mapping[str, Any] | None = None,
) -> list[np.ndarray]:
    """Run one operator as written, its first arrays as inputs and all others as constants."""
    names = ["" if a is None else f"i{n}" for n, a in enumerate(inputs)]
    given = {n: np.asarray(a, order="C") for n, a in zip(names, inputs, strict=True) if a is not None}
    node = helper.make_node(op_type, names, [f"o{n}" for n in range(outputs)], domain=domain, **dict(attributes or {}))
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("i0", helper.np_dtype_to_tensor_dtype(given["i0"].dtype), given["i0"].shape)],
        [helper.make_empty_tensor_value_info(f"o{n}") for n in range(outputs)],
        [onnx.numpy_helper.from_array(a, n) for n, a in given.items() if n != "i0"],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"i0": given["i0"]})
