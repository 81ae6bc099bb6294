"""round-adaptively: what is stored afterwards is exactly what was chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompiler.engine import Array
from qcompiler.ir.graph import const_array
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.passes.round_adaptively import RoundAdaptively
from qcompiler.passes.stored_constants import own_params
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.quant.rounding import RoundedWeight
from qcompiler.targets.target import Target, load_target
from tests.filecheck import run_pass_test
from tests.passes.quantize.lab import lab, model_of, normal, reasons

WEIGHTS = {"w": normal(1, 4, 3, 3, 3), "b": normal(2, 4, scale=30.0), "m": normal(3, 64, 32)}
CONV = ("[a] p = Conv(x, w, b) y = Sigmoid(p)", "float[1,3,8,8] x")
PRODUCT = ("[a] y = MatMul(x, m)", "float[N,64] x")


def chosen(body: str, inputs: str, form: Form, target: Target | None = None) -> tuple[CompileState, Array]:
    """Return a planned state with random codes around the weight, and those codes."""
    used = {name: array for name, array in WEIGHTS.items() if f"{name})" in body or f"{name}," in body}
    bench = lab(model_of(inputs, "float[] y", body, used), target=target)
    (group,) = [g for g in bench.groups.values() if g.row.kind == "weighted"]
    state = bench.run([PlanQuantization()], {group.name: form})
    weight = const_array(group.root.inputs[1])
    assert weight is not None
    params = own_params(weight, state.plan.points[f"{group.name}#1"].spec, group.root.op_type)
    low, high = params.spec.limits
    codes = np.random.default_rng(0).integers(low, high + 1, weight.shape)
    state.rounding = {group.name: RoundedWeight(params, codes)}
    return state, codes


@pytest.mark.parametrize(
    ("model", "form", "target"),
    [
        (CONV, "static", "ort-x86"), (PRODUCT, "dynamic", "ort-x86"), (PRODUCT, "static-float", "ort-x86"),
        (PRODUCT, "dynamic", "ort-x86-avx2"), (PRODUCT, "weight-only", "ort-cuda"),
    ],
)  # fmt: skip
def test_quantizing_gives_the_chosen_integers(model: tuple[str, str], form: Form, target: str) -> None:
    state, codes = chosen(*model, form, load_target(target))
    RoundAdaptively().run(state)
    InsertQdq().run(state)
    constants = [v.const_value for n, v in state.model.graph.initializers.items() if n.endswith(":rounded:q")]
    stored = [constant.numpy() for constant in constants if constant is not None]
    assert len(stored) == 1
    np.testing.assert_array_equal(stored[0].astype(np.int64), codes)


def test_the_weight_lies_on_the_grid_of_its_scale() -> None:
    state, codes = chosen(*PRODUCT, "dynamic")
    scale = state.rounding["a"].params.scale
    run_pass_test("", RoundAdaptively(), "# CHECK: MatMul(%x, const<f32 64x32", state=state)
    node = next(n for n in state.model.graph if n.op_type == "MatMul")
    np.testing.assert_allclose(const_array(node.inputs[1]), codes * scale, rtol=1e-6)
    assert state.plan.points["a#1"].source.kind == "fixed"
    assert [r.reason for r in state.remarks if r.done] == ["rounded"]


def test_what_stays_float_keeps_its_weight() -> None:
    state, _ = chosen(*PRODUCT, "dynamic")
    state.plan = replace(state.plan, choices={})
    assert RoundAdaptively().run(state) == 0


def test_another_shape_or_format_is_refused_with_the_reason() -> None:
    state, codes = chosen(*PRODUCT, "dynamic")
    params = state.rounding["a"].params
    state.rounding = {"a": RoundedWeight(params, codes[:, :3])}
    assert RoundAdaptively().run(state) == 0
    state.rounding = {"a": RoundedWeight(replace(params, spec=replace(params.spec, format="uint8")), codes)}
    assert RoundAdaptively().run(state) == 0
    assert reasons(state, "round-adaptively") == ["other-format", "other-format"]


def test_a_second_run_finds_nothing_to_do() -> None:
    state, _ = chosen(*PRODUCT, "dynamic")
    assert RoundAdaptively().run(state) > 0
    assert RoundAdaptively().run(state) == 0
