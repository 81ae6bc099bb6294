"""lower-onnxruntime: Q/DQ or integer operators, both the same numbers, and the engine's own within a step."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.errors import PassError
from qcompiler.ir.graph import all_nodes, origins
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.pipeline.contract import WithinStep
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.filecheck import file_check
from tests.passes.quantize.lab import OPTIMIZED, lab, ops, outputs, reasons
from tests.passes.quantize.test_fuse_qdq import CASES, COLUMNS, IDS, IMAGE, MATRIX, OUT, STATIC, made

EMITTED = {
    "Conv": "QLinearConv", "Gemm": "QGemm", "Add": "QLinearAdd", "Mul": "QLinearMul", "Concat": "QLinearConcat",
    "Sigmoid": "QLinearSigmoid", "LeakyRelu": "QLinearLeakyRelu", "AveragePool": "QLinearAveragePool",
    "GlobalAveragePool": "QLinearGlobalAveragePool", "LSTM": "DynamicQuantizeLSTM",
}  # fmt: skip


def steps(model, a: np.ndarray) -> float:
    return max(float(np.ptp(a)) / 255, 1e-6)


@pytest.mark.parametrize("emit", ["auto", "qdq", "qoperator"])
@pytest.mark.parametrize(("body", "inputs", "result", "forms", "expected"), CASES, ids=IDS)
def test_every_form_is_the_fused_graph_within_a_step_and_so_is_the_engine(body, inputs, result, forms, expected, emit):
    work = made(body, inputs, result)
    fused, lowered = work.fused(**forms), work.lowered(emit, **forms)
    assert lowered.phase is Phase.LOWERED
    assert lowered.model.functions == {}
    assert all(n.domain != "qcompiler" for n in all_nodes(lowered.model))
    assert LowerOnnxruntime(emit=emit).run(lowered) == 0
    for feed in work.feeds:
        wanted = outputs(fused.model, feed)
        # DynamicQuantizeLSTM quantizes its input and state too, which the Q/DQ body does not.
        allowed = (1.01 if "LSTM" not in forms else 4) * max(1, sum(expected.values()))
        for a, b, c in zip(wanted, outputs(lowered.model, feed), outputs(lowered.model, feed, OPTIMIZED), strict=True):
            assert np.abs(a - b).max() <= allowed * steps(lowered.model, a)
            assert np.abs(b - c).max() <= 1.01 * max(1, sum(expected.values())) * steps(lowered.model, a)


@pytest.mark.parametrize(("body", "inputs", "result", "forms", "expected"), CASES, ids=IDS)
def test_every_planned_fusion_is_proven_in_both_forms(body, inputs, result, forms, expected):
    work = made(body, inputs, result)
    for emit in ("auto", "qoperator"):
        proof = work.prove(emit, **forms)
        assert proof.missed == ()
        assert len(proof.fused) == proof.planned == sum(expected.values())


@pytest.mark.parametrize(("body", "inputs", "result", "forms", "expected"), CASES, ids=IDS)
def test_integer_operators_are_emitted_on_request(body, inputs, result, forms, expected):
    work = made(body, inputs, result)
    found = ops(work.lowered("qoperator", **forms).model)
    for kind, count in expected.items():
        if kind in ("MatMul", "Gemm") and forms[kind] != "static":
            assert found["MatMulIntegerToFloat"] == count
        elif kind in EMITTED:
            assert found[EMITTED[kind]] == count
        assert found.get(kind, 0) == (0 if kind in EMITTED or kind == "MatMul" else count)


def test_qdq_inlines_and_the_root_keeps_the_groups_name():
    state = made("c = Conv(x, w, b) y = Relu(c)").lowered("qdq", Conv="static")
    file_check(
        print_model(state.model),
        """
        # CHECK: x/QuantizeLinear: %x:q
        # CHECK-DAG: Conv_0/DequantizeLinear: {{.*}} = DequantizeLinear(%x:q
        # CHECK-DAG: Conv_0/DequantizeLinear_{{[23]}}: {{.*}} = DequantizeLinear(const<i8
        # CHECK: Conv_0: {{.*}} = Conv(
        # CHECK-NEXT: Conv_0/QuantizeLinear:
        # CHECK-NEXT: Conv_0:dequantize: %y:
        # CHECK-NEXT: }
        """,
    )


def test_the_operator_carries_the_groups_name_and_origin():
    state = made("c = Conv(x, w, b) y = Relu(c)").lowered("qoperator", Conv="static")
    (node,) = [n for n in all_nodes(state.model) if n.op_type == "QLinearConv"]
    assert node.name == "Conv_0"
    assert set(origins(node)) == {"Conv_0", "Relu_1"}
    assert node.outputs[0].name == "y:q"


def test_the_table_says_where_the_operator_is_emitted():
    work = made("h = MatMul(x, m) y = Add(h, mb)", MATRIX, COLUMNS)
    assert "MatMulIntegerToFloat" in ops(work.lowered(MatMul="dynamic").model)
    assert "MatMulIntegerToFloat" not in ops(work.lowered("qdq", MatMul="dynamic").model)


def test_one_group_can_be_forced_by_the_plan():
    work = made("c = Conv(x, w, b) y = Conv(c, w2)")
    work.engine_forms = {"emit:Conv_1": "qoperator"}
    found = {n.name: n.op_type for n in all_nodes(work.lowered(Conv="static").model) if n.name in ("Conv_0", "Conv_1")}
    assert found == {"Conv_0": "Conv", "Conv_1": "QLinearConv"}


def test_an_activation_that_is_left_inside_keeps_the_group_in_qdq():
    weights = {"lo": np.asarray(-1, np.float32), "hi": np.asarray(0.66, np.float32)}
    state = made("c = Conv(x, w, b) y = Clip(c, lo, hi)", **weights).lowered("qoperator", Conv="static")
    assert {"Conv", "Clip"} <= set(ops(state.model))
    assert reasons(state, "lower-onnxruntime") == ["no-integer-operator"]


def test_the_contrib_domain_is_imported_only_where_it_is_used():
    work = made("y = Conv(x, w, b)")
    assert "com.microsoft" not in work.lowered(Conv="static").model.graph.opset_imports
    assert made("c = Conv(x, w) y = Add(c, c)").lowered("qoperator", **STATIC).model.opset_imports["com.microsoft"] == 1
    assert "qcompiler" not in work.lowered(Conv="static").model.opset_imports


def test_the_interface_stays():
    work = made("c = Conv(x, w, b) y = Conv(c, w2)", result=OUT + ", float[n,c,p,q] c")
    for emit in ("qdq", "qoperator"):
        model = work.lowered(emit, Conv="static").model
        assert [v.name for v in model.graph.inputs] == ["x"]
        assert [v.name for v in model.graph.outputs] == ["y", "c"]


def test_calls_inside_if_bodies_are_lowered():
    body = (
        "c = Conv(x, w, b) y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Conv(c, w2) }, "
        "else_branch = g2 () => (float[n,8,6,6] v) { v = Exp(c) }>"
    )
    work = made(body, IMAGE + ", bool p", "float[n,8,6,6] y")
    for emit in ("qdq", "qoperator"):
        state = work.lowered(emit, Conv="static")
        assert all(n.domain != "qcompiler" for n in all_nodes(state.model))
        for flag in (True, False):
            feed = {**work.feeds[0], "p": np.asarray(flag)}
            (a,), (b,) = outputs(state.model, feed), outputs(state.model, feed, OPTIMIZED)
            assert np.abs(a - b).max() <= 1.01 * steps(state.model, a)
        assert work.prove(emit, Conv="static").missed == ()


def test_a_dilated_pool_keeps_its_dilations():
    """QLinearAveragePool has none: forced onto integers, the engine refuses the whole model."""
    from tests.passes.quantize.lab import model_of, normal

    text = model_of(IMAGE, OUT, "c = Conv(x, w) y = AveragePool<kernel_shape=[3,3],dilations=[2,2]>(c)",
                    {"w": normal(1, 8, 4, 3, 3)})  # fmt: skip
    work = lab(text)
    for emit in ("auto", "qoperator"):
        state = work.lowered(emit, Conv="static", AveragePool="static")
        assert ops(state.model)["AveragePool"] == 1
        assert outputs(state.model, work.feeds[0], OPTIMIZED)[0].shape == (2, 8, 2, 2)
        assert reasons(state, "plan-quantization") == ["dilations"]


def test_an_unknown_way_to_emit_is_refused():
    with pytest.raises(PassError, match="emit is 'int8'; expected auto, qdq or qoperator"):
        made("y = Conv(x, w)").lowered("int8", Conv="static")


def test_the_pass_needs_a_fused_graph():
    state = CompileState(made("y = Conv(x, w)").base.model, load_target("ort-x86"))
    with pytest.raises(PassError, match="lower-onnxruntime"):
        Pipeline((LowerOnnxruntime(),)).run(state)
    assert (LowerOnnxruntime.needs, LowerOnnxruntime.gives) == (Phase.FUSED, Phase.LOWERED)
    assert LowerOnnxruntime.numerics == WithinStep(1)
