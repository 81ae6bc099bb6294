"""Measured sensitivity: against the law of rounding noise, against whole builds, against exhaustive runs, its cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from scipy.stats import spearmanr

import qcompiler
from qcompiler.backends.onnxruntime import OrtEngine, OrtRunner
from qcompiler.compilation import Compilation
from qcompiler.engine import EngineOptions, Feeds, ModelLike
from qcompiler.errors import CalibrationError
from qcompiler.options import Options
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.quant.plan import Form
from qcompiler.search.noise import NoiseTable
from qcompiler.search.noise_outputs import Power, Wanted, float_outputs
from qcompiler.search.noise_points import first_nodes, read_variant, switch_points
from qcompiler.search.noise_suffix import cut_suffix, node_works, share_of_work
from qcompiler.sensitivity import measure_noise, sensitivity
from qcompiler.sensitivity_rows import sensitivity_rows
from qcompiler.targets.placement import Policy, propose
from qcompiler.workshop import Workshop
from tests.passes.quantize.lab import model_of, normal

PLAIN = EngineOptions(threads=1, optimize=False)
DEMOS = Path(__file__).resolve().parents[1] / "examples" / "models"
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "models"


class Counting(OrtEngine):
    """ONNX Runtime that counts the nodes it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.executed = 0

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> OrtRunner:
        assert isinstance(model, ir.Model)
        made, engine, nodes = super().load(model, options), self, len(model.graph)

        class Runner(OrtRunner):
            def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
                engine.executed += nodes
                return super().run(feeds, outputs)

        return Runner(made.session)


def prepared(source: object, feeds: object, estimator: str = "min-max") -> tuple[Workshop, list[Feeds]]:
    options = Options(target="ort-x86", calibration=feeds, threads=1)
    compilation = Compilation(source, options)  # type: ignore[arg-type]
    compilation.prepare()
    compilation.workshop.estimator = estimator
    return compilation.workshop, list(compilation.data.held_out)


def variants(workshop: Workshop) -> tuple[dict[str, Form], dict[str, Form]]:
    static = propose(workshop.groups, Policy("static", "static-float", "float", True))
    return static, {g.name: "dynamic" if "dynamic" in g.legal else "float" for g in workshop.groups}


def built(workshop: Workshop, forms: Mapping[str, Form]) -> tuple[ir.Model, object]:
    state = workshop.base.clone()
    state.forms = {g.name: forms.get(g.name, "float") for g in workshop.groups}
    Pipeline((PlanQuantization(estimator=workshop.estimator), InsertQdq())).run(state)
    return state.model, state.plan


def measured(workshop: Workshop, feeds: list[Feeds], whole: int = 1000) -> NoiseTable:
    return measure_noise(workshop, *variants(workshop), feeds, OrtEngine(), PLAIN, whole=whole)


def product(rows: int = 64) -> tuple[object, list[Feeds]]:
    """Return y = x @ w with x uniform in [-1, 1], and feeds of which each reaches both ends."""
    random = np.random.default_rng(5)
    feeds = []
    for _ in range(8):
        x = random.uniform(-1, 1, (rows, 64)).astype(np.float32)
        x[0, :2] = -1, 1
        feeds.append({"x": x})
    return model_of("float[N,64] x", "float[N,64] y", "[m] y = MatMul(x, w)", {"w": normal(1, 64, 64)}), feeds


def branchy() -> tuple[object, list[Feeds]]:
    """Return a net with a shared value, a mover, a Concat, a residual, and two outputs."""
    body = """
      [c1] a = Conv<pads=[1,1,1,1]>(x, w1) [r1] b = Relu(a)
      [c2] c = Conv<pads=[1,1,1,1]>(b, w2) [c3] d = Conv<pads=[1,1,1,1]>(b, w3)
      [s] e = Add(c, d) [p] f = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)
      [c4] g = Conv<pads=[1,1,1,1]>(f, w2) [k] h = Concat<axis=1>(f, g) [c5] y = Conv(h, w5) [t] z = Tanh(e)
    """
    weights = {"w1": normal(1, 8, 3, 3, 3), "w2": normal(2, 8, 8, 3, 3), "w3": normal(3, 8, 8, 3, 3)}
    weights["w5"] = normal(5, 16, 16, 1, 1)
    random = np.random.default_rng(3)
    feeds = [{"x": random.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(8)]
    return model_of("float[1,3,16,16] x", "float[1,16,8,8] y, float[1,8,16,16] z", body, weights), feeds


def test_the_noise_of_a_uniform_input_is_step_squared_over_twelve() -> None:
    """White rounding noise passes a matrix product as the uniform signal does: 12 / (2 / 255)^2 = 48.1 dB below it."""
    workshop, feeds = prepared(*product())
    table = measured(workshop, feeds)
    step = 2.0 / 255
    expected = (step * step / 12) / (1.0 / 3.0)
    # 64 rows of 64 outputs: the estimate of a mean square has a relative deviation of about sqrt(2 / 4096) = 2 %.
    assert table.points["read:x@m"]["y"] == pytest.approx(expected, rel=0.1)
    assert table.points["dynamic:x@m"]["y"] == pytest.approx(expected, rel=0.1)
    w = normal(1, 64, 64)
    steps = np.abs(w).max(0) / 127
    rounding = float((steps**2 / 12).mean() / np.square(w).mean())
    assert table.points["weight:m"]["y"] == pytest.approx(rounding, rel=0.1)


@pytest.mark.parametrize("which", [0, 1])
def test_all_switches_on_is_the_variant_and_all_off_is_float(which: int) -> None:
    for source, data in (branchy(), product(4)):
        workshop, feeds = prepared(source, data)
        qdq, plan = built(workshop, variants(workshop)[which])
        base, _, _ = float_outputs(workshop.base.model)
        variant = read_variant(base, qdq, workshop.groups, plan)  # type: ignore[arg-type]
        if not variant.points:
            continue  # nothing of it can be dynamic
        engine = OrtEngine()
        suffix = cut_suffix(base, first_nodes(variant, variant.points))
        switched = switch_points(variant, variant.points, engine, suffix.model)
        # The whole graph, and three operators per activation and reader, which count by the elements they write.
        assert 0.9 < share_of_work(suffix.model, node_works(base, feeds[0])) < 1.5
        assert suffix.feeds == ("x",)
        runner = engine.load(switched.model, PLAIN)
        for on, model in ((True, qdq), (False, base)):
            arrays = {name: np.asarray(on) for name in switched.switches.values()}
            arrays |= {name: pair[on] for inputs in switched.weights.values() for name, pair in inputs.items()}
            wanted, actual = engine.load(model, PLAIN).run(feeds[0]), runner.run({**feeds[0], **arrays})
            assert set(wanted) <= set(actual)
            for name, array in wanted.items():
                np.testing.assert_array_equal(array, actual[name])


def test_a_stored_value_has_one_point_each_reader_of_a_float_its_own_and_a_mover_is_covered() -> None:
    workshop, feeds = prepared(*branchy())
    table = measured(workshop, feeds)
    static = variants(workshop)[0]
    assert table.covered["value:f"] == (("p", "static"),)
    assert [g for g, forms in table.asks.items() if "value:b" in forms.get("static", ())] == ["c1"]
    assert table.shared["reads:b"] == ("read:b@c2", "read:b@c3")
    # Nothing but those two reads b: stored or read by both, it is rounded alike.
    assert table.points["value:b"] == table.points["reads:b"]
    own = {g: table.noise(f"weight:{g}")["y"] + table.noise(f"value:{v}")["y"] for g, v in (("c2", "c"), ("c3", "d"))}
    assert table.of({"c2": "static"})["y"] == pytest.approx(table.noise("read:b@c2")["y"] + own["c2"])
    both = table.of({"c2": "static", "c3": "static"})["y"]
    assert both - sum(own.values()) == pytest.approx(table.noise("reads:b")["y"], rel=1e-6)
    whole = {g: f for g, f in static.items() if f != "float"}
    stored = {p for g in whole for p in table.asks[g][whole[g]] if p not in table.covered}
    raw = sum(table.points[p]["y"] for p in stored | {"read:x@c1"})
    assert table.of(whole)["y"] == pytest.approx(raw * table.factors["static"]["y"], rel=1e-6)
    # Behind the pool the value has the scale of the sum: to store it adds nothing to what the pool reads.
    assert table.of({"p": "static"})["y"] == pytest.approx(table.noise("read:e@p")["y"])


def test_a_point_adds_nothing_at_an_output_it_does_not_reach() -> None:
    workshop, feeds = prepared(*branchy())
    table = measured(workshop, feeds)
    assert table.points["value:h"]["z"] == 0.0
    assert table.points["value:h"]["y"] > 0
    assert table.points["value:b"]["z"] > 0


def test_the_whole_variant_is_predicted_as_it_was_measured() -> None:
    workshop, feeds = prepared(*branchy())
    table = measured(workshop, feeds)
    static = workshop.build(variants(workshop)[0]).forms
    assert table.of(static)["y"] == pytest.approx(table.joint["static"]["y"], rel=1e-6)
    assert all(0.5 < factor < 2.0 for factor in table.factors["static"].values())


def test_an_arg_max_is_measured_in_front_of_it() -> None:
    body = "[m] a = MatMul(x, w) [k] y = ArgMax<axis=1>(a)"
    source = model_of("float[N,64] x", "int64[N,1] y", body, {"w": normal(1, 64, 64)})
    workshop, feeds = prepared(source, product()[1])
    table = measured(workshop, feeds)
    assert table.outputs == ("a",)
    assert 1e-6 < table.points["read:x@m"]["a"] < 1e-4


def test_a_branch_that_never_ran_is_infinite_with_a_reason() -> None:
    body = """
      [n] s = ReduceSum<keepdims=0>(x) [g] i = Greater(s, big) [i] y = If(i)
        <then_branch = t () => (float[4,64] u) {[m1] u = MatMul(x, w)},
         else_branch = e () => (float[4,64] v) {[m2] v = MatMul(x, w)}>
    """
    weights = {"w": normal(1, 64, 64), "big": np.float32(1e9)}
    source = model_of("float[4,64] x", "float[4,64] y", body, weights)  # type: ignore[arg-type]
    workshop, feeds = prepared(source, product(4)[1])
    table = measured(workshop, feeds)
    taken = next(g for g in table.asks if "m2" in g)
    other = next(g for g in table.asks if "m1" in g)
    assert 0 < table.of({taken: "dynamic"})["y"] < 1e-3
    assert math.isfinite(table.of({taken: "static-float"})["y"])
    assert table.points[f"weight:{other}"]["y"] == 0.0
    assert table.points[f"weight:{taken}"]["y"] > 0


def test_no_feeds_is_a_clear_error() -> None:
    workshop, _ = prepared(*product())
    with pytest.raises(CalibrationError, match="there are none; give --calibration"):
        measure_noise(workshop, *variants(workshop), [], OrtEngine())


def test_a_model_without_floats_is_a_clear_error() -> None:
    source = model_of("int64[2] x", "int64[2] y", "[a] y = Add(x, x)")
    with pytest.raises(CalibrationError, match="computes no floats"):
        sensitivity(source, Options(target="ort-x86", calibration=[{"x": np.arange(2)}] * 2))


def exhaustive(workshop: Workshop, feeds: list[Feeds], groups: Sequence[tuple[str, Form]]) -> list[float]:
    """Return the noise at the first output of builds in which one group alone is quantized."""
    engine = OrtEngine()
    base = engine.load(workshop.base.model, PLAIN)
    name = base.outputs[0].name
    wanted = [base.run(f, [name])[name].astype(np.float64) for f in feeds]
    found = []
    for group, form in groups:
        runner = engine.load(built(workshop, {group: form})[0], PLAIN)
        noise = sum(float(np.square(runner.run(f, [name])[name] - w).sum()) for f, w in zip(feeds, wanted, strict=True))
        found.append(noise / sum(float(np.square(w).sum()) for w in wanted))
    return found


def agreement(
    workshop: Workshop, held_out: list[Feeds], others: list[Feeds], every: int = 1
) -> tuple[float, NoiseTable]:
    table = measure_noise(workshop, *variants(workshop), held_out, OrtEngine(), PLAIN, whole=32)
    static = workshop.build(variants(workshop)[0]).forms
    pairs: list[tuple[str, Form]] = [(g, f) for g, f in static.items() if f != "float"]
    pairs += [(g, "dynamic") for g, f in variants(workshop)[1].items() if f == "dynamic"]
    pairs = pairs[::every]
    truth = exhaustive(workshop, others, pairs)
    predicted = [table.of({g: f})[table.outputs[0]] for g, f in pairs]
    kept = [(t, p) for t, p in zip(truth, predicted, strict=True) if t > 0]
    return float(spearmanr(*zip(*kept, strict=True)).statistic), table


def npz_feeds(path: Path, rows: slice) -> list[Feeds]:
    with np.load(path) as arrays:
        return [{name: arrays[name][rows] for name in arrays.files}]


def test_the_ranking_of_groups_is_that_of_exhaustive_builds_on_a_demo_model() -> None:
    data = DEMOS / "digits_resnet_calib.npz"
    workshop, held_out = prepared(DEMOS / "digits_resnet.onnx", data)
    rank, table = agreement(workshop, held_out, npz_feeds(data, slice(0, 64)))
    assert rank >= 0.8
    assert table.evaluations < 25


def test_the_ranking_of_groups_is_that_of_exhaustive_builds_on_a_language_model() -> None:
    """Where query, key and value projections read one tensor, each group has its own part of the noise."""
    data = DEMOS / "code_lm_calib.npz"
    workshop, held_out = prepared(DEMOS / "code_lm.onnx", data)
    rank, table = agreement(workshop, held_out, npz_feeds(data, slice(0, 4)), every=3)
    assert rank >= 0.8
    assert table.evaluations < 25


def test_the_ranking_of_points_is_that_of_exhaustive_runs_on_a_language_model() -> None:
    """Points that several groups read are no groups' own, so each point is run alone, through the whole graph."""
    data = DEMOS / "code_lm_calib.npz"
    workshop, held_out = prepared(DEMOS / "code_lm.onnx", data)
    table = measured(workshop, held_out, 32)
    qdq, plan = built(workshop, variants(workshop)[0])
    variant = read_variant(workshop.base.model, qdq, workshop.groups, plan)  # type: ignore[arg-type]
    # Every third one: enough for a rank, and a third of the time.
    points = variant.points[::3]
    engine = OrtEngine()
    switched = switch_points(variant, points, engine)
    runner = engine.load(switched.model, EngineOptions(threads=1))
    off: dict[str, np.ndarray] = {name: np.asarray(False) for name in switched.switches.values()}  # type: ignore[type-arg]
    off |= {name: pair[0] for inputs in switched.weights.values() for name, pair in inputs.items()}
    (feed,) = npz_feeds(data, slice(0, 4))
    wanted = runner.run({**feed, **off})["logits"].astype(np.float64)
    truth = []
    for point in points:
        on = {switched.switches[point]: np.asarray(True)} if point in switched.switches else {}
        on |= {name: pair[1] for name, pair in switched.weights.get(point, {}).items()}
        truth.append(float(np.square(runner.run({**feed, **off, **on})["logits"] - wanted).sum()))
    rank = spearmanr(truth, [table.points[p]["logits"] for p in points]).statistic
    assert rank >= 0.8
    assert table.evaluations < 25


def test_the_ranking_is_that_of_exhaustive_runs_on_a_reference_model() -> None:
    folder = REFERENCE / "resnet8_cifar10"
    if not folder.is_dir():
        pytest.skip("the reference models are not here")
    sys.path.insert(0, str(REFERENCE))
    try:
        from load import load  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(REFERENCE))
    given = load("resnet8_cifar10")
    workshop, held_out = prepared(given.path, given.calib[:16])
    rank, table = agreement(workshop, held_out, given.calib[:2])
    assert rank >= 0.8
    assert table.evaluations < 25


def deep(layers: int) -> tuple[object, list[Feeds]]:
    """Return a chain of convolutions with 200 points and more, and 32 feeds."""
    lines = [
        f"[c{i}] v{i} = Conv<pads=[1,1,1,1]>({'x' if i == 0 else f'v{i - 1}'}, w{i % 4})" for i in range(layers - 1)
    ]
    lines.append(f"[last] y = Conv<pads=[1,1,1,1]>(v{layers - 2}, w0)")
    weights = {f"w{i}": normal(i, 8, 8, 3, 3) / 8 for i in range(4)}
    random = np.random.default_rng(1)
    feeds = [{"x": random.standard_normal((1, 8, 8, 8)).astype(np.float32)} for _ in range(32)]
    return model_of("float[1,8,8,8] x", "float[1,8,8,8] y", " ".join(lines), weights), feeds


def test_two_hundred_groups_cost_less_than_25_evaluations() -> None:
    source, data = deep(200)
    workshop, feeds = prepared(source, data)
    engine = Counting()
    table = measure_noise(workshop, *variants(workshop), feeds, engine, PLAIN, whole=len(data))
    assert sum(len(p) for p in table.points.values()) >= 400
    assert table.evaluations < 25
    # The float graph has 200 nodes; what quantizes and switches is counted, too.
    assert engine.executed < 25 * len(data) * 200


def test_sensitivity_of_a_file(tmp_path: Path) -> None:
    source, feeds = branchy()
    found = sensitivity(source, Options(target="ort-x86", calibration=feeds))  # type: ignore[arg-type]
    assert [name for name, _ in found.groups] == ["c1", "c2", "c3", "s", "p", "c4", "k", "c5"]
    assert found.variants["static"]["c1"] == "static"
    assert set(found.table.outputs) == {"y", "z"}


def test_the_shares_of_all_groups_are_the_whole_noise() -> None:
    source, feeds = branchy()
    rows = sensitivity_rows(sensitivity(source, Options(target="ort-x86", calibration=feeds)))  # type: ignore[arg-type]
    for name in ("y", "z"):
        assert sum(row.share[name] for row in rows if row.variant == "static") == pytest.approx(1.0)
    for row in rows:
        assert sum(row.points.values()) == pytest.approx(max(row.share.values()), rel=1.0)
    # Both readers of b share its noise with what stores it: it is stored, so that it is the writer's alone.
    assert "value:b" in next(row for row in rows if row.group == "c1").points
    assert not any("read:b@c2" in row.points for row in rows)


def test_what_neither_variant_asks_for_is_left_out_unless_everything_is_wanted() -> None:
    workshop, feeds = prepared(*branchy())
    static = {"c1": "static"}
    table = measure_noise(workshop, static, {}, feeds, OrtEngine(), PLAIN)  # type: ignore[arg-type]
    assert math.isfinite(table.of({"c1": "static"})["y"])
    assert table.of({"c4": "static"})["y"] == math.inf
    assert "neither variant" in table.reasons["weight:c4"]
    table = measure_noise(workshop, static, {}, feeds, OrtEngine(), PLAIN, everything=True)  # type: ignore[arg-type]
    assert 0 < table.of({"c4": "static"})["y"] < 1e-2


def test_power_counts_what_is_finite_in_float_and_is_infinite_where_the_other_is_not() -> None:
    power = Power()
    power.add(Wanted(np.float32([3, np.inf, 4])), np.float32([3, 7, 4.5]))
    assert (power.signal, power.noise, power.relative) == (25.0, 0.25, 0.01)
    power.add(Wanted(np.float32([1, 2])), np.float32([1, np.nan]))
    assert power.relative == math.inf
    assert Power().relative == 0.0


def test_noise_is_told_per_section_and_plans_hold_each() -> None:
    """Boxes are a thousand times larger than probabilities: judged as a whole, the scores could be lost unseen."""
    body = (
        "h = Conv<pads=[1,1,1,1]>(x, w) r = Relu(h) box = Conv(r, wb) cls = Conv(r, wc) p = Sigmoid(cls) "
        "y = Concat<axis=1>(box, p)"
    )
    weights = {"w": normal(1, 16, 3, 3, 3), "wb": 300 * normal(2, 4, 16, 1, 1), "wc": normal(3, 12, 16, 1, 1)}
    model = model_of("float[1,3,16,16] x", "float[1,16,16,16] y", body, weights)
    feeds = [{"x": normal(seed, 1, 3, 16, 16)} for seed in range(8)]
    sections = ("y[:, 0:4]", "y[:, 4:16]")
    table = sensitivity(model, Options(target="ort-x86", calibration=feeds, threads=1)).table
    assert table.outputs == sections
    finite = [noise for noise in table.points.values() if all(map(math.isfinite, noise.values()))]
    assert any(noise[sections[0]] > 0 == noise[sections[1]] for noise in finite)  # the box branch's own points
    assert any(noise[sections[1]] > 0 == noise[sections[0]] for noise in finite)
    made = qcompiler.compile(model, target="ort-x86", calibration=feeds, threads=1)
    assert made.report.quality is not None
    assert set(made.report.quality.sqnr_db) == set(sections)
    assert made.report.quality.worst >= 18.0
