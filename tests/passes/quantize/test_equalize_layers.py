"""equalize-layers: what it does to a graph, where it declines, and that the function stays the same."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.ir.graph import const_array
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.filecheck import run_pass_test
from tests.passes.quantize.lab import ENGINE, import_exactly, model_of, normal, outputs, random_feeds, reasons

WEIGHTS = {
    "w": normal(1, 4, 3, 3, 3), "b": normal(2, 4), "v": normal(3, 5, 4, 1, 1), "d": normal(4, 4, 1, 3, 3),
    "g": normal(5, 4, 2, 1, 1), "c": normal(6, 1, 4, 1, 1), "flat": normal(7, 16, 7), "fb": normal(8, 7),
    "m": normal(9, 3, 4), "k": normal(10, 4, 5), "to2d": np.array([-1, 16]),
}  # fmt: skip
FIRST = "[a] p = Conv<pads=[1,1,1,1]>(x, w, b)"
CHAIN = f"{FIRST} r = Relu(p) [e] y = Conv(r, v)"
SCALE = (0.5, 8.0, 3.0, 1.7)


def state_of(body: str, scales: dict[str, tuple[float, ...]], inputs: str = "float[1,3,2,2] x") -> CompileState:
    used = {name: array for name, array in WEIGHTS.items() if f"{name})" in body or f"{name}," in body}
    state = CompileState(import_exactly(model_of(inputs, "float[] y", body, used)), load_target("ort-x86"))
    state.equalization = dict(scales)
    return state


def test_the_channels_between_two_layers_are_divided() -> None:
    state = run_pass_test(
        "", EqualizeLayers(),
        """
        # CHECK: a: %p:equalized: f32 1x4x2x2 = Conv(%x, const<f32 4x3x3x3 {{.*}}, const<f32 4
        # CHECK-NEXT: Relu_1: %r:equalized: f32 1x4x2x2 = Relu(%p:equalized)
        # CHECK-NEXT: Conv(%r:equalized, const<f32 5x4x1x1
        """,
        state=state_of(CHAIN, {"p": SCALE}),
    )  # fmt: skip
    first, _, last = state.model.graph
    s = np.array(SCALE)
    np.testing.assert_allclose(const_array(first.inputs[1]), WEIGHTS["w"] / s[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(const_array(first.inputs[2]), WEIGHTS["b"] / s, rtol=1e-6)
    np.testing.assert_allclose(const_array(last.inputs[1]), WEIGHTS["v"] * s[None, :, None, None], rtol=1e-6)
    assert sorted(state.model.graph.initializers) == ["b:equalized", "v:equalized", "w:equalized"]
    (remark,) = [r for r in state.remarks if r.done]
    assert (remark.reason, remark.node, remark.numbers["spread"]) == ("equalized", "a", 16.0)


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (CHAIN, "float[N,3,H,W] x"),
        (f"{FIRST} r = LeakyRelu(p) [f] s = Conv<group=2>(r, g) t = Add(s, r) [e] y = Conv(t, v)", "float[1,3,4,4] x"),
        (f"{FIRST} q = Add(p, c) [f] s = Conv<group=4>(q, d) [e] y = Conv(s, v)", "float[1,3,4,4] x"),
        (f"{FIRST} r = Relu(p) f = Reshape(r, to2d) [e] y = Gemm(f, flat, fb)", "float[1,3,2,2] x"),
        ("[a] p = MatMul(x, m) q = Add(p, b) r = Relu(q) [e] y = MatMul(r, k)", "float[2,N,3] x"),
        ("[a] p = Gemm(x, m, b) r = PRelu(p, b) [e] y = Gemm(r, k)", "float[N,3] x"),
    ],
)
def test_the_function_stays_the_same_within_the_contract(body: str, inputs: str) -> None:
    state = state_of(body, {"p": SCALE}, inputs)
    feeds = random_feeds(state.model, size=4)
    before = [outputs(state.model, feed) for feed in feeds]
    run_pass_test("", EqualizeLayers(), "# CHECK: :equalized", state=state, engine=ENGINE, feeds=feeds)
    for feed, (wanted,) in zip(feeds, before, strict=True):
        (found,) = outputs(state.model, feed)
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_second_run_finds_nothing_to_do() -> None:
    state = state_of(CHAIN, {"p": SCALE})
    assert EqualizeLayers().run(state) > 0
    assert EqualizeLayers().run(state) == 0


def test_a_layer_that_gives_an_output_is_refused_with_the_reason() -> None:
    state = state_of(CHAIN, {"y": (1.0, 2.0, 3.0, 4.0, 5.0), "p": (1.0, 2.0)})
    assert EqualizeLayers().run(state) == 0
    assert reasons(state, "equalize-layers") == ["no-such-channels", "no-such-channels"]
    assert "y has no 5 channels" in state.remarks[0].text


def test_a_weight_that_two_layers_read_stays() -> None:
    state = state_of(f"{FIRST} r = Relu(p) [e] s = Conv(r, v) [f] t = Conv(r, v) y = Add(s, t)", {"p": SCALE})
    assert EqualizeLayers().run(state) == 0
    assert reasons(state) == ["no-such-channels"]
