"""What is kept: what gains beyond chance, on top of what was kept before; and that a record repeats it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest

from qcompiler.errors import CalibrationError, PassError
from qcompiler.ir.serialize import to_bytes
from qcompiler.quant.plan import Form
from qcompiler.search.timing import Timing
from qcompiler.treatments import (
    LAST,
    TREATMENTS,
    Case,
    Parameters,
    Terms,
    correct_final,
    replay_treatments,
    try_treatments,
)
from qcompiler.treatments.bias import CorrectBiases, measure_corrections
from qcompiler.treatments.equalization import Equalize
from qcompiler.treatments.rounding import RoundWeights
from qcompiler.treatments.trying import likely_variants
from qcompiler.workshop import Workshop
from tests.passes.quantize.lab import model_of
from tests.treatments.bench import Bench, bench, feeds_of, normal

WEIGHTS = {
    "w": normal(1, 8, 3, 3, 3, scale=0.3), "b": normal(2, 8), "v": normal(3, 8, 8, 3, 3, scale=0.2),
    "m": normal(4, 8, 10), "axes": np.array([2, 3]),
}  # fmt: skip
BODY = """[a] p = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(p) [f] s = Conv<pads=[1,1,1,1]>(r, v) t = Relu(s)
k = ReduceMean<keepdims=0>(t, axes) [e] y = MatMul(k, m)"""


def net() -> Bench:
    proto = model_of("float[4,3,8,8] x", "float[4,10] y", BODY, WEIGHTS)
    return bench(proto, feeds_of(0, 8, x=(4, 3, 8, 8)), feeds_of(1, 6, x=(4, 3, 8, 8)))


@dataclass(frozen=True)
class Shifted:
    """A treatment that adds the same number to every channel of the first layer's bias: wrong unless it is tiny."""

    by: float
    name: str = "correct-bias"
    least_gain_db: float = 0.1
    costs_time: bool = False
    applied: list[Parameters] = field(default_factory=list)

    def choose(self, case: Case) -> Parameters:
        return {"a@static": [self.by] * 8}

    def parts(self, parameters: Parameters) -> list[Parameters]:
        return [parameters]

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        return {}

    def apply(self, case: Case, parameters: Parameters) -> Case:
        self.applied.append(parameters)
        return CorrectBiases().apply(case, parameters)


@dataclass
class Clock:
    """A stopwatch on which everything treated takes so many percent longer."""

    percent: float

    def compare(self, models: Mapping[str, object]) -> dict[str, Timing]:
        return {n: Timing(1.0 if n == "plain" else 1.0 + self.percent / 100.0, 1.0, 1) for n in models}

    def profile(self, model: object) -> object:
        raise AssertionError("nothing is profiled here")


def test_what_hurts_is_tried_and_refused() -> None:
    given = net()
    wrong = Shifted(0.5)
    made = try_treatments(given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[wrong])
    assert len(wrong.applied) == 1
    assert made.parameters == {}
    assert made.workshop is given.workshop
    figures = made.figures["correct-bias"]
    assert figures["kept"] == 0.0
    assert figures["treated_static_db"] < figures["static_db"] - 3


def test_what_gains_is_kept_on_top_of_what_was_kept_before() -> None:
    given = net()
    lines: list[str] = []
    candidates = (*TREATMENTS, CorrectBiases())
    made = try_treatments(
        given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=candidates, say=lines.append
    )
    assert "round-adaptively" in made.parameters
    assert [line.split(":")[0] for line in lines] == [t.name for t in candidates]
    assert "smooth-activations: nothing to do" in lines
    (line,) = (line for line in lines if line.startswith("round-adaptively: "))
    before, after = map(float, line.removeprefix("round-adaptively: ").removesuffix(" dB, kept").split(" -> "))
    assert abs(before - made.figures["round-adaptively"]["static_db"]) <= 0.06  # printed with one digit
    assert abs(after - made.figures["round-adaptively"]["treated_static_db"]) <= 0.06
    kept = [made.figures[name] for name in made.parameters]
    assert kept
    for before, after in pairwise(kept):
        assert after["static_db"] == before["treated_static_db"]
    assert kept[-1]["treated_static_db"] > made.figures[next(iter(made.figures))]["static_db"] + 1.0
    case = replace(given.case, workshop=made.workshop, statistics=made.statistics)
    assert given.decibels(case) > given.decibels() + 0.7


def test_a_gain_must_be_worth_the_time_it_costs() -> None:
    given = net()
    slow = replace(RoundWeights(), costs_time=True)
    for percent, kept in ((0.0, True), (60.0, False)):
        made = try_treatments(
            given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[slow],
            stopwatch=Clock(percent),  # type: ignore[arg-type]
        )  # fmt: skip
        assert (slow.name in made.parameters) is kept
        assert made.figures[slow.name]["latency_percent"] == percent


def test_nothing_is_tried_where_the_model_is_accurate_enough() -> None:
    given = net()
    shifted = Shifted(0.5)
    made = try_treatments(
        given.workshop, given.statistics, given.case.feeds, given.held_out,
        candidates=[CorrectBiases(), shifted], terms=Terms(enough_db=5.0),
    )  # fmt: skip
    assert shifted.applied == []
    assert made.figures == {}


def test_a_model_without_anything_to_quantize_is_left_alone() -> None:
    given = bench(model_of("float[2,4] x", "float[2,4] y", "y = Tanh(x)"), feeds_of(0, 2, x=(2, 4)), [])
    made = try_treatments(given.workshop, given.statistics, given.case.feeds, given.held_out)
    assert (made.workshop, made.figures) == (given.workshop, {})


@pytest.mark.parametrize("treatment", [Equalize(), RoundWeights(), RoundWeights("soft"), CorrectBiases()])
def test_the_same_data_and_parameters_give_the_same_bytes(treatment) -> None:  # type: ignore[no-untyped-def]
    builds = []
    parameters: Parameters = {}
    for _ in range(2):
        given = net()
        parameters = parameters or json.loads(json.dumps(treatment.choose(given.case)))
        made = replay_treatments(
            given.workshop, given.statistics, given.case.feeds, {treatment.name: parameters}, candidates=[treatment]
        )
        forms = likely_variants(made.workshop.groups)["static"]
        builds.append(to_bytes(made.workshop.build(forms).model))
    assert builds[0] == builds[1]
    assert builds[0] != to_bytes(net().workshop.build(likely_variants(net().workshop.groups)["static"]).model)


def test_a_replay_repeats_what_trying_kept() -> None:
    given = net()
    made = try_treatments(given.workshop, given.statistics, given.case.feeds, given.held_out)
    fresh = net()
    again = replay_treatments(fresh.workshop, fresh.statistics, fresh.case.feeds, made.parameters)
    forms = likely_variants(made.workshop.groups)["static"]
    assert to_bytes(again.workshop.build(forms).model) == to_bytes(made.workshop.build(forms).model)


def test_biases_are_corrected_for_the_forms_and_ranges_in_force() -> None:
    given = net()
    forms = {"a": "static", "f": "static", "e": "float"}
    workshop = replace(given.workshop, estimator="percentile:99.99")
    made = correct_final(workshop, given.statistics, forms, given.case.feeds, given.held_out)  # type: ignore[arg-type]
    (figures,) = made.figures.values()
    assert figures["kept"] == 1.0
    assert figures["treated_final_db"] > figures["final_db"] + 0.1
    assert set(made.parameters["correct-bias"]) == {"a@static", "f@static"}
    assert made.workshop.estimator == "percentile:99.99"
    again = replay_treatments(workshop, given.statistics, given.case.feeds, made.parameters)
    builds = [to_bytes(w.build(forms).model) for w in (made.workshop, again.workshop, workshop)]  # type: ignore[arg-type]
    assert builds[0] == builds[1] != builds[2]


def test_corrections_depend_on_the_ranges_that_they_are_measured_under() -> None:
    """Measured under wide ranges and applied under narrow ones they are those of another model."""
    given = net()
    forms = given.case.variants["static"]
    wide, narrow = (replace(given.workshop, estimator=e) for e in ("min-max", "percentile:99"))
    first, second = (measure_corrections(w, forms, given.case.feeds) for w in (wide, narrow))
    stale = given.decibels(replace(CorrectBiases().apply(replace(given.case, workshop=narrow), first)))
    fresh = given.decibels(replace(CorrectBiases().apply(replace(given.case, workshop=narrow), second)))
    assert fresh > stale


def test_nothing_is_corrected_last_where_all_is_float_or_the_model_stays_as_given() -> None:
    given = net()
    floats: dict[str, Form] = dict.fromkeys(("a", "f", "e"), "float")
    static: dict[str, Form] = {**floats, "a": "static"}
    for forms, engine_forms in ((floats, {}), (static, {"as-given": "keep"})):
        made = correct_final(
            given.workshop, given.statistics, forms, given.case.feeds, given.held_out, engine_forms=engine_forms
        )
        assert (made.workshop, made.figures) == (given.workshop, {})


def test_a_matmul_without_a_bias_gets_none_at_the_end() -> None:
    weights = {"m": normal(1, 64, 48), "k": normal(2, 48, 32), "b": normal(3, 48)}
    feeds = [{"x": f["x"] * 0.3 + 2} for f in feeds_of(0, 8, x=(16, 64))]
    body = "[a] p = MatMul(x, m) q = Add(p, b) r = Relu(q) [e] y = MatMul(r, k)"
    given = bench(model_of("float[16,64] x", "float[] y", body, weights), feeds, [])
    forms = given.case.variants["dynamic"]
    assert set(measure_corrections(given.workshop, forms, feeds)) == {"a@dynamic", "e@dynamic"}
    assert set(measure_corrections(given.workshop, forms, feeds, appends=False)) == {"a@dynamic"}


def variants(convolutions: int) -> list[str]:
    """Return the variants of so many convolutions and a product behind them."""
    body, weights = "t0 = Conv(x, w0)", {"w0": normal(0, 64, 3, 1, 1)}
    for i in range(1, convolutions):
        body += f" t{i} = Conv(t{i - 1}, w{i})"
        weights[f"w{i}"] = normal(i, 64, 64, 1, 1)
    body += f" k = ReduceMean<keepdims=0>(t{convolutions - 1}, axes) y = MatMul(k, m)"
    weights |= {"axes": np.array([2, 3]), "m": normal(9, 64, 64)}
    proto = model_of("float[16,3,4,4] x", "float[] y", body, weights)
    return list(likely_variants(bench(proto, feeds_of(0, 1, x=(16, 3, 4, 4)), []).workshop.groups))


def test_a_variant_that_is_nearly_the_first_is_not_measured() -> None:
    assert variants(12) == ["static"]
    assert variants(2) == ["static", "dynamic"]


def test_a_record_with_treatments_needs_the_data_and_known_names() -> None:
    given = net()
    with pytest.raises(CalibrationError, match="give the calibration data"):
        replay_treatments(given.workshop, None, None, {"correct-bias": {}})
    with pytest.raises(PassError, match="unknown treatment 'magic'"):
        replay_treatments(given.workshop, given.statistics, given.case.feeds, {"magic": {}})
    assert replay_treatments(given.workshop, None, None, {}).workshop is given.workshop


def test_the_names_of_treatments_are_those_of_passes() -> None:
    from qcompiler.passes.catalog import PASSES

    names = {t.name for t in (*TREATMENTS, LAST)}
    assert names - {cls.name() for cls in PASSES} == {"separate-concats"}
    assert len(names) == len(TREATMENTS) + 1


def test_a_treated_workshop_keeps_its_passes_through_replace() -> None:
    workshop: Workshop = replace(net().workshop, refused={"a": "why"})
    assert [type(p).__name__ for p in workshop.passes(())][:4] == [
        "PlanQuantization", "RoundAdaptively", "CorrectBias", "InsertQdq",
    ]  # fmt: skip
