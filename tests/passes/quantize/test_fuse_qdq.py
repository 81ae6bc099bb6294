"""fuse-qdq: Q/DQ groups become calls whose body is the same Q/DQ, and true integers agree with it within a step."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.graph import all_nodes
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.patterns.outline import DOMAIN, ROOT, role_indices
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.filecheck import file_check
from tests.passes.quantize.lab import (
    ENGINE,
    OPTIMIZED,
    Lab,
    import_exactly,
    lab,
    model_of,
    normal,
    ops,
    outputs,
    reference_outputs,
)

F = np.float32
IMAGE, OUT = "float[n,4,8,8] x", "float[n,c,p,q] y"
MATRIX, COLUMNS = "float[n,5,64] x", "float[n,5,32] y"
W = {
    "w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "w2": normal(3, 8, 8, 1, 1, scale=0.3),
    "m": normal(4, 64, 32, scale=0.1), "mb": normal(5, 32), "k": normal(6, 8, 1, 1), "sc": np.asarray([1, 1, 2, 2], F),
    "a0": np.asarray([0, 0]), "a1": np.asarray([4, 4]), "ax": np.asarray([2, 3]), "one": np.asarray(1, F),
    "lw": normal(7, 1, 64, 64, scale=0.1), "lr": normal(8, 1, 64, 16, scale=0.1), "lb": normal(9, 1, 128),
    "dw": normal(10, 8, 1, 3, 3, scale=0.3), "gw": normal(11, 8, 2, 3, 3, scale=0.3),
    "w1": normal(12, 8, 4, 3, scale=0.2), "w3": normal(13, 6, 4, 2, 2, 2, scale=0.2), "idx": np.asarray([1, 3]),
}  # fmt: skip
STATIC = dict.fromkeys(
    ("Conv", "Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "MaxPool", "Transpose",
     "Resize", "Slice", "Gather", "Flatten", "Split"),
    "static",
)  # fmt: skip


def made(body: str, inputs: str = IMAGE, result: str = OUT, **weights: np.ndarray) -> Lab:
    return lab(model_of(inputs, result, body, {**W, **weights}))


CASES = [
    # body, inputs, outputs, forms, calls by root
    ("y = Conv(x, w, b)", IMAGE, OUT, STATIC, {"Conv": 1}),
    ("c = Conv(x, w) y = Relu(c)", IMAGE, OUT, STATIC, {"Conv": 1}),
    ("y = Conv(x, w1)", "float[n,4,9] x", "float[n,8,7] y", STATIC, {"Conv": 1}),
    ("y = Conv<strides=[2,1,1],pads=[1,0,0,1,1,0]>(x, w3)", "float[n,4,5,4,6] x", "float[n,6,p,q,r] y", STATIC,
     {"Conv": 1}),
    ('y = Conv<group=2,auto_pad="SAME_UPPER",strides=[2,2]>(x, gw, b)', IMAGE, OUT, STATIC, {"Conv": 1}),
    ("c = Conv(x, w) y = Conv<group=8,dilations=[2,2],pads=[2,2,2,2]>(c, dw)", IMAGE, OUT, STATIC, {"Conv": 2}),
    ("c = Conv(x, w) d = Conv(c, w2) y = Add(c, d)", IMAGE, OUT, STATIC, {"Conv": 2, "Add": 1}),
    ("c = Conv(x, w) d = Conv(c, w2) e = Add(c, d) y = Relu(e)", IMAGE, OUT, STATIC, {"Conv": 2, "Add": 1}),
    ("c = Conv(x, w) y = Add(c, k)", IMAGE, OUT, STATIC, {"Conv": 1, "Add": 1}),
    ("c = Conv(x, w) y = Mul(c, c)", IMAGE, OUT, STATIC, {"Conv": 1, "Mul": 1}),
    ("c = Conv(x, w) s = Sigmoid(c) y = Mul(c, s)", IMAGE, OUT, STATIC, {"Conv": 1, "Sigmoid": 1, "Mul": 1}),
    ("c = Conv(x, w) y = LeakyRelu<alpha=0.1>(c)", IMAGE, OUT, STATIC, {"Conv": 1, "LeakyRelu": 1}),
    ("c = Conv(x, w) d = Conv(x, w, b) y = Concat<axis=1>(c, d)", IMAGE, OUT, STATIC, {"Conv": 2, "Concat": 1}),
    ("c = Conv(x, w) y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,0,1]>(c)", IMAGE, OUT, STATIC,
     {"Conv": 1, "AveragePool": 1}),
    ("c = Conv(x, w) y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,0,1],count_include_pad=1>(c)", IMAGE,
     OUT, STATIC, {"Conv": 1, "AveragePool": 1}),
    ("c = Conv(x, w) y = AveragePool<kernel_shape=[3,3],strides=[2,2],ceil_mode=1>(c)", IMAGE, OUT, STATIC,
     {"Conv": 1, "AveragePool": 1}),
    ("c = Conv(x, w) y = GlobalAveragePool(c)", IMAGE, OUT, STATIC, {"Conv": 1, "GlobalAveragePool": 1}),
    ("c = Conv(x, w) y = MaxPool<kernel_shape=[2,2]>(c)", IMAGE, OUT, STATIC, {"Conv": 1, "MaxPool": 1}),
    ('c = Conv(x, w) y = Resize<mode="nearest">(c, , sc)', IMAGE, OUT, STATIC, {"Conv": 1, "Resize": 1}),
    ("c = Conv(x, w) y = Slice(c, a0, a1, ax)", IMAGE, OUT, STATIC, {"Conv": 1, "Slice": 1}),
    ("c = Conv(x, w) y = Gather<axis=1>(c, idx)", IMAGE, OUT, STATIC, {"Conv": 1, "Gather": 1}),
    ("c = Conv(x, w) y = Flatten(c)", IMAGE, "float[n,288] y", STATIC, {"Conv": 1, "Flatten": 1}),
    ("y = MatMul(x, m)", MATRIX, COLUMNS, {"MatMul": "static-float"}, {"MatMul": 1}),
    ("h = MatMul(x, m) y = Add(h, mb)", MATRIX, COLUMNS, {"MatMul": "static-float"}, {"MatMul": 1}),
    ("h = MatMul(x, m) y = Add(mb, h)", MATRIX, COLUMNS, {"MatMul": "dynamic"}, {"MatMul": 1}),
    ("h = MatMul(x, m) i = Add(h, mb) y = Relu(i)", MATRIX, COLUMNS, {"MatMul": "dynamic"}, {"MatMul": 1}),
    ("y = Gemm(x, m, mb)", "float[n,64] x", "float[n,32] y", {"Gemm": "static"}, {"Gemm": 1}),
    ("g = Gemm(x, m, mb) y = Relu(g)", "float[n,64] x", "float[n,32] y", {"Gemm": "static"}, {"Gemm": 1}),
    ("y = Gemm(x, m)", "float[n,64] x", "float[n,32] y", {"Gemm": "static"}, {"Gemm": 1}),
    ("y = Gemm(x, m, mb)", "float[n,64] x", "float[n,32] y", {"Gemm": "static-float"}, {"Gemm": 1}),
    ("y = Gemm(x, m)", "float[n,64] x", "float[n,32] y", {"Gemm": "dynamic"}, {"Gemm": 1}),
    ("y = LSTM<hidden_size=16>(x, lw, lr, lb)", "float[s,n,64] x", "float[s,1,n,16] y", {"LSTM": "dynamic"},
     {"LSTM": 1}),
    ("y, h = LSTM<hidden_size=16>(x, lw, lr, lb, , h0, c0)", "float[s,n,64] x, float[1,n,16] h0, float[1,n,16] c0",
     "float[s,1,n,16] y, float[1,n,16] h", {"LSTM": "dynamic"}, {"LSTM": 1}),
]  # fmt: skip
IDS = [c[0] for c in CASES]


def calls(model: ir.Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in all_nodes(model):
        if node.domain == DOMAIN:
            kind = model.functions[node.op_identifier()].metadata_props[ROOT]
            found[kind] = found.get(kind, 0) + 1
    return found


@pytest.mark.parametrize(("body", "inputs", "result", "forms", "expected"), CASES, ids=IDS)
def test_each_group_becomes_one_call_that_computes_the_same(body, inputs, result, forms, expected):
    work = made(body, inputs, result)
    before, after = work.inserted(**forms), work.fused(**forms)
    assert calls(after.model) == expected
    names = {n.name for n in all_nodes(after.model) if n.domain == DOMAIN}
    assert names == {name for name, choice in after.plan.choices.items() if choice.form != "float"}
    for feed in work.feeds:
        for a, b in zip(outputs(before.model, feed), outputs(after.model, feed), strict=True):
            np.testing.assert_array_equal(a, b)
    assert FuseQdq().run(after) == 0


@pytest.mark.parametrize(("body", "inputs", "result", "forms", "expected"), CASES, ids=IDS)
def test_true_integer_arithmetic_is_within_a_step_of_the_body(body, inputs, result, forms, expected):
    work = made(body, inputs, result)
    gaps = work.gaps(**forms)
    kinds = {
        "Conv",
        "MatMul",
        "Gemm",
        "Add",
        "Mul",
        "Concat",
        "AveragePool",
        "GlobalAveragePool",
        "Sigmoid",
        "LeakyRelu",
    }
    computed = {k: n for k, n in expected.items() if k in kinds}
    assert len(gaps) == len(work.feeds) * sum(computed.values())
    assert {g.kind for g in gaps} == set(computed)
    quantized = [g for g in gaps if not (g.kind in ("MatMul", "Gemm") and forms.get(g.kind) != "static")]
    assert max((g.steps for g in gaps), default=0) <= 1.0
    # A tie may fall on either side; more than a handful would be another arithmetic.
    assert max((g.differing for g in quantized), default=0.0) <= 0.005
    # Float outputs: the integers are exact, the body rounds each product.
    assert max((g.steps for g in gaps if g not in quantized), default=0) <= 1e-3


@pytest.mark.parametrize(("body", "inputs", "result", "forms", "expected"), CASES, ids=IDS)
def test_the_whole_graph_on_integers_is_near_the_engine(body, inputs, result, forms, expected):
    work = made(body, inputs, result)
    fused, lowered = work.fused(**forms), work.lowered(**forms)
    for feed in work.feeds:
        truth = reference_outputs(fused.model, feed)
        for a, b in zip(truth, outputs(lowered.model, feed, OPTIMIZED), strict=True):
            step = max(float(np.ptp(a)) / 255, 1e-6)
            # One step per group in a row, and what a later group makes of it; a dynamic scale can tip over once.
            allowed = 2.5 if "LSTM" not in forms else 5
            assert float(np.abs(a - b).max()) <= allowed * step * max(1, sum(expected.values()))


def test_the_text_of_a_call_and_its_function():
    state = made("c = Conv(x, w, b) y = Relu(c)").fused(Conv="static")
    file_check(
        print_model(state.model),
        """
        # CHECK: Conv_0: %[[Q:[^ ]+]]: u8 {{.*}} = qcompiler::QConv_1(%x:q, {{.*}}const<i8 8x4x3x3
        # CHECK-NEXT: %y: f32 {{.*}} = DequantizeLinear(%[[Q]]
        # CHECK: function qcompiler::QConv_1(
        # CHECK-DAG: DequantizeLinear(%in0, %in1, %in2)
        # CHECK-DAG: DequantizeLinear(%in3, %in4, %in5) {axis=0}
        # CHECK: Conv(
        # CHECK: QuantizeLinear(
        # CHECK-NEXT: }
        """,
    )


def test_equal_groups_share_a_function_and_different_ones_do_not():
    body = "c = Conv(x, w, b) d = Conv(c, w2, b) e = Conv(d, w2) y = Conv<strides=[2,2]>(e, w2)"
    state = made(body).fused(Conv="static")
    used = [n.op_type for n in all_nodes(state.model) if n.domain == DOMAIN]
    assert used == ["QConv_1", "QConv_1", "QConv_2", "QConv_3"]
    assert len(state.model.functions) == 3


def test_roles_name_the_inputs():
    state = made("y = Conv(x, w, b)").fused(Conv="static")
    (function,) = state.model.functions.values()
    assert list(role_indices(function)) == ["x", "xs", "xz", "w", "ws", "wz", "b", "bs", "bz", "ys", "yz"]


def test_a_clip_that_is_not_redundant_takes_its_bounds_along():
    weights = {"lo": np.asarray(-1, F), "hi": np.asarray(0.66, F)}
    work = made("c = Conv(x, w, b) y = Clip(c, lo, hi)", **weights)
    state = work.fused(Conv="static")
    assert calls(state.model) == {"Conv": 1}
    (function,) = state.model.functions.values()
    assert [n.op_type for n in function if n.op_type == "Clip"] == ["Clip"]
    assert {g.steps for g in work.gaps(Conv="static")} == {0.0}
    (y,) = reference_outputs(state.model, work.feeds[0])
    assert y.min() >= -1.01
    assert y.max() <= 0.67


def test_inside_if_bodies_and_through_captured_values():
    body = (
        "c = Conv(x, w, b) y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Conv(c, w2) }, "
        "else_branch = g2 () => (float[n,8,6,6] v) { v = Exp(c) }>"
    )
    work = made(body, IMAGE + ", bool p", "float[n,8,6,6] y")
    state = work.fused(Conv="static")
    assert calls(state.model) == {"Conv": 2}
    for flag in (True, False):
        feed = {**work.feeds[0], "p": np.asarray(flag)}
        (a,), (b,) = outputs(work.inserted(Conv="static").model, feed), outputs(state.model, feed)
        np.testing.assert_array_equal(a, b)
        (truth,) = reference_outputs(state.model, feed)
        assert np.abs(truth - a).max() <= 1.01 * np.ptp(a) / 255 + 1e-6


def direct(body: str, weights: dict[str, np.ndarray], inputs: str = IMAGE, result: str = OUT) -> CompileState:
    """Fuse Q/DQ written by hand."""
    state = CompileState(import_exactly(model_of(inputs, result, body, weights)), load_target("ort-x86"), Phase.QDQ)
    FuseQdq().run(state)
    return state


NUMBERS = {"s": np.asarray(0.05, F), "z": np.asarray(120, np.uint8), "s2": np.asarray(0.07, F),
           "wq": np.random.default_rng(1).integers(-127, 128, (8, 4, 3, 3)).astype(np.int8),
           "ws": np.asarray(0.01, F), "wz": np.asarray(0, np.int8),
           "mq": np.random.default_rng(2).integers(-127, 128, (64, 32)).astype(np.int8), **W}  # fmt: skip
DQX = "xq = QuantizeLinear(x, s, z) dx = DequantizeLinear(xq, s, z) "
DQW = "dwt = DequantizeLinear(wq, ws, wz) "
DQM = "dm = DequantizeLinear(mq, ws, wz) "
QY = "q0 = QuantizeLinear({}, s2, z) y = DequantizeLinear(q0, s2, z)"


def why(state: CompileState, rule: str) -> list[str]:
    return [r.reason for r in state.remarks if r.rule == rule and not r.done]


@pytest.mark.parametrize(
    ("body", "rule", "reason", "inputs", "result"),
    [
        (DQX + DQW + "c = Conv(dx, dwt) " + QY.format("c") + " e = Exp(c)", "dq-conv-q", "interior-used-elsewhere",
         IMAGE, OUT + ", float[n,c,p,q] e"),
        (DQX + DQW + "c = Conv(dx, dwt) " + QY.format("c"), "dq-conv-q", "graph-output", IMAGE,
         OUT + ", float[n,c,p,q] c"),
        (DQX + DQW + "c = Conv(dx, dwt) " + QY.format("c") + " e = If(p) <then_branch = g1 () => (float[n,8,6,6] u) "
         "{ u = Exp(c) }, else_branch = g2 () => (float[n,8,6,6] v) { v = Tanh(c) }>", "dq-conv-q", "captured",
         IMAGE + ", bool p", OUT + ", float[n,8,6,6] e"),
        (DQX + "t = MaxPool<kernel_shape=[2,2]>(dx) " + QY.format("t"), "dq-move-q", "parameters-differ", IMAGE, OUT),
        (DQX + 't = Resize<mode="linear">(dx, , sc) q0 = QuantizeLinear(t, s, z) y = DequantizeLinear(q0, s, z)',
         "dq-move-q", "resize-mode", IMAGE, OUT),
    ],
)  # fmt: skip
def test_a_group_that_does_not_fuse_says_why(body, rule, reason, inputs, result):
    state = direct(body, NUMBERS, inputs, result)
    assert why(state, rule) == [reason]


def test_a_matmul_in_front_of_its_bias_waits_for_the_larger_group():
    state = direct(DQX + DQM + "t = MatMul(dx, dm) y = Add(t, mb)", NUMBERS, MATRIX, COLUMNS)
    assert why(state, "dq-matmul") == ["larger-group"]
    assert calls(state.model) == {"MatMul": 1}
    assert "Add" not in ops(state.model)


def test_removing_the_reason_larger_group_lets_the_smaller_rule_fire():
    state = direct(DQX + DQM + "t = MatMul(dx, dm) e = Exp(t) y = Add(e, mb)", NUMBERS, MATRIX, COLUMNS)
    assert why(state, "dq-matmul") == []
    assert calls(state.model) == {"MatMul": 1}


@pytest.mark.parametrize("between", ["", "r = Relu(h) "])
def test_a_bias_in_front_of_another_quantization_stays_with_its_matmul(between):
    source = "r" if between else "h"
    body = f"t = MatMul(x, m) h = Add(t, mb) {between} y = MatMul({source}, m2)"
    work = made(body, MATRIX, "float[n,5,48] y", m2=normal(3, 32, 48))
    assert calls(work.fused(MatMul="static-float").model) == {"MatMul": 2}
    assert set(work.prove(MatMul="static-float").fused.values()) == {"MatMulIntegerToFloat"}


def test_a_column_of_constants_is_added_outside():
    state = direct(
        DQX + DQM + "t = MatMul(dx, dm) y = Add(t, one5)", {**NUMBERS, "one5": normal(1, 5, 1)}, MATRIX, COLUMNS
    )
    assert calls(state.model) == {"MatMul": 1}
    assert ops(state.model)["Add"] == 1


def test_the_engine_runs_a_fused_graph_as_it_is():
    work = made("c = Conv(x, w, b) d = Conv(c, w2) y = Add(c, d)")
    state = work.fused(**STATIC)
    assert ENGINE.load(state.model, OPTIMIZED).run(work.feeds[0])["y"].shape == (2, 8, 6, 6)
