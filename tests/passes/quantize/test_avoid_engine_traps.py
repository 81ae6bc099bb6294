"""avoid-engine-traps: equal forms that the engine runs well, and why each rewrite is held back elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from qcompiler.engine import Array
from qcompiler.errors import PassError
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.patterns.traps import FLOOR
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import QuantPlan
from qcompiler.targets.target import load_target
from tests.filecheck import file_check
from tests.passes.quantize.lab import ENGINE, OPTIMIZED, import_exactly, model_of, normal, ops, outputs
from tests.passes.quantize.traps_lab import avoid_in, changes, why

F = np.float32
ROWS = "float[n,4,6] x"
NUMBERS = {"s": np.asarray(0.05, F), "z": np.asarray(120, np.uint8), "scale": np.ones(6, F), "bias": np.zeros(6, F),
           "row": normal(1, 6)}  # fmt: skip


def avoid(
    body: str,
    traps: str = "",
    inputs: str = ROWS,
    result: str = "float[n,4,6] y",
    *,
    opset: int = 21,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    feeds: list[dict[str, Array]] | None = None,
) -> CompileState:
    return avoid_in(body, traps, inputs, result, NUMBERS, opset=opset, ranges=ranges, feeds=feeds)


SOFTMAX = "y = Softmax<axis=-1>(x)"


def test_scores_get_a_floor():
    state = avoid(SOFTMAX, "softmax-underflow")
    file_check(
        print_model(state.model),
        """
        # CHECK: %[[TOP:[^:]+:out]]: {{.*}} = ReduceMax(%x, const<i64 1 [-1]>) {keepdims=1}
        # CHECK: %[[FLOOR:[^:]+:out]]: {{.*}} = Sub(%[[TOP]], const<f32 64.0>)
        # CHECK: %[[SCORES:[^:]+:out]]: f32 nx4x6 = Max(%x, %[[FLOOR]])
        # CHECK-NEXT: Softmax_0: %y: f32 nx4x6 = Softmax(%[[SCORES]]) {axis=-1}
        """,
    )


def test_masked_scores_keep_their_probabilities():
    scores = normal(1, 3, 4, 6) * 20
    for mask in (-1e9, -np.finfo(F).max, -np.inf, -90.0, -104.0):
        x = scores.copy()
        x[..., 3:] = mask
        state = avoid(SOFTMAX, "softmax-underflow", feeds=[{"x": x}])
        (y,) = outputs(state.model, {"x": x})
        np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-6)
        assert y[..., 3:].max() < 1e-20 or mask == -90.0
        assert (y[y > 0].min() >= np.exp(-FLOOR) / 6 * 0.99) if mask != -90.0 else True


def test_a_row_that_is_masked_wholly_is_not_a_number_as_before():
    x = normal(1, 3, 4, 6)
    x[1, 2] = -np.inf
    avoid(SOFTMAX, "softmax-underflow", feeds=[{"x": x}])


@pytest.mark.parametrize(
    ("body", "inputs", "result", "opset", "ranges", "reason"),
    [
        ("y = Softmax<axis=1>(x)", ROWS, "float[n,4,6] y", 21, None, "axis"),
        (SOFTMAX, "float16[n,4,6] x", "float16[n,4,6] y", 21, None, "not-float32"),
        (SOFTMAX, ROWS, "float[n,4,6] y", 13, None, "opset"),
        (SOFTMAX, ROWS, "float[n,4,6] y", 21, {"x": (-40.0, 40.0)}, "no-underflow"),
        ("m = Max(x, row) y = Softmax(m)", ROWS, "float[n,4,6] y", 21, None, "has-floor"),
    ],
)
def test_scores_that_get_no_floor(body, inputs, result, opset, ranges, reason):
    state = avoid(body, "softmax-underflow", inputs, result, opset=opset, ranges=ranges)
    assert (changes(state), why(state, "softmax-floor")) == (0, [reason])


def test_the_last_axis_by_its_number_and_a_wide_range():
    state = avoid("y = Softmax<axis=2>(x)", "softmax-underflow", ranges={"x": (-3.4e38, 40.0)})
    assert changes(state) == 1


def test_without_being_decided_nothing_happens():
    assert changes(avoid(SOFTMAX)) == 0


def test_the_plan_decides_too():
    model = import_exactly(model_of(ROWS, "float[n,4,6] y", SOFTMAX))
    state = CompileState(model, load_target("ort-x86"), Phase.LOWERED)
    state.plan = QuantPlan(engine_forms={"softmax-underflow": "avoid", "skip-layer-norm": "keep"})
    assert AvoidEngineTraps().run(state) == 1


def test_an_unknown_trap_is_refused():
    with pytest.raises(PassError, match="unknown trap 'pit'; known: merged-projection, attention, rotary-embedding, "):
        avoid(SOFTMAX, "pit")


NORM = "y = LayerNormalization<axis=-1>(a, scale, bias)"


def test_an_addition_in_front_of_a_layer_norm_becomes_a_sum_that_the_engine_does_not_fuse():
    body = "a = Add(x, v) " + NORM
    inputs = ROWS + ", float[n,4,6] v"
    state = avoid(body, "skip-layer-norm", inputs)
    assert ops(state.model) == {"Sum": 1, "LayerNormalization": 1}
    assert [n.name for n in all_nodes(state.model)] == ["Add_0", "LayerNormalization_1"]
    assert "SkipLayerNormalization" not in ops(ENGINE.optimized_graph(state.model, OPTIMIZED))
    plain = import_exactly(model_of(inputs, "float[n,4,6] y", body, NUMBERS))
    assert "SkipLayerNormalization" in ops(ENGINE.optimized_graph(plain, OPTIMIZED))


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("a = Add(x, v) y = Exp(a)", ROWS + ", float[n,4,6] v", "no-layer-norm"),
        ("a = Add(x, row) " + NORM, ROWS, "shapes"),
        ("a = Add(x, v) " + NORM, ROWS + ", float[6] v", "shapes"),
    ],
)
def test_an_addition_that_stays(body, inputs, reason):
    state = avoid(body, "skip-layer-norm", inputs)
    assert (changes(state), why(state, "add-as-sum")) == (0, [reason])


def test_an_addition_that_is_a_graph_output_too():
    state = avoid("a = Add(x, v) " + NORM, "skip-layer-norm", ROWS + ", float[n,4,6] v",
                  "float[n,4,6] y, float[n,4,6] a")  # fmt: skip
    assert changes(state) == 1
    assert [v.name for v in state.model.graph.outputs] == ["y", "a"]


DQ = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "


def test_silu_behind_a_dequantize_is_one_operator():
    state = avoid(DQ + "g = Sigmoid(d) y = Mul(d, g)")
    assert ops(state.model) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "QuickGelu": 1}
    assert state.model.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("g = Sigmoid(x) y = Mul(x, g)", "not-dequantized"),
        (DQ + "g = Sigmoid(d) e = Mul(d, g) y = Add(e, g)", "interior-used-elsewhere"),
    ],
)
def test_silu_that_stays(body, reason):
    state = avoid(body)
    assert (changes(state), why(state, "silu-quick-gelu")) == (0, [reason])


def test_inside_if_bodies():
    body = (
        "y = If(p) <then_branch = g1 () => (float[n,4,6] u) { u = Softmax(x) }, "
        "else_branch = g2 () => (float[n,4,6] v) { v = Exp(x) }>"
    )
    assert changes(avoid(body, "softmax-underflow", ROWS + ", bool p")) == 1


def test_phases_are_declared():
    assert (AvoidEngineTraps.needs, AvoidEngineTraps.gives) == (Phase.LOWERED, Phase.LOWERED)
