"""fold-scales: pairs that cancel, factors that go into scales, movers that move integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import VerifyError
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.ir.verify import verify
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.filecheck import file_check
from tests.passes.quantize.lab import ENGINE, import_exactly, model_of, normal, ops, outputs, random_feeds

F, U = np.float32, np.uint8
NUMBERS = {
    "s": np.asarray(0.05, F), "z": np.asarray(120, U), "s2": np.asarray(0.07, F), "one": np.asarray([0.05], F),
    "two": np.asarray(2.0, F), "half": np.asarray(0.5, F), "neg": np.asarray(-2.0, F), "nan": np.asarray(np.nan, F),
    "vec": np.asarray([1.0, 2.0, 3.0, 4.0], F), "tiny": np.asarray(1e-38, F), "z8": np.asarray(-8, np.int8),
    "z0": np.asarray(0, np.int8),
    "flat": np.asarray([0, -1]), "deep": np.full((1, 1, 1), 2.0, F),
}  # fmt: skip
IN, OUT = "float[n,4] x", "float[n,4] y"
FAKE = "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) "


def fold(body: str, inputs: str = IN, result: str = OUT, weights: dict[str, np.ndarray] | None = None) -> CompileState:
    """Run the pass within its contract, twice, and return the state."""
    model = import_exactly(model_of(inputs, result, body, {**NUMBERS, **(weights or {})}))
    state = CompileState(model, load_target("ort-x86"), Phase.QDQ)
    feeds = random_feeds(model, count=2, size=3)
    before = [outputs(model.clone(), f) for f in feeds]
    Pipeline((FoldScales(),)).run(state, [NumericsInstrument(ENGINE, feeds), VerifyInstrument()])
    settled = print_model(state.model)
    assert FoldScales().run(state.clone()) == 0
    for feed, wanted in zip(feeds, before, strict=True):
        for first, second in zip(wanted, outputs(state.model, feed), strict=True):
            assert first.shape == second.shape
            assert np.abs(first - second).max() <= 0.0501 * 2
    assert print_model(state.model) == settled
    return state


def why_not(state: CompileState, rule: str) -> list[str]:
    return [r.reason for r in state.remarks if r.rule == rule and not r.done]


def test_equal_parameters_cancel():
    state = fold(FAKE + "c = QuantizeLinear(b, s, z) y = DequantizeLinear(c, s2, z)")
    file_check(
        print_model(state.model),
        """
        # CHECK: %a: {{.*}} = QuantizeLinear(%x, const<f32 0.05>, const<u8 120>)
        # CHECK-NEXT: %y: {{.*}} = DequantizeLinear(%a, const<f32 0.07>, const<u8 120>)
        # CHECK-NEXT: }
        """,
    )


def test_a_scale_of_one_element_equals_a_scalar():
    assert ops(fold(FAKE + "c = QuantizeLinear(b, one, z) y = DequantizeLinear(c, s, z)").model) == {
        "QuantizeLinear": 1,
        "DequantizeLinear": 1,
    }


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (FAKE + "c = QuantizeLinear(b, s2, z) y = DequantizeLinear(c, s2, z)", "parameters-differ"),
        (FAKE + "c = QuantizeLinear(b, s, z0) y = DequantizeLinear(c, s, z0)", "type"),
    ],
)
def test_different_parameters_stay(body, reason):
    state = fold(body)
    assert ops(state.model) == {"QuantizeLinear": 2, "DequantizeLinear": 2}
    assert why_not(state, "cancel-dq-q") == [reason]


def test_a_second_pair_on_the_same_grid_goes():
    state = fold(FAKE + "c = QuantizeLinear(b, s, z8) y = DequantizeLinear(c, s, z8)")
    file_check(
        print_model(state.model),
        """
        # CHECK: %a: u8 {{.*}} = QuantizeLinear(
        # CHECK-NEXT: %y: f32 {{.*}} = DequantizeLinear(%a, const<f32 0.05>, const<u8 120>)
        # CHECK-NEXT: }
        """,
    )


def test_a_second_pair_that_is_computed_with_keeps_its_type():
    state = fold(FAKE + "c = QuantizeLinear(b, s, z8) d = DequantizeLinear(c, s, z8) y = Exp(d)")
    assert why_not(state, "quantize-once") == ["read-inside"]
    assert ops(state.model)["QuantizeLinear"] == 2


def test_a_dequantize_that_others_read_stays_for_them():
    body = FAKE + "c = QuantizeLinear(b, s, z) d = DequantizeLinear(c, s2, z) e = Exp(b) y = Add(d, e)"
    assert ops(fold(body).model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "Exp": 1, "Add": 1}


def test_a_quantized_graph_output_takes_the_producers_name():
    state = fold(FAKE + "y = QuantizeLinear(b, s, z)", result="uint8[n,4] y")
    assert ops(state.model) == {"QuantizeLinear": 1}
    assert [v.name for v in state.model.graph.outputs] == ["y"]


def test_a_graph_input_cannot_become_a_graph_output():
    body = "b = DequantizeLinear(a, s, z) y = QuantizeLinear(b, s, z)"
    state = fold(body, inputs="uint8[n,4] a", result="uint8[n,4] y")
    assert why_not(state, "cancel-dq-q") == ["graph-output"]


@pytest.mark.parametrize(
    ("node", "scale"),
    [("Mul(b, two)", 0.1), ("Mul(half, b)", 0.025), ("Div(b, half)", 0.1), ("Mul(b, deep2)", 0.1)],
)
def test_a_factor_behind_a_dequantize_goes_into_its_scale(node, scale):
    state = fold(FAKE + f"y = {node}", weights={"deep2": np.full((1, 1), 2.0, F)})
    assert ops(state.model) == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    (dq,) = [n for n in all_nodes(state.model) if n.op_type == "DequantizeLinear"]
    assert dq.inputs[1].const_value.numpy() == F(F(0.05) * (scale / 0.05))


def test_a_factor_behind_a_per_channel_dequantize_scales_all_channels():
    weights = {"w": np.arange(-8, 8, dtype=np.int8).reshape(4, 4), "ws": np.asarray([0.1, 0.2, 0.3, 0.4], F),
               "wz": np.zeros(4, np.int8)}  # fmt: skip
    state = fold("d = DequantizeLinear<axis=1>(w, ws, wz) e = Mul(d, two) y = MatMul(x, e)", weights=weights)
    (dq,) = [n for n in all_nodes(state.model) if n.op_type == "DequantizeLinear"]
    np.testing.assert_array_equal(dq.inputs[1].const_value.numpy(), weights["ws"] * 2)
    assert dq.attributes["axis"].as_int() == 1
    assert "Mul" not in ops(state.model)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (FAKE + "y = Mul(b, neg)", "not-positive"),
        (FAKE + "y = Mul(b, vec)", "not-scalar"),
        (FAKE + "e = Mul(b, two) f = Exp(b) y = Add(e, f)", "interior-used-elsewhere"),
        (FAKE + "y = Mul(b, tiny)", "range"),
        (FAKE + "e = Mul(b, deep) y = ReduceMax<keepdims=0>(e, ax)", "rank"),
    ],
)
def test_a_factor_behind_a_dequantize_that_stays(body, reason):
    state = fold(body, weights={"ax": np.asarray([0])})
    assert why_not(state, "scale-behind-dq") == [reason]
    assert ops(state.model)["Mul"] == 1


def test_an_infinite_factor_stays():
    model = import_exactly(model_of(IN, OUT, FAKE + "y = Mul(b, nan)", NUMBERS))
    state = CompileState(model, load_target("ort-x86"), Phase.QDQ)
    assert FoldScales().run(state) == 0
    assert why_not(state, "scale-behind-dq") == ["not-positive"]


@pytest.mark.parametrize(("node", "scale"), [("Mul(x, two)", 0.025), ("Div(x, two)", 0.1), ("Mul(half, x)", 0.1)])
def test_a_factor_in_front_of_a_quantize_goes_into_its_scale(node, scale):
    state = fold(f"e = {node} a = QuantizeLinear(e, s, z) y = DequantizeLinear(a, s, z)")
    assert ops(state.model) == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    (q,) = [n for n in all_nodes(state.model) if n.op_type == "QuantizeLinear"]
    np.testing.assert_allclose(q.inputs[1].const_value.numpy(), scale, rtol=1e-7)


def test_a_factor_that_something_else_reads_stays_in_front_of_a_quantize():
    state = fold("e = Mul(x, two) a = QuantizeLinear(e, s, z) b = DequantizeLinear(a, s, z) y = Add(b, e)")
    assert why_not(state, "scale-before-q") == ["interior-used-elsewhere"]


WEIGHTED = {
    "w": np.random.default_rng(1).integers(-127, 128, (4, 4)).astype(np.int8), "ws": np.asarray(0.01, F),
    "wz": np.asarray(0, np.int8), "bias": np.asarray([100, -50, 7, 0], np.int32), "bz": np.asarray(0, np.int32),
}  # fmt: skip
GEMM = "dw = DequantizeLinear(w, ws, wz) db = DequantizeLinear(bias, bs, bz) y = Gemm({x}, dw, db)"


def test_a_factor_that_an_int32_bias_depends_on_stays():
    numbers = {**WEIGHTED, "bs": np.asarray(F(0.05) * F(0.01) * 2, F)}
    state = fold(FAKE + "e = Mul(b, two) " + GEMM.format(x="e"), weights=numbers)
    assert why_not(state, "scale-behind-dq") == ["int32-bias"]


def test_the_verifier_rejects_a_bias_scale_that_is_not_the_product():
    numbers = {**NUMBERS, **WEIGHTED, "bs": np.asarray(F(0.05) * F(0.01), F)}
    model = import_exactly(model_of(IN, OUT, FAKE + GEMM.format(x="b"), numbers))
    verify(model, Phase.QDQ)
    (dq,) = [n for n in all_nodes(model) if n.outputs[0].name == "b"]
    dq.replace_input_with(1, ir.Value(name="other", const_value=ir.tensor(np.asarray(0.1, F), name="other")))
    model.graph.register_initializer(dq.inputs[1])
    with pytest.raises(VerifyError, match=r"bias-scale: Gemm .* bias scale differs from x_scale \* w_scale by 0.5"):
        verify(model, Phase.QDQ)


def test_a_mover_with_two_quantizing_readers_moves_integers():
    body = FAKE + (
        "t = Transpose<perm=[1,0]>(b) c = QuantizeLinear(t, s, z) d = DequantizeLinear(c, s2, z) "
        "e = Exp(t) y = Add(d, e)"
    )
    state = fold(body, inputs="float[4,4] x", result="float[4,4] y")
    file_check(
        print_model(state.model),
        """
        # CHECK: %a: u8 4x4 = QuantizeLinear(%x
        # CHECK-NEXT: [[T:%[^:]+:out]]: u8 4x4 = Transpose(%a)
        # CHECK-DAG: DequantizeLinear([[T]], const<f32 0.05>
        # CHECK-DAG: DequantizeLinear([[T]], const<f32 0.07>
        # CHECK: Add(
        """,
    )
    assert ops(state.model)["QuantizeLinear"] == 1


def test_a_chain_of_movers_hands_its_integers_on():
    body = FAKE + (
        "t = Transpose<perm=[1,0]>(b) r = Reshape(t, flat) c = QuantizeLinear(r, s, z) y = DequantizeLinear(c, s2, z)"
    )
    state = fold(body, inputs="float[4,4] x", result="float[4,4] y")
    # The last one is left to fuse-qdq, which gives the group its name.
    assert ops(state.model) == {"QuantizeLinear": 2, "Transpose": 1, "Reshape": 1, "DequantizeLinear": 2}
    (move,) = [n for n in all_nodes(state.model) if n.op_type == "Transpose"]
    assert move.inputs[0].dtype == ir.DataType.UINT8


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (FAKE + "t = Transpose<perm=[1,0]>(b) y = Exp(t)", "no-pair"),
        (FAKE + "t = Transpose<perm=[1,0]>(b) c = QuantizeLinear(t, s, z) y = DequantizeLinear(c, s, z)",
         "fused-later"),
    ],
)  # fmt: skip
def test_a_mover_that_stays(body, reason):
    state = fold(body, inputs="float[4,4] x", result="float[4,4] y")
    assert why_not(state, "dq-behind-mover") == [reason]


def test_interpolation_is_no_mover():
    body = FAKE + (
        'r = Resize<mode="linear">(b, , sc) c = QuantizeLinear(r, s, z) d = DequantizeLinear(c, s2, z) '
        "e = Exp(r) y = Add(d, e)"
    )
    state = fold(
        body, inputs="float[1,1,4,4] x", result="float[1,1,8,8] y", weights={"sc": np.asarray([1, 1, 2, 2], F)}
    )
    assert why_not(state, "dq-behind-mover") == ["resize-mode"]


def test_inside_an_if_body_and_with_a_value_captured_by_it():
    body = FAKE + (
        "y = If(p) <then_branch = g1 () => (float[n,4] u) { c = QuantizeLinear(b, s, z) k = DequantizeLinear(c, s, z) "
        "u = Mul(k, two) }, else_branch = g2 () => (float[n,4] v) { v = Exp(b) }>"
    )
    state = fold(body, inputs=IN + ", bool p")
    found = ops(state.model)
    # The pair in the body cancels against a value of the outer graph only if that is in reach: it is not.
    assert found["Exp"] == 1
    assert "Mul" not in found


def test_random_chains_stay_within_a_step():
    rng = np.random.default_rng(5)
    for _ in range(10):
        c, s = F(rng.uniform(0.1, 8)), F(rng.uniform(0.01, 0.2))
        numbers = {"c": np.asarray(c), "s": np.asarray(s), "z": np.asarray(rng.integers(0, 256), U)}
        body = "e = Mul(x, c) a = QuantizeLinear(e, s, z) y = DequantizeLinear(a, s, z)"
        model = import_exactly(model_of("float[64,64] x", "float[64,64] y", body, numbers))
        feed = {"x": normal(int(rng.integers(1e6)), 64, 64)}
        (before,) = outputs(model.clone(), feed)
        state = CompileState(model, load_target("ort-x86"), Phase.QDQ)
        assert FoldScales().run(state) == 1
        (after,) = outputs(state.model, feed)
        steps = np.abs(before - after) / s
        assert steps.max() <= 1.0001
        assert (steps > 0.5).mean() < 1e-3
