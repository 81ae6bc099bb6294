"""The Q/DQ that TensorRT gets: symmetric int8, float biases, sums in the epilogue, its own block operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.engine import Array
from qcompiler.errors import TargetError
from qcompiler.ir.graph import all_graphs, attr_int, const_array, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.schemas import onnx_opset
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_tensorrt import LowerTensorrt
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.search.quality import sqnr_db
from qcompiler.targets.target import Target, load_target
from tests.passes.quantize.lab import ENGINE, REFERENCE, Lab, import_exactly, lab, model_of, normal, ops

F = np.float32
TARGET = load_target("tensorrt-sm80")
IMAGE = "float[n,4,8,8] x"
STEPS = (PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq())
W = {
    "w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "v": normal(3, 8, 8, 3, 3, scale=0.1),
    "u": normal(4, 8, 8, 3, 3, scale=0.1), "two": np.asarray([1, 1, 2, 2], F),
}  # fmt: skip
PADDED = "<pads=[1,1,1,1]>"


def work(body: str, inputs: str = IMAGE, weights: dict[str, Array] | None = None, target: Target = TARGET) -> Lab:
    return lab(model_of(inputs, "float[] y", body, W if weights is None else weights), target=target)


def lowered(of: Lab, *passes: LowerTensorrt, **forms: str) -> ir.Model:
    return of.run((*STEPS, *(passes or (LowerTensorrt(),))), **forms).model  # type: ignore[arg-type]


def run(model: ir.Model, feed: dict[str, Array]) -> list[Array]:
    return list(ENGINE.load(model, REFERENCE).run(feed).values())


def worst(of: Lab, model: ir.Model) -> float:
    return min(sqnr_db(a, b) for f in of.feeds for a, b in zip(run(of.base.model, f), run(model, f), strict=True))


def pairs(model: ir.Model) -> list[ir.Node]:
    return [n for g in all_graphs(model) for n in g if is_op(n, "QuantizeLinear", "DequantizeLinear")]


# ---- int8 ----------------------------------------------------------------------------------------------------------


def test_every_pair_is_symmetric_int8_with_its_zero_point_and_no_bias_is_an_integer() -> None:
    of = work("c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)")
    model = lowered(of, Conv="static")
    assert len(pairs(model)) == 6
    for node in pairs(model):
        zero = const_array(node.inputs[2])
        assert zero is not None
        assert zero.dtype == np.int8
        assert not zero.any()
    assert not any(v.dtype is ir.DataType.INT32 for v in model.graph.initializers.values())
    first = next(n for n in model.graph if n.op_type == "Conv")
    np.testing.assert_array_equal(const_array(first.inputs[2]), W["b"])
    assert worst(of, model) > 30


def test_nothing_stands_between_a_convolution_and_its_activation() -> None:
    model = lowered(work("c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)"), Conv="static")
    relu = next(n for n in model.graph if n.op_type == "Relu")
    assert relu.inputs[0] is not None
    assert is_op(relu.inputs[0].producer(), "Conv")
    assert all(is_op(use.node, "QuantizeLinear") for use in relu.outputs[0].uses())


def test_a_sum_reads_the_skip_branch_quantized_and_the_product_in_float() -> None:
    of = work(f"c = Conv{PADDED}(x, w) r = Relu(c) d = Conv{PADDED}(r, v) s = Add(d, r) y = Conv(s, u)")
    state = of.run((*STEPS, LowerTensorrt()), Conv="static", Add="static")
    add = next(n for n in state.model.graph if n.op_type == "Add")
    kinds = [v.producer().op_type for v in add.inputs if v is not None and v.producer() is not None]
    assert sorted(kinds) == ["Conv", "DequantizeLinear"]
    assert any(r.reason == "residual" and r.done for r in state.remarks)
    assert worst(of, state.model) > 25


def test_a_branch_that_another_node_reads_stays_quantized() -> None:
    body = f"c = Conv{PADDED}(x, w) d = Conv{PADDED}(x, w2) s = Add(c, d) e = Conv(s, u) f = Conv(d, u) y = Add(e, f)"
    of = work(body, weights={**W, "w2": normal(8, 8, 4, 3, 3, scale=0.2)})
    model = lowered(of, Conv="static", Add="static")
    add = next(n for n in model.graph if n.name == "Add_2")
    kinds = {v.producer().op_type for v in add.inputs if v is not None and v.producer() is not None}
    assert kinds == {"Conv", "DequantizeLinear"}


def test_the_pair_behind_a_resize_stays() -> None:
    body = f'c = Conv(x, w) r = Resize<mode="nearest">(c, , two) y = Conv{PADDED}(r, v)'
    model = lowered(work(body), Conv="static", Resize="static")
    resize = next(n for n in model.graph if n.op_type == "Resize")
    assert [use.node.op_type for use in resize.outputs[0].uses()] == ["QuantizeLinear"]


def test_lowering_again_changes_nothing() -> None:
    of = work("c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)")
    state = of.run((*STEPS, LowerTensorrt()), Conv="static")
    state.phase = Phase.FUSED
    assert LowerTensorrt().run(state) == 0


# ---- an attention's projection --------------------------------------------------------------------------------------

PROJECTION = "h = MatMul(x, w) a = Add(h, b)"
HEADS = {
    "split": "q, k, v = Split<axis=-1, num_outputs=3>(a)",
    "reshape": "r = Reshape(a, shape) t = Transpose<perm=[2,0,1,3]>(r) q = Gather<axis=0>(t, i0) "
    "k = Gather<axis=0>(t, i1) v = Gather<axis=0>(t, i2)",
}
PROJECTION_WEIGHTS = {
    "w": normal(1, 64, 96, scale=0.1), "b": normal(2, 96), "shape": np.asarray([0, 0, 3, 32], np.int64),
    "i0": np.asarray(0, np.int64), "i1": np.asarray(1, np.int64), "i2": np.asarray(2, np.int64),
}  # fmt: skip


@pytest.mark.parametrize("form", HEADS)
def test_a_product_that_is_split_becomes_one_per_part(form: str) -> None:
    of = work(f"{PROJECTION} {HEADS[form]} s = Mul(q, k) y = Add(s, v)", "float[2,5,64] x", PROJECTION_WEIGHTS)
    fused = of.run(STEPS, MatMul="static-float").model
    model = lowered(of, MatMul="static-float")
    products = [n for n in model.graph if n.op_type == "MatMul"]
    assert [n.name for n in products] == ["MatMul_0", "MatMul_0/part_1", "MatMul_0/part_2"]
    assert len({n.inputs[0] for n in products}) == 1
    assert [n.inputs[1].shape.numpy() for n in products] == [(64, 32)] * 3  # type: ignore[union-attr]
    for feed in of.feeds:
        for wanted, actual in zip(run(fused, feed), run(model, feed), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_product_whose_parts_are_interleaved_stays_whole() -> None:
    heads = "r = Reshape(a, shape) q = Gather<axis=3>(r, i0) k = Gather<axis=3>(r, i1) v = Gather<axis=3>(r, i2)"
    weights = {**PROJECTION_WEIGHTS, "shape": np.asarray([0, 0, 32, 3], np.int64)}
    of = work(f"{PROJECTION} {heads} s = Mul(q, k) y = Add(s, v)", "float[2,5,64] x", weights)
    assert ops(lowered(of, MatMul="static-float"))["MatMul"] == 1


# ---- what the parser refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_a_zero_point_at_the_border_is_written_out(kind: str) -> None:
    body = "f = DequantizeLinear(x, s, z) r = Relu(f) y = QuantizeLinear(r, s, z)"
    zero = np.asarray(3, kind)
    proto = model_of(f"{kind}[2,16] x", f"{kind}[2,16] y", body, {"s": np.asarray(0.125, F), "z": zero})
    state = CompileState(import_exactly(proto), TARGET, phase=Phase.FUSED)
    given = state.model.clone()
    Pipeline((LowerTensorrt(),)).run(state)
    assert pairs(state.model) == []
    limits = np.iinfo(kind)
    feed = {"x": np.linspace(limits.min, limits.max, 32).astype(kind).reshape(2, 16)}
    np.testing.assert_array_equal(run(state.model, feed)[0], run(given, feed)[0])


def test_a_quantization_without_zero_point_is_the_uint8_that_onnx_says() -> None:
    proto = model_of("float[8] x", "float[8] y", "q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", {"s": F(0.5)})
    state = CompileState(import_exactly(proto), TARGET, phase=Phase.FUSED)
    Pipeline((LowerTensorrt(),)).run(state)
    assert pairs(state.model) == []
    x = np.asarray([-3, 0, 1, 50, 127, 200, 0.25, 0.75], F)
    np.testing.assert_array_equal(run(state.model, {"x": x})[0], np.clip(np.rint(x / F(0.5)), 0, 255) * F(0.5))


def test_a_model_newer_than_the_target_reads_is_refused() -> None:
    proto = model_of("float[2,16] x", "float[2,16] y", "y = Swish(x)", opset=24)
    old = Target("old", "tensorrt", max_opset=21)
    with pytest.raises(TargetError, match=r"needs ONNX opset 24, and old reads up to 21"):
        Pipeline((LowerTensorrt(),)).run(CompileState(import_exactly(proto), old, phase=Phase.FUSED))


# ---- other schemes --------------------------------------------------------------------------------------------------

DENSE = {"w": normal(1, 128, 64, scale=0.1), "b": normal(2, 64)}


def scheme(name: str, target: str = "tensorrt-sm120") -> Lab:
    return work("h = MatMul(x, w) y = Add(h, b)", "float[3,128] x", DENSE, load_target(target, name))


def test_fp8_stands_on_both_operands() -> None:
    of = scheme("fp8")
    model = lowered(of, MatMul="static-float")
    assert {n.inputs[2].dtype for n in pairs(model) if n.inputs[2] is not None} == {ir.DataType.FLOAT8E4M3FN}
    assert worst(of, model) > 25


def test_an_int4_weight_has_at_least_two_blocks() -> None:
    of = scheme("int4-weights", "tensorrt-sm80")
    model = lowered(of, MatMul="weight-only")
    (dequantize,) = pairs(model)
    assert attr_int(dequantize, "block_size", 0) == 64
    assert const_array(dequantize.inputs[1]).shape == (2, 64)  # type: ignore[union-attr]
    assert onnx_opset(model) == 21
    assert worst(of, model) > 15


@pytest.mark.parametrize(
    ("name", "quantizer", "opset"), [("nvfp4", "TRT_FP4DynamicQuantize", 23), ("mxfp8", "TRT_MXFP8DynamicQuantize", 21)]
)
def test_block_formats_use_operators_of_tensorrt(name: str, quantizer: str, opset: int) -> None:
    of = scheme(name)
    model = lowered(of, MatMul="dynamic")
    assert ops(model)[quantizer] == 1
    assert onnx_opset(model) == opset
    assert not model.functions
    stored = {v.dtype for v in model.graph.initializers.values()}
    assert (ir.DataType.FLOAT4E2M1 if name == "nvfp4" else ir.DataType.FLOAT8E4M3FN) in stored
    twin = lowered(of, LowerTensorrt(standard=True), MatMul="dynamic")
    assert worst(of, twin) > (12 if name == "nvfp4" else 22)


def test_a_float4_weight_keeps_its_numbers() -> None:
    of = scheme("nvfp4")
    model, twin = lowered(of, MatMul="dynamic"), lowered(of, LowerTensorrt(standard=True), MatMul="dynamic")

    def weight(of_model: ir.Model) -> Array:
        node = next(n for n in of_model.graph if n.op_type == "MatMul").inputs[1].producer()  # type: ignore[union-attr]
        assert node is not None
        inner = node.inputs[1].producer()  # type: ignore[union-attr]
        assert inner is not None
        scale = const_array(inner.inputs[0]).astype(F) * const_array(inner.inputs[1])  # type: ignore[union-attr]
        return np.asarray(const_array(node.inputs[0]).astype(F) * np.repeat(scale, 16, axis=0))  # type: ignore[union-attr]

    np.testing.assert_array_equal(weight(model), weight(twin))
