"""correct-bias: the bias of what is quantized changes, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.ir.graph import const_array
from qcompiler.passes.correct_bias import CorrectBias, correction_key
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from tests.filecheck import run_pass_test
from tests.passes.quantize.lab import lab, model_of, normal, outputs, reasons

WEIGHTS = {"w": normal(1, 4, 3, 3, 3), "b": normal(2, 4), "m": normal(3, 64, 4), "c": normal(4, 1, 4)}
IMAGE, ROWS = "float[1,3,8,8] x", "float[N,64] x"
SHIFT = (0.5, -1.0, 0.0, 2.0)


def planned(
    body: str, inputs: str, form: Form, key: Form | None = None, shift: tuple[float, ...] = SHIFT
) -> CompileState:
    used = {name: array for name, array in WEIGHTS.items() if f"{name})" in body or f"{name}," in body}
    bench = lab(model_of(inputs, "float[] y", body, used))
    (group,) = [g for g in bench.groups.values() if g.row.kind == "weighted"]
    state = bench.run([PlanQuantization()], {group.name: form})
    state.bias_corrections = {correction_key(group.name, key or form): shift}
    return state


def test_a_bias_takes_the_correction() -> None:
    state = planned("[a] p = Conv(x, w, b) y = Sigmoid(p)", IMAGE, "static")
    run_pass_test("", CorrectBias(), "# CHECK: Conv(%x, const<f32 4x3x3x3 {{.*}}, const<f32 4", state=state)
    node = next(n for n in state.model.graph if n.op_type == "Conv")
    np.testing.assert_array_equal(const_array(node.inputs[2]), (WEIGHTS["b"].astype(float) + SHIFT).astype(np.float32))
    assert [r.reason for r in state.remarks if r.done] == ["corrected"]


def test_a_convolution_without_a_bias_gets_one_and_its_point() -> None:
    state = planned("[a] p = Conv(x, w) y = Sigmoid(p)", IMAGE, "static")
    run_pass_test("", CorrectBias(), "# CHECK: Conv(%x, const<f32 4x3x3x3 {{.*}}, const<f32 4 ", state=state)
    point = state.plan.points["a#2"]
    assert (point.spec.format, point.spec.axis, point.source.points) == ("int32", 0, ("x", "a#1"))
    InsertQdq().run(state)
    node = next(n for n in state.model.graph if n.op_type == "Conv")
    assert node.inputs[2] is not None
    assert node.inputs[2].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "body", ["[a] y = MatMul(x, m)", "[a] p = MatMul(x, m) q = Sigmoid(p) z = Neg(p) y = Add(q, z)"]
)
def test_a_product_without_a_bias_gets_an_add_under_its_name(body: str) -> None:
    state = planned(body, ROWS, "static-float")
    feed = {"x": normal(5, 3, 64)}
    name = str(next(n for n in state.model.graph if n.op_type == "MatMul").outputs[0].name)
    run_pass_test("", CorrectBias(), "# CHECK: MatMul\n# CHECK-NEXT: Add(", state=state)
    add = next(n for n in state.model.graph if n.op_type == "Add")
    assert add.outputs[0].name == name
    plain = feed["x"].astype(np.float64) @ WEIGHTS["m"] + SHIFT
    wanted = plain if body.count("=") == 1 else 1 / (1 + np.exp(-plain)) - plain
    np.testing.assert_allclose(outputs(state.model, feed)[0], wanted, atol=1e-5 * np.abs(wanted).max())


def test_the_add_behind_a_product_takes_the_correction_with_its_shape() -> None:
    state = planned("[a] p = MatMul(x, m) y = Add(c, p)", ROWS, "dynamic")
    CorrectBias().run(state)
    add = next(n for n in state.model.graph if n.op_type == "Add")
    np.testing.assert_allclose(const_array(add.inputs[0]), WEIGHTS["c"] + np.float32(SHIFT), rtol=1e-6)


def test_a_group_that_is_float_or_has_another_form_keeps_its_bias() -> None:
    for form, key in (("float", "static"), ("dynamic", "static")):
        state = planned("[a] y = Gemm(x, m, c)", ROWS, form, key)  # type: ignore[arg-type]
        assert CorrectBias().run(state) == 0


def test_forms_that_read_the_same_integers_share_a_correction() -> None:
    assert correction_key("a", "static") == correction_key("a", "static-float") == "a@static"
    assert correction_key("a", "dynamic") == "a@dynamic"


def test_numbers_for_other_channels_are_refused_with_the_reason() -> None:
    state = planned("[a] y = Gemm(x, m, c)", ROWS, "static-float", shift=(1.0, 2.0))
    assert CorrectBias().run(state) == 0
    assert reasons(state, "correct-bias") == ["no-such-bias"]


def test_a_second_run_finds_nothing_to_do() -> None:
    state = planned("[a] y = Gemm(x, m)", ROWS, "static-float")
    assert CorrectBias().run(state) > 0
    assert CorrectBias().run(state) == 0
