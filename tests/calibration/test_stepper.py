"""Stepping through a graph: what is looked at is what ONNX Runtime computes, wherever the cuts are."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.readers import random_feeds
from qcompiler.calibration.segments import estimated_sizes
from qcompiler.calibration.stepper import Stepper
from qcompiler.engine import Array, Feeds
from qcompiler.errors import CalibrationError
from qcompiler.ir.importer import import_model
from tests.calibration.stepping import (
    HEAD,
    LIMITS,
    OFF,
    F,
    Seen,
    X,
    assert_same,
    check_main_graph,
    every_name,
    native,
    of_text,
    same,
    stepped,
)
from tests.property.families import FAMILIES, Case, make_case

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"

CHAIN = """main (float[N,4] x) => (float[N,2] y)
<float[4,3] w = {1,2,3,4,5,6,-7,8,9,-1,-2,3}, float[3,2] v = {1,-1,2,-2,3,-3}>
{ [a] h = MatMul(x, w)
  [b] r = Relu(h)
  [s] n = Shape(r)
  [t] k = Cast<to = 1>(n)
  [c] y = MatMul(r, v) }"""


class TestPlainGraphs:
    def test_every_value_is_what_a_native_run_gives(self) -> None:
        model, proto = of_text(CHAIN)
        check_main_graph(model, proto, [{"x": X}, {"x": X[:1] * 3}])

    def test_what_is_no_float_tensor_is_never_seen(self) -> None:
        model, _ = of_text(CHAIN)
        assert set(stepped(model, [{"x": X}])) == {"x", "h", "r", "k", "y"}

    def test_only_what_is_named_is_seen_once_a_feed(self, engine: Any) -> None:
        model, _ = of_text(CHAIN)
        found = stepped(model, [{"x": X}] * 2, ["h", "nowhere"], engine=engine)
        assert {n: len(a) for n, a in found.items()} == {"h": 2}
        assert engine.ran.count("a") == 2  # nothing runs twice

    def test_what_is_behind_the_last_wanted_value_does_not_run(self, engine: Any) -> None:
        model, _ = of_text(CHAIN)
        stepped(model, [{"x": X}], ["h"], limit=1, engine=engine)
        assert engine.ran == ["a"]
        assert len(engine.loads) == 1

    @pytest.mark.parametrize("seed", range(12))
    def test_random_models(self, seed: int) -> None:
        case = make_case(seed)
        check_main_graph(import_as_is(case), onnx_of(case), case.feeds(2))

    def test_random_loops(self) -> None:
        place = list(FAMILIES).index("loops")
        for seed in range(place, place + 4 * len(FAMILIES), len(FAMILIES)):
            case = make_case(seed)
            model, proto, feeds = import_as_is(case), onnx_of(case), case.feeds(2)
            at_limits = [stepped(model, feeds, limit=limit) for limit in LIMITS]
            for other in at_limits[1:]:
                assert_same(at_limits[0], other)
            for index, feed in enumerate(feeds):
                for name, wanted in native(proto, feed).items():
                    # Products of a body use weights of the graph around it, which the engine packs in one of the two
                    # cases only: another order of 48 additions, over a few iterations.
                    bound = 48 * 2.0**-23 * np.abs(wanted).max()
                    np.testing.assert_allclose(at_limits[0][name][index], wanted, rtol=0, atol=bound)

    @pytest.mark.parametrize("kind", ["float16", "bfloat16"])
    def test_half_precision_is_the_same_wherever_the_cuts_are(self, kind: str) -> None:
        code = {"float16": 10, "bfloat16": 16}[kind]
        operators = ["Relu", "Tanh", "Exp", "Neg", "Sigmoid"] if kind == "float16" else ["Identity"] * 3
        names = ["h", *(f"v{i}" for i in range(len(operators)))]
        lines = [f"[n{i}] v{i} = {op}({names[i]})" for i, op in enumerate(operators)]
        model, proto = of_text(
            f"main (float[N,4] x) => (float[N,4] y) {{ [in] h = Cast<to = {code}>(x)\n"
            + "\n".join(lines)
            + f"\n[out] y = Cast<to = 1>({names[-1]}) }}"
        )
        feeds = [{"x": X * F(0.3)}, {"x": X[:2] * F(0.01)}]
        at_limits = [stepped(model, feeds, limit=limit) for limit in LIMITS]
        for other in at_limits[1:]:
            assert_same(at_limits[0], other)
        assert at_limits[0]["h"][0].dtype == model.graph[0].outputs[0].dtype.numpy()
        # A native run in one piece leaves out the rounding between operators that it computes in float32.
        bound = len(operators) * 2.0**-10
        np.testing.assert_allclose(at_limits[0]["y"][0], native(proto, feeds[0])["y"], rtol=bound)

    def test_half_precision_inputs_of_any_layout(self) -> None:
        for kind in ("float16", "bfloat16"):
            model, _ = of_text(f"main ({kind}[N,4] x) => ({kind}[N,4] y) {{ [a] y = Identity(x) }}")
            dtype = model.graph.inputs[0].dtype.numpy()
            given = np.asfortranarray(X.astype(dtype))
            strided = np.repeat(X.astype(dtype), 2, axis=1)[:, ::2]
            found = stepped(model, [{"x": given}, {"x": strided}])
            for array in (*found["x"], *found["y"]):
                assert same(array, X.astype(dtype))

    def test_a_feed_of_any_layout_gives_the_same(self) -> None:
        model, proto = of_text(CHAIN)
        given = [X, np.asfortranarray(X), np.repeat(X, 2, axis=1)[:, ::2]]
        found = stepped(model, [{"x": x} for x in given])
        for name, arrays in found.items():
            if name != "x":
                assert all(same(a, native(proto, {"x": X}, ["h", "r", "k"])[name]) for a in arrays)

    def test_an_operator_that_names_a_value_twice(self) -> None:
        model, proto = of_text("main (float[N,4] x) => (float[N,4] y) { [a] h = Mul(x, x) [b] y = Add(h, h) }")
        check_main_graph(model, proto, [{"x": X}])

    def test_values_of_other_kinds_pass_from_piece_to_piece(self) -> None:
        model, proto = of_text(
            """main (float[N,4] x) => (float[M,4] y) { [i] z = Neg(x) [s] s = SequenceConstruct(x, z)
            [k] k = Identity(s) [c] y = ConcatFromSequence<axis = 0>(k) }"""
        )
        feed = {"x": X}
        at_limits = [stepped(model, [feed], limit=limit) for limit in LIMITS]
        assert all(same(found["y"][0], native(proto, feed)["y"]) for found in at_limits)

    def test_optional_outputs_and_inputs_that_are_left_out(self) -> None:
        model, proto = of_text(
            """main (float[N,4] x) => (float[N,4] y) <float lo = {-1.0}, int64[1] k = {2}> {
            [d] y0, m = Dropout(x) [c] y1 = Clip(y0, , lo) [t] v, i = TopK<axis = -1>(y1, k) [y] y = Add(y1, x) }"""
        )
        check_main_graph(model, proto, [{"x": X}])

    def test_functions_of_the_model_are_called(self) -> None:
        text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]> main (float[N,4] x) => (float[N,4] y) {
          [a] h = own.twice(x) [b] y = own.twice(h) }
          <domain: "own", opset_import: ["" : 21]> twice (v) => (w) { [d] w = Add(v, v) }"""
        model = ir.from_proto(onnx.parser.parse_model(text))
        for limit in LIMITS:
            found = stepped(model, [{"x": X}], ["x", "h", "y"], limit=limit)
            assert_same(found, {"x": [X], "h": [X * 2], "y": [X * 4]})

    def test_no_piece_holds_more_than_the_limit(self) -> None:
        model, _ = of_text(CHAIN)
        stepper = Stepper(model, ["h", "r", "y"], OrtEngine(), OFF, 100)
        stepper.run({"x": X}, lambda name, array: None)
        # h and r are 36 bytes each, y is 24.
        assert stepper.segments == 1
        stepper = Stepper(model, ["h", "r", "y"], OrtEngine(), OFF, 72)
        assert stepper.segments == 0
        stepper.run({"x": X}, lambda name, array: None)
        assert stepper.segments == 2

    def test_a_feed_beyond_the_estimate_makes_smaller_pieces(self) -> None:
        model, _ = of_text(CHAIN)
        feeds = [{"x": X[:1]}, *[{"x": np.resize(X, (1000, 4))}] * 2]
        stepper = Stepper(model, ["h", "r", "y"], OrtEngine(), OFF, 1000)
        found: Seen = defaultdict(list)
        pieces = []
        for feed in feeds:
            stepper.run(feed, lambda name, array: found[name].append(np.array(array)))
            pieces.append(stepper.segments)
        assert (pieces[0], pieces[2]) == (1, 4)  # the Shape and Cast lie between two that are too large
        assert_same(found, stepped(model, feeds, ["h", "r", "y"], limit=1 << 40))

    def test_the_model_is_not_changed(self) -> None:
        model, _ = of_text(CHAIN)
        before = ir.to_proto(model).SerializeToString()
        stepped(model, [{"x": X}])
        assert ir.to_proto(model).SerializeToString() == before

    def test_sizes_are_estimated_from_the_feed(self) -> None:
        model, _ = of_text(CHAIN)
        model.graph[1].outputs[0].shape = None
        sizes = estimated_sizes(model, {"h", "r", "y"}, {"x": X})
        assert sizes["y"] == 3 * 2 * 4
        assert sizes["r"] == max(sizes.values())  # of unknown rank: as large as the largest


class TestLiveness:
    LENGTH = 60

    def chain(self) -> str:
        lines = [f"[n{i}] v{i + 1} = {'Neg' if i % 2 else 'Abs'}(v{i})" for i in range(self.LENGTH)]
        return f"main (float[N,4] v0) => (float[N,4] v{self.LENGTH}) {{ {' '.join(lines)} }}"

    @pytest.mark.parametrize(("limit", "most"), [(1, 4), (48 * 5, 9)])
    def test_few_values_of_a_long_chain_are_alive_at_a_time(self, limit: int, most: int, engine: Any) -> None:
        model, _ = of_text(self.chain())
        stepped(model, [{"v0": X}] * 2, limit=limit, engine=engine)
        assert 2 <= engine.most_alive <= most
        assert engine.alive == 0
        assert len(engine.ran) == 2 * self.LENGTH

    def test_a_value_lives_until_its_last_reader(self, engine: Any) -> None:
        lines = (
            self.chain()
            .replace("}", f" [late] y = Add(v{self.LENGTH}, v3) }}")
            .replace(f"=> (float[N,4] v{self.LENGTH})", "=> (float[N,4] y)")
        )
        model, proto = of_text(lines)
        found = stepped(model, [{"v0": X}], engine=engine)
        assert same(found["y"][0], native(proto, {"v0": X})["y"])
        assert engine.most_alive <= 5

    def test_iterations_of_a_loop_do_not_add_up(self, engine: Any) -> None:
        model, _ = of_text(
            """main (float[N,4] x, int64 n) => (float[N,4] y) { [l] y = Loop (n, , x)
            <body = b (int64 i, bool c, float[N,4] s) => (bool d, float[N,4] t)
              { [f] d = Identity(c) [m] u = Neg(s) [k] t = Abs(u) }> }"""
        )
        peaks = []
        for trips in (3, 60):
            engine.most_alive = 0
            found = stepped(model, [{"x": X, "n": np.array(trips)}], engine=engine)
            assert len(found["u"]) == trips
            peaks.append(engine.most_alive)
            assert engine.alive == 0
        assert peaks[0] == peaks[1]


NESTED_IF = """main (float[N,2] x, bool c, bool d) => (float[N,2] y)
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


class TestIf:
    def feed(self, c: bool, d: bool) -> dict[str, Array]:
        return {"x": F([[1, -2], [3, 4]]), "c": np.array(c), "d": np.array(d)}

    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize(("c", "d"), [(True, True), (True, False), (False, True)])
    def test_only_the_branch_that_is_taken_runs(self, c: bool, d: bool, limit: int, engine: Any) -> None:
        model, proto = of_text(NESTED_IF)
        feed = self.feed(c, d)
        found = stepped(model, [feed], limit=limit, engine=engine)
        k = feed["x"] * F(2)
        q, e, u = k * F(10), k + F(10), k - F(10)
        inside = ({"q": q, "p": -q, "a": -q} if d else {"e": e, "a": e}) if c else {"u": u, "z": np.abs(u)}
        y = inside["a" if c else "z"]
        assert_same(found, {n: [v] for n, v in {"x": feed["x"], "k": k, **inside, "y": y}.items()})
        assert same(found["y"][0], native(proto, feed)["y"])
        taken = {"m1", "n1"} if c and d else {"m2"} if c else {"m3", "n3"}
        assert set(engine.ran) == {"s", *taken}

    def test_an_if_without_wanted_values_inside_is_one_operator(self, engine: Any) -> None:
        model, _ = of_text(NESTED_IF)
        found = stepped(model, [self.feed(True, True)], ["k", "y"], limit=1 << 40, engine=engine)
        assert len(engine.loads) == 1
        assert found["y"][0].tolist() == [[-20, 40], [-60, -80]]

    def test_branches_that_only_hand_on_what_is_outside(self) -> None:
        model, proto = of_text(
            """main (float[2] x, bool c) => (float[2] y, float[2] w) <float[2] two = {2.0, 3.0}> {
              [k] k = Neg(x)
              [o] y, w = If (c) <then_branch = t () => (float[2] a, float[2] b)
                  { [i] a = Identity(two) [j] b = Abs(k) },
                else_branch = e () => (float[2] f, float[2] g) { [l] f = Identity(k) [m] g = Identity(x) }> }"""
        )
        # The text syntax has no way to say it: the branch's outputs are values of the graph around it.
        branch = model.graph[1].attributes["else_branch"].as_graph()
        branch.outputs[0], branch.outputs[1] = model.graph[0].outputs[0], model.graph[0].outputs[0]
        for c in (True, False):
            feed = {"x": F([1, -1]), "c": np.array(c)}
            found = stepped(model, [feed])
            assert same(found["y"][0], native(proto, feed)["y"])
            assert found["w"][0].tolist() == ([1, 1] if c else [-1, 1])

    def test_both_branches_may_give_other_shapes_feed_by_feed(self) -> None:
        model, proto = of_text(
            """main (float[N,2] x, bool c) => (float[M,2] y) { [o] y = If (c) <
            then_branch = t () => (float[P,2] a) { [i] a = Concat<axis = 0>(x, x) },
            else_branch = e () => (float[Q,2] b) { [j] b = Neg(x) }> }"""
        )
        feeds = [{"x": F([[1, 2]]) * i, "c": np.array(i % 2 == 0)} for i in range(1, 5)]
        found = stepped(model, feeds)
        assert [a.shape for a in found["y"]] == [(1, 2), (2, 2)] * 2
        assert all(same(a, native(proto, f)["y"]) for a, f in zip(found["y"], feeds, strict=True))


def test_two_branches_and_bodies_may_use_the_same_names_outside() -> None:
    """Names are unique in an imported model, so what is seen under one name is one value."""
    proto = onnx.parser.parse_model(
        HEAD
        + """main (float[2] x, bool c) => (float[2] y) { [o] y = If (c) <
        then_branch = t () => (float[2] r) { [i] tmp = Neg(x) [j] r = Abs(tmp) },
        else_branch = e () => (float[2] s) { [k] tmp = Exp(x) [l] s = Abs(tmp) }> }"""
    )
    proto.graph.node[0].attribute[1].g.output[0].name = "r"
    proto.graph.node[0].attribute[1].g.node[1].output[0] = "r"
    model = import_model(proto)
    names = every_name(model)
    assert len(names) == len(set(names))
    feed = {"x": F([1, -1]), "c": np.array(False)}
    assert same(stepped(model, [feed])["y"][0], native(proto, feed)["y"])


class TestErrors:
    def test_what_the_engine_says_of_a_body_comes_through(self) -> None:
        model, _ = of_text(
            """main (float[N,2] x, int64 n) => (float[N,2] y) <float[2,2] w = {1.0,2.0,3.0,4.0}> { [l] y = Loop (n, , x)
            <body = b (int64 i, bool c, float[N,2] s) => (bool d, float[A,B] t)
              { [f] d = Identity(c) [p] q = Concat<axis = 1>(s, s) [m] t = MatMul(q, w) }> }"""
        )
        with pytest.raises(CalibrationError, match="onnxruntime could not run the model on this feed: "):
            stepped(model, [{"x": X[:, :2], "n": np.array(2)}])

    def test_a_graph_out_of_order_is_named(self) -> None:
        model, _ = of_text(CHAIN)
        nodes = list(model.graph)
        model.graph.remove(nodes[0])
        model.graph.append(nodes[0])
        with pytest.raises(CalibrationError, match="value 'h' has not been computed; the graph is not in"):
            stepped(model, [{"x": X}])


def import_as_is(case: Case) -> Any:
    return import_model(case.model)


def onnx_of(case: Case) -> onnx.ModelProto:
    """Return the imported model, whose operator set may be another one than the case's."""
    made = ir.to_proto(import_model(case.model))
    assert isinstance(made, onnx.ModelProto)
    return made


@pytest.mark.models
@pytest.mark.parametrize(
    "name", ["silero_vad", "mnist_cnn_opset8", "resnet8_cifar10", "vww_mobilenetv1", "vit_cifar10"]
)
def test_a_reference_model_gives_the_same_in_small_pieces_and_in_one(name: str) -> None:
    path = MODELS / name / "model.onnx"
    if not path.is_file():
        pytest.skip("the reference models are not beside the checkout")
    model = import_model(path)
    if name == "silero_vad":
        state = np.zeros((2, 1, 128), F)
        rate = np.array(16000)
        sound = np.random.default_rng(0).standard_normal((2, 1, 576)).astype(F)
        feeds: list[Feeds] = [{"input": s, "state": state, "sr": rate} for s in sound]
    else:
        feeds = random_feeds(OrtEngine().load(model).inputs, 2)
    whole = stepped(model, feeds, limit=1 << 40)
    assert_same(whole, stepped(model, feeds, limit=1_000_000))
    assert_same(whole, stepped(model, feeds, limit=10_000))
