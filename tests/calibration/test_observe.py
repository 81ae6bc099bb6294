"""Observation: what the statistics of a model's values are, feed by feed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.observe import (
    PIECE_BYTES,
    Observer,
    blank,
    channel_axes,
    default_memory,
    length_of,
    observe,
)
from qcompiler.calibration.statistics import Statistics, merge_all
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.importer import import_model
from qcompiler.ir.text import parse_text

VAD = Path(__file__).resolve().parents[3] / "shared" / "models" / "silero_vad"

F = np.float32
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
X = np.arange(12, dtype=F).reshape(3, 4) - 5
W = np.array([1, 2, 3, 4, 5, 6, -7, 8, 9, -1, -2, 3], F).reshape(4, 3)


def frozen(of: Statistics) -> dict[str, object]:
    """Return everything that statistics hold, in a form that tells 0.0 from -0.0."""
    made: dict[str, object] = {"feeds": of.feeds, "names": list(of)}
    for name, tensor in of.tensors.items():
        fields, arrays = tensor.state()
        made[name] = (
            {n: repr(v) for n, v in fields.items()},
            {n: (str(a.dtype), a.tobytes()) for n, a in arrays.items()},
        )
    return made


def test_values_and_input_against_numpy(engine: Any) -> None:
    found = observe(parse_text(PLAIN), ["x", "h", "r", "y"], [{"x": X}, {"x": X[:1] * 3}], engine)
    h = np.concatenate([X, X[:1] * 3]) @ W
    assert found.range("h", "min-max") == (h.min(), h.max())
    assert found.range("r", "min-max") == (0.0, h.max())
    assert found.tensors["r"].zeros == int((h <= 0).sum())
    assert found.range("x", "min-max") == (-15.0, 6.0)
    assert found.tensors["h"].count == 12
    assert found.tensors["h"].mean == h.mean(dtype=np.float64)
    assert found.feeds == 2
    assert [(o.optimize, o.threads) for o in engine.loads] == [(False, 1)]


def test_the_model_is_not_changed(engine: Any) -> None:
    model = parse_text(PLAIN)
    before = ir.to_proto(model).SerializeToString()
    observe(model, ["h", "r"], [{"x": X}], engine)
    assert ir.to_proto(model).SerializeToString() == before


def test_the_order_of_feeds_changes_the_extremes_by_feed_only(engine: Any) -> None:
    feeds = [{"x": X}, {"x": X[:2] * 7}, {"x": X[1:] * F(0.01)}]
    one, other = (observe(parse_text(PLAIN), ["x", "h"], f, engine) for f in (feeds, feeds[::-1]))
    for name in ("x", "h"):
        (fields, arrays), (others, theirs) = one.tensors[name].state(), other.tensors[name].state()
        assert fields == others
        assert [n for n in arrays if arrays[n].tobytes() != theirs[n].tobytes()] == ["extremes"]
        assert one.tensors[name].extremes.tolist() == other.tensors[name].extremes[::-1].tolist()


def test_what_is_no_float_value_of_the_model_stays_unobserved(engine: Any) -> None:
    model = parse_text(HEAD + "main (float[N,2] x) => (int64[2] s) { [a] s = Shape(x) }")
    found = observe(model, ["s", "nowhere"], [{"x": X[:, :2]}], engine)
    assert [found.observed(name) for name in ("s", "nowhere")] == [False, False]
    assert list(found) == ["s", "nowhere"]


def test_memory_cap_cuts_pieces_and_changes_no_bit(engine: Any) -> None:
    names, feeds = ["h", "r", "y"], [{"x": X}, {"x": X[:2] * 7}, {"x": X[1:] * F(0.1)}]
    whole = observe(parse_text(PLAIN), names, feeds, engine, memory=10**9)
    assert len(engine.loads) == 1
    cut = observe(parse_text(PLAIN), names, feeds, engine, memory=1)
    assert len(engine.loads) == 1 + 3
    assert frozen(whole) == frozen(cut)
    assert engine.ran.count("a") == 2 * len(feeds)  # every operator runs once a feed


def test_pieces_stay_small_however_much_memory_there_is() -> None:
    big = Observer(parse_text(PLAIN), ["h"], OrtEngine(), memory=1 << 50)
    small = Observer(parse_text(PLAIN), ["h"], OrtEngine(), memory=1000)
    assert (big._stepper.limit, small._stepper.limit) == (PIECE_BYTES, 1000)
    assert big.pieces == 0
    big.observe({"x": X}, 0, blank(["h"]))
    assert big.pieces == 1
    assert 0 < default_memory() < 1 << 50


def test_batch_may_vary_between_feeds(engine: Any) -> None:
    feeds = [{"x": np.resize(X, (n, 4))} for n in (1, 5, 2)]
    found = observe(parse_text(PLAIN), ["h"], feeds, engine)
    assert found.tensors["h"].count == 3 * (1 + 5 + 2)
    wanted = [f["x"] @ W for f in feeds]
    assert found.tensors["h"].extremes.tolist() == [[h.min(), h.max()] for h in wanted]


def test_feeds_without_elements_count_as_feeds_only(engine: Any) -> None:
    found = observe(parse_text(PLAIN), ["h"], [{"x": X[:0]}, {"x": X}], engine)
    assert (found.feeds, found.tensors["h"].executions) == (2, 1)
    assert found.tensors["h"].recent.feeds.tolist() == [1]


def feed(c: bool, d: bool, scale: float = 1.0) -> dict[str, Any]:
    return {"x": np.array([[1, -2]], F) * F(scale), "c": np.array(c), "d": np.array(d)}


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


def test_feeds_are_numbered_over_the_whole_run_where_a_branch_runs_now_and_then(engine: Any) -> None:
    feeds = [feed(True, False), feed(True, True), feed(False, True, 3.0), feed(True, False, 2.0)]
    found = observe(parse_text(NESTED), ["q", "e", "u", "y"], feeds, engine)
    assert {n: t.recent.feeds.tolist() for n, t in found.tensors.items()} == {
        "q": [1], "e": [0, 3], "u": [2], "y": [0, 1, 2, 3],
    }  # fmt: skip
    assert found.range("e", "min-max") == (2.0, 14.0)
    assert frozen(found) == frozen(observe(parse_text(NESTED), ["q", "e", "u", "y"], feeds, engine, memory=1))


LOOP = (
    HEAD
    + """main (float[2] x) => (float[2] y) <int64 n = {3}, bool go = {1}, float two = {2.0}>
{ [l] y = Loop (n, go, x) <body = b (int64 i, bool ci, float[2] s) => (bool co, float[2] t)
    { [f] co = Identity(ci)
      [m] t = Mul(s, two) }> }"""
)


def test_bodies_of_loops_are_seen_iteration_by_iteration(engine: Any) -> None:
    found = observe(parse_text(LOOP), ["s", "t", "y"], [{"x": F([1, -1])}, {"x": F([3, 0])}], engine)
    assert found.range("y", "min-max") == (-8.0, 24.0)
    assert found.range("s", "min-max") == (-4.0, 12.0)
    t = found.tensors["t"]
    assert (t.count, t.zeros, t.executions) == (12, 3, 2)
    assert t.extremes.tolist() == [[-8.0, 8.0], [0.0, 24.0]]
    assert t.mean == (6 + 12 + 24) / 12
    assert t.mean_square == (2 * (4 + 16 + 64) + 36 + 144 + 576) / 12


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
    x = np.array([[0.1, -3.0]], F)
    found = observe(model, ["h", "g", "m"], [{"x": x, "c": np.array(True)}], engine)
    half = x.astype(np.float16 if kind == "float16" else ir.DataType.BFLOAT16.numpy()).astype(F)
    assert found.range("h", "min-max") == (half.min(), half.max())
    assert found.range("g", "min-max") == (half.min(), half.max())
    assert not found.observed("m")


BAD = (
    HEAD
    + """main (float[2] x) => (float[2] y) { [s] r = Sqrt(x)
  [l] y = Neg(r) }"""
)


def test_nan_names_sample_and_tensor(engine: Any) -> None:
    feeds = [{"x": F([1, 4])}, {"x": F([1, -4])}]
    text = r"^sample 1: tensor 'r' holds NaN although the inputs are finite; the float model itself computes it"
    with pytest.raises(CalibrationError, match=text):
        observe(parse_text(BAD), ["r"], feeds, engine)


def test_nan_from_a_bad_feed_is_told_apart(engine: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        observe(parse_text(PLAIN), ["h"], [{"x": X * F("nan")}], engine)
    assert str(caught.value) == "sample 0: tensor 'h' holds NaN, and so do the inputs or infinity: mend them"


def test_an_error_of_the_engine_in_a_body_names_the_sample(engine: Any) -> None:
    model = parse_text(
        HEAD
        + """main (float[N,2] x, float[K,2] w) => (float[M,2] y) <int64 n = {2}> { [l] y = Loop (n, , x)
        <body = b (int64 i, bool c, float[N,2] s) => (bool d, float[A,2] t)
          { [f] d = Identity(c) [p] q = Neg(s) [m] t = Add(q, w) }> }"""
    )
    feeds = [{"x": X[:, :2], "w": X[:rows, :2]} for rows in (3, 1, 2)]
    with pytest.raises(CalibrationError, match=r"^sample 2: onnxruntime could not run the model on this feed: .*'m'"):
        observe(model, ["q"], feeds, engine)


INFINITE = (
    HEAD
    + """main (float[2] x) => (float[2] y) { [l] r = Log(x)
  [n] y = Neg(r) }"""
)


def test_infinities_that_the_model_computes_are_left_out(engine: Any) -> None:
    feeds = [{"x": F([0, 1])}, {"x": F([0, 0])}]
    found = observe(parse_text(INFINITE), ["r", "y"], feeds, engine)
    assert found.range("r", "min-max") == (0.0, 0.0)
    assert [(found.tensors[n].count, found.tensors[n].infinities) for n in ("r", "y")] == [(1, 3), (1, 3)]
    assert repr(found.tensors["y"].minimum) == "0.0"  # -0.0 there


def test_empty_source(engine: Any) -> None:
    with pytest.raises(CalibrationError, match=r"^the calibration source is empty; give at least one feed$"):
        observe(parse_text(PLAIN), ["h"], [], engine)


def test_progress_counts_feeds(engine: Any) -> None:
    seen: list[tuple[int, int | None]] = []
    given = [{"x": X}] * 3
    observe(parse_text(PLAIN), ["h", "y"], given, engine, memory=1, progress=lambda d, t: seen.append((d, t)))
    observe(parse_text(PLAIN), ["h"], iter(given), engine, progress=lambda d, t: seen.append((d, t)))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, None), (2, None), (3, None)]
    assert (length_of(given), length_of(iter(given))) == (3, None)


def test_one_observer_serves_many_threads() -> None:
    feeds = [{"x": np.random.default_rng(i).standard_normal((1 + i % 5, 4)).astype(F)} for i in range(24)]
    names = ["x", "h", "r", "y"]
    # So small a cap that larger feeds cut the graph anew while other threads are at work.
    observer = Observer(parse_text(PLAIN), names, OrtEngine(), memory=30)
    shards = [blank(names) for _ in range(4)]

    def work(place: int) -> None:
        for index in range(place, len(feeds), 4):
            observer.observe(feeds[index], index, shards[place])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = observe(parse_text(PLAIN), names, feeds, OrtEngine())
    assert frozen(merge_all(shards)) == frozen(whole)


class TestChannels:
    IMAGE = (
        HEAD
        + """main (float[N,3,5,5] x) => (float[N,7] y)
        <float[2,3,1,1] w = {1,2,3,-1,-2,-3}, float[50,7] v, int64[2] flat = {-1,50}> {
        [c] c = Conv(x, w) [r] r = Relu(c) [f] f = Reshape(r, flat) [m] y = MatMul(f, v) }"""
    )

    def model(self) -> ir.Model:
        return parse_text(self.IMAGE.replace("float[50,7] v", f"float[50,7] v = {{{','.join(['0.5'] * 350)}}}"))

    def test_which_axis_holds_them(self) -> None:
        model = self.model()
        assert channel_axes(model, {"x", "c", "r", "f", "y"}) == {"x": 1, "c": 1, "r": 1, "f": 1, "y": 1}
        assert channel_axes(model, {"c"}) == {"c": 1}
        text = HEAD + "main (float[N,T,8] x, float[N,T] s) => (float[N,T,8] y) { [a] y = Neg(x) }"
        assert channel_axes(parse_text(text), {"x", "s", "y"}) == {"x": 2, "y": 2}
        text = HEAD + "main (float[N,8,T] x) => (float[N,8,T] y) <float[8,1,1] w> { [a] y = Conv<group=8>(x, w) }"
        made = parse_text(text.replace("[8,1,1] w", "[8,1,1] w = {1,1,1,1,1,1,1,1}"))
        assert channel_axes(made, {"x", "y"}) == {"x": 1, "y": 1}

    def test_extremes_and_squares_against_numpy(self) -> None:
        x = np.random.default_rng(0).standard_normal((4, 3, 5, 5)).astype(F)
        found = observe(self.model(), ["x", "c"], [{"x": x[:1]}, {"x": x[1:]}], OrtEngine(), squares=["x"])
        channels = found.tensors["x"].channels
        assert channels is not None
        assert channels.axis == -3
        assert channels.low.tolist() == x.min((0, 2, 3)).tolist()
        assert channels.high.tolist() == x.max((0, 2, 3)).tolist()
        assert channels.count == 100
        assert channels.mean_square == pytest.approx(np.square(x, dtype=np.float64).mean((0, 2, 3)), rel=2.0**-48)
        other = found.tensors["c"].channels
        assert other is not None
        assert other.squares is None

    def test_values_that_are_scalars_or_long_have_none(self) -> None:
        text = HEAD + "main (float[N,4] x) => (float z) { [a] z = ReduceMax<keepdims = 0>(x) }"
        found = observe(parse_text(text), ["z"], [{"x": X}], OrtEngine())
        assert found.tensors["z"].channels is None
        assert found.range("z") == (6.0, 6.0)
        long = HEAD + f"main (float[N,{1 << 17}] x) => (float[N,{1 << 17}] y) {{ [a] y = Neg(x) }}"
        assert channel_axes(parse_text(long), {"x", "y"}) == {}


@pytest.mark.models
def test_branches_of_a_real_model() -> None:
    """25 nested Ifs; one sample rate runs one branch of the outermost."""
    if not (VAD / "model.onnx").is_file():
        pytest.skip("the reference models are not beside the checkout")
    model = import_model(VAD / "model.onnx")
    names = [str(v.name) for n in all_nodes(model) for v in n.outputs if v.dtype == ir.DataType.FLOAT]
    random = np.random.default_rng(0)
    feeds = [
        {
            "input": random.standard_normal((rows, 576)).astype(F),
            "state": np.zeros((2, rows, 128), F),
            "sr": np.array(16000),
        }
        for rows in (1, 3)
    ]
    whole = observe(model, names, feeds, OrtEngine())
    convolutions = [str(n.outputs[0].name) for n in all_nodes(model) if n.op_type == "Conv"]
    then_branch = [n for n in convolutions if n.startswith("If_0_then_branch")]
    else_branch = [n for n in convolutions if n.startswith("If_0_else_branch")]
    assert len(then_branch) == len(else_branch) == 6
    assert all(whole.observed(n) for n in then_branch)
    assert not any(whole.observed(n) for n in else_branch)
    assert frozen(whole) == frozen(observe(model, names, feeds, OrtEngine(), memory=1_000_000))
