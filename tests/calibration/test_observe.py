from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.observe import observe
from qcompiler.calibration.statistics import Statistics
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.importer import import_model
from qcompiler.ir.text import parse_text

VAD = Path(__file__).resolve().parents[3] / "shared" / "models" / "silero_vad"

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PLAIN = (
    HEAD
    + """main (float[N,4] x) => (float[N,2] y)
<float[4,3] w = {1,2,3,4,5,6,-7,8,9,-1,-2,3}, float[3,2] v = {1,-1,2,-2,3,-3}>
{ [a] h = MatMul(x, w)
  [b] r = Relu(h)
  [c] y = MatMul(r, v) }"""
)
NESTED = (
    HEAD
    + """main (float[N,2] x, bool c, bool d) => (float[N,2] y)
<float two = {2.0}, float ten = {10.0}>
{ [s] k = Mul(x, two)
  [o] y = If (c) <
    then_branch = t () => (float[N,2] a) {
      [i] a = If (d) <
        then_branch = tt () => (float[N,2] p) { [m1] q = Mul(k, ten)
          [n1] p = Neg(q) },
        else_branch = te () => (float[N,2] e) { [m2] e = Add(k, ten) }> },
    else_branch = el () => (float[N,2] z) { [m3] u = Sub(k, ten)
      [n3] z = Abs(u) }> }"""
)
X = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
W = np.array([1, 2, 3, 4, 5, 6, -7, 8, 9, -1, -2, 3], np.float32).reshape(4, 3)


def same(a: Statistics, b: Statistics) -> bool:
    return list(a.tensors) == list(b.tensors) and all(
        repr(s.minimum) == repr(b.tensors[n].minimum)
        and repr(s.maximum) == repr(b.tensors[n].maximum)
        and (s.count, s.zeros, s.exponent, s.sums)
        == (b.tensors[n].count, b.tensors[n].zeros, b.tensors[n].exponent, b.tensors[n].sums)
        and np.array_equal(s.counts, b.tensors[n].counts)
        for n, s in a.tensors.items()
    )


def test_values_and_input_against_numpy(engine: Any) -> None:
    found = observe(parse_text(PLAIN), ["x", "h", "r", "y"], [{"x": X}, {"x": X[:1] * 3}], engine)
    h = np.concatenate([X, X[:1] * 3]) @ W
    assert found.range("h", "min-max") == (h.min(), h.max())
    assert found.range("r", "min-max") == (0.0, h.max())
    assert found.tensors["r"].zeros == int((h <= 0).sum())
    assert found.range("x", "min-max") == (-15.0, 6.0)
    assert found.tensors["h"].count == 12
    assert found.feeds == 2
    assert [(o.optimize, o.threads) for o in engine.loads] == [(False, 1)]


def test_the_model_is_not_changed(engine: Any) -> None:
    model = parse_text(PLAIN)
    before = ir.to_proto(model).SerializeToString()
    observe(model, ["h", "r"], [{"x": X}], engine)
    assert ir.to_proto(model).SerializeToString() == before


def test_the_order_of_feeds_changes_no_count(engine: Any) -> None:
    feeds = [{"x": X}, {"x": X[:2] * 7}, {"x": X[1:] * 0.01}]
    one, other = (observe(parse_text(PLAIN), ["x", "h"], f, engine) for f in (feeds, feeds[::-1]))
    for name in ("x", "h"):
        a, b = one.tensors[name], other.tensors[name]
        assert (a.count, a.minimum, a.maximum, a.zeros, a.exponent) == (
            b.count,
            b.minimum,
            b.maximum,
            b.zeros,
            b.exponent,
        )
        assert a.counts.tolist() == b.counts.tolist()


def test_what_is_no_float_value_of_the_model_stays_unobserved(engine: Any) -> None:
    model = parse_text(HEAD + "main (float[N,2] x) => (int64[2] s) { [a] s = Shape(x) }")
    found = observe(model, ["s", "nowhere"], [{"x": X[:, :2]}], engine)
    assert [found.observed(name) for name in ("s", "nowhere")] == [False, False]


def test_memory_cap_cuts_groups_and_changes_no_bit(engine: Any) -> None:
    names, feeds = ["h", "r", "y"], [{"x": X}, {"x": X[:2] * 7}, {"x": X[1:] * 0.1}]
    whole = observe(parse_text(PLAIN), names, feeds, engine, memory=10**9)
    assert len(engine.loads) == 1
    cut = observe(parse_text(PLAIN), names, feeds, engine, memory=1)
    assert len(engine.loads) == 1 + 3
    assert same(whole, cut)


def test_batch_may_vary_between_feeds(engine: Any) -> None:
    feeds = [{"x": np.resize(X, (n, 4))} for n in (1, 5, 2)]
    found = observe(parse_text(PLAIN), ["h"], feeds, engine)
    assert [s[2] for s in found.tensors["h"].sums] == [3, 15, 6]


def feed(c: bool, d: bool, scale: float = 1.0) -> dict[str, Any]:
    return {"x": np.array([[1, -2]], np.float32) * np.float32(scale), "c": np.array(c), "d": np.array(d)}


def test_nested_branches(engine: Any) -> None:
    names = ["k", "q", "p", "e", "u", "z", "a", "y"]
    found = observe(parse_text(NESTED), names, [feed(True, True), feed(False, True, 2.0)], engine)
    assert found.range("k", "min-max") == (-8.0, 4.0)
    assert found.range("q", "min-max") == (-40.0, 20.0)
    assert found.range("p", "min-max") == (-20.0, 40.0)
    assert found.range("u", "min-max") == (-18.0, -6.0)
    assert found.range("y", "min-max") == (-20.0, 40.0)
    assert found.tensors["q"].count == 2
    assert not found.observed("e")
    with pytest.raises(CalibrationError, match="e was never executed"):
        found.range("e", "min-max")


def test_nested_branches_in_groups(engine: Any) -> None:
    names, feeds = ["q", "e", "u", "y"], [feed(True, False), feed(True, True), feed(False, True, 3.0)]
    whole = observe(parse_text(NESTED), names, feeds, engine)
    assert same(whole, observe(parse_text(NESTED), names, feeds, engine, memory=1))
    assert whole.range("e", "min-max") == (6.0, 12.0)


LOOP = (
    HEAD
    + """main (float[2] x) => (float[2] y) <int64 n = {3}, bool go = {1}, float two = {2.0}>
{ [l] y = Loop (n, go, x) <body = b (int64 i, bool ci, float[2] s) => (bool co, float[2] t)
    { [f] co = Identity(ci)
      [m] t = Mul(s, two) }> }"""
)


def test_loop_bodies_are_left_out(engine: Any) -> None:
    found = observe(parse_text(LOOP), ["t", "y"], [{"x": np.array([1, -1], np.float32)}], engine)
    assert found.range("y", "min-max") == (-8.0, 8.0)
    assert not found.observed("t")


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_counted_in_float32(kind: str, engine: Any) -> None:
    model = parse_text(
        HEAD
        + f"""main (float[N,2] x, bool c) => (float[N,2] y) {{
        [c1] h = Cast<to = {10 if kind == "float16" else 16}>(x)
        [i] b = If (c) < then_branch = t () => ({kind}[N,2] g) {{ [j] g = Identity(h) }},
          else_branch = e () => ({kind}[N,2] m) {{ [n] m = Identity(h) }}>
        [c2] y = Cast<to = 1>(b) }}"""
    )
    x = np.array([[0.1, -3.0]], np.float32)
    found = observe(model, ["h", "g", "m"], [{"x": x, "c": np.array(True)}], engine)
    half = x.astype(np.float16 if kind == "float16" else ir.DataType.BFLOAT16.numpy()).astype(np.float32)
    assert found.range("h", "min-max") == (half.min(), half.max())
    assert found.range("g", "min-max") == (half.min(), half.max())
    assert not found.observed("m")


BAD = (
    HEAD
    + """main (float[2] x) => (float[2] y) { [s] r = Sqrt(x)
  [l] y = Neg(r) }"""
)


def test_nan_names_sample_and_tensor(engine: Any) -> None:
    feeds = [{"x": np.array([1, 4], np.float32)}, {"x": np.array([1, -4], np.float32)}]
    with pytest.raises(CalibrationError, match=r"sample 1: tensor 'r' holds NaN"):
        observe(parse_text(BAD), ["r"], feeds, engine)


INFINITE = (
    HEAD
    + """main (float[2] x) => (float[2] y) { [l] r = Log(x)
  [n] y = Neg(r) }"""
)


def test_infinities_that_the_model_computes_are_left_out(engine: Any) -> None:
    feeds = [{"x": np.array([0, 1], np.float32)}, {"x": np.array([0, 0], np.float32)}]
    found = observe(parse_text(INFINITE), ["r", "y"], feeds, engine)
    assert found.range("r", "min-max") == (0.0, 0.0)
    assert (found.tensors["r"].count, found.tensors["y"].count) == (1, 1)


def test_nan_from_a_bad_feed_is_told_apart(engine: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        observe(parse_text(PLAIN), ["h"], [{"x": X * np.float32("nan")}], engine)
    assert "although the inputs are finite" not in str(caught.value)


def test_empty_source(engine: Any) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        observe(parse_text(PLAIN), ["h"], [], engine)


def test_progress_counts_up_to_the_total(engine: Any) -> None:
    seen: list[tuple[int, int | None]] = []
    observe(parse_text(PLAIN), ["h", "y"], [{"x": X}] * 2, engine, memory=1, progress=lambda d, t: seen.append((d, t)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_feed_beyond_the_estimate_stays_within_the_cap(engine: Any) -> None:
    feeds = [{"x": X[:1]}, {"x": np.resize(X, (1000, 4))}, {"x": np.resize(X, (1000, 4))}]
    observe(parse_text(PLAIN), ["h", "r", "y"], feeds, engine, memory=1000)
    assert len(engine.loads) > 1


@pytest.mark.models
def test_branches_of_a_real_model(engine: Any) -> None:
    """Both branches of 25 nested Ifs are tapped at once; one sample rate runs one of them."""
    if not (VAD / "model.onnx").is_file():
        pytest.skip("the reference models are not beside the checkout")
    model = import_model(VAD / "model.onnx")
    names = [str(v.name) for n in all_nodes(model) for v in n.outputs if v.dtype == ir.DataType.FLOAT]
    random = np.random.default_rng(0)
    feeds = [
        {
            "input": random.standard_normal((rows, 576)).astype(np.float32),
            "state": np.zeros((2, rows, 128), np.float32),
            "sr": np.array(16000),
        }
        for rows in (1, 3)
    ]
    runner = OrtEngine()
    whole = observe(model, names, feeds, runner)
    convolutions = [str(n.outputs[0].name) for n in all_nodes(model) if n.op_type == "Conv"]
    then_branch = [n for n in convolutions if n.startswith("If_0_then_branch")]
    else_branch = [n for n in convolutions if n.startswith("If_0_else_branch")]
    assert len(then_branch) == len(else_branch) == 6
    assert all(whole.observed(n) for n in then_branch)
    assert not any(whole.observed(n) for n in else_branch)
    assert same(whole, observe(model, names, feeds, runner, memory=1_000_000))
