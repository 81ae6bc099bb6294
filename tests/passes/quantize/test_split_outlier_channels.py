"""split-outlier-channels: a loud channel is given twice, halved, and the function stays the same."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.ir.graph import const_array
from qcompiler.passes.split_outlier_channels import SplitOutlierChannels, halved
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.filecheck import run_pass_test
from tests.passes.quantize.lab import ENGINE, import_exactly, model_of, normal, outputs, random_feeds, reasons

WEIGHTS = {
    "w": normal(1, 4, 3, 3, 3), "b": normal(2, 4), "v": normal(3, 5, 4, 1, 1), "c": normal(6, 1, 4, 1, 1),
    "m": normal(9, 3, 4), "k": normal(10, 4, 5), "v4": normal(12, 4, 4, 1, 1),
}  # fmt: skip
FIRST = "[a] p = Conv<pads=[1,1,1,1]>(x, w, b)"
CHAIN = f"{FIRST} r = Relu(p) [e] y = Conv(r, v)"


def state_of(body: str, splits: dict[str, tuple[int, ...]], inputs: str = "float[N,3,4,4] x") -> CompileState:
    used = {name: array for name, array in WEIGHTS.items() if f"{name})" in body or f"{name}," in body}
    state = CompileState(import_exactly(model_of(inputs, "float[] y", body, used)), load_target("ort-x86"))
    state.splitting = dict(splits)
    return state


def test_channels_behind_the_splits() -> None:
    source, factor = halved(3, (1, 1, 4))
    assert source.tolist() == [0, 1, 2, 1, 1, 1]
    assert factor.tolist() == [1.0, 0.25, 1.0, 0.5, 0.125, 0.125]


def test_a_loud_channel_is_given_twice() -> None:
    state = state_of(CHAIN, {"p": (2,)})
    run_pass_test(
        "", SplitOutlierChannels(),
        """
        # CHECK: %p:split: f32 Nx5x4x4 = Conv(%x, const<f32 5x3x3x3 {{.*}}, const<f32 5
        # CHECK-NEXT: %r:split: f32 Nx5x4x4 = Relu(%p:split)
        # CHECK-NEXT: Conv(%r:split, const<f32 5x5x1x1
        """,
        state=state,
    )  # fmt: skip
    first, _, last = state.model.graph
    np.testing.assert_array_equal(const_array(first.inputs[1])[[2, 4]], np.stack([WEIGHTS["w"][2] / 2] * 2))  # type: ignore[index]
    np.testing.assert_array_equal(const_array(last.inputs[1])[:, 4], WEIGHTS["v"][:, 2])  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (CHAIN, "float[N,3,H,W] x"),
        (f"{FIRST} r = LeakyRelu(p) q = GlobalAveragePool(r) [e] y = Conv(q, v)", "float[N,3,4,4] x"),
        ("[a] p = Gemm(x, m, b) r = Relu(p) [e] y = MatMul(r, k)", "float[N,3] x"),
    ],
)
def test_the_function_stays_the_same_within_the_contract(body: str, inputs: str) -> None:
    state = state_of(body, {"p": (2, 0, 4)}, inputs)
    feeds = random_feeds(state.model, size=4)
    before = [outputs(state.model, feed) for feed in feeds]
    run_pass_test("", SplitOutlierChannels(), "# CHECK: :split", state=state, engine=ENGINE, feeds=feeds)
    for feed, (wanted,) in zip(feeds, before, strict=True):
        np.testing.assert_allclose(outputs(state.model, feed)[0], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{FIRST} r = Relu(p) [f] s = Conv(p, v4) t = Add(s, r) [e] y = Conv(t, v)", "several layers"),
        (f"{FIRST} r = Add(p, c) [e] y = Conv(r, v)", "a constant is added"),
        (f"{FIRST} r = Transpose<perm=[0,1,3,2]>(p) [e] y = Conv(r, v)", "something besides layers"),
        (f"{FIRST} r = Sigmoid(p) [e] y = Conv(r, v)", "no class"),
        ("[a] y = Conv(x, w, b)", "no class"),
    ],
)
def test_what_it_declines_has_a_reason(body: str, reason: str) -> None:
    state = state_of(body, {"p": (1,)})
    assert SplitOutlierChannels().run(state) == 0
    (remark,) = state.remarks
    assert remark.reason == "not-splittable"
    assert reason in remark.text


def test_a_channel_that_is_not_there_is_refused() -> None:
    state = state_of(CHAIN, {"p": (9,)})
    assert SplitOutlierChannels().run(state) == 0
    assert reasons(state) == ["no-such-channels"]


def test_a_second_run_finds_nothing_to_do() -> None:
    state = state_of(CHAIN, {"p": (2,)})
    assert SplitOutlierChannels().run(state) > 0
    assert SplitOutlierChannels().run(state) == 0
