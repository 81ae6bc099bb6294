"""avoid-engine-traps, attention: what is the engine's attention operator, and what only looks like it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qcompiler.ir.graph import all_nodes, origins
from qcompiler.ir.text import print_model
from tests.filecheck import file_check
from tests.passes.quantize.lab import ops
from tests.passes.quantize.traps_lab import avoid_in, changes, why

F = np.float32
NUMBERS = {
    "hs": np.asarray([0, 0, 3, 4]), "ks": np.asarray([-1, 7, 3, 4]), "vs": np.asarray([0, 0, 3, 2]),
    "other": np.asarray([0, 0, 4, 3]), "moved": np.asarray([1, -1, 3, 4]), "shared": np.asarray([0, 0, 1, 12]),
    "c": np.asarray(0.5, F), "root": np.asarray(np.sqrt(0.5), F), "r": np.asarray([2.0], F),
    "row": np.ones(7, F), "minus": np.asarray(-0.5, F), "os": np.asarray([0, 0, 12]),
    "s": np.asarray(0.02, F), "z": np.asarray(128, np.uint8),
    "s3": np.full(3, 0.02, F), "z3": np.full(3, 128, np.uint8),
}  # fmt: skip
INPUTS = "float[n,5,12] xq, float[n,7,12] xk, float[n,7,12] xv"
HEADS = (
    "rq = Reshape(xq, hs) q = Transpose<perm=[0,2,1,3]>(rq) rk = Reshape(xk, ks) k = Transpose<perm=[0,2,3,1]>(rk) "
    "rv = Reshape(xv, hs) v = Transpose<perm=[0,2,1,3]>(rv) "
)
SCORES = "p = MatMul(q, k) e = Mul(p, c) "
REST = "a = Softmax<axis=-1>(e) o = MatMul(a, v) t = Transpose<perm=[0,2,1,3]>(o) y = Reshape(t, os)"
RESULT = "float[n,5,12] y"


def avoid(body, result=RESULT, inputs=INPUTS, **more):
    used = {name: a for name, a in NUMBERS.items() if re.search(rf"\b{name}\b", body)}
    return avoid_in(body, "attention", inputs, result, used, **more)


def attention(state):
    (node,) = [n for n in all_nodes(state.model) if n.op_type == "MultiHeadAttention"]
    return node


def test_attention_is_one_operator():
    state = avoid(HEADS + SCORES + REST)
    assert ops(state.model) == {"MultiHeadAttention": 1, "Reshape": 2}
    file_check(
        print_model(state.model),
        """
        # CHECK: MatMul_9: %[[A:[^ ]+]]: f32 nx5x12 = com.microsoft::MultiHeadAttention(%xq, %xk, %xv) {num_heads=3
        # CHECK: %[[H:[^ ]+]]: f32 {{.*}}5x3x4 = Reshape(%[[A]], const<i64 4 [0, 0, 3, 4]>)
        # CHECK: %y: f32 nx5x12 = Reshape(%[[H]]
        """,
    )
    assert attention(state).attributes["scale"].as_float() == 0.5
    assert state.model.opset_imports["com.microsoft"] == 1
    assert {"MatMul_6", "Softmax_8", "MatMul_9"} <= set(origins(attention(state)))


SCALES = {
    "divided": ("p = MatMul(q, k) e = Div(p, r) ", 0.5),
    "queries": ("g = Mul(q, c) e = MatMul(g, k) ", 0.5),
    "both": ("g = Mul(q, root) l = Mul(k, root) e = MatMul(g, l) ", 0.5),
    "all": ("g = Mul(c, q) l = Div(k, r) p = MatMul(g, l) e = Mul(p, c) ", 0.125),
}


@pytest.mark.parametrize("form", SCALES)
def test_wherever_the_scale_stands(form):
    scores, wanted = SCALES[form]
    assert attention(avoid(HEADS + scores + REST)).attributes["scale"].as_float() == pytest.approx(wanted, rel=1e-6)


def test_without_a_scale_it_is_one():
    body = HEADS + "e = MatMul(q, k) " + REST
    assert attention(avoid(body)).attributes["scale"].as_float() == 1.0


def test_keys_transposed_twice_and_values_of_another_width():
    heads = HEADS.replace("k = Transpose<perm=[0,2,3,1]>(rk)", "l = Transpose<perm=[0,2,1,3]>(rk) "
                          "k = Transpose<perm=[0,1,3,2]>(l)").replace("Reshape(xv, hs)", "Reshape(xv, vs)")  # fmt: skip
    rest = REST.replace(" y = Reshape(t, os)", "")
    state = avoid(heads + SCORES + rest, "float[n,5,3,2] t", "float[n,5,12] xq, float[n,7,12] xk, float[n,7,6] xv")
    assert ops(state.model) == {"MultiHeadAttention": 1, "Reshape": 1}


def test_the_softmax_axis_by_its_number():
    assert changes(avoid(HEADS + SCORES + REST.replace("axis=-1", "axis=3"))) == 1


STORED = (
    "a = Softmax<axis=-1>(e) o = MatMul(a, v) g = QuantizeLinear(o, s, z) h = DequantizeLinear(g, s, z) "
    "t = Transpose<perm=[0,2,1,3]>(h) i = QuantizeLinear(t, s, z) y = DequantizeLinear(i, s, z)"
)


def stored_feeds():
    """Return feeds whose attention is far from the middle between two integers."""
    return [{"xq": np.zeros((2, 5, 12), F), "xk": np.zeros((2, 7, 12), F), "xv": np.full((2, 7, 12), 0.37, F)}]


def test_a_stored_result_is_quantized_with_the_same_numbers():
    state = avoid(HEADS + SCORES + STORED, "float[n,5,3,4] y", feeds=stored_feeds())
    found = [n.op_type for n in all_nodes(state.model)]
    assert found == ["MultiHeadAttention", "Reshape", "QuantizeLinear", "DequantizeLinear"]
    # Not the name of the Transpose's own quantizer: that one must not be left over.
    assert [n.name for n in all_nodes(state.model) if n.op_type == "QuantizeLinear"] == ["QuantizeLinear_10"]


@pytest.mark.parametrize(
    ("body", "result", "reason"),
    [
        (HEADS + "p = MatMul(q, k) e = Mul(p, row) " + REST, RESULT, "not-scalar"),
        (HEADS + "p = MatMul(q, k) e = Mul(p, minus) " + REST, RESULT, "not-positive"),
        (HEADS.replace("xv, hs", "xv, shared") + SCORES + REST.replace(" y = Reshape(t, os)", ""),
         "float[n,5,3,12] t", "heads"),
        (HEADS.replace("ks", "moved").replace("hs", "moved") + SCORES + REST, RESULT, "rows"),
    ],
)  # fmt: skip
def test_attention_that_stays(body, result, reason):
    state = avoid(body, result, INPUTS if "moved" not in body else INPUTS.replace("n,7", "n,5"))
    assert (changes(state), why(state, "attention-operator")) == (0, [reason])


@pytest.mark.parametrize(
    ("body", "result"),
    [
        (HEADS + SCORES + REST, RESULT + ", float[n,3,5,7] a"),
        (HEADS + SCORES + REST + " u = Exp(p)", RESULT + ", float[n,3,5,7] u"),
    ],
)
def test_scores_that_are_read_elsewhere(body, result):
    assert changes(avoid(body, result)) == 0


def test_a_mask_is_not_taken_along():
    body = HEADS + "p = MatMul(q, k) f = Mul(p, c) e = Add(f, m) " + REST
    assert changes(avoid(body, inputs=INPUTS + ", float[n,1,1,7] m")) == 0


def test_other_axes_are_not_attention():
    assert changes(avoid(HEADS + SCORES + REST.replace("axis=-1", "axis=2"))) == 0
    other = REST.replace("t = Transpose<perm=[0,2,1,3]>(o) y = Reshape(t, os)", "y = Transpose<perm=[0,1,3,2]>(o)")
    assert changes(avoid(HEADS + SCORES + other, "float[n,3,4,5] y")) == 0


def test_scales_per_channel_are_not_moved():
    body = HEADS + SCORES + STORED.replace("(o, s, z)", "<axis=1>(o, s3, z3)").replace(
        "(g, s, z)", "<axis=1>(g, s3, z3)").replace("(t, s, z)", "<axis=2>(t, s3, z3)").replace(
        "(i, s, z)", "<axis=2>(i, s3, z3)")  # fmt: skip
    state = avoid(body, "float[n,5,3,4] y", feeds=stored_feeds())
    assert (changes(state), why(state, "stored-attention-operator")) == (0, ["per-channel"])
