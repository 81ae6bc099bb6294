"""The proof loop on invented tables: what they tell wrongly is found out, corrected, and never chosen twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from qcompiler.planner import ROUNDS, SEARCH_ROUNDS, Planner, Proof, Tables, best_proof
from qcompiler.quant.plan import Form
from qcompiler.search.accuracy import Bound, Terms
from qcompiler.search.borders import find_borders
from qcompiler.search.costs import CostTable
from qcompiler.search.demand import CLOSE_DB, Demand
from qcompiler.search.file_sizes import FileSizes
from qcompiler.search.forms_problem import Sizes
from qcompiler.search.noise_fit import corrected, fitted
from qcompiler.search.observations import Observation
from qcompiler.search.problem import Cause, Charge, Limits, Option, Problem
from qcompiler.search.quality import Quality, decibels
from qcompiler.search.solution import InfeasibleError, evaluate
from tests.search.nets import chain, net

Forms = Mapping[str, Form]
MODEL, GROUPS = net(chain("Conv", "Conv", "Conv", "Conv", "Conv", "Conv"))
NAMES = tuple(GROUPS)
FLOAT_US, STATIC_US = (90.0, 40.0, 70.0, 55.0, 120.0, 30.0), (30.0, 25.0, 20.0, 24.0, 50.0, 14.0)
NOISE = (3e-4, 2e-5, 9e-5, 4e-4, 6e-5, 1e-5)
FIXED_US = 10.0
TERMS = Terms(comfort_db=0.0)
"""Nothing is bought beyond the bound: the fastest plan that holds is the answer."""


@dataclass(frozen=True)
class Told:
    """A table of noise: one point per group."""

    powers: Mapping[str, float]
    outputs: tuple[str, ...] = ("y",)

    def barred(self) -> frozenset[tuple[str, str]]:
        return frozenset()

    def charges(self, allowed: Mapping[str, Sequence[str]]) -> tuple[Charge, ...]:
        return tuple(
            Charge(f"weight:{g}", (Cause(((g, "static"),)),), noise={"y": self.powers[g]})
            for g, forms in allowed.items()
            if "static" in forms
        )


def static_of(forms: Forms) -> tuple[str, ...]:
    return tuple(g for g in NAMES if forms.get(g, "float") == "static")


def plain_us(forms: Forms) -> float:
    each = zip(NAMES, FLOAT_US, STATIC_US, strict=True)
    return FIXED_US + sum(b if forms.get(g, "float") == "static" else a for g, a, b in each)


def plain_noise(forms: Forms) -> float:
    return sum(power for g, power in zip(NAMES, NOISE, strict=True) if g in static_of(forms))


@dataclass
class World:
    """What is true, and what is asked: a planner finds it out by building.

    Attributes:
        us, noise: time and noise power of a choice, as they are.
        metric: a user's metric by the noise power.
        header: bytes of the file that no table knows.
    """

    us: Callable[[Forms], float] = plain_us
    noise: Callable[[Forms], float] = plain_noise
    metric: Callable[[float], float] | None = None
    header: int = 0
    evaluated: list[dict[str, Form]] = field(default_factory=list)

    def evaluate(self, forms: Forms) -> Quality:
        self.evaluated.append(dict(forms))
        power = self.noise(forms)
        return Quality({"y": decibels(power)}, metric=None if self.metric is None else self.metric(power))

    def observe(self, forms: Forms) -> Observation:
        whole = self.us(forms)
        scale = (whole - FIXED_US) / (plain_us(forms) - FIXED_US)
        each = zip(NAMES, FLOAT_US, STATIC_US, strict=True)
        groups = {g: scale * (b if g in static_of(forms) else a) for g, a, b in each}
        return Observation(dict(forms), groups, {}, {"lone": FIXED_US}, whole)

    def size(self, forms: Forms) -> FileSizes:
        groups = {g: 100 if g in static_of(forms) else 400 for g in NAMES}
        return FileSizes(dict(forms), groups, {}, 0, sum(groups.values()) + 50 + self.header, 8 * sum(groups.values()))

    def planner(self, bound: Bound, limits: Limits | None = None, objective: str = "latency") -> Planner:
        each = zip(NAMES, FLOAT_US, STATIC_US, strict=True)
        borders = find_borders(list(GROUPS.values()), {})
        costs = CostTable({g: {"float": a, "static": b} for g, a, b in each}, {}, FIXED_US, borders)
        tables = Tables(list(GROUPS.values()), dict.fromkeys(NAMES, ("static",)), costs)
        told = Told(dict(zip(NAMES, NOISE, strict=True)))
        limits = limits or Limits()
        if limits.bytes is not None or limits.bits is not None or objective == "bytes":
            by_form = {g: {"float": 400, "static": 100} for g in NAMES}
            bits = {g: {"float": 3200, "static": 800} for g in NAMES}
            tables.sizes = Sizes(by_form, {}, {}, 50, 100 * len(NAMES), bits)
        return Planner(
            tables, self.evaluate, self.observe, lambda: told, bound, limits, TERMS,  # type: ignore[arg-type,return-value]
            objective=objective, size=None if tables.sizes is None else self.size,
            reference=None if self.metric is None else self.metric(0.0),
        )  # fmt: skip

    def best(self, holds: Callable[[Forms], bool]) -> float:
        """Return the least time over all choices that hold, tried one by one."""
        return min(self.us(forms) for forms in every() if holds(forms))


def every() -> Iterator[dict[str, Form]]:
    for chosen in itertools.product(("float", "static"), repeat=len(NAMES)):
        yield dict(zip(NAMES, chosen, strict=True))  # type: ignore[arg-type]


def chosen(planner: Planner) -> Proof:
    proofs = {str(n): proof for n, proof in enumerate(planner.run())}
    return proofs[best_proof(proofs, {n: p.measured_us for n, p in proofs.items()}, TERMS, planner.objective)]


def test_what_the_tables_tell_rightly_takes_two_plans() -> None:
    world = World()
    planner = world.planner(Bound({"y": 34.0}))
    found = chosen(planner)
    assert found.held
    assert found.measured_us == pytest.approx(world.best(lambda f: decibels(world.noise(f)) >= 34.0))
    assert len(planner.proofs) == 2, "the fastest of all, and the one with noise known"
    assert planner.proofs[0].forms == dict.fromkeys(NAMES, "static")


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_noise_that_is_told_wrong_by_6_db_is_corrected(factor: float) -> None:
    world = World(noise=lambda forms: factor * plain_noise(forms))
    planner = world.planner(Bound({"y": 34.0}))
    found = chosen(planner)
    assert found.quality is not None
    assert found.quality.sqnr_db["y"] >= 34.0
    assert found.measured_us == pytest.approx(world.best(lambda f: decibels(world.noise(f)) >= 34.0))
    assert len(planner.proofs) <= 4


def test_groups_that_make_each_other_worse_are_told_apart() -> None:
    first, last = NAMES[0], NAMES[2]

    def noise(forms: Forms) -> float:
        both = {first, last} <= set(static_of(forms))
        return plain_noise(forms) * (1.0 if not both else 20.0)

    world = World(noise=noise)
    planner = world.planner(Bound({"y": 31.0}))
    found = chosen(planner)
    assert found.held
    assert not {first, last} <= set(static_of(found.forms))
    best = world.best(lambda f: decibels(world.noise(f)) >= 31.0)
    assert found.measured_us <= 1.2 * best
    assert len(planner.proofs) <= ROUNDS


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_metric_that_falls_with_the_noise_is_bracketed(power: float) -> None:
    world = World(metric=lambda noise: 0.9 - 0.05 * (noise / 1e-3) ** power)
    planner = world.planner(Bound({"y": 20.0}, metric=0.9 - 0.015))
    found = chosen(planner)
    assert found.held
    assert world.metric is not None
    best = world.best(lambda f: world.metric is not None and world.metric(world.noise(f)) >= 0.885)
    assert found.measured_us <= 1.02 * best
    assert len(planner.proofs) <= SEARCH_ROUNDS
    assert len({tuple(sorted(f.items())) for f in world.evaluated}) == len(world.evaluated), "no plan is built twice"


def test_a_metric_with_steps_does_not_keep_the_search_going() -> None:
    """Few samples: the metric is the same over many dB, and then falls by one of them."""
    world = World(metric=lambda noise: 0.9 if noise <= 2e-4 else 0.8)
    planner = world.planner(Bound({"y": 10.0}, metric=0.9))
    found = chosen(planner)
    assert found.held
    assert found.measured_us <= 1.1 * world.best(lambda f: world.noise(f) <= 2e-4)
    assert len(planner.proofs) <= SEARCH_ROUNDS


def test_a_metric_that_only_float_holds_ends_with_float() -> None:
    world = World(metric=lambda noise: 0.9 if noise == 0 else 0.5)
    found = chosen(world.planner(Bound({"y": 10.0}, metric=0.9)))
    assert found.held
    assert static_of(found.forms) == ()


def test_a_fused_operator_that_is_slower_beside_another_is_not_chosen() -> None:
    pair = {NAMES[0], NAMES[1]}

    def us(forms: Forms) -> float:
        return plain_us(forms) + (300.0 if pair <= set(static_of(forms)) else 0.0)

    world = World(us=us)
    found = chosen(world.planner(Bound()))
    assert not pair <= set(static_of(found.forms))
    assert found.measured_us < us(dict.fromkeys(NAMES, "static"))
    assert found.measured_us < us({})


def test_a_latency_that_only_the_tables_promised_is_refused() -> None:
    world = World(us=lambda forms: 2.0 * plain_us(forms))
    with pytest.raises(InfeasibleError, match=r"latency <= 200\.00 us cannot hold") as refused:
        world.planner(Bound(), Limits(latency_us=200.0)).run()
    assert refused.value.nearest.cost_us > 200.0


def test_a_latency_that_holds_on_the_engine_stands_though_the_tables_come_to_doubt_it() -> None:
    least = plain_us(dict.fromkeys(NAMES, "static"))
    world = World(us=lambda forms: 1.02 * plain_us(forms))
    found = chosen(world.planner(Bound({"y": 5.0}), Limits(latency_us=least)))
    assert found.held
    assert found.measured_us == pytest.approx(1.02 * least)


def test_bytes_are_those_of_the_file_whatever_the_tables_say() -> None:
    world = World(header=37)
    planner = world.planner(Bound(), Limits(bytes=1700))
    found = chosen(planner)
    assert found.bytes == found.predicted_bytes == world.size(found.forms).total
    assert found.bytes <= 1700
    assert found.measured_us == pytest.approx(world.best(lambda f: world.size(f).total <= 1700))


@pytest.mark.parametrize("header", [-40, 40])
def test_bytes_that_just_hold_or_just_fail_by_a_header_are_told_apart(header: int) -> None:
    """All on integers has 650 bytes by the tables."""
    world = World(header=header)
    least = 650 + header
    assert chosen(world.planner(Bound(), Limits(bytes=least))).bytes == least
    with pytest.raises(InfeasibleError, match=r"bytes <= 0.*cannot hold") as refused:
        world.planner(Bound(), Limits(bytes=least - 1)).run()
    assert refused.value.nearest.bytes == least


def test_bits_per_weight_are_counted_in_the_build() -> None:
    world = World()
    found = chosen(world.planner(Bound(), Limits(bits=20.0)))
    assert found.bits == pytest.approx(8 * sum(world.size(found.forms).groups.values()) / 600)
    assert found.bits <= 20.0


def test_bytes_and_accuracy_that_exclude_each_other_name_both() -> None:
    with pytest.raises(InfeasibleError, match="cannot hold together") as refused:
        World().planner(Bound({"y": 45.0}), Limits(bytes=1000)).run()
    assert set(refused.value.limits) == {"bytes", "noise:y"}


def test_what_is_asked_to_spare_is_no_reason_to_refuse() -> None:
    """Bytes leave one choice of noise; the tables tell it 3 dB wrong, so the next would need some to spare."""
    world = World(noise=lambda forms: 2.0 * plain_noise(forms))
    db = max(decibels(2.0 * plain_noise(f)) for f in every() if world.size(f).total <= 1250)
    found = chosen(world.planner(Bound({"y": db - 0.01}), Limits(bytes=1250)))
    assert found.held


def test_the_smallest_is_not_slower_than_float() -> None:
    slow = NAMES[4]

    def us(forms: Forms) -> float:
        return plain_us(forms) + (400.0 if slow in static_of(forms) else 0.0)

    world = World(us=us)
    found = chosen(world.planner(Bound({"y": 10.0}), objective="bytes"))
    assert found.measured_us <= us({})
    assert slow not in static_of(found.forms)
    assert found.bytes == min(world.size(f).total for f in every() if us(f) <= us({}))


def test_two_plans_that_refute_each_other_end_the_search() -> None:
    """Whatever is built is 9 dB worse than told: the tables promise something else each time, to the end."""
    world = World(noise=lambda forms: 8.0 * plain_noise(forms) * (1 + sum(map(len, static_of(forms))) % 3))
    planner = world.planner(Bound({"y": 30.0}))
    found = chosen(planner)
    assert len(planner.proofs) <= SEARCH_ROUNDS
    assert len({tuple(sorted(p.forms.items())) for p in planner.proofs}) == len(planner.proofs)
    held = [p for p in planner.proofs if p.held]
    assert found.held == bool(held)


def test_without_data_or_engine_one_plan_is_enough() -> None:
    planner = World().planner(Bound())
    planner.evaluate = planner.observe = planner.measure_noise = None
    assert [p.forms for p in planner.run()] == [dict.fromkeys(NAMES, "static")]


def test_prices_are_those_of_the_limits_that_bind() -> None:
    planner = World().planner(Bound({"y": 34.0}))
    chosen(planner)
    outcome = planner.prices()
    assert outcome is not None
    assert outcome.gap == 0.0
    (price,) = outcome.prices.values()
    slower = World().best(lambda f: decibels(plain_noise(f)) >= 34.0)
    faster = World().best(lambda f: decibels(plain_noise(f)) >= 33.0)
    assert price.per_unit == pytest.approx(slower - faster)
    assert price.unit == "us per dB"


# ---- what corrects and bargains ------------------------------------------------------------------------------------


def proof(us: float, db: float, shortfall: float = 0.0, excess: float = 0.0, size: int = 0) -> Proof:
    return Proof({}, Quality({"y": db}), {}, us, us, shortfall, excess=excess, bytes=size)


def test_the_best_proof_holds_before_it_is_fast() -> None:
    proofs = {"fast": proof(10, 20, shortfall=2.0), "held": proof(30, 30), "over": proof(5, 40, excess=0.1)}
    assert best_proof(proofs, {}, Terms()) == "held"
    assert best_proof({n: proofs[n] for n in ("fast", "over")}, {}, Terms()) == "fast"


def test_accuracy_is_weighed_against_time_and_bytes_where_they_are_made_small() -> None:
    near, far = proof(100, 20, size=10), proof(110, 24, size=5)
    assert best_proof({"near": near, "far": far}, {}, Terms()) == "far", "4 dB for 10 %"
    assert best_proof({"near": near, "far": far}, {"far": 120.0}, Terms()) == "near", "4 dB for 20 %"
    assert best_proof({"near": near, "far": far}, {}, Terms(), "bytes") == "far"


def three() -> Problem:
    options = {g: (Option("float", 2.0, 0), Option("static", 1.0, 0)) for g in "abc"}
    charges = tuple(Charge(g, (Cause(((g, "static"),)),), noise={"y": 1e-4}) for g in "abc")
    return Problem(options, charges, ("y",))


def test_factors_agree_with_every_plan_that_was_measured() -> None:
    truth = {"a": 1e-4, "b": 4e-4, "c": 2e-4}
    plans = [{"a": "static", "b": "static"}, {"b": "static", "c": "static"}, {"a": "static", "c": "static"}]
    choices = [{g: plan.get(g, "float") for g in "abc"} for plan in plans]
    seen = [(c, {"y": decibels(sum(truth[g] for g in "abc" if c[g] == "static"))}) for c in choices]
    made = corrected(three(), fitted(three(), seen))
    for choice, measured in seen:
        assert evaluate(made, choice).sqnr_db["y"] == pytest.approx(measured["y"], abs=0.1)
    alone = evaluate(made, {"a": "float", "b": "static", "c": "float"})
    assert alone.noise["y"] == pytest.approx(4e-4, rel=0.1)


def test_factors_are_bounded_and_leave_what_was_not_measured() -> None:
    seen = [({"a": "static", "b": "float", "c": "float"}, {"y": 200.0})]
    factors = fitted(three(), seen)
    assert factors["a"]["y"] == pytest.approx(0.02)
    assert set(factors) == {"a"}
    assert corrected(three(), {}) == three()


def test_a_demand_follows_the_fall_and_then_narrows() -> None:
    demand = Demand()
    assert demand.closed
    demand.missed(2.0, 0.1, 0.01)
    assert demand.level == pytest.approx(2.0 + 9.0), "a decade is 15 dB, and a step at most 9"
    demand.held(12.0, 0.001, 0.01)
    assert demand.level == pytest.approx(7.0), "half of the two decades between them"
    demand.missed(7.0, 0.02, 0.01)
    assert 7.0 < demand.level < 12.0
    assert not demand.closed
    demand.held(7.0 + CLOSE_DB, 0.009, 0.01)
    assert demand.closed


def test_a_demand_that_gives_the_same_plan_again_moves_on() -> None:
    demand = Demand()
    demand.missed(0.0, None, 0.0)
    assert demand.level == pytest.approx(4.0)
    demand.repeated(0.0)
    assert demand.level == pytest.approx(8.0)
    demand.held(20.0, None, 0.0)
    before = demand.level
    for _ in range(8):
        demand.repeated(0.0)
    assert demand.closed
    assert before > 4.0
