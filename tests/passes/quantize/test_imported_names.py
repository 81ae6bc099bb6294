"""The numbers of an imported quantized model follow its values when a rewriting renames them."""

from __future__ import annotations

import numpy as np

import qcompiler
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.import_qdq import ImportQdq
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import import_exactly, model_of
from tests.synthetic import feeds_of

F = np.float32
WEIGHTS = {
    "sx": F(0.02), "zx": np.asarray(-3, np.int8), "sy": F(0.05), "zy": np.asarray(9, np.int8),
    "w": np.random.default_rng(0).integers(-127, 128, (64, 10)).astype(np.int8), "sw": F(0.004),
    "zw": np.asarray(0, np.int8), "b": np.linspace(-1, 1, 10).astype(F),
}  # fmt: skip
BODY = """
    qx = QuantizeLinear(x, sx, zx) dx = DequantizeLinear(qx, sx, zx) dw = DequantizeLinear(w, sw, zw)
    m = MatMul(dx, dw) a = Add(m, b)
    qa = QuantizeLinear(a, sy, zy) da = DequantizeLinear(qa, sy, zy) y = Softmax<axis=1>(da)
"""


def test_the_output_of_a_product_that_took_its_bias_along_keeps_its_numbers() -> None:
    model = import_exactly(model_of("float[n,64] x", "float[n,10] y", BODY, WEIGHTS))
    state = CompileState(model, load_target("ort-x86"))
    Pipeline((ImportQdq(), Canonicalize())).run(state, [])
    (gemm,) = [node for node in state.model.graph if node.op_type == "Gemm"]
    kept = state.imported[str(gemm.outputs[0].name)]
    assert kept.zero_point == (9 + 128,)
    assert kept.scale == (float(F(0.05)),)


def test_what_was_quantized_in_front_of_a_float_operator_stays_quantized() -> None:
    made = qcompiler.compile(
        model_of("float[n,64] x", "float[n,10] y", BODY, WEIGHTS), target="ort-openvino",
        calibration=feeds_of({"x": (8, 64)}, 5),
    )  # fmt: skip
    (softmax,) = [node for node in made.model.graph if node.op_type == "Softmax"]
    dequantize = softmax.inputs[0].producer()
    assert dequantize is not None
    assert dequantize.op_type == "DequantizeLinear"
    assert dequantize.inputs[1].const_value.numpy().item() == F(0.05)
    assert made.report.quality is not None
    assert made.report.quality.worst > 60  # the same integers
