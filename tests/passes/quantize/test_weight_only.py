"""Weights alone stored quantized: what the plan says, what is written, fused, and emitted as MatMulNBits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import planned_fusions, prove
from qcompiler.engine import EngineOptions
from qcompiler.ir.graph import all_nodes, const_array
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.matmul_nbits import pack, pack_weight, packs
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.quant.arithmetic import dequantize, quantize, weight_params
from qcompiler.quant.plan import QuantPlan
from qcompiler.quant.spec import QuantSource, QuantSpec
from qcompiler.targets.target import Target, parse_target
from tests.passes.quantize.lab import ENGINE, OPTIMIZED, Lab, lab, model_of, normal, ops, outputs

HEAD = '[target]\nengine = "onnxruntime"\nmax_opset = 24\nbias = "float"\n'
ROW = (
    '[[op]]\ntype = ["MatMul", "Gemm"]\nkind = "weighted"\nforms = ["weight-only"]\ndata = [0]\nweight = 1\n'
    "weight_axis = -1\nbias = 2\n"
)
EMIT = 'emit = { weight-only = "MatMulNBits" }\n'
FORMATS = {
    "int4": 'weight = "int4"\nblock = 32\nblocks = [16]\n',
    "uint4": 'weight = "uint4"\nweight_symmetric = false\nblock = 16\n',
    "int8": 'weight = "int8"\n',
    "int8-blocks": 'weight = "int8"\nblock = 64\n',
    "uint8": 'weight = "uint8"\nweight_symmetric = false\nblock = 32\n',
    "int2": 'weight = "int2"\nblock = 16\n',
    "uint2": 'weight = "uint2"\nweight_symmetric = false\nblock = 64\n',
}
W = {
    "m": normal(4, 64, 48, scale=0.1), "mb": normal(5, 48), "m2": normal(6, 48, 32, scale=0.1), "gb": normal(7, 32),
    "odd": normal(8, 52, 32, scale=0.1),
}  # fmt: skip
TWO = "h = MatMul(x, m) i = Add(h, mb) r = Relu(i) y = MatMul(r, m2)"
X, Y = "float[n,5,64] x", "float[n,5,32] y"


def target(kind: str = "int4", emit: bool = False, row: str = ROW) -> Target:
    return parse_target(HEAD + FORMATS[kind] + row + (EMIT if emit else ""), "t")


def made(kind: str = "int4", body: str = TWO, x: str = X, y: str = Y, emit: bool = False) -> Lab:
    return lab(model_of(x, y, body, W), target=target(kind, emit), calibrate=False)


PLAN = PlanQuantization(convolution="weight-only", matmul="weight-only", recurrent="float", arithmetic=False)
STORED = (PLAN, InsertQdq())
FUSED = (*STORED, FoldScales(), FuseQdq())


def run(given: Lab, *passes):
    return given.run(passes, {g.name: "weight-only" for g in given.groups.values() if g.legal})


def weights(state, name="m"):
    return {str(v.name): const_array(v) for v in state.model.graph.initializers.values() if f"{name}:" in str(v.name)}


# ---- plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_has_one_point_per_weight_and_needs_no_calibration():
    plan = run(made(), PLAN).plan
    spec = QuantSpec("int4", 0, symmetric=True, narrow=True, block=32)
    assert {k: (p.spec, p.source) for k, p in plan.points.items()} == {
        "MatMul_0#1": (spec, QuantSource("weight")),
        # 48 has no blocks of 32.
        "MatMul_3#1": (QuantSpec("int4", 0, symmetric=True, narrow=True, block=16), QuantSource("weight")),
    }
    assert [c.form for c in plan.choices.values()] == ["weight-only"] * 2
    assert QuantPlan.from_json(plan.to_json()) == plan


def test_k_that_no_block_divides_stays_float_with_a_reason():
    state = run(made(body="y = MatMul(x, odd)", x="float[n,5,52] x"), *FUSED)
    assert ops(state.model) == {"MatMul": 1}
    assert [(r.node, r.reason, r.text) for r in state.remarks] == [
        (
            "MatMul_0",
            "block-size",
            "weight-only: the weight has 52 numbers along K, which blocks of 32, 16 do not divide",
        )
    ]


# ---- Q/DQ -----------------------------------------------------------------------------------------------------------


def test_blocks_of_k_are_written_with_one_scale_each():
    state = run(made(), *STORED)
    params = weight_params(W["m"], QuantSpec("int4", 0, symmetric=True, narrow=True, block=32))
    found = weights(state)
    assert set(found) == {"m:q", "m:scale"}  # symmetric blocks need no zero points
    np.testing.assert_array_equal(found["m:q"].astype(np.int64), quantize(W["m"], params))
    np.testing.assert_array_equal(found["m:scale"], params.scale)
    assert found["m:scale"].shape == (2, 48)
    dq = next(n for n in all_nodes(state.model) if n.name == "MatMul_0/DequantizeLinear_1")
    assert {k: a.value for k, a in dq.attributes.items()} == {"axis": 0, "block_size": 32}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_model_computes_with_the_stored_weights(kind):
    given = made(kind, "y = MatMul(x, m)", y="float[n,5,48] y")
    state = run(given, *STORED)
    (point,) = (p for p in state.plan.points.values())
    params = weight_params(W["m"], point.spec)
    stored = dequantize(quantize(W["m"], params), params)
    assert np.abs(stored - W["m"]).max() > 0
    expected = given.feeds[0]["x"] @ stored
    tolerance = 1e-6 * (np.abs(given.feeds[0]["x"]) @ np.abs(stored)).max()
    np.testing.assert_allclose(outputs(state.model, given.feeds[0])[0], expected, rtol=0, atol=tolerance)


# ---- fused calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "x", "y", "calls"),
    [
        ("y = MatMul(x, m)", X, "float[n,5,48] y", {"QMatMul_1": 1}),
        ("h = MatMul(x, m) y = Add(mb, h)", X, "float[n,5,48] y", {"QMatMul_1": 1}),
        (TWO, X, Y, {"QMatMul_1": 1, "Relu": 1, "QMatMul_2": 1}),
        ("g = Gemm(x, m, mb) y = Gemm(g, m2)", "float[n,64] x", "float[n,32] y", {"QGemm_1": 1, "QGemm_2": 1}),
        ("a = MatMul(x, m) b = MatMul(x, m) y = Mul(a, b)", X, "float[n,5,48] y", {"QMatMul_1": 2, "Mul": 1}),
    ],
)
def test_each_group_becomes_one_call_that_computes_the_same(body, x, y, calls):
    given = made(body=body, x=x, y=y)
    stored, fused = run(given, *STORED), run(given, *FUSED)
    assert ops(fused.model) == calls
    assert {p.group for p in planned_fusions(fused.model, fused.plan)} == set(fused.plan.choices)
    np.testing.assert_array_equal(outputs(fused.model, given.feeds[0])[0], outputs(stored.model, given.feeds[0])[0])


def test_a_convolution_and_a_table_are_stored_per_channel_and_row():
    conv = ROW.replace('"MatMul", "Gemm"', '"Conv"').replace("weight_axis = -1", "weight_axis = 0")
    table = ROW.replace('"MatMul", "Gemm"', '"Gather"').replace("data = [0]\nweight = 1", "data = [1]\nweight = 0")
    rows = conv + table.replace("weight_axis = -1", "weight_axis = 0").replace("bias = 2", "bias = -1")
    proto = model_of(
        "int64[b,4] i, float[b,4,6] x", "float[b,8,4] y", "t = Gather(e, i) s = Add(t, x) y = Conv(s, w, c)",
        {"e": normal(1, 10, 6), "w": normal(2, 8, 4, 3), "c": normal(3, 8)},
    )  # fmt: skip
    given = lab(proto, target=target("int8", row=rows), calibrate=False)
    state = run(given, *FUSED)
    assert ops(state.model) == {"QGather_1": 1, "Add": 1, "QConv_1": 1}
    assert {k: (p.spec.axis, p.spec.block) for k, p in state.plan.points.items()} == {
        "Gather_0#0": (0, 0),
        "Conv_2#1": (0, 0),
    }
    scales = {n: weights(state, n)[f"{n}:scale"] for n in ("e", "w")}
    assert {n: s.shape for n, s in scales.items()} == {"e": (10,), "w": (8,)}
    feed = given.feeds[0]
    reference, got = outputs(given.base.model, feed)[0], outputs(state.model, feed)[0]
    assert 0 < np.abs(got - reference).max() < 0.05 * np.abs(reference).max()


def test_a_weight_in_blocks_beside_quantized_data_is_no_integer_product():
    rows = ROW.replace('"weight-only"', '"static-float"')
    proto = model_of(X, "float[n,5,48] y", "y = MatMul(x, m)", W)
    given = lab(proto, target=parse_target(HEAD + FORMATS["int4"] + rows, "t"))
    state = given.run((PlanQuantization(matmul="static-float"), InsertQdq(), FuseQdq()), MatMul="static-float")
    assert not any(n.op_type == "QMatMul_1" and len(n.inputs) == 6 for n in all_nodes(state.model))


# ---- MatMulNBits ----------------------------------------------------------------------------------------------------


def test_numbers_are_packed_from_the_lowest_bits():
    assert pack(np.asarray([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(np.asarray([1, 2, 3, 0, 1]), 2).tolist() == [0b00111001, 1]
    assert pack(np.asarray([[250], [7]]), 8).tolist() == [[250], [7]]
    q = np.asarray([[1, 9], [2, 10], [3, 11]])
    zero = np.asarray([[8, 8], [8, 8]])
    # Columns first; the last block is filled up with its zero point.
    assert pack_weight(q, zero, 2, 4).tolist() == [[[0x21], [0x83]], [[0xA9], [0x8B]]]


@pytest.mark.parametrize(("bits", "block", "fits"), [(4, 32, True), (4, 8, False), (3, 32, False), (8, 48, False)])
def test_the_operator_takes_powers_of_two_from_16(bits, block, fits):
    assert packs(bits, block) is fits


def exact(model: ir.Model) -> ir.Model:
    """Let MatMulNBits compute in float32, as the Q/DQ form does."""
    for node in all_nodes(model):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return model


@pytest.mark.parametrize("kind", FORMATS)
def test_the_emitted_operator_holds_the_same_weights_bit_for_bit(kind):
    # Rows of the identity read the weights themselves.
    given = made(kind, "y = MatMul(x, m)", y="float[n,5,48] y", emit=True)
    lowered = run(given, *FUSED, LowerOnnxruntime())
    assert ops(lowered.model) == {"MatMulNBits": 1}
    (node,) = all_nodes(lowered.model)
    assert node.name == "MatMul_0"
    assert (node.domain, node.attributes["K"].value, node.attributes["N"].value) == ("com.microsoft", 64, 48)
    eye = np.eye(64, dtype=np.float32)[:60].reshape(12, 5, 64)
    stored = outputs(run(given, *STORED).model, {"x": eye})[0]
    np.testing.assert_array_equal(outputs(exact(lowered.model), {"x": eye})[0], stored)


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "int2"])
def test_emitted_and_stored_form_agree(kind):
    given = made(kind, emit=True)
    stored, lowered = run(given, *STORED), run(given, *FUSED, LowerOnnxruntime())
    if kind != "uint4":  # 48 rows in blocks of 16
        assert ops(lowered.model) == {"MatMulNBits": 2, "Relu": 1}
    reference = outputs(stored.model, given.feeds[0])[0]
    np.testing.assert_allclose(
        outputs(exact(lowered.model), given.feeds[0])[0], reference, rtol=0, atol=1e-5 * np.abs(reference).max()
    )


def test_the_bias_goes_into_the_operator_and_the_proof_finds_it():
    given = made(emit=True)
    fused, lowered = run(given, *FUSED), run(given, *FUSED, LowerOnnxruntime())
    first = next(n for n in all_nodes(lowered.model) if n.name == "MatMul_0")
    np.testing.assert_array_equal(const_array(first.inputs[5]), W["mb"])
    assert first.inputs[3:5] == (None, None)
    proof = prove(planned_fusions(fused.model, fused.plan), ENGINE.optimized_graph(lowered.model, OPTIMIZED))
    assert proof.fused == {"MatMul_0": "MatMulNBits", "MatMul_3": "MatMulNBits"}


def test_without_an_emitter_the_weight_stays_dequantized_in_front():
    given = made()
    lowered = run(given, *FUSED, LowerOnnxruntime())
    assert ops(lowered.model) == {"DequantizeLinear": 2, "MatMul": 2, "Add": 1, "Relu": 1}
    session = OrtEngine().load(lowered.model, EngineOptions(optimize=False))
    assert [o.name for o in session.outputs] == ["y"]


def test_emit_qdq_keeps_the_weight_dequantized():
    lowered = run(made(emit=True), *FUSED, LowerOnnxruntime(emit="qdq"))
    assert ops(lowered.model) == {"DequantizeLinear": 2, "MatMul": 2, "Add": 1, "Relu": 1}
