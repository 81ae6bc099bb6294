"""Times of an engine's nodes go to the groups they serve."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.engine import NodeCost, Profile
from qcompiler.search.attribution import Costs, Owners, attribute
from qcompiler.targets.groups import find_groups
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import import_exactly, model_of
from tests.search.nets import SAME, net, profile_of

POOL = "MaxPool<kernel_shape=[2,2]>"
BODY = f"[c0] a = Conv{SAME}(x, w) [r0] b = Relu(a) [t0] t = Tanh(b) [m0] p = {POOL}(t) [e0] y = Exp(p)"


def owners() -> Owners:
    model, groups = net(BODY)
    assert set(groups) == {"c0", "m0"}
    return Owners.of(model, list(groups.values()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c0", ("group", "c0")),
        ("r0", ("group", "c0")),  # the Relu that the convolution absorbs
        ("a", ("group", "c0")),  # fused nodes are named after a tensor
        ("b", ("group", "c0")),
        ("t0", ("other", "t0")),
        ("t", ("other", "t0")),
        ("p", ("group", "m0")),
        ("c0_token_12", ("group", "c0")),
        ("c0_nchwc", ("group", "c0")),
        ("c0_nhwc", ("group", "c0")),
        ("c0/duplicated", ("group", "c0")),
        ("c0/duplicated_token_3", ("group", "c0")),
        ("c0_nchwc_token_7", ("group", "c0")),
        ("t0_nchwc", ("other", "t0")),
        ("c0:node", ("group", "c0")),
        ("fused c0", ("group", "c0")),
        ("c0/MatMulAddFusion", ("group", "c0")),
        ("fused c0/MatMulAddFusion_token_8", ("group", "c0")),
        ("fused unknown", None),
        ("b:out", ("group", "c0")),
        ("b_out2", ("group", "c0")),
        ("c0/QuantizeLinear", ("group", "c0")),  # left over from the body of the fused call
        ("c0/DequantizeLinear_1_token_4", ("group", "c0")),
        ("x/QuantizeLinear", ("conversion", "x")),  # at the border: the value's
        ("t/DynamicQuantizeLinear", ("conversion", "t")),
        ("t:dequantize", ("conversion", "t")),
        ("t:dequantize_token_9", ("conversion", "t")),
        ("c0:dq", ("group", "c0")),
        ("c0:dyn_q", ("group", "c0")),
        ("Reorder", None),
        ("c0x", None),
    ],
)
def test_a_name_is_traced_to_what_it_belongs_to(name: str, expected: tuple[str, str] | None) -> None:
    assert owners().find(name) == expected


def test_a_node_whose_own_name_ends_like_a_suffix_keeps_it() -> None:
    model, groups = net(f"[conv] a = Conv{SAME}(x, w) [conv_nchwc] y = Conv{SAME}(a, v)")
    found = Owners.of(model, list(groups.values()))
    assert found.find("conv_nchwc") == ("group", "conv_nchwc")
    assert found.find("conv_nchwc_token_2") == ("group", "conv_nchwc")
    assert found.find("conv_token_2") == ("group", "conv")


def executed(body: str) -> ir.Model:
    weights = dict.fromkeys("wv", np.zeros((4, 4, 3, 3), np.float32))
    return import_exactly(model_of("float[1,4,8,8] x", "float[] y", body, weights))


def test_a_renamed_node_is_found_by_the_tensor_it_writes() -> None:
    engine = executed(
        f"[fused] b = Conv{SAME}(x, w) [other] t = Tanh(b) [pool] p = MaxPool<kernel_shape=[2,2]>(t) [z] y = Exp(p)"
    )
    made = attribute(profile_of({"fused": 10, "other": 3, "pool": 2, "z": 1}), engine, owners())
    assert dict(made.groups) == {"c0": 10, "m0": 2}
    assert dict(made.others) == {"t0": 3, "e0": 1}
    assert made.total == 16


def test_a_layout_change_is_paid_by_what_follows_it() -> None:
    engine = executed(
        f"[ReorderInput] i = Identity(x) [again] j = Identity(i) [k] b = Conv{SAME}(j, w) [l] y = Tanh(b)"
    )
    made = attribute(profile_of({"ReorderInput": 4, "again": 2, "k": 10}), engine, owners())
    assert dict(made.groups) == {"c0": 16}


def test_a_layout_change_behind_the_last_node_is_paid_by_its_source() -> None:
    engine = executed(
        f"[k] b = Conv{SAME}(x, w) [ReorderOutput] nameless = Identity(b) [other] unknown = Neg(nameless)"
    )
    made = attribute(profile_of({"ReorderOutput": 4}), engine, owners())
    assert dict(made.groups) == {"c0": 4}


@pytest.mark.parametrize(
    ("op_type", "expected"),
    [
        ("Conv", {"c0": 9}),  # an engine names a fused convolution after the activation behind it
        ("FusedConv", {"c0": 9}),
        ("QLinearConv", {"s0": 9}),
        ("Sigmoid", {"s0": 9}),
        ("MatMul", {"s0": 9}),  # there is no such product in front
    ],
)
@pytest.mark.parametrize("name", ["s0", "b", "b_nchwc"])
def test_a_fused_operator_belongs_to_what_computes(name: str, op_type: str, expected: dict[str, float]) -> None:
    model, groups = net(f"[c0] a = Conv{SAME}(x, w) [s0] b = Sigmoid(a) [e0] y = Exp(b)")
    found = Owners.of(model, list(groups.values()))
    made = attribute(Profile((NodeCost(name, op_type, 9.0),)), executed("[q] y = Neg(x)"), found)
    assert dict(made.groups) == expected


def test_a_convolution_fused_with_an_addition_and_an_activation_outside_all_groups() -> None:
    body = f"[c0] a = Conv{SAME}(x, w) [c1] b = Conv{SAME}(a, v) [s0] c = Add(a, b) [t0] y = Tanh(c)"
    model, groups = net(body)
    found = Owners.of(model, list(groups.values()))
    for name in ("t0", "y_nchwc"):
        made = attribute(Profile((NodeCost(name, "FusedConv", 9.0),)), executed("[q] y = Neg(x)"), found)
        assert sum(made.groups.values()) == 9
        assert set(made.groups) <= {"c0", "c1"}


@pytest.mark.parametrize("branch", ["c0", "c1"])
def test_of_two_summands_the_one_whose_tensors_are_read_is_the_fused_one(branch: str) -> None:
    model, groups = net(f"[c0] a = Conv{SAME}(x, w) [c1] b = Conv{SAME}(x, v) [s0] c = Add(a, b) [t0] y = Tanh(c)")
    weight, other = ("w", "b") if branch == "c0" else ("v", "a")
    engine = executed(f"[p] {other} = Identity(x) [fused] y = Conv{SAME}(x, {weight}, {other})")
    made = attribute(Profile((NodeCost("fused", "FusedConv", 9.0),)), engine, Owners.of(model, list(groups.values())))
    assert dict(made.groups) == {branch: 9}


def test_a_product_fused_with_what_follows() -> None:
    model, groups = net("[m0] a = MatMul(x, m) [n0] b = Neg(a) [e0] y = Exp(b)", inputs="float[8,64] x")
    found = Owners.of(model, list(groups.values()))
    made = attribute(Profile((NodeCost("n0", "FusedMatMul", 9.0),)), executed("[q] y = Neg(x)"), found)
    assert dict(made.groups) == {"m0": 9}


def test_a_name_that_nothing_explains_is_kept_under_its_own() -> None:
    made = attribute(profile_of({"mystery": 5}), executed("[q] y = Neg(x)"), owners())
    assert dict(made.others) == {"mystery": 5}
    assert not made.groups
    assert not made.conversions


def test_conversions_are_kept_per_value() -> None:
    times = {"x/QuantizeLinear": 3, "x/QuantizeLinear_token_1": 2, "b:dequantize": 7}
    made = attribute(profile_of(times), executed("[q] y = Neg(x)"), owners())
    assert dict(made.conversions) == {"x": 5, "b": 7}


def test_the_total_counts_everything_once() -> None:
    made = Costs()
    made.groups["a"] += 1
    made.others["b"] += 2
    made.conversions["c"] += 4
    assert made.total == 7


def test_nodes_of_a_branch_belong_to_their_groups() -> None:
    body = (
        "y = If(c) <then_branch = g1 () => (float[1,4,8,8] p) { [ct] p = Conv<pads=[1,1,1,1]>(x, w) },"
        " else_branch = g2 () => (float[1,4,8,8] q) { [ce] q = Neg(x) }>"
    )
    model, groups = net(body, "bool c, float[1,4,8,8] x")
    found = Owners.of(model, list(groups.values()))
    assert found.find("ct") == ("group", "ct")
    assert found.find("ce") == ("other", "ce")


def test_nodes_of_a_loop_body_are_attributed_by_name_and_what_it_captures_to_the_outer_value() -> None:
    text = f"""[l] y = Loop(k, , x) <body = b (int64 i, bool go, float[n,8,6,6] h) => (bool again, float[n,8,6,6] g)
      {{ [again] again = Identity(go) [c0] a = Conv{SAME}(h, w) [r0] r = Relu(a) [t0] g = Tanh(r) }}>"""
    weight = {"w": np.ones((8, 8, 3, 3), np.float32)}
    model = import_exactly(model_of("float[n,8,6,6] x, int64 k", "float[n,8,6,6] y", text, weight))
    owners = Owners.of(model, list(find_groups(model, load_target("ort-x86"))))
    times = {"c0_token_2": 30.0, "h/QuantizeLinear": 3.0, "r:dequantize": 2.0, "t0": 5.0, "x/QuantizeLinear": 1.0}
    profile = Profile(tuple(NodeCost(name, "Any", time) for name, time in times.items()))
    costs = attribute(profile, model, owners)
    assert costs.groups == {"c0": 30.0}
    assert costs.others == {"t0": 5.0}
    assert costs.conversions == {"h": 3.0, "r": 2.0, "x": 1.0}
