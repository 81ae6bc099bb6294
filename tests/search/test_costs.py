"""Cost tables: what they predict, how they are measured, corrected and kept."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from qcompiler.engine import NodeCost, Profile
from qcompiler.errors import PassError
from qcompiler.quant.plan import Form
from qcompiler.search.borders import Border, Kind
from qcompiler.search.cost_cache import CostCache, EngineKey
from qcompiler.search.costs import Conversion, CostTable, fit_lines
from qcompiler.search.measure_costs import alternating, lone_neighbours, measure_costs
from qcompiler.search.observations import Observation, at_scale, real_share
from tests.search.cost_machine import ELEMENTS, THREE, CostMachine, all_static, machine_of, meter_of
from tests.search.nets import SAME, TARGET, chain, net

Forms = dict[str, Form]


def choices(machine: CostMachine) -> list[Forms]:
    both: tuple[Form, ...] = ("float", "static")
    names = [g.name for g in machine.groups]
    return [dict(zip(names, forms, strict=True)) for forms in itertools.product(both, repeat=len(names))]


def table() -> CostTable:
    return CostTable(
        {"a": {"float": 10.0, "static": 4.0}, "b": {"float": 20.0, "static": 5.0}},
        {"x": Conversion(quantize=1.0), "v": Conversion(2.0, 3.0), "y": Conversion(dequantize=4.0)},
        fixed=100.0,
        borders={"x": Border("", ("a",)), "v": Border("a", ("b",)), "y": Border("b", (), True)},
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, 130.0),
        ({"a": "static"}, 100 + 4 + 20 + 1 + 3),  # Q of x, DQ of v
        ({"b": "static"}, 100 + 10 + 5 + 2 + 4),  # Q of v, DQ of y
        ({"a": "static", "b": "static"}, 100 + 4 + 5 + 1 + 4),
    ],
)
def test_a_total_is_groups_and_charges(choice: Mapping[str, str], expected: float) -> None:
    assert table().total(choice) == pytest.approx(expected)


def test_an_option_without_a_cost_of_its_own_has_that_of_its_form() -> None:
    assert table().cost("a", "static:int8") == 4.0
    with pytest.raises(PassError, match="group a has no cost in form 'dynamic', it has float, static; measure"):
        table().total({"a": "dynamic"})


def test_json_round_trip() -> None:
    machine = machine_of()
    made = meter_of(machine).table({"static": all_static(machine)})
    assert CostTable.from_json(made.to_json()) == made
    with pytest.raises(PassError, match="not a cost table"):
        CostTable.from_json("[]")


def test_measured_costs_predict_every_choice_where_neighbours_do_not_matter() -> None:
    machine = machine_of()
    made = meter_of(machine).table({"static": all_static(machine)})
    assert {n: dict(c) for n, c in made.groups.items()} == {n: pytest.approx(c) for n, c in THREE.items()}
    assert made.fixed == pytest.approx(7.0)
    assert made.conversions["x"].quantize == pytest.approx(2 + 0.01 * 256)
    for forms in choices(machine):
        assert made.total(forms) == pytest.approx(machine.whole_us(forms))
    assert made.counts() == {"measured": 6 + 6}  # v0 and v1 are converted both ways
    assert meter_of(machine_of()).table({}).total({}) == pytest.approx(100 + 200 + 50 + 7)


def test_the_function_does_what_the_meter_does() -> None:
    machine = machine_of()
    variants = {"static": all_static(machine)}
    made = measure_costs(machine.model, machine.groups, TARGET, machine.build, machine, variants, ELEMENTS)
    assert made == meter_of(machine_of()).table(variants)


def test_what_crossing_costs_is_paid_with_the_conversion() -> None:
    """A group in float beside integers loses its layout, and pays 40 us per side."""
    machine = machine_of()

    def us(name: str, form: str, forms: Mapping[str, Form]) -> float:
        beside = {"c0": ("c1",), "c1": ("c0", "c2"), "c2": ("c1",)}[name]
        lost = sum(forms.get(other, "float") == "static" for other in beside) if form == "float" else 0
        return THREE[name][form] + 40.0 * lost

    machine.group_us = us
    made = meter_of(machine).table({"static": all_static(machine)})
    assert made.groups["c1"]["float"] == pytest.approx(200.0)
    ratios = [made.total(forms) / machine.whole_us(forms) for forms in choices(machine)]
    assert all(0.85 < ratio < 1.15 for ratio in ratios)
    # Whole variants are exact.
    assert ratios[0] == pytest.approx(1.0)
    assert ratios[-1] == pytest.approx(1.0)


def test_overhead_between_nodes_is_in_the_costs() -> None:
    machine = machine_of()
    machine.hidden = 1.0
    made = meter_of(machine).table({"static": all_static(machine)})
    for forms in (choices(machine)[0], choices(machine)[-1]):
        assert made.total(forms) == pytest.approx(machine.whole_us(forms))
    assert 100.0 < made.groups["c0"]["float"] < 102.0


def test_a_profile_is_brought_to_the_real_time() -> None:
    profile = Profile((NodeCost("a", "A", 10.0), NodeCost("b", "B", 90.0)))
    longer = at_scale(profile, 106.0)  # one microsecond per node, and four nodes' worth for the run itself
    assert [n.microseconds for n in longer.nodes] == pytest.approx([11.0, 91.0, 4.0])
    assert real_share(profile, 106.0) == pytest.approx(1.0)
    shorter = at_scale(profile, 97.0)  # the profiler added half a microsecond per node
    assert shorter.total == pytest.approx(97.0)
    assert [n.microseconds for n in shorter.nodes] == pytest.approx([97 / 99 * 9.5, 97 / 99 * 89.5, 0.0])
    double = at_scale(profile, 209.0 * 1.0)
    assert double.total == pytest.approx(209.0)
    assert double.nodes[1].microseconds == pytest.approx(91.5 * 209 / 109)
    assert at_scale(profile, 0.0) is profile


def test_a_lone_node_that_conversions_slow_down_is_laid_to_its_neighbours() -> None:
    """Tanh stands behind c2; where c2 writes integers the engine no longer fuses it, say."""
    machine = machine_of()
    machine.lone_us = lambda name, forms: 27.0 if forms.get("c2") == "static" else 7.0
    made = meter_of(machine).table({"static": all_static(machine)})
    assert made.fixed == pytest.approx(7.0)
    assert made.groups["c2"]["static"] == pytest.approx(70.0 + 20.0)
    assert made.groups["c1"]["static"] == pytest.approx(60.0)


def test_neighbours_of_lone_nodes() -> None:
    model, groups = net(chain("Conv", "Tanh", "Exp", "Abs", "Conv"))
    lone = [n for n in model.graph if n.name in ("t1", "e2", "a3")]
    found = lone_neighbours(lone, list(groups.values()))
    assert found == {"t1": ("c0",), "e2": ("c0", "c4"), "a3": ("c4",)}


def test_equal_layers_share_the_median() -> None:
    us = {f"c{i}": {"float": 100.0, "static": s} for i, s in enumerate((30.0, 30.0, 30.0, 45.0, 30.0))}
    machine = machine_of("Conv", "Conv", "Conv", "Conv", "Conv", "Tanh", us=us)
    machine.elements = {}
    made = meter_of(machine).table({"static": all_static(machine)})
    # c0 has no convolution in front, c4 none behind; the three in the middle are alike.
    assert [made.groups[f"c{i}"]["static"] for i in range(5)] == pytest.approx([30, 30, 30, 30, 30])


def test_layers_that_differ_by_more_than_noise_share_nothing(tmp_path: Path) -> None:
    us = {f"c{i}": {"float": 100.0, "static": s} for i, s in enumerate((30.0, 30.0, 30.0, 300.0, 30.0))}
    machine = machine_of("Conv", "Conv", "Conv", "Conv", "Conv", "Tanh", us=us)
    machine.elements = {}
    cache = CostCache(tmp_path, EngineKey("engine", "1", "processor", 1))
    meter = meter_of(machine, cache)
    made = meter.table({"static": all_static(machine)})
    assert [made.groups[f"c{i}"]["static"] for i in range(5)] == pytest.approx([30, 30, 30, 300, 30])
    groups, forms = {g.name: g for g in machine.groups}, all_static(machine)
    kept = {n: cache.get(meter.signer.signature(g, "static", forms)) is not None for n, g in groups.items()}
    assert kept == {"c0": True, "c1": False, "c2": False, "c3": False, "c4": True}


def test_a_correction_predicts_the_built_choice() -> None:
    machine = machine_of()
    meter = meter_of(machine)
    made = meter.table({"static": all_static(machine)})
    choice: Forms = {"c0": "static", "c1": "float", "c2": "static"}
    machine.group_us = lambda name, form, forms: THREE[name][form] + 33.0 * (name == "c1" and forms != {})
    corrected = made.corrected(meter.observe(choice))
    assert corrected.total(choice) == pytest.approx(machine.whole_us(choice))
    assert corrected.groups["c1"]["float"] == pytest.approx(233.0)
    assert corrected.groups["c1"]["static"] == made.groups["c1"]["static"]
    assert corrected.origin["c1"] == {"float": "corrected", "static": "measured"}


def test_a_correction_scales_what_the_choice_changes() -> None:
    seen = Observation(
        {"a": "static", "b": "float"}, {"a": 4.0, "b": 20.0}, {("x", "quantize"): 1.0, ("v", "dequantize"): 3.0},
        {"lone": 102.0}, 132.0,
    )  # fmt: skip
    corrected = table().corrected(seen)
    assert corrected.total({"a": "static"}) == pytest.approx(132.0)
    assert corrected.groups["a"]["static"] == pytest.approx(4.0 + 132 - 128)  # lone nodes grew: a answers for it
    assert corrected.groups["b"] == {"float": 20.0, "static": 5.0}
    assert corrected.fixed == 100.0
    faster = table().corrected(replace(seen, whole_us=64.0))  # more than the group could have saved: all of it scales
    assert faster.total({"a": "static"}) == pytest.approx(64.0)
    assert faster.fixed == pytest.approx(50.0)
    untimed = table().corrected(replace(seen, whole_us=0.0))
    assert untimed.groups["a"]["static"] == 4.0


def test_a_busy_machine_slows_all_variants_alike() -> None:
    """Whole models took three times as long as their parts: ratios between choices stay what they are."""
    machine = machine_of()
    machine.slower = 3.0
    meter = meter_of(machine)
    made = meter.table({"static": all_static(machine)})
    static = all_static(machine)
    assert made.total(static) / made.total({}) == pytest.approx(
        machine.whole_us(static) / machine.whole_us({}), rel=0.02
    )
    assert not meter.steady


def test_one_disturbed_timing_does_not_make_its_variant_slow() -> None:
    machine = machine_of()
    plain = machine.whole_us
    machine.whole_us = lambda forms: plain(forms) * (4.0 if forms.get("c0") == "static" else 1.0)  # type: ignore[method-assign]
    meter = meter_of(machine)
    made = meter.table({"static": all_static(machine)})
    # Not four times: the 8 % that builds may differ by, and 1.5 us of overhead for each of 10 nodes.
    assert made.total(all_static(machine)) <= 1.08 * (plain(all_static(machine)) + 1.5 * 10)
    assert not meter.steady


def test_a_machine_that_slows_down_later_does_not_make_a_choice_slow() -> None:
    machine = machine_of()
    meter = meter_of(machine)
    made = meter.table({"static": all_static(machine)})
    choice: Forms = {"c0": "static", "c1": "float", "c2": "static"}
    as_told = made.total(choice)
    machine.pace = 1.6
    assert meter.observe(choice).whole_us == pytest.approx(as_told, rel=0.01)


def test_alternating_choices_are_each_others_complement() -> None:
    model, groups = net(
        f"[c0] a = Conv{SAME}(x, w) [c1] b = Conv{SAME}(a, v) [a0] c = Add(b, a) [c2] y = Conv{SAME}(c, w)"
    )
    listed = list(groups.values())
    machine = CostMachine(model, listed, {}, lambda name, form, forms: 1.0)
    meter = meter_of(machine)
    even, odd = alternating(listed, meter.borders, dict.fromkeys(groups, "static")).values()
    assert set(even) | set(odd) == set(groups)
    assert not set(even) & set(odd)
    assert set(even) == {"c0", "a0"}


@pytest.mark.parametrize("kind", ["quantize", "dequantize", "dynamic"])
def test_conversions_lie_on_a_line(kind: Kind) -> None:
    lines = fit_lines([(kind, n, 3.0 + 0.002 * n) for n in (100, 1000, 50_000)])
    assert lines.us(kind, 20_000) == pytest.approx(43.0)
    assert lines.us(kind, 0) == pytest.approx(3.0)


def test_a_line_never_falls() -> None:
    lines = fit_lines([("quantize", 100, 9.0), ("quantize", 10_000, 8.0)])
    base, rate = lines.terms["quantize"]
    assert base >= 0
    assert rate >= 0
    alike = fit_lines([("quantize", 1000, 2.5), ("quantize", 1000, 2.5)])
    assert alike.us("quantize", 1000) == pytest.approx(2.5)
    assert fit_lines([]).us("quantize", 10_000) == pytest.approx(0.5 + 2.5)
