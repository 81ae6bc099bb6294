"""NVFP4 and MXFP8: activations in blocks with scales found at run time, as functions that ONNX Runtime runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import PassError
from qcompiler.ir.graph import all_nodes, const_array
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.passes.stored_constants import float4_of
from qcompiler.patterns.block_dynamic import BLOCK_DOMAIN, BLOCK_SIZES, block_quantizer, quantizer_of
from qcompiler.patterns.outline import DOMAIN
from qcompiler.quant.arithmetic import dequantize, quantize, weight_params
from qcompiler.quant.spec import QuantSpec, affine_params
from qcompiler.targets.target import parse_target
from tests.passes.quantize.lab import ENGINE, REFERENCE, lab, model_of, normal, ops, outputs

F = np.float32
HEAD = '[target]\nengine = "onnxruntime"\nmax_opset = 24\nbias = "float"\n'
ROW = (
    '[[op]]\ntype = ["MatMul", "Gemm"]\nkind = "weighted"\nforms = ["dynamic", "weight-only"]\ndata = [0]\nweight = 1\n'
    "weight_axis = -1\nbias = 2\n"
)
FIELDS = {
    "mxfp8": 'activation = "float8e4m3fn"\nweight = "float8e4m3fn"\nblock = 32\nweight_scale = "float8e8m0"\n',
    "nvfp4": 'activation = "float4e2m1"\nweight = "float4e2m1"\nblock = 16\nweight_scale = "float8e4m3fn"\n',
}
SPECS = {
    "mxfp8": QuantSpec("float8e4m3fn", -1, symmetric=True, dynamic=True, block=32, scale_format="float8e8m0"),
    "nvfp4": QuantSpec("float4e2m1", -1, symmetric=True, dynamic=True, block=16, scale_format="float8e4m3fn"),
}
NAMES = {"mxfp8": "QuantizeMXFP8", "nvfp4": "QuantizeNVFP4"}
W = {"m": normal(4, 64, 48, scale=0.1), "mb": normal(5, 48), "m2": normal(6, 48, 32, scale=0.1)}
X, Y = "float[n,5,64] x", "float[n,5,48] y"
BODY = "h = MatMul(x, m) y = Add(h, mb)"
FUSED = (PlanQuantization(matmul="dynamic"), InsertQdq(), FoldScales(), FuseQdq())


def target(kind):
    return parse_target(HEAD + FIELDS[kind] + ROW, kind)


def made(kind, body=BODY, x=X, y=Y, **options):
    return lab(model_of(x, y, body, W), target=target(kind), **options)


def blocks_of(x, spec, outer=None):
    """Quantize as the formats are defined, in NumPy; ``outer`` replaces the scale above the blocks."""
    cut = np.abs(x).reshape(*x.shape[:-1], -1, spec.block).max(-1)
    if outer is None:
        params = affine_params(spec, -cut, cut)
        return dequantize(quantize(x, params), params)
    stored = np.clip((cut / F(6)) / F(outer), 2.0**-9, 448).astype(F)
    scale = np.repeat(stored.astype("float8_e4m3fn").astype(F) * F(outer), spec.block, -1)
    ratio = np.clip(x / scale, -6, 6).astype(F)
    return ratio.astype("float4_e2m1fn").astype(F) * scale


def run_alone(name, x, *more):
    function = block_quantizer(name)
    values = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT)) for n in ("x", "xo")[: len(function.inputs)]]
    node = ir.Node(BLOCK_DOMAIN, name, values, num_outputs=1)
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21, BLOCK_DOMAIN: 1}, name="g")
    for value, array in zip(values, (x, *more), strict=True):
        value.shape = ir.Shape(array.shape)
    model = ir.Model(graph, ir_version=10, functions=[function])
    return ENGINE.load(model, REFERENCE).run(dict(zip(("x", "xo"), (x, *more), strict=False)))["y"]


def test_the_functions_are_named_after_their_formats():
    assert {kind: quantizer_of(s.format, s.scale_format) for kind, s in SPECS.items()} == NAMES
    assert {kind: BLOCK_SIZES[NAMES[kind]] for kind in SPECS} == {"mxfp8": 32, "nvfp4": 16}
    assert quantizer_of("float8e4m3fn", "") is None


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 32), (1, 2, 3, 96), (64,)])
def test_mxfp8_in_the_engine_is_the_definition_bit_for_bit(shape):
    x = (
        np.random.default_rng(7).normal(0, 1, shape) * 10.0 ** np.random.default_rng(8).integers(-20, 20, shape)
    ).astype(F)
    np.testing.assert_array_equal(run_alone("QuantizeMXFP8", x), blocks_of(x, SPECS["mxfp8"]))


def test_mxfp8_scales_are_exact_at_every_power_of_two():
    powers = np.exp2(np.arange(-100, 100, dtype=np.float64)).astype(F)
    edges = np.concatenate([powers, np.nextafter(powers, F(0)), np.nextafter(powers, F(np.inf)), [F(0)]])
    x = np.zeros((edges.size, 32), F)
    x[:, 3], x[:, 4] = edges, edges / 3
    np.testing.assert_array_equal(run_alone("QuantizeMXFP8", x), blocks_of(x, SPECS["mxfp8"]))


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 32), (16,)])
def test_nvfp4_in_the_engine_is_the_definition_bit_for_bit(shape):
    x = np.random.default_rng(9).normal(0, 1, shape).astype(F)
    x.reshape(-1)[:16] = 0.0
    outer = np.asarray(np.abs(x).max() / (6 * 448) + F(1e-6), F)
    np.testing.assert_array_equal(run_alone("QuantizeNVFP4", x, outer), blocks_of(x, SPECS["nvfp4"], outer))


def test_nvfp4_rounds_ties_as_float4_does():
    x = np.zeros((2, 16), F)
    x[0, :9] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 0.5]
    x[1] = -x[0]
    # With a block scale of 1 the numbers are the ties themselves.
    got = run_alone("QuantizeNVFP4", x, np.asarray(1, F))
    np.testing.assert_array_equal(got[0, :9], [6, 0, 1, 1, 2, 2, 4, 4, 0.5])
    np.testing.assert_array_equal(got[1], -got[0])


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_a_group_is_one_call_that_reads_its_data_through_the_quantizer(kind):
    given = made(kind)
    state = given.run(FUSED, {"MatMul_0": "dynamic"})
    assert ops(state.model) == {"QMatMul_1": 1}
    (function,) = (f for f in state.model.functions.values() if f.domain == DOMAIN)
    assert [n.op_type for n in function if n.domain == BLOCK_DOMAIN] == [NAMES[kind]]
    lowered = given.run((*FUSED, LowerOnnxruntime()), {"MatMul_0": "dynamic"})
    (made_quantizer,) = (n for n in all_nodes(lowered.model) if n.domain == BLOCK_DOMAIN)
    assert made_quantizer.name == f"MatMul_0/{NAMES[kind]}"
    assert [f.name for f in lowered.model.functions.values()] == [NAMES[kind]]
    for model in (state.model, lowered.model):
        x = given.feeds[0]["x"]
        point = state.plan.points["MatMul_0#1"].spec
        params = weight_params(W["m"], point)
        outer = None
        if kind == "nvfp4":
            low, high = given.base.statistics.range("x")
            outer = F(max(-low, high) / (6 * 448))
        data, weight = blocks_of(x, SPECS[kind], outer), dequantize(quantize(W["m"], params), params)
        expected = data @ weight + W["mb"]
        tolerance = 1e-6 * (np.abs(data) @ np.abs(weight)).max()
        np.testing.assert_allclose(outputs(model, given.feeds[0])[0], expected, rtol=0, atol=tolerance)


def test_float4_weights_are_carried_in_int8_and_turn_back():
    state = made("nvfp4").run(FUSED[:2], {"MatMul_0": "dynamic"})
    constants = {str(v.name): const_array(v) for v in state.model.graph.initializers.values()}
    params = weight_params(W["m"], state.plan.points["MatMul_0#1"].spec)
    assert constants["m:q"].dtype == np.int8
    np.testing.assert_array_equal(float4_of(constants["m:q"]).astype(F), quantize(W["m"], params))
    assert constants["m:scale"].dtype.name == "float8_e4m3fn"
    assert constants["m:outer_scale"] == F(params.outer) / 2
    assert state.plan.points["MatMul_0#1"].spec.format == "float4e2m1"


def test_mxfp8_needs_no_calibration_and_nvfp4_says_that_it_does():
    assert made("mxfp8", calibrate=False).run(FUSED[:1], {"MatMul_0": "dynamic"}).plan.form("MatMul_0") == "dynamic"
    state = made("nvfp4", calibrate=False).run(FUSED[:1], {"MatMul_0": "dynamic"})
    assert state.plan.form("MatMul_0") == "float"
    assert [r.reason for r in state.remarks] == ["no-calibration"]


def test_a_table_with_an_unknown_mixture_is_named():
    text = HEAD + FIELDS["mxfp8"].replace("32", "16") + ROW
    given = lab(model_of(X, Y, BODY, W), target=parse_target(text, "odd"))
    with pytest.raises(PassError, match="MatMul_0: no quantizer at run time for float8e4m3fn in blocks of 16"):
        given.run(FUSED[:2], {"MatMul_0": "dynamic"})


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_two_groups_read_one_value_each_through_a_quantizer_of_its_own(kind):
    given = made(kind, "a = MatMul(x, m) b = MatMul(x, m) y = Mul(a, b)")
    state = given.run((*FUSED, LowerOnnxruntime()), dict.fromkeys(given.groups, "dynamic"))
    assert ops(state.model)[NAMES[kind]] == 2
    (got,) = outputs(state.model, given.feeds[0])
    assert np.isfinite(got).all()
    assert (got >= 0).all()
