"""avoid-engine-traps, rotary-embedding: what is the engine's operator, and tables that it would read wrongly."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qcompiler.ir.graph import all_nodes
from qcompiler.ir.text import print_model
from tests.filecheck import file_check
from tests.passes.quantize.lab import normal, ops
from tests.passes.quantize.traps_lab import avoid_in, changes, why

F = np.float32
HALF = normal(1, 5, 4)
WHOLE = np.concatenate([HALF, HALF], axis=1)
NUMBERS = {
    "cos": WHOLE, "sin": WHOLE[::-1].copy(), "cos4": WHOLE[None, None], "sin4": WHOLE[None, None, ::-1].copy(),
    "wrong": normal(2, 5, 8), "freq": np.tile(np.asarray([1, 0.1, 0.01, 0.001], F), 2), "column": normal(3, 5, 1),
    "sizes": np.asarray([4, 4]), "ax": np.asarray([3]), "zero": np.asarray([0]),
    "four": np.asarray([4]), "end": np.asarray([2**62]), "one": np.asarray([1]), "row": WHOLE[:1],
    "angles": normal(4, 5, 4), "data": normal(5, 9, 4),
}  # fmt: skip
X = "float[n,3,5,8] x"
Y = "float[n,3,5,8] y"
TURN = "m = Neg(b) t = Concat<axis=-1>(m, a) u = Mul(x, cos) v = Mul(t, sin) y = Add(u, v)"
SPLIT = "a, b = Split<axis=-1, num_outputs=2>(x) "


def avoid(body, inputs=X, result=Y, **more):
    used = {
        name: a
        for name, a in NUMBERS.items()
        if re.search(rf"\b{name}\b", body) and f"{name} =" not in body and f"] {name}" not in inputs
    }
    return avoid_in(body, "rotary-embedding", inputs, result, used, **more)


HALVES = {
    "split": SPLIT,
    "sized": "a, b = Split<axis=3>(x, sizes) ",
    "slices": "a = Slice(x, zero, four, ax) b = Slice(x, four, end, ax, one) ",
}


@pytest.mark.parametrize("form", HALVES)
def test_constant_tables(form):
    state = avoid(HALVES[form] + TURN)
    assert ops(state.model) == {"RotaryEmbedding": 1}
    file_check(
        print_model(state.model),
        """
        # CHECK: %y: f32 nx3x5x8 = com.microsoft::RotaryEmbedding(%x, const<i64 1 [0]>, const<f32 5x4
        """,
    )


def test_operands_in_the_other_order_and_the_axis_by_its_number():
    turn = "m = Neg(b) t = Concat<axis=3>(m, a) u = Mul(cos, x) v = Mul(sin, t) y = Add(v, u)"
    assert ops(avoid(SPLIT + turn).model) == {"RotaryEmbedding": 1}


def test_tables_of_four_axes():
    assert ops(avoid(SPLIT + TURN.replace("cos", "cos4").replace("sin", "sin4")).model) == {"RotaryEmbedding": 1}


COMPUTED = {
    "frequencies": "g = Mul(column, freq) cos = Cos(g) sin = Sin(g) ",
    "joined angles": "g = Concat<axis=-1>(angles, angles) cos = Cos(g) sin = Sin(g) ",
    "read by place": "h = Gather<axis=0>(data, place) g = Concat<axis=1>(h, h) cos = Cos(g) sin = Sin(g) ",
}


@pytest.mark.parametrize("form", COMPUTED)
def test_computed_tables_are_halved_once(form):
    body = COMPUTED[form] + SPLIT + TURN + " c, d = Split<axis=-1, num_outputs=2>(y) e = Neg(d) "
    body += "f = Concat<axis=-1>(e, c) p = Mul(y, cos) q = Mul(f, sin) z = Add(p, q)"
    feeds = [{"x": normal(7, 2, 3, 5, 8)} | ({"place": np.arange(5)} if "place" in body else {})]
    inputs = X + (", int64[5] place" if "place" in body else "")
    state = avoid(body, inputs, "float[n,3,5,8] z", feeds=feeds)
    found = ops(state.model)
    assert (found["RotaryEmbedding"], found["Slice"], found.get("Split", 0)) == (2, 2, 0)


def test_a_computed_table_of_four_axes_becomes_a_matrix():
    body = "g = Concat<axis=-1>(angles, angles) w = Unsqueeze(g, first) cos = Cos(w) sin = Sin(w) " + SPLIT + TURN
    used = {"angles": NUMBERS["angles"], "first": np.asarray([0, 1])}
    state = avoid_in(body, "rotary-embedding", X, Y, used)
    assert [n.op_type for n in all_nodes(state.model)].count("Reshape") == 2
    assert changes(state) == 1


COMPONENTS = "c = Mul(a, chalf) d = Mul(b, shalf) e = Sub(c, d) f = Mul(a, shalf) g = Mul(b, chalf) h = Add(f, g) "
PAIRS = "a = Slice(x, zero, end, ax, two) b = Slice(x, one, end, ax, two) " + COMPONENTS
ALTERNATE = "i = Unsqueeze(e, last) j = Unsqueeze(h, last) k = Concat<axis=-1>(i, j) y = Reshape(k, shape)"
NUMBERS |= {"chalf": HALF, "shalf": HALF[::-1].copy(), "two": np.asarray([2]), "last": np.asarray([-1]),
            "shape": np.asarray([0, 3, 5, 8]), "turned": np.asarray([0, 5, 3, 8]),
            "chalf4": HALF[None, None]}  # fmt: skip


@pytest.mark.parametrize("form", HALVES)
def test_halves_that_are_turned_and_joined(form):
    body = HALVES[form] + COMPONENTS + "y = Concat<axis=3>(e, h)"
    state = avoid(body)
    assert ops(state.model) == {"RotaryEmbedding": 1}
    assert set(state.model.graph.initializers) == {"chalf", "shalf", "rotary:first"}


def test_pairs_that_are_turned_and_put_back():
    state = avoid(PAIRS + ALTERNATE)
    (node,) = all_nodes(state.model)
    assert node.attributes["interleaved"].as_int() == 1


def test_tables_of_pairs_with_four_axes():
    assert ops(avoid((PAIRS + ALTERNATE).replace("chalf", "chalf4")).model) == {"RotaryEmbedding": 1}


@pytest.mark.parametrize(
    ("body", "result", "reason"),
    [
        (PAIRS + ALTERNATE.replace("k, shape", "k, turned"), "float[n,5,3,8] y", "pairs"),
        (PAIRS.replace("x, one", "x, zero") + ALTERNATE, Y, "pairs"),
        (PAIRS.replace("chalf", "column") + ALTERNATE, Y, "table"),
    ],
)
def test_pairs_that_stay(body, result, reason):
    state = avoid(body, result=result)
    assert (changes(state), why(state, "rotary-operator-of-pairs")) == (0, [reason])


WIDE = "float[n,3,5,8] x, float[5,8] cos, float[5,8] sin"


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        (SPLIT + TURN.replace("cos", "wrong"), X, "table"),
        (SPLIT + TURN, WIDE, "table"),
        (SPLIT + TURN.replace("cos", "row"), X, "table"),
        (SPLIT.replace("a, b", "b, a") + TURN, X, None),
        ("a = Slice(x, zero, four, ax) b = Slice(x, zero, four, ax) " + TURN, X, "halves"),
    ],
)
def test_what_stays(body, inputs, reason):
    state = avoid(body, inputs)
    assert (changes(state), why(state, "rotary-operator")) == (0, [reason] if reason else [])


def test_three_axes_have_no_heads():
    state = avoid(SPLIT + TURN, "float[3,5,8] x", "float[3,5,8] y")
    assert (changes(state), why(state, "rotary-operator")) == (0, ["heads"])
