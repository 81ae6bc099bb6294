"""Each treatment on a case built for it, where it gains, and on one where there is nothing to gain or it hurts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from qcompiler.passes.correct_bias import correction_key
from qcompiler.treatments import try_treatments
from qcompiler.treatments.bias import CorrectBiases, measure_corrections, sure_shift
from qcompiler.treatments.channels import SplitOutliers
from qcompiler.treatments.concats import SeparateConcats, range_ratio
from qcompiler.treatments.equalization import Equalize
from qcompiler.treatments.rounding import RoundWeights
from qcompiler.treatments.trying import likely_variants
from tests.passes.quantize.lab import ENGINE, model_of
from tests.treatments.bench import Bench, bench, feeds_of, normal

F = np.float32
SHAPE = (2, 3, 10, 10)


def layers(spread: float, depthwise: bool = False) -> Bench:
    """Return two layers between which one channel of 16 is louder than the others, and its reader's column quieter."""
    loud = np.where(np.arange(16) == 5, spread, 1.0).astype(F)
    weights = {
        "w": normal(1, 16, 3, 3, 3, scale=0.3) * loud[:, None, None, None], "b": normal(2, 16) * loud,
        "v": normal(3, 8, 16, 1, 1, scale=0.3) / loud[None, :, None, None],
        "d": normal(4, 16, 1, 3, 3, scale=0.5),
    }  # fmt: skip
    middle = "[g] q = Conv<group=16>(r, d) z = Relu(q)" if depthwise else "z = Identity(r)"
    body = f"[a] p = Conv(x, w, b) r = Relu(p) {middle} [e] y = Conv(z, v)"
    if not depthwise:
        del weights["d"]
    return bench(
        model_of("float[2,3,10,10] x", "float[] y", body, weights), feeds_of(0, 6, x=SHAPE), feeds_of(1, 4, x=SHAPE)
    )


@pytest.mark.parametrize("depthwise", [False, True])
def test_equalization_gains_where_one_channel_is_loud(depthwise: bool) -> None:
    given = layers(40.0, depthwise)
    made = try_treatments(given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[Equalize()])
    figures = made.figures["equalize-layers"]
    assert figures["treated_static_db"] > figures["static_db"] + 6.0
    assert "p" in made.parameters["equalize-layers"]
    assert made.statistics.observed("r:equalized")
    assert not made.statistics.observed("r")


def test_equalization_finds_nothing_where_channels_are_even() -> None:
    weights = {"w": np.ones((4, 3, 1, 1), F), "v": np.ones((4, 4, 1, 1), F)}
    given = bench(
        model_of("float[2,3,10,10] x", "float[] y", "p = Conv(x, w) r = Relu(p) y = Conv(r, v)", weights),
        feeds_of(0, 4, x=SHAPE), feeds_of(1, 2, x=SHAPE),
    )  # fmt: skip
    assert Equalize().choose(given.case) == {}


def test_an_equalization_that_hurts_is_refused() -> None:
    given = layers(1.0)

    class Backwards(Equalize):
        def choose(self, case):  # type: ignore[no-untyped-def]
            return {"p": [1.0, -3.0]}  # the loud channels are made louder

    made = try_treatments(given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[Backwards()])
    assert made.figures["equalize-layers"]["treated_static_db"] < made.figures["equalize-layers"]["static_db"] - 1.0
    assert made.parameters == {}
    assert made.workshop is given.workshop


def shifted() -> Bench:
    """Return products whose inputs all have a mean, so that errors of weights shift means."""
    weights = {"m": normal(1, 64, 48), "k": normal(2, 48, 12), "b": normal(3, 48)}
    feeds = [[{"x": f["x"] * 0.3 + 2} for f in feeds_of(seed, 8, x=(16, 64))] for seed in (0, 1)]
    body = "[a] p = MatMul(x, m) q = Add(p, b) r = Relu(q) [e] y = MatMul(r, k)"
    return bench(model_of("float[16,64] x", "float[] y", body, weights), *feeds)


def test_bias_correction_gains_where_means_shift() -> None:
    given = shifted()
    made = try_treatments(
        given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[CorrectBiases()]
    )
    figures = made.figures["correct-bias"]
    for variant in ("static", "dynamic"):
        assert figures[f"treated_{variant}_db"] > figures[f"{variant}_db"] + 3.0
    assert set(made.parameters["correct-bias"]) == {
        correction_key(g, f) for g in ("a", "e") for f in ("static", "dynamic")
    }


def test_corrections_are_measured_in_order_with_those_in_front_in_place() -> None:
    """The second product's correction is what is left of its shift behind the first one's."""
    given = shifted()
    forms = given.case.variants["static"]
    feeds = list(given.case.feeds)[:3]  # so few feeds do not say how sure a mean is: all of the shift is taken
    found = measure_corrections(given.workshop, forms, feeds)
    first = {key: numbers for key, numbers in found.items() if key.startswith("a@")}
    state = given.workshop.base.clone()
    part = CorrectBiases().apply(given.case, first)
    # With only the first one in place, the model's mean error per output is the second one's correction.
    total = np.zeros(12)
    count = 0
    built = ENGINE.load(part.workshop.build(forms).model)
    plain = ENGINE.load(state.model)
    for feed in feeds:
        wanted, got = (next(iter(r.run(feed).values())) for r in (plain, built))
        total += (wanted.astype(np.float64) - got).sum(axis=0)
        count += len(wanted)
    spread = np.abs(total / count).max()
    np.testing.assert_allclose(found["e@static"], total / count, atol=0.02 * spread)


def test_a_correction_holds_only_for_the_form_it_was_measured_in() -> None:
    given = shifted()
    made = CorrectBiases().apply(given.case, {"a@static": [100.0] * 48})
    plain = {g.name: "float" for g in given.workshop.groups}
    feed = given.held_out[0]
    runs = [next(iter(ENGINE.load(w.build(plain).model).run(feed).values())) for w in (given.workshop, made.workshop)]  # type: ignore[arg-type]
    np.testing.assert_array_equal(*runs)


def test_what_may_be_chance_between_feeds_is_not_corrected() -> None:
    given = shifted()
    forms = given.case.variants["static"]
    whole = measure_corrections(given.workshop, forms, given.case.feeds, most=3)
    sure = measure_corrections(given.workshop, forms, given.case.feeds)
    passing = np.array(whole["a@static"]) != 0  # what the Relu stops is not corrected
    assert passing.sum() > 20
    kept = np.array(sure["a@static"])[passing] / np.array(whole["a@static"])[passing]
    assert np.median(kept) > 0.9  # the mean of the input is the same in all feeds


def test_a_shift_that_differs_between_feeds_is_taken_for_chance() -> None:
    rows = np.full(5, 10.0)
    steady = np.array([1.0, 1.1, 0.9, 1.0, 1.0])
    differences = np.stack([steady, [1.0, -1.0, 1.5, -1.5, 0.5], 3 * steady, np.zeros(5)], axis=1)
    found = sure_shift(differences, rows)
    np.testing.assert_allclose(found, [0.996, 0.0, 2.988, 0.0], atol=1e-3)
    np.testing.assert_allclose(sure_shift(differences[:3], rows[:3]), differences[:3].mean(axis=0))


@pytest.mark.parametrize("clip", ["Relu(p)", "Clip(p, zero, six)"])
def test_means_are_those_behind_the_activation(clip: str) -> None:
    """What a Relu or Clip stops is not corrected for: the mean of what passes is that of the float model."""
    weights = {"m": normal(1, 64, 48), "k": normal(2, 48, 32), "b": normal(3, 48)}
    weights |= {"zero": F(0).reshape(()), "six": F(6).reshape(())} if "zero" in clip else {}
    feeds = [{"x": f["x"] * 0.3 + 0.2} for f in feeds_of(0, 3, x=(16, 64))]
    body = f"[a] p0 = MatMul(x, m) p = Add(p0, b) r = {clip} [e] y = MatMul(r, k)"
    given = bench(model_of("float[16,64] x", "float[] y", body, weights), feeds, [])
    forms = given.case.variants["dynamic"]
    found = measure_corrections(given.workshop, forms, feeds, appends=False)

    def mean(parameters: dict[str, list[float]]) -> npt.NDArray[np.float64]:
        workshop = CorrectBiases().apply(given.case, parameters).workshop  # type: ignore[arg-type]
        model = workshop.build({"a": "dynamic"} if parameters else {}).model
        node = next(n for n in model.graph if n.op_type == clip[:4])
        model.graph.outputs.append(node.outputs[0])
        name = str(node.outputs[0].name)
        return np.mean([ENGINE.load(model).run(f)[name].astype(np.float64).mean(axis=0) for f in feeds], axis=0)

    wanted, untreated, treated = mean({}), mean({"a@static": [0.0] * 48}), mean(found)
    before, after = np.abs(untreated - wanted), np.abs(treated - wanted)
    assert after.sum() < 0.25 * before.sum()


def test_few_feeds_are_taken_where_memory_is_short() -> None:
    given = shifted()
    forms = given.case.variants["static"]
    few = measure_corrections(given.workshop, forms, given.case.feeds, memory=1)
    one = measure_corrections(given.workshop, forms, list(given.case.feeds)[:1])
    assert few == one


@pytest.mark.parametrize("method", ["sequential", "soft"])
def test_adaptive_rounding_gains_where_inputs_have_something_in_common(method: str) -> None:
    mix = normal(7, 4, 96)
    # One row of the weights is large and its input small: the other rows are left few steps.
    quiet = np.where(np.arange(96) == 0, 0.05, 1.0).astype(F)
    weights = {"m": normal(1, 96, 32) / quiet[:, None]}
    feeds = [
        [{"x": ((f["z"] @ mix + 0.05 * f["x"]) * quiet).astype(F)} for f in feeds_of(s, 8, z=(16, 4), x=(16, 96))]
        for s in (0, 1)
    ]
    given = bench(model_of("float[16,96] x", "float[] y", "[a] y = MatMul(x, m)", weights), *feeds)
    made = try_treatments(
        given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[RoundWeights(method)]
    )
    figures = made.figures["round-adaptively"]
    assert figures["treated_static_db"] > figures["static_db"] + 1.0
    assert made.parameters == {"round-adaptively": {"a": method}}


def outliers() -> Bench:
    """Return two layers between which one channel is loud and its reader needs it: weights cannot take its spread."""
    loud = np.where(np.arange(24) == 5, 3.0, 1.0).astype(F)
    weights = {"w": normal(1, 24, 3, 3, 3, scale=0.3) * loud[:, None, None, None], "v": normal(3, 8, 24, 1, 1)}
    body = "[a] p = Conv(x, w) r = Relu(p) [e] q = Conv(r, v) y = Relu(q)"
    return bench(
        model_of("float[2,3,10,10] x", "float[] y", body, weights), feeds_of(0, 6, x=SHAPE), feeds_of(1, 4, x=SHAPE)
    )


def test_splitting_an_outlier_channel_narrows_the_range() -> None:
    given = outliers()
    parameters = SplitOutliers().choose(given.case)
    assert parameters["p"][0] == 5
    treated = SplitOutliers().apply(given.case, parameters)
    before, after = (s.range(n)[1] for s, n in ((given.statistics, "r"), (treated.statistics, "r:split")))
    assert after <= before / 1.25
    assert given.decibels(treated) > given.decibels() + 0.5


def test_even_channels_are_not_split() -> None:
    given = layers(1.0)
    assert SplitOutliers().choose(given.case) == {}


HEAD = """[box] u = Conv(x, wb, bb) [cls] s = Conv(x, wc) t = Concat<axis=1>(u, s) d = Reshape(t, flat)
[left] boxes = Slice(d, zero, four, one) scores = Slice(d, four, ten, one)
[l] by = Conv(boxes, wl) [r] p = Conv(scores, wr) y = Tanh(by) z = Tanh(p)"""


def head(spread: float) -> Bench:
    """Return a detector's head: boxes in pixels and scores meet in a Concat, and both are computed with behind it."""
    weights = {
        "wb": normal(1, 4, 8, 1, 1) * F(spread), "bb": np.full(4, spread, F), "wc": normal(3, 6, 8, 1, 1, scale=0.3),
        "flat": np.array([2, 10, -1]), "zero": np.array([0]), "four": np.array([4]), "ten": np.array([10]),
        "one": np.array([1]), "wl": normal(5, 4, 4, 1) / F(spread), "wr": normal(6, 6, 6, 1, scale=0.4),
    }  # fmt: skip
    shape = (2, 8, 6, 6)
    proto = model_of("float[2,8,6,6] x", "float[] y, float[] z", HEAD, weights)
    return bench(proto, feeds_of(0, 6, x=shape), feeds_of(1, 4, x=shape))


def test_one_scale_for_boxes_and_scores_destroys_the_scores_and_separate_ones_do_not() -> None:
    given = head(200.0)
    concat = next(g for g in given.workshop.groups if g.root.op_type == "Concat")
    assert range_ratio(concat, given.statistics) > 100
    variant = likely_variants(given.workshop.groups)["static"]
    assert variant[concat.name] == "static"
    made = try_treatments(
        given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[SeparateConcats()]
    )
    figures = made.figures["separate-concats"]
    assert figures["treated_static_db"] > figures["static_db"] + 10.0
    (groups,) = made.parameters["separate-concats"].values()
    assert {g.root.op_type for g in made.workshop.groups if g.name in groups} == {"Concat", "Reshape", "Slice"}
    build = made.workshop.build(likely_variants(made.workshop.groups)["static"])
    assert build.forms[concat.name] == "float"


def test_a_concat_of_like_branches_keeps_its_integers() -> None:
    given = head(0.3)
    assert SeparateConcats().choose(given.case) == {}


def test_a_separation_that_gains_nothing_is_refused() -> None:
    given = head(0.3)
    concat = next(g.name for g in given.workshop.groups if g.root.op_type == "Concat")

    class Always(SeparateConcats):
        def choose(self, case):  # type: ignore[no-untyped-def]
            return {concat: [concat]}

    made = try_treatments(given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[Always()])
    assert made.parameters == {}
    assert made.workshop.refused == {}
