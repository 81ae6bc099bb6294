"""insert-qdq: what the plan says appears in the graph, once, with the right numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import PassError, VerifyError
from qcompiler.ir.graph import all_nodes, const_array
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.ir.verify import verify
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.arithmetic import dequantize, quantize
from qcompiler.quant.spec import QuantParams, QuantSpec
from qcompiler.targets.target import load_target
from tests.filecheck import file_check
from tests.passes.quantize.lab import Lab, lab, model_of, normal, ops, outputs, reasons

F = np.float32
IMAGE, OUT = "float[n,4,8,8] x", "float[n,8,p,q] y"
W = {"w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "w2": normal(3, 8, 8, 1, 1, scale=0.3),
     "m": normal(4, 64, 32, scale=0.1), "mb": normal(5, 32)}  # fmt: skip


def made(body: str, inputs: str = IMAGE, result: str = OUT, **weights: np.ndarray) -> Lab:
    return lab(model_of(inputs, result, body, {**W, **weights}))


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in all_nodes(model) if n.name == name)


def array(value: ir.Value | None) -> np.ndarray:
    found = const_array(value)
    assert found is not None
    return found


def test_a_convolution_with_relu_and_bias():
    state = made("c = Conv(x, w, b) y = Relu(c)").inserted(Conv="static")
    file_check(
        print_model(state.model),
        """
        # CHECK: x/QuantizeLinear: %x:q: u8 nx4x8x8 = QuantizeLinear(%x, const<f32 [[XS:[0-9.e-]+]]>, const<u8 [[XZ:[0-9]+]]>)
        # CHECK-DAG: %[[X:[^ ]+]]: f32 nx4x8x8 = DequantizeLinear(%x:q, const<f32 [[XS]]>, const<u8 [[XZ]]>)
        # CHECK-DAG: %[[W:[^ ]+]]: f32 8x4x3x3 = DequantizeLinear(const<i8 8x4x3x3 #{{....}}>, const<f32 8 #{{....}}>, const<i8 8 #{{....}}>) {axis=0}
        # CHECK-DAG: %[[B:[^ ]+]]: f32 8 = DequantizeLinear(const<i32 8 #{{....}}>, const<f32 8 #{{....}}>, const<i32 8 #{{....}}>) {axis=0}
        # CHECK: Conv_0: %[[C:[^ ]+]]: f32 {{.*}} = Conv(%[[X]], %[[W]], %[[B]])
        # CHECK-NEXT: Conv_0/QuantizeLinear: %[[Q:[^ ]+]]: u8 {{.*}} = QuantizeLinear(%[[C]], const<f32 [[YS:[0-9.e-]+]]>, const<u8 0>)
        # CHECK-NEXT: %y: f32 {{.*}} = DequantizeLinear(%[[Q]], const<f32 [[YS]]>, const<u8 0>)
        # CHECK-NEXT: }
        """,  # noqa: E501  # one line per node
    )


def test_the_numbers_are_those_of_the_ranges_and_the_weight():
    work = made("y = Conv(x, w, b)")
    state = work.inserted(Conv="static")
    low = min(float(f["x"].min()) for f in work.feeds)
    high = max(float(f["x"].max()) for f in work.feeds)
    q = node(state.model, "x/QuantizeLinear")
    assert array(q.inputs[1]) == F((high - low) / 255)
    assert array(q.inputs[2]) == np.rint(-low / ((high - low) / 255))
    dw = node(state.model, "Conv_0/DequantizeLinear_1")
    scale = np.abs(W["w"]).max(axis=(1, 2, 3)) / 127
    np.testing.assert_array_equal(array(dw.inputs[1]), scale.astype(F))
    spec = QuantSpec("int8", 0, symmetric=True, narrow=True)
    params = QuantParams(spec, scale.astype(F), np.zeros(8, np.int64))
    np.testing.assert_array_equal(array(dw.inputs[0]), quantize(W["w"], params))
    assert np.abs(dequantize(array(dw.inputs[0]), params) - W["w"]).max() <= scale.max() / 2 * 1.0001
    db = node(state.model, "Conv_0/DequantizeLinear_2")
    np.testing.assert_array_equal(array(db.inputs[1]), array(q.inputs[1]) * array(dw.inputs[1]))
    np.testing.assert_allclose(array(db.inputs[0]) * array(db.inputs[1]), W["b"], atol=array(db.inputs[1]).max())


def test_every_integer_reader_gets_a_dequantize_of_its_own_and_floats_share_one():
    body = "c = Conv(x, w, b) d = Conv(c, w2) e = Conv(c, w2) f = Exp(c) g = Tanh(c) y = Sum(d, e, f, g)"
    state = made(body).inserted(Conv="static")
    (q,) = [n for n in all_nodes(state.model) if n.name == "Conv_0/QuantizeLinear"]
    readers = [use.node for use in q.outputs[0].uses()]
    assert [r.op_type for r in readers] == ["DequantizeLinear"] * 3
    read_by = sorted(sorted(u.node.op_type for u in r.outputs[0].uses()) for r in readers)
    assert read_by == [["Conv"], ["Conv"], ["Exp", "Tanh"]]


def test_a_value_that_nothing_reads_in_float_has_no_dequantize_for_that():
    state = made("c = Conv(x, w, b) y = Conv(c, w2)").inserted(Conv="static")
    assert ops(state.model) == {"Conv": 2, "QuantizeLinear": 3, "DequantizeLinear": 6}


def test_a_graph_output_keeps_its_name_and_stays_float():
    state = made("c = Conv(x, w, b) y = Conv(c, w2)", result=OUT + ", float[n,8,p,q] c").inserted(Conv="static")
    assert [(v.name, v.dtype, v.producer().op_type) for v in state.model.graph.outputs] == [
        ("y", ir.DataType.FLOAT, "DequantizeLinear"),
        ("c", ir.DataType.FLOAT, "DequantizeLinear"),
    ]


def test_a_graph_input_is_quantized_once_for_all_readers():
    state = made("a = Conv(x, w) c = Conv(x, w, b) y = Sum(a, c)").inserted(Conv="static")
    assert sum(n.name.startswith("x/QuantizeLinear") for n in all_nodes(state.model)) == 1


def test_a_shared_weight_is_stored_once_and_its_float_form_goes():
    state = made("a = Conv(x, w) c = Conv(x, w) y = Sum(a, c)").inserted(Conv="static")
    first, second = (node(state.model, f"Conv_{i}/DequantizeLinear_1") for i in (0, 1))
    assert first.inputs[0] is second.inputs[0]
    assert "w" not in state.model.graph.initializers


def test_a_weight_that_a_float_operator_reads_too_stays_for_it():
    state = made("a = Conv(x, w) e = Exp(w) f = ReduceMax<keepdims=0>(e) y = Mul(a, f)").inserted(Conv="static")
    assert "w" in state.model.graph.initializers


def test_a_relu_that_its_output_cannot_absorb_stays_and_says_so():
    text = model_of(IMAGE, OUT, "c = Conv(x, w, b) y = Clip(c, lo, hi)",
                    {**W, "lo": np.asarray(-1, F), "hi": np.asarray(0.66, F)})  # fmt: skip
    state = lab(text).inserted(Conv="static")
    assert "Clip" in ops(state.model)
    assert reasons(state, "insert-qdq") == ["activation-not-redundant"]


def test_a_clip_at_the_ends_of_the_range_goes():
    numbers = {"lo": np.asarray(0, F), "hi": np.asarray(0.5, F)}
    state = made("c = Conv(x, w, b) y = Clip(c, lo, hi)", **numbers).inserted(Conv="static")
    assert "Clip" not in ops(state.model)
    assert reasons(state) == []


def test_a_dynamic_form_finds_its_scale_at_run_time():
    work = made("h = MatMul(x, m) y = Add(h, mb)", "float[n,5,64] x", "float[n,5,32] y")
    state = work.inserted(MatMul="dynamic")
    assert ops(state.model) == {"DynamicQuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Add": 1}
    weight = node(state.model, "MatMul_0/DequantizeLinear_1")
    assert weight.attributes["axis"].as_int() == 1
    assert array(weight.inputs[1]).shape == (32,)


def test_dynamic_readers_of_one_value_share_its_quantization():
    work = made("q = MatMul(x, m) k = MatMul(x, m) y = Add(q, k)", "float[n,5,64] x", "float[n,5,32] y")
    assert ops(work.inserted(MatMul="dynamic").model)["DynamicQuantizeLinear"] == 1


def test_an_empty_axis_at_run_time_does_no_harm():
    work = made("h = MatMul(x, m) y = Add(h, mb)", "float[n,5,64] x", "float[n,5,32] y")
    (found,) = outputs(work.lowered(MatMul="dynamic").model, {"x": np.zeros((0, 5, 64), F)})
    assert found.shape == (0, 5, 32)


IF = (
    "c = Conv(x, w, b) y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Conv(c, w2) }, "
    "else_branch = g2 () => (float[n,8,6,6] v) { v = Exp(c) }>"
)


def test_a_body_captures_the_integers_of_an_outer_value():
    work = made(IF, IMAGE + ", bool p", "float[n,8,6,6] y")
    state = work.inserted(Conv="static")
    inner = node(state.model, "Conv_2")
    reads = inner.inputs[0].producer()
    assert (reads.op_type, reads.graph) == ("DequantizeLinear", inner.graph)
    assert reads.inputs[0].producer().name == "Conv_0/QuantizeLinear"


def test_a_group_inside_a_body_quantizes_an_outer_value_there():
    body = (
        "y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Conv(x, w) }, "
        "else_branch = g2 () => (float[n,8,6,6] v) { v = Conv(x, w, b) }>"
    )
    work = made(body, IMAGE + ", bool p", "float[n,8,6,6] y")
    state = work.inserted(Conv="static")
    for name in ("Conv_1", "Conv_2"):
        inner = node(state.model, name)
        assert inner.inputs[0].producer().inputs[0].producer().graph is inner.graph
    for feed in work.feeds:
        (a,), (b,) = outputs(work.base.model, feed), outputs(state.model, feed)
        assert np.abs(a - b).max() < 0.05 * np.ptp(a)


def test_a_branch_that_calibration_never_took_stays_float():
    feeds = [{"x": normal(1, 2, 4, 8, 8), "p": np.asarray(True)}]
    work = lab(model_of(IMAGE + ", bool p", "float[n,8,6,6] y", IF, W), feeds=feeds)
    state = work.inserted(Conv="static")
    assert reasons(state) == []
    other = [{"x": normal(1, 2, 4, 8, 8), "p": np.asarray(False)}]
    work = lab(model_of(IMAGE + ", bool p", "float[n,8,6,6] y", IF, W), feeds=other)
    state = work.inserted(Conv="static")
    assert reasons(state) == ["never-observed"]
    assert node(state.model, "Conv_2").inputs[0].producer().op_type == "DequantizeLinear"  # shared, for a float reader


@pytest.mark.parametrize(
    ("body", "inputs", "result", "forms"),
    [
        ("c = Conv(x, w, b) y = Relu(c)", IMAGE, OUT, {"Conv": "static"}),
        ("c = Conv(x, w, b) d = Conv(c, w2) y = Add(c, d)", IMAGE, OUT, {"Conv": "static", "Add": "static"}),
        ("h = MatMul(x, m) y = Add(h, mb)", "float[n,5,64] x", "float[n,5,32] y", {"MatMul": "dynamic"}),
        ("y = Gemm(x, m, mb)", "float[n,64] x", "float[n,32] y", {"Gemm": "static"}),
    ],
)
def test_the_error_is_that_of_eight_bits(body, inputs, result, forms):
    work = made(body, inputs, result)
    state = work.inserted(**forms)
    for feed in work.feeds:
        (a,), (b,) = outputs(work.base.model, feed), outputs(state.model, feed)
        noise = float(np.mean((a - b) ** 2))
        assert 10 * np.log10(float(np.mean(a**2)) / noise) > 30


def test_the_pass_needs_a_plan():
    state = made("y = Conv(x, w)").base.clone()
    with pytest.raises(PassError, match="insert-qdq"):
        Pipeline((InsertQdq(),)).run(state)
    twice = [PlanQuantization(), InsertQdq(), InsertQdq()]
    with pytest.raises(PassError, match="insert-qdq"):
        Pipeline(tuple(twice)).run(made("y = Conv(x, w)").base.clone())


# ---- the bias trap: engines add the stored integers to the accumulator whatever their scale says ---------------------

LATER: tuple[Pass, ...] = (FoldScales(), FuseQdq(), LowerOnnxruntime(emit="qdq"))


def spoil(model: ir.Model) -> None:
    """Double the scale of the int32 bias, wherever the pass has put it."""
    for name, value in list(model.graph.initializers.items()):
        if value.const_value.dtype == ir.DataType.FLOAT and name.startswith(("b:scale", "mb:scale")):
            value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)


@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_wrong_bias_scale_is_rejected_after_each_later_pass(kind, count):
    models = {"Conv": ("y = Conv(x, w, b)",), "Gemm": ("y = Gemm(x, m, mb)", "float[n,64] x", "float[n,32] y")}
    work = made(*models[kind])
    state = work.run([PlanQuantization(), InsertQdq(), *LATER[:count]], **{kind: "static"})
    verify(state.model, state.phase)
    spoil(state.model)
    with pytest.raises(VerifyError, match=rf"bias-scale: Q?{kind}(_1)? .*differs from x_scale \* w_scale by 1 "):
        verify(state.model, state.phase)


def test_a_bias_beyond_int32_widens_the_weight_scale():
    weights = {"tiny": normal(1, 8, 4, 1, 1, scale=1e-9), "huge": np.full(8, 3e4, F)}
    work = made("y = Conv(x, tiny, huge)", **weights)
    state = work.inserted(Conv="static")
    bias = node(state.model, "Conv_0/DequantizeLinear_2")
    assert np.abs(array(bias.inputs[0]).astype(np.int64)).max() <= 2**30 * 1.001
    for feed in work.feeds:
        (a,), (b,) = outputs(work.base.model, feed), outputs(state.model, feed)
        assert np.abs(a - b).max() <= 3e4 / 255


def test_channels_without_weights_keep_their_bias():
    weight = W["w2"].copy()
    weight[3] = 0
    work = made("c = Conv(x, w) y = Conv(c, hole, b)", hole=weight)
    (a,), (b,) = outputs(work.base.model, work.feeds[0]), outputs(work.inserted(Conv="static").model, work.feeds[0])
    step = np.ptp(a) / 255
    assert np.abs(a[:, 3] - b[:, 3]).max() <= step


def test_phases_are_declared():
    assert (InsertQdq.needs, InsertQdq.gives) == (Phase.PLANNED, Phase.QDQ)
    assert InsertQdq.name() == "insert-qdq"
    state = CompileState(made("y = Tanh(x)", result="float[n,4,8,8] y").base.model, load_target("ort-x86"))
    assert state.phase is Phase.FLOAT
