"""Fusion groups: what a root absorbs, and the reason code for every form it cannot have."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.targets.groups import Group, find_groups, left_out, reduce_length
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import import_exactly, model_of, normal

F = np.float32
IMAGE, MATRIX = "float[n,4,8,8] x", "float[n,64] x"
W = {
    "w": normal(1, 8, 4, 3, 3), "b": normal(2, 8), "m": normal(3, 64, 32), "mb": normal(4, 32),
    "zero": np.asarray(0, F),
    "six": np.asarray(6, F), "one": np.asarray(1, F), "minus": np.asarray(-1, F), "row": normal(5, 1, 32),
    "column": normal(6, 5, 1), "high": normal(7, 1, 1, 1, 32), "batch": normal(8, 2, 64, 32),
    "small": normal(9, 16, 32), "nine": normal(10, 9),
}  # fmt: skip


def model(body: str, inputs: str = IMAGE, result: str = "float[] y", weights: dict[str, np.ndarray] | None = None):
    return import_exactly(model_of(inputs, result, body, {**W, **(weights or {})}))


def groups(body: str, inputs: str = IMAGE, result: str = "float[n,8,p,q] y", **weights: np.ndarray) -> list[Group]:
    return list(find_groups(model(body, inputs, result, weights), load_target("ort-x86")))


def only(
    body: str, op_type: str, inputs: str = IMAGE, result: str = "float[n,8,p,q] y", **weights: np.ndarray
) -> Group:
    (found,) = [g for g in groups(body, inputs, result, **weights) if g.root.op_type == op_type]
    return found


@pytest.mark.parametrize(
    ("body", "inputs", "root", "bias", "activation"),
    [
        ("c = Conv(x, w, b) y = Relu(c)", IMAGE, "Conv", None, "Relu"),
        ("c = Conv(x, w) y = Clip(c, zero, six)", IMAGE, "Conv", None, "Clip"),
        ("c = Conv(x, w) y = Clip(c, minus)", IMAGE, "Conv", None, "Clip"),
        ("g = Gemm(x, m, mb) y = Relu(g)", MATRIX, "Gemm", None, "Relu"),
        ("g = MatMul(x, m) y = Add(g, mb)", MATRIX, "MatMul", "Add", None),
        ("g = MatMul(x, m) h = Add(mb, g) y = Relu(h)", MATRIX, "MatMul", "Add", "Relu"),
        ("g = MatMul(x, m) y = Add(g, row)", MATRIX, "MatMul", "Add", None),
    ],
)
def test_what_a_root_absorbs(body, inputs, root, bias, activation):
    (group,) = groups(body, inputs, "float[n,p] y" if inputs is MATRIX else "float[n,8,p,q] y")
    assert group.root.op_type == root
    assert (group.bias and group.bias.op_type) == bias
    assert (group.activation and group.activation.op_type) == activation
    assert [v.name for v in group.results] == ["y"]
    assert group.name == group.root.name
    assert [v.name for v in group.data] == ["x"]


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("c = Conv(x, w) r = Relu(c) y = Add(r, c)", IMAGE),  # read elsewhere too
        ("c = Conv(x, w) y = Clip(c, one, six)", IMAGE),  # zero would not be exact
        ("c = Conv(x, w) y = Clip(c, , six)", IMAGE),
        ("c = Conv(x, w) y = Tanh(c)", IMAGE),
    ],
)
def test_an_activation_that_is_not_absorbed(body, inputs):
    conv = next(g for g in groups(body, inputs) if g.root.op_type == "Conv")
    assert conv.activation is None


@pytest.mark.parametrize("constant", ["one", "column", "high"])
def test_an_added_constant_that_is_no_bias_per_column(constant):
    found = groups(f"g = MatMul(x, m) y = Add(g, {constant})", "float[5,64] x", "float[] y")
    assert [g.root.op_type for g in found] == ["MatMul", "Add"]
    assert found[0].bias is None


def test_an_addition_of_two_activations_takes_its_relu():
    found = groups("c = Conv(x, w) d = Conv(x, w, b) e = Add(c, d) y = Relu(e)")
    add = found[-1]
    assert (add.root.op_type, add.activation.op_type) == ("Add", "Relu")
    assert [v.name for v in add.data] == ["c", "d"]


def test_the_same_value_twice_is_one_data_input():
    add = groups("c = Conv(x, w) y = Add(c, c)")[-1]
    assert [v.name for v in add.data] == ["c"]
    assert add.data_indices == (0, 1)


def test_the_float_result_lies_in_front_of_the_activation():
    (group,) = groups("g = MatMul(x, m) h = Add(g, mb) y = Relu(h)", MATRIX, "float[n,32] y")
    assert group.float_result.name == "h"
    assert [n.op_type for n in group.nodes] == ["MatMul", "Add", "Relu"]


def test_an_activation_in_another_graph_is_not_absorbed():
    body = (
        "c = Conv(x, w) y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Relu(c) }, "
        "else_branch = g2 () => (float[n,8,6,6] v) { v = Conv(x, w) }>"
    )
    found = groups(body, IMAGE + ", bool p", "float[n,8,6,6] y")
    assert [(g.root.op_type, g.activation) for g in found] == [("Conv", None), ("Conv", None)]


def test_groups_in_bodies_of_loops_and_scans_are_found():
    body = (
        "y = Loop(k, , x) <body = g (int64 i, bool cond, float[n,8,8,8] a) => (bool again, float[n,8,8,8] z) "
        "{ again = Identity(cond) c = Conv<pads=[1,1,1,1]>(a, w8) z = Relu(c) }>"
    )
    (group,) = groups(body, "float[n,8,8,8] x, int64 k", "float[n,8,8,8] y", w8=normal(1, 8, 8, 3, 3))
    assert (group.root.op_type, group.legal, [v.name for v in group.data]) == ("Conv", ("static",), ["a"])
    assert [v.name for v in group.results] == ["z"]
    body = "y = Scan<num_scan_inputs=1, body = g (float[64] a) => (float[32] z) { z = MatMul(a, m) }>(x)"
    (group,) = groups(body, MATRIX, "float[n,32] y")
    assert (group.root.op_type, group.legal) == ("MatMul", ("static-float", "dynamic"))


def test_the_body_of_a_sequence_map_is_left_out_with_a_reason():
    body = (
        "s = SequenceConstruct(x) "
        "t = SequenceMap(s) <body = g (float[n,64] a) => (float[n,32] z) { z = MatMul(a, m) }> "
        "y = ConcatFromSequence<axis=0>(t)"
    )
    given, target = model(body, MATRIX, "float[p,32] y"), load_target("ort-x86")
    assert find_groups(given, target) == ()
    ((node, code, text),) = left_out(given, target)
    assert (node.op_type, code) == ("MatMul", "closed-body")
    assert "SequenceMap" in text


LSTM = {"lw": normal(1, 1, 64, 64), "lr": normal(2, 1, 64, 16), "lb": normal(3, 1, 128), "lp": normal(4, 1, 48)}
SEQUENCE = "float[s,n,64] x, float[1,64,64] w2, float[1,48] p2"


@pytest.mark.parametrize(
    ("body", "inputs", "form", "reason"),
    [
        ("y = Conv(x, k)", IMAGE + ", float[8,4,3,3] k", "static", "weight-not-constant"),
        ("y = MatMul(x, k)", MATRIX + ", float[64,32] k", "dynamic", "weight-not-constant"),
        ("y = MatMul(x, batch)", "float[2,5,64] x", "dynamic", "weight-rank"),
        ("y = Gemm<alpha=0.5>(x, m)", MATRIX, "static", "gemm-form"),
        ("y = Gemm<beta=0.5>(x, m, mb)", MATRIX, "static", "gemm-form"),
        ("y = Gemm<transA=1>(x, m)", "float[64,n] x", "dynamic", "gemm-form"),
        ("y = Gemm(x, m, k)", MATRIX + ", float[32] k", "static", "bias-not-constant"),
        ("y = Conv(x, w, k)", IMAGE + ", float[8] k", "static", "bias-not-constant"),
        ("y = Gemm(x, m, one)", MATRIX, "static", "bias-shape"),
        ("y = Gemm(x, m, column)", "float[5,64] x", "static-float", "bias-shape"),
        ("y = MatMul(x, small)", "float[n,16] x", "dynamic", "too-small"),
        ("c = Conv(x, w) y, i = MaxPool<kernel_shape=[2,2]>(c)", IMAGE, "static", "indices-used"),
        ('c = Conv(x, w) y = Resize<mode="linear">(c, , s)', IMAGE, "static", "resize-mode"),
        ('c = Conv(x, w) y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(c, roi, s)', IMAGE, "static",
         "resize-mode"),
        ("y = Gather(table, i)", "int64[n] i", "static", "constant"),
        ("y = Conv(image, w)", IMAGE, "static", "constant"),
        ("y = Concat<axis=0>(x, image)", IMAGE, "static", "constant-input"),
        ("c = Conv(x, w) y = AveragePool<kernel_shape=[2,2],dilations=[2,2]>(c)", IMAGE, "static", "dilations"),
        ("c = Conv(x, w) y = AveragePool<kernel_shape=[3,3],strides=[2,2],ceil_mode=1,count_include_pad=1>(c)", IMAGE,
         "static", "ceil-mode"),
        ("y = LSTM<hidden_size=16>(x, w2, lr)", SEQUENCE, "dynamic", "weight-not-constant"),
        ("y = LSTM<hidden_size=16,layout=1>(x, lw, lr)", SEQUENCE, "dynamic", "layout"),
        ("y = LSTM<hidden_size=16>(x, lw, lr, lb, , , , p2)", SEQUENCE, "dynamic", "peephole"),
    ],
)  # fmt: skip
def test_a_form_that_a_node_cannot_have(body, inputs, form, reason):
    extra = {**LSTM, "s": np.asarray([1, 1, 2, 2], F), "roi": np.zeros(8, F), "table": normal(1, 3, 64),
             "image": normal(2, 1, 4, 8, 8)}  # fmt: skip
    outputs = "float[] y, int64[n,8,3,3] i" if "y, i" in body else "float[] y"
    found = groups(body, inputs, outputs, **extra)[-1]
    codes = {f: code for f, code, _ in found.refusals}
    assert codes[form] == reason
    assert form not in found.legal


def test_a_half_precision_node_has_no_integer_form():
    weights = {"h": W["m"].astype(np.float16)}
    group = only("y = MatMul(x, h)", "MatMul", "float16[n,64] x", "float16[n,32] y", **weights)
    assert {code for _, code, _ in group.refusals} == {"not-float32"}
    assert "float16" in group.refusals[0][2]


def test_the_type_of_an_output_that_is_left_out_says_nothing():
    found = only(", h = LSTM<hidden_size=16>(x, lw, lr)", "LSTM", "float[s,n,64] x", "float[1,n,16] h", **LSTM)
    assert found.legal == ("dynamic",)


def test_a_bias_of_the_wrong_length_is_refused_for_a_convolution():
    group = only("y = Conv(x, w, nine)", "Conv")
    assert group.refusals[0][1] == "bias-shape"
    assert "(9,)" in group.refusals[0][2]


@pytest.mark.parametrize(
    ("body", "inputs", "length"),
    [("y = Conv(x, w)", IMAGE, 36), ("y = Gemm(x, m)", MATRIX, 64), ("y = MatMul(x, small)", "float[n,16] x", 16)],
)
def test_how_many_products_an_output_sums(body, inputs, length):
    node = next(iter(model(body, inputs).graph))
    assert reduce_length(node) == length
    assert isinstance(node, ir.Node)
