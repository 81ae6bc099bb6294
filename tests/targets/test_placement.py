"""Where quantization goes: proposed forms, and the points that a choice of forms needs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from qcompiler.errors import CalibrationError
from qcompiler.quant.plan import QuantPlan
from qcompiler.quant.spec import QuantSource, QuantSpec
from qcompiler.targets.following import activation_bounds
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.placement import Policy, Resolution, propose, resolve
from qcompiler.targets.points import DYNAMIC_SUFFIX, root_point
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import import_exactly, model_of, normal

TARGET = load_target("ort-x86")
F = np.float32
IMAGE, OUT = "float[n,4,8,8] x", "float[] y"
W = {"w": normal(1, 8, 4, 3, 3), "b": normal(2, 8), "w2": normal(3, 8, 8, 1, 1), "m": normal(4, 64, 64),
     "mb": normal(5, 64), "zero": np.asarray(0, F), "six": np.asarray(6, F),
     "k": normal(6, 8, 1, 1), "flat": np.asarray([0, -1])}  # fmt: skip


class Ranges:
    """Observed ranges as given; -1 to 1 where nothing is said, and never observed where the range is None."""

    def __init__(self, ranges: Mapping[str, tuple[float, float] | None] | None = None) -> None:
        self.ranges = dict(ranges or {})

    def observed(self, name: str) -> bool:
        return self.ranges.get(name, (-1.0, 1.0)) is not None

    def range(self, name: str, estimator: str = "min-max", spec: object = None) -> tuple[float, float]:
        found = self.ranges.get(name, (-1.0, 1.0))
        if found is None:
            raise CalibrationError(f"{name} was never observed")
        return found


DEFAULT, PLAIN = Policy(), Ranges()


def groups_of(body: str, inputs: str = IMAGE, **weights: np.ndarray) -> tuple[Group, ...]:
    return find_groups(import_exactly(model_of(inputs, OUT, body, {**W, **weights})), TARGET)


def proposed(body: str, policy: Policy = DEFAULT, inputs: str = IMAGE, **frozen: str) -> dict[str, str]:
    """Return forms by operator type (the types in these models are distinct, or numbered in order)."""
    groups = groups_of(body, inputs)
    by_type: dict[str, str] = {}
    decided = {g.name: frozen[g.root.op_type] for g in groups if g.root.op_type in frozen}
    for name, form in propose(groups, policy, decided).items():
        kind = next(g.root.op_type for g in groups if g.name == name)
        count = sum(key.rstrip("0123456789") == kind for key in by_type)
        by_type[kind if not count else f"{kind}{count + 1}"] = form
    return by_type


def resolved(
    body: str, forms: Mapping[str, str], ranges: Ranges | None = PLAIN, inputs: str = IMAGE, **more: object
) -> Resolution:
    groups = groups_of(body, inputs)
    chosen = {g.name: forms.get(g.root.op_type, "float") for g in groups}
    return resolve(groups, chosen, TARGET, ranges, **more)


ALL_STATIC = dict.fromkeys(
    ("Conv", "Add", "Mul", "Concat", "MaxPool", "Transpose", "Sigmoid", "Split", "Flatten", "Gemm"), "static"
)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), {"Conv": "static", "MatMul": "dynamic", "LSTM": "dynamic"}),
        (Policy(convolution="float"), {"Conv": "float", "MatMul": "dynamic", "LSTM": "dynamic"}),
        # What a MatMul cannot have becomes the nearest form it can.
        (Policy(matmul="static"), {"Conv": "static", "MatMul": "static-float", "LSTM": "dynamic"}),
        (Policy(matmul="float", recurrent="float"), {"Conv": "static", "MatMul": "float", "LSTM": "float"}),
    ],
)
def test_weighted_operators_get_the_form_of_the_policy(policy, expected):
    weights = {"lw": normal(1, 1, 64, 64), "lr": normal(2, 1, 64, 16)}
    body = "c = Conv(x, w) d = MatMul(a, m) y = LSTM<hidden_size=16>(v, lw, lr)"
    groups = groups_of(body, IMAGE + ", float[n,64] a, float[s,n,64] v", **weights)
    forms = propose(groups, policy)
    assert {g.root.op_type: forms[g.name] for g in groups} == expected


def test_forward_an_operator_between_quantized_ones_joins_them():
    found = proposed("c = Conv(x, w) d = Conv(c, w2) e = Add(c, d) y = Conv(e, w2)")
    assert found == {"Conv": "static", "Conv2": "static", "Add": "static", "Conv3": "static"}


def test_an_operator_with_one_float_input_stays_float():
    found = proposed("c = Conv(x, w) e = Add(c, z) y = Conv(e, w2)", inputs=IMAGE + ", float[n,8,6,6] z")
    assert found["Add"] == "float"


def test_an_operator_whose_result_no_integer_operator_reads_goes_back():
    assert proposed("c = Conv(x, w) d = Conv(c, w2) y = Add(c, d)")["Add"] == "float"
    assert proposed("c = Conv(x, w) d = Conv(c, w2) e = Add(c, d) y = Softmax(e)")["Add"] == "float"


def test_a_pool_stays_although_nothing_behind_it_computes():
    assert proposed("c = Conv(x, w) y = GlobalAveragePool(c)")["GlobalAveragePool"] == "static"


def test_going_back_runs_down_a_chain():
    found = proposed("c = Conv(x, w) s = Sigmoid(c) y = Mul(c, s)")
    assert found == {"Conv": "static", "Sigmoid": "float", "Mul": "float"}


def test_backward_a_mover_towards_integer_readers_moves_integers():
    found = proposed("t = Transpose<perm=[0,1,3,2]>(x) y = Conv(t, w)")
    assert found == {"Transpose": "static", "Conv": "static"}
    mixed = proposed("t = Transpose<perm=[0,1,3,2]>(x) c = Conv(t, w) y = Exp(t)")
    assert mixed["Transpose"] == "float"


def test_a_mover_of_stored_integers_stays_on_integers():
    assert proposed("c = Conv(x, w) y = Flatten(c)")["Flatten"] == "static"


def test_arithmetic_can_be_switched_off():
    found = proposed("c = Conv(x, w) d = Add(c, c) y = Conv(d, w2)", Policy(arithmetic=False))
    assert found == {"Conv": "static", "Add": "float", "Conv2": "static"}


def test_what_is_decided_stays_decided():
    body = "c = Conv(x, w) d = Add(c, c) y = Conv(d, w2)"
    assert proposed(body, Conv="float") == {"Conv": "float", "Add": "float", "Conv2": "float"}
    assert proposed(body, Add="float")["Add"] == "float"


# ---- points -------------------------------------------------------------------------------------------------------


def test_a_static_convolution_needs_four_points():
    plan = resolved("y = Conv(x, w, b)", ALL_STATIC).plan
    (name,) = plan.choices
    assert plan.points["x"].spec == QuantSpec("uint8")
    assert plan.points["y"].source == QuantSource("observed", estimator="min-max")
    assert plan.points[f"{name}#1"].spec == QuantSpec("int8", axis=0, symmetric=True, narrow=True)
    bias = plan.points[f"{name}#2"]
    assert bias.spec == QuantSpec("int32", 0, symmetric=True)
    assert bias.source == QuantSource("derived", ("x", f"{name}#1"))
    assert set(plan.points) == {"x", "y", f"{name}#1", f"{name}#2"}


def test_a_float_output_needs_no_point_behind_and_no_integer_bias():
    plan = resolved("y = Gemm(x, m, mb)", {"Gemm": "static-float"}, inputs="float[n,64] x").plan
    (name,) = plan.choices
    assert set(plan.points) == {"x", f"{name}#1"}
    assert plan.points[f"{name}#1"].spec.axis == 1


def test_a_dynamic_point_has_a_name_of_its_own():
    body = "a = MatMul(x, m) y = Gemm(x, m)"
    plan = resolved(body, {"MatMul": "dynamic", "Gemm": "static-float"}, inputs="float[n,64] x").plan
    assert plan.points["x" + DYNAMIC_SUFFIX].spec == QuantSpec("uint8", dynamic=True)
    assert plan.points["x"].spec == QuantSpec("uint8")


def test_the_generic_table_uses_seven_bits():
    groups = groups_of("y = Conv(x, w)")
    plan = resolve(groups, {groups[0].name: "static"}, load_target("ort-generic"), Ranges()).plan
    assert plan.points[f"{groups[0].name}#1"].spec.limits == (-63, 63)


def test_a_mover_shares_the_numbers_of_what_it_moves():
    plan = resolved("c = Conv(x, w) t = Transpose<perm=[0,1,3,2]>(c) r = Flatten(t) y = Identity(r)", ALL_STATIC).plan
    assert plan.points["t"].source == QuantSource("shared", ("c",))
    assert root_point(plan, "r") == "c"


def test_every_output_of_a_split_shares():
    plan = resolved("c = Conv(x, w) p, q = Split<axis=1,num_outputs=2>(c) y = Add(p, q)", ALL_STATIC).plan
    assert {root_point(plan, name) for name in ("p", "q")} == {"c"}


def test_a_sigmoid_has_its_own_numbers():
    plan = resolved("c = Conv(x, w) s = Sigmoid(c) y = Mul(c, s)", ALL_STATIC).plan
    assert plan.points["s"].source == QuantSource("fixed", scale=(1 / 256,), zero_point=(0,))


def test_a_constant_operand_is_a_point_of_its_use():
    plan = resolved("c = Conv(x, w) y = Mul(c, k)", ALL_STATIC).plan
    name = next(n for n in plan.choices if n.startswith("Mul"))
    assert plan.points[f"{name}#1"].source == QuantSource("weight")
    assert plan.points[f"{name}#1"].spec == QuantSpec("uint8")


CONCAT = "a = Conv(x, w) b1 = Conv(x, w, b) y = Concat<axis=1>(a, b1)"


def roots(plan: QuantPlan, *names: str) -> list[str]:
    return [root_point(plan, name) for name in names]


def test_what_only_a_concat_reads_takes_its_numbers():
    plan = resolved(CONCAT, ALL_STATIC).plan
    assert roots(plan, "a", "b1", "y") == ["y", "y", "y"]
    assert plan.points["y"].source.kind == "observed"


def test_what_something_else_reads_keeps_its_own():
    plan = resolved(CONCAT.replace("y =", "z =") + " y = Conv(a, w2)", ALL_STATIC).plan
    assert roots(plan, "a", "b1") == ["a", "z"]


def test_a_graph_input_keeps_its_own():
    plan = resolved("a = Conv(x, w) y = Concat<axis=1>(a, v)", ALL_STATIC, inputs=IMAGE + ", float[n,8,6,6] v").plan
    assert roots(plan, "a", "v") == ["y", "v"]


def test_movers_on_the_way_to_a_concat_go_along():
    body = "a = Conv(x, w) t = MaxPool<kernel_shape=[1,1]>(a) b1 = Conv(x, w, b) y = Concat<axis=1>(t, b1)"
    assert roots(resolved(body, ALL_STATIC).plan, "a", "t", "b1") == ["y", "y", "y"]
    # ... unless one of them is read by something that computes.
    other = body.replace("y =", "z =") + " y = Conv(t, w2)"
    assert roots(resolved(other, ALL_STATIC).plan, "a", "t", "b1") == ["a", "a", "z"]


def test_a_sigmoid_keeps_its_fixed_numbers_in_front_of_a_concat():
    body = "a = Conv(x, w) s = Sigmoid(a) b1 = Conv(x, w, b) y = Concat<axis=1>(s, b1)"
    assert roots(resolved(body, ALL_STATIC).plan, "s", "b1") == ["s", "y"]


RELU = "a = Conv(x, w) r = Relu(a) b1 = Conv(x, w, b) y = Concat<axis=1>(r, b1)"


@pytest.mark.parametrize(("low", "expected"), [(0.0, "y"), (-1.0, "r")])
def test_a_range_below_zero_is_not_shared_with_a_relu_that_would_come_back(low, expected):
    plan = resolved(RELU, ALL_STATIC, Ranges({"y": (low, 3.0), "r": (0.0, 3.0)})).plan
    assert roots(plan, "r", "b1") == [expected, "y"]


@pytest.mark.parametrize(("low", "expected"), [(0.0, "y"), (-1.0, "z")])
def test_the_relu_counts_through_a_concat_in_front_too(low, expected):
    body = "a = Conv(x, w) r = Relu(a) z = Concat<axis=1>(r, r) b1 = Conv(x, w, b) y = Concat<axis=1>(z, b1)"
    plan = resolved(body, ALL_STATIC, Ranges({"y": (low, 3.0), "r": (0.0, 3.0), "z": (0.0, 3.0)})).plan
    assert roots(plan, "r", "z") == [expected, expected]


@pytest.mark.parametrize(("high", "expected"), [(6.0, "y"), (7.0, "r")])
def test_a_clip_limits_both_ends(high, expected):
    body = RELU.replace("Relu(a)", "Clip(a, zero, six)")
    plan = resolved(body, ALL_STATIC, Ranges({"y": (0.0, high)})).plan
    assert roots(plan, "r") == [expected]


def test_imported_numbers_win_over_observed_ones():
    fixed = QuantSource("fixed", scale=(0.5,), zero_point=(3,))
    plan = resolved("c = Conv(x, w) y = MaxPool<kernel_shape=[2,2]>(c)", ALL_STATIC, imported={"c": fixed}).plan
    assert plan.points["c"].source == fixed
    assert root_point(plan, "y") == "c"


def test_an_imported_weight_keeps_its_scales():
    fixed = QuantSource("fixed", scale=(0.5,) * 8, zero_point=(0,) * 8)
    single = QuantSource("fixed", scale=(0.5,), zero_point=(0,))
    plan = resolved("y = Conv(x, w)", ALL_STATIC, imported={"w": fixed}).plan
    (name,) = plan.choices
    assert (plan.points[f"{name}#1"].source, plan.points[f"{name}#1"].spec.axis) == (fixed, 0)
    plan = resolved("y = Conv(x, w)", ALL_STATIC, imported={"w": single}).plan
    assert (plan.points[f"{name}#1"].source, plan.points[f"{name}#1"].spec.axis) == (single, None)


def test_the_estimator_of_a_group_is_kept_in_its_points():
    groups = groups_of("y = Conv(x, w)")
    (group,) = groups
    plan = resolve(
        groups, {group.name: "static"}, TARGET, Ranges(), {group.name: "percentile:99.9"}, "min-max", {group.name: "me"}
    ).plan
    assert plan.points["x"].source.estimator == "percentile:99.9"
    assert plan.choices[group.name].why == "me"


@pytest.mark.parametrize(
    ("ranges", "form", "code"),
    [(Ranges({"x": None}), "static", "never-observed"), (Ranges({"y": None}), "static", "never-observed"),
     (None, "static", "no-calibration")],
)  # fmt: skip
def test_a_group_without_ranges_stays_float_and_says_why(ranges, form, code):
    result = resolved("y = Conv(x, w)", {"Conv": form}, ranges)
    (name,) = result.plan.choices
    assert result.plan.form(name) == "float"
    assert [(group, reason) for group, reason, _ in result.refused] == [(name, code)]
    assert result.plan.points == {}


def test_a_dynamic_group_needs_no_ranges():
    result = resolved("y = MatMul(x, m)", {"MatMul": "dynamic"}, None, inputs="float[n,64] x")
    assert result.refused == ()


@pytest.mark.parametrize(
    ("body", "forms", "code"),
    [
        ("y = Conv(x, v)", {"Conv": "static"}, "weight-not-constant"),
        ("y = Conv(x, w)", {"Conv": "dynamic"}, "no-such-form"),
    ],
)
def test_a_form_that_a_group_cannot_have_is_refused(body, forms, code):
    result = resolved(body, forms, inputs=IMAGE + ", float[8,4,3,3] v")
    assert [reason for _, reason, _ in result.refused] == [code]
    assert {c.form for c in result.plan.choices.values()} == {"float"}


def test_the_interval_of_an_activation():
    groups = groups_of("c = Conv(x, w) r = Relu(c) d = Conv(x, w) y = Clip(d, zero, six)")
    assert [activation_bounds(g.activation) for g in groups] == [(0.0, np.inf), (0.0, 6.0)]
