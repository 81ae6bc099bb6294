"""avoid-engine-traps, masked-softmax: masks that underflow in no Softmax, and the scores that they must not touch."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.ir.graph import all_nodes
from qcompiler.ir.text import print_model
from qcompiler.patterns.masks import FLOOR
from tests.filecheck import file_check
from tests.passes.quantize.lab import normal, ops, outputs
from tests.passes.quantize.traps_lab import avoid_in, changes, why

F = np.float32
SCORES = "float[n,2,5,5] s"
MASKED = SCORES + ", float[n,1,1,5] m"
RESULT = "float[n,2,5,5] y"
BODY = "a = Add(s, m) y = Softmax<axis=-1>(a)"
NEAR = {"s": (-10.0, 10.0), "a": (-1e9, 10.0)}
CAUSAL = np.triu(np.full((1, 1, 5, 5), -1e9, F), 1)


def avoid(body=BODY, inputs=MASKED, result=RESULT, weights=None, ranges=NEAR, **more):
    return avoid_in(body, "masked-softmax", inputs, result, weights or {}, ranges=ranges, **more)


def feed(*masks: float) -> dict[str, np.ndarray]:
    m = np.zeros((len(masks), 1, 1, 5), F)
    m[..., 3:] = np.asarray(masks, F).reshape(-1, 1, 1, 1)
    return {"s": normal(1, len(masks), 2, 5, 5, scale=3), "m": m}


def test_a_computed_mask_gets_a_floor():
    state = avoid(feeds=[feed(-1e9, 0, -np.inf, -100, -65)])
    file_check(
        print_model(state.model),
        """
        # CHECK: %[[TOP:[^ ]+]]: f32 nx1x1x1 = ReduceMax(%m, const<i64 1 [-1]>) {keepdims=1}
        # CHECK: %[[LOW:[^ ]+]]: f32 nx1x1x1 = Sub(%[[TOP]], const<f32 64.0>)
        # CHECK: %[[MASK:[^ ]+]]: f32 nx1x1x5 = Max(%m, %[[LOW]])
        # CHECK: %[[SUM:[^ ]+]]: f32 nx2x5x5 = Add(%s, %[[MASK]])
        # CHECK: %y: f32 nx2x5x5 = Softmax(%[[SUM]])
        """,
    )


def test_no_probability_is_subnormal():
    given = feed(-1e9, -1e4, -100)
    (y,) = outputs(avoid(feeds=[given]).model, given)
    np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-6)
    assert y[..., 3:].max() < 1e-18
    assert y.min() > np.finfo(F).tiny


@pytest.mark.parametrize("deep", [-1e9, -200.0, -np.inf])
def test_a_row_that_is_masked_wholly_stays_as_it_was(deep):
    given = feed(0, 0)
    given["m"][1] = deep
    avoid(feeds=[given])


def test_a_constant_mask_is_lifted_at_compile_time_once_for_all_readers():
    body = "a = Add(s, m) p = Softmax<axis=-1>(a) b = Add(m, p) y = Softmax<axis=-1>(b)"
    state = avoid(body, SCORES, weights={"m": CAUSAL}, ranges=NEAR | {"p": (0.0, 1.0), "b": (-1e9, 1.0)})
    assert ops(state.model) == {"Add": 2, "Softmax": 2}
    masks = {v.name: v.const_value.numpy() for v in state.model.graph.initializers.values()}
    assert set(masks) == {"m:floor"}
    np.testing.assert_array_equal(masks["m:floor"], np.triu(np.full((1, 1, 5, 5), -FLOOR, F), 1))
    assert changes(state) == 2


def test_a_computed_mask_that_two_read_gets_one_floor():
    body = "k = Mul(m, m) a = Add(s, k) p = Softmax<axis=-1>(a) b = Add(p, k) y = Softmax<axis=-1>(b)"
    ranges = NEAR | {"p": (0.0, 1.0), "b": (-1e9, 1.0)}
    state = avoid(body, ranges=ranges, feeds=[feed(-3, 0)])
    assert ops(state.model) == {"Mul": 1, "ReduceMax": 1, "Sub": 1, "Max": 1, "Add": 2, "Softmax": 2}
    assert [n.op_type for n in all_nodes(state.model)][:4] == ["Mul", "ReduceMax", "Sub", "Max"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ranges": {"s": (-31.0, 10.0), "a": (-1e9, 10.0)}}, "wide-scores"),
        ({"ranges": {"a": (-1e9, 10.0)}}, "never-observed"),
        ({"ranges": None}, "never-observed"),
        ({"ranges": {"s": (-10.0, 10.0), "a": (-60.0, 10.0)}}, "no-underflow"),
        ({"body": "a = Add(s, m) y = Softmax<axis=1>(a)"}, "axis"),
        ({"opset": 13}, "opset"),
        ({"inputs": SCORES, "weights": {"m": CAUSAL.clip(-64, 0)}}, "has-floor"),
        ({"result": RESULT + ", float[n,2,5,5] a"}, "graph-output"),
    ],
)
def test_a_mask_that_stays(change, reason):
    given = {} if "inputs" in change else {"feeds": [feed(-1e9, 0)]}
    state = avoid(**(given | change))
    assert (changes(state), why(state, "mask-floor")) == (0, [reason])


def test_a_masked_score_far_above_its_row_weighs_nothing_yet():
    given = feed(-1e9)
    given["s"] = np.full_like(given["s"], -20)
    given["s"][..., 3:] = 20
    (y,) = outputs(avoid(ranges={"s": (-20.0, 20.0), "a": (-1e9, 20.0)}, feeds=[given]).model, given)
    assert y[..., 3:].max() == pytest.approx(np.exp(-24) / 3, rel=1e-3)


@pytest.mark.parametrize("inputs", [SCORES + ", float[n,2,5,5] m", SCORES + ", float[n,2,5,1] m", SCORES + ", float m"])
def test_what_is_no_mask(inputs):
    assert (changes(avoid(inputs=inputs)), why(avoid(inputs=inputs), "mask-floor")) == (0, [])


def test_a_mask_with_a_floor_leaves_nothing_to_the_floor_of_scores():
    state = avoid_in(BODY, "masked-softmax+softmax-underflow", MASKED, RESULT, {}, ranges=NEAR, feeds=[feed(-1e9)])
    assert ops(state.model) == {"ReduceMax": 1, "Sub": 1, "Max": 1, "Add": 1, "Softmax": 1}
    assert why(state, "softmax-floor")[-1:] == ["has-floor"]


def test_wide_scores_are_left_to_the_floor_of_scores():
    wide = {"s": (-20.0, 21.0), "a": (-1e9, 21.0)}
    state = avoid_in(BODY, "masked-softmax+softmax-underflow", MASKED, RESULT, {}, ranges=wide, feeds=[feed(-1e9)])
    assert [n.op_type for n in all_nodes(state.model)] == ["Add", "ReduceMax", "Sub", "Max", "Softmax"]
