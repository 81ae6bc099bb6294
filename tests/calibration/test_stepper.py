"""Stepping through a graph: what is looked at is what ONNX Runtime computes, wherever the cuts are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.readers import random_feeds
from qcompiler.calibration.stepper import Stepper, estimated_sizes
from qcompiler.engine import Array, Engine, EngineOptions, Feeds
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import all_graphs, all_nodes
from qcompiler.ir.importer import import_model
from qcompiler.ir.text import parse_text
from tests import loops
from tests.property.families import FAMILIES, Case, make_case

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"
OFF = EngineOptions(threads=1, optimize=False, shared_pool=True)
LIMITS = (1, 200, 1 << 40)
F = np.float32
HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'

Seen = dict[str, list[Array]]


def every_name(model: Any) -> list[str]:
    given = [v for graph in all_graphs(model) for v in graph.inputs]
    return [str(v.name) for v in (*given, *(v for n in all_nodes(model) for v in n.outputs)) if v.name]


def stepped(
    model: Any, feeds: Sequence[Feeds], names: Sequence[str] | None = None, limit: int = 1, engine: Engine | None = None
) -> Seen:
    """Return what the sink got, in its order."""
    found: Seen = defaultdict(list)
    stepper = Stepper(model, every_name(model) if names is None else names, engine or OrtEngine(), OFF, limit)
    for feed in feeds:
        stepper.run(feed, lambda name, array: found[name].append(np.array(array)))
    return dict(found)


def same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def assert_same(one: Mapping[str, Sequence[Array]], other: Mapping[str, Sequence[Array]]) -> None:
    assert {n: len(a) for n, a in one.items()} == {n: len(a) for n, a in other.items()}
    different = [n for n, a in one.items() if not all(same(x, y) for x, y in zip(a, other[n], strict=True))]
    assert different == []


def native(proto: onnx.ModelProto, feed: Feeds, names: Sequence[str] = ()) -> dict[str, Array]:
    """Return the outputs and the named values of the main graph as ONNX Runtime gives them in one run."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    have = [o.name for o in made.graph.output]
    made.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    wanted = [o.name for o in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, dict(feed)), strict=True))


def of_text(text: str) -> tuple[Any, onnx.ModelProto]:
    return parse_text(HEAD + text), onnx.parser.parse_model(HEAD + text)


def check_main_graph(model: Any, proto: onnx.ModelProto, feeds: Sequence[Feeds]) -> None:
    """Compare every float value of the main graph with a native run, and every limit with every other."""
    at_limits = [stepped(model, feeds, limit=limit) for limit in LIMITS]
    for other in at_limits[1:]:
        assert_same(at_limits[0], other)
    names = [str(v.name) for node in model.graph for v in node.outputs if v.name]
    for index, feed in enumerate(feeds):
        wanted = native(proto, feed, names)
        compared = [n for n in names if wanted[n].dtype in (np.float32, np.float16)]
        assert compared
        assert [n for n in compared if not same(at_limits[0][n][index], wanted[n])] == []


CHAIN = """main (float[N,4] x) => (float[N,2] y)
<float[4,3] w = {1,2,3,4,5,6,-7,8,9,-1,-2,3}, float[3,2] v = {1,-1,2,-2,3,-3}>
{ [a] h = MatMul(x, w)
  [b] r = Relu(h)
  [s] n = Shape(r)
  [t] k = Cast<to = 1>(n)
  [c] y = MatMul(r, v) }"""
X = np.arange(12, dtype=F).reshape(3, 4) - 5


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


LOOP = """main (float[2] x, int64 n, bool go, float far) => (float[2] y, float[T,2] rows)
<float[2] w = {3.0, -1.0}> {
  [k] k = Neg(x)
  [l] y, rows = Loop (TRIPS, COND, x) <body = b (int64 i, bool ci, float[2] s) => (bool co, float[2] t, float[2] r)
    { [m] m = Mul(s, w) [a] t = Add(m, k) [q] r = Abs(t)
      [z] z = ReduceMax<keepdims = 0>(r) [f] co = Less(z, far) }> }"""


def simulate_loop(x: Array, trips: float, go: bool, far: float) -> tuple[Seen, Array]:
    found: Seen = defaultdict(list)
    state, count = x, 0
    while go and count < trips:
        found["s"].append(state)
        found["m"].append(state * F([3, -1]))
        found["t"].append(found["m"][-1] - x)
        state = found["t"][-1]
        found["r"].append(np.abs(state))
        found["z"].append(found["r"][-1].max())
        go = bool(found["z"][-1] < F(far))
        count += 1
    return found, state


class TestLoop:
    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize(
        ("trips", "cond"), [("n", ""), ("n", "go"), ("", "go")], ids=["trip count", "both", "condition"]
    )
    @pytest.mark.parametrize(
        ("n", "go", "far"), [(5, True, 1e9), (5, True, 20.0), (0, True, 1e3), (3, False, 1e3), (1, True, 0.0)]
    )
    def test_iterations_against_a_simulation(
        self, trips: str, cond: str, n: int, go: bool, far: float, limit: int
    ) -> None:
        if not trips:
            far = min(far, 1e3)  # or it would never end
        model, proto = of_text(LOOP.replace("TRIPS", trips).replace("COND", cond))
        feed = {"x": F([3, -0.5]), "n": np.array(n), "go": np.array(go), "far": np.array(far, F)}
        found = stepped(model, [feed], limit=limit)
        inside, state = simulate_loop(feed["x"], n if trips else np.inf, go or not cond, far)
        wanted = {"x": [feed["x"]], "far": [feed["far"]], "k": [-feed["x"]], **inside, "y": [state]}
        rows = np.stack(inside["r"]) if inside else np.zeros((0, 2), F)
        assert_same(found, {**wanted, "rows": [rows]})
        given = native(proto, feed)
        assert same(found["y"][0], given["y"])
        assert same(found["rows"][0], given["rows"])

    def test_a_state_whose_shape_grows(self) -> None:
        model, proto = of_text(
            """main (float[A,2] x, int64 n) => (float[B,2] y) { [l] y = Loop (n, , x)
            <body = b (int64 i, bool c, float[C,2] s) => (bool d, float[D,2] t)
              { [f] d = Identity(c) [g] u = Neg(s) [m] t = Concat<axis = 0>(s, u) }> }"""
        )
        feed = {"x": F([[1, 2]]), "n": np.array(3)}
        found = stepped(model, [feed])
        assert [a.shape[0] for a in found["t"]] == [2, 4, 8]
        assert [a.shape[0] for a in found["u"]] == [1, 2, 4]
        assert same(found["y"][0], native(proto, feed)["y"])

    def test_a_sequence_as_state(self) -> None:
        model, proto = of_text(
            """main (float[1,2] x, int64 n) => (float[B,2] y) { [e] e = SequenceConstruct(x)
            [l] all = Loop (n, , e)
            <body = b (int64 i, bool c, seq(float[1,2]) s) => (bool d, seq(float[1,2]) t)
              { [f] d = Identity(c) [at] at = SequenceAt(s, i) [g] u = Sub(at, x) [m] t = SequenceInsert(s, u) }>
            [y] y = ConcatFromSequence<axis = 0>(all) }"""
        )
        feed = {"x": F([[1, 2]]), "n": np.array(3)}
        found = stepped(model, [feed])
        assert [a.tolist() for a in found["u"]] == [[[0, 0]], [[-1, -2]], [[-2, -4]]]
        assert same(found["y"][0], native(proto, feed)["y"])

    @pytest.mark.parametrize("trips", [0, 2])
    def test_counter_and_condition_of_rank_one(self, trips: int) -> None:
        """Exporters write both ways; the body may rely on it, as this Concat does."""
        model, proto = of_text(
            """main (float[2] x, int64[1] n, bool[1] go) => (float[2] y) <int64[1] one = {1}> {
            [l] y = Loop (n, go, x) <body = b (int64[1] i, bool[1] c, float[2] s) => (bool[1] d, float[2] t)
              { [f] d = Identity(c) [j] j = Concat<axis = 0>(i, one) [k] k = Cast<to = 1>(j) [m] t = Add(s, k) }> }"""
        )
        feed = {"x": F([1, 2]), "n": np.array([trips]), "go": np.array([True])}
        found = stepped(model, [feed])
        assert same(found["y"][0], native(proto, feed)["y"])
        assert found.get("k", []) == [] if not trips else [a.tolist() for a in found["k"]] == [[0, 1], [1, 1]]

    def test_names_that_the_loop_does_not_give_out(self) -> None:
        # ONNX Runtime 1.31 itself crashes where a Loop leaves a state out, so there is no native run to compare with.
        model, _ = of_text(
            """main (float[2] x, int64 n) => (float[T,2] rows) { [l] , rows = Loop (n, , x)
            <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t, float[2] r)
              { [f] d = Identity(c) [m] t = Add(s, s) [g] r = Neg(t) }> }"""
        )
        feed = {"x": F([1, 2]), "n": np.array(3)}
        found = stepped(model, [feed], ["r", "rows"])
        assert [a.tolist() for a in found["r"]] == [[-2, -4], [-4, -8], [-8, -16]]
        assert same(found["rows"][0], np.stack(found["r"]))

    def test_a_body_that_hands_its_inputs_on(self) -> None:
        model, proto = of_text(
            """main (float[2] x, float[2] z, int64 n) => (float[2] y, float[2] w, float[T,2] rows) {
            [l] y, w, rows = Loop (n, , x, z)
            <body = b (int64 i, bool c, float[2] s, float[2] v) => (bool c, float[2] v, float[2] s, float[2] r)
              { [g] r = Sub(s, v) }> }"""
        )
        feed = {"x": F([1, 2]), "z": F([5, 7]), "n": np.array(3)}
        found = stepped(model, [feed])
        assert [a.tolist() for a in found["r"]] == [[-4, -5], [4, 5], [-4, -5]]
        given = native(proto, feed)
        assert all(same(found[n][0], given[n]) for n in ("y", "w", "rows"))

    def test_integers_as_state_are_carried_and_not_seen(self) -> None:
        model, proto = of_text(
            """main (int64[2] x, int64 n) => (float[2] y) { [l] k, rows = Loop (n, , x)
            <body = b (int64 i, bool c, int64[2] s) => (bool d, int64[2] t, int64[2] r)
              { [f] d = Identity(c) [m] t = Add(s, s) [h] h = Cast<to = 1>(t) [g] r = Neg(t) }>
            [y] y = Cast<to = 1>(k) }"""
        )
        feed = {"x": np.array([1, 2]), "n": np.array(3)}
        found = stepped(model, [feed])
        assert set(found) == {"h", "y"}
        assert same(found["y"][0], native(proto, feed)["y"])


class TestScan:
    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize("attributes", [
        "", "scan_input_axes = [1, 0], scan_output_axes = [1, 0]",
        "scan_input_axes = [-2, 0], scan_output_axes = [-1, 0]",
        "scan_input_directions = [1, 0], scan_output_directions = [0, 1]",
        "scan_input_axes = [1, 0], scan_input_directions = [0, 1], scan_output_axes = [1, 1], "
        "scan_output_directions = [1, 1]",
    ])  # fmt: skip
    def test_axes_and_directions(self, attributes: str, limit: int) -> None:
        axis = 1 if "scan_input_axes = [1" in attributes or "[-2" in attributes else 0
        shape = "float[N,T,2]" if axis else "float[T,N,2]"
        model, proto = of_text(
            f"""main ({shape} xs, float[T,2] ys, float[N,2] a, float b) =>
              (float[N,2] p, float q, float[U,V,2] rows, float[W,2] sums) {{
            [k] k = Neg(a)
            [s] p, q, rows, sums = Scan <num_scan_inputs = 2, {attributes}{"," if attributes else ""} body = c
              (float[N,2] h, float g, float[N,2] x, float[2] y) => (float[N,2] h2, float g2, float[N,2] r, float[2] t)
              {{ [m] m = Mul(h, x) [n] h2 = Add(m, k) [o] g2 = ReduceMax<keepdims = 0>(h2)
                 [r] r = Sub(h2, g) [t] t = Neg(y) }}> (a, b, xs, ys) }}"""
        )
        rng = np.random.default_rng(0)
        xs, ys = rng.integers(-3, 4, (4, 3, 2)).astype(F), rng.integers(-9, 9, (4, 2)).astype(F)
        feed = {"xs": xs.swapaxes(0, 1) if axis else xs, "ys": ys, "a": F([[1, 2]] * 3), "b": np.array(0.5, F)}
        found = stepped(model, [feed], limit=limit)
        given = native(proto, feed)
        assert all(same(found[n][0], given[n]) for n in ("p", "q", "rows", "sums"))
        backwards = "scan_input_directions = [1" in attributes, "scan_input_directions = [0, 1" in attributes
        h, g = feed["a"], feed["b"]
        inside: Seen = defaultdict(list)
        for x, y in zip(xs[::-1] if backwards[0] else xs, ys[::-1] if backwards[1] else ys, strict=True):
            m = h * x
            h2 = m - feed["a"]
            step = {"h": h, "g": g, "x": x, "y": y, "m": m, "h2": h2, "r": h2 - g, "t": -y, "g2": h2.max()}
            for name, value in step.items():
                inside[name].append(np.asarray(value))
            h, g = h2, np.asarray(h2.max())
        assert_same({n: found[n] for n in inside}, inside)

    def test_an_early_scan_with_a_batch_axis_runs_as_a_whole(self) -> None:
        text = """<ir_version: 5, opset_import: ["" : 8]>
            main (float[N,2] a, float[N,T,2] xs) => (float[N,2] y, float[N,T,2] rows) { [s] y, rows = Scan
            <num_scan_inputs = 1, body = c (float[2] h, float[2] x) => (float[2] g, float[2] r)
              { [m] g = Add(h, x) [n] r = Identity(g) }> (, a, xs) }"""
        model, proto = import_model(onnx.parser.parse_model(text)), onnx.parser.parse_model(text)
        feed = {"a": F([[0, 0], [1, 1]]), "xs": np.arange(12, dtype=F).reshape(2, 3, 2)}
        for limit in LIMITS:
            found = stepped(model, [feed], limit=limit)
            assert set(found) == {"a", "xs", "y", "rows"}
            assert all(same(found[n][0], array) for n, array in native(proto, feed).items())

    def test_no_steps(self) -> None:
        model, _ = of_text(
            """main (float[T,2] xs, float[2] a) => (float[2] y, float[U,2] rows) { [s] y, rows = Scan
            <num_scan_inputs = 1, body = c (float[2] h, float[2] x) => (float[2] g, float[2] r)
              { [m] g = Add(h, x) [n] r = Neg(g) }> (a, xs) }"""
        )
        # ONNX Runtime 1.31 refuses a Scan over nothing; another engine may run it, so the node is left to the engine.
        with pytest.raises(CalibrationError, match="Scan node"):
            stepped(model, [{"xs": np.zeros((0, 2), F), "a": F([1, 2])}])


@pytest.mark.parametrize(
    ("make", "feeds"),
    [
        (loops.recurrent_loop, loops.loop_feeds),
        (loops.recurrent_scan, loops.scan_feeds),
        (loops.nested_loops, loops.nested_feeds),
        (loops.nested_loops, lambda count: loops.nested_feeds(count, deep=False)),
        (loops.convolution_loop, loops.image_feeds),
    ],
    ids=["loop", "scan", "loop in if in loop", "other branch", "convolutions"],
)
def test_results_of_nested_bodies_are_those_of_a_native_run(
    make: Callable[[], onnx.ModelProto], feeds: Callable[[int], list[dict[str, Array]]], engine: Any
) -> None:
    model, proto, given = import_model(make()), make(), feeds(3)
    at_limits = [stepped(model, given, limit=limit, engine=engine) for limit in LIMITS]
    for other in at_limits[1:]:
        assert_same(at_limits[0], other)
    assert engine.alive == 0
    for index, feed in enumerate(given):
        for name, array in native(proto, feed).items():
            assert same(at_limits[0][name][index], array)


def test_a_loop_in_an_if_in_a_loop_iteration_by_iteration() -> None:
    model = import_model(loops.nested_loops())
    feed = loops.nested_feeds(1)[0]
    found = stepped(model, [feed])
    held = {n: len(a) for n, a in found.items()}
    assert (held["u"], held["w"], held["vy"], held["hn"], held["p"]) == (3, 3, 3, 9, 9)
    # The state of the inner Loop starts as that of the outer one and goes out as its result.
    assert all(same(h, u) for h, u in zip(found["h"][::3], found["u"], strict=True))
    assert all(same(h, v) for h, v in zip(found["hn"][2::3], found["vy"], strict=True))
    assert all(same(a, b) for a, b in zip(found["h"][1:3], found["hn"][:2], strict=True))


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
