"""The speed search on an invented machine: what loses its region goes back to float, and the record says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import pytest

from qcompiler.engine import ModelLike, Profile
from qcompiler.quant.plan import Form
from qcompiler.search.speed import SpeedSearch, same_nodes
from qcompiler.search.timing import Timing
from qcompiler.targets.groups import Group
from tests.search.nets import SAME, chain, net, profile_of

Times = Callable[[Mapping[str, Form]], Mapping[str, float]]


@dataclass(frozen=True)
class Built:
    model: ir.Model
    forms: dict[str, Form]


@dataclass
class Machine:
    """Builds that only remember their forms, and a stopwatch that knows what each form costs.

    Attributes:
        model: the graph.
        times: forms to microseconds by executed node.
        whole: seconds per run of a whole build, by its engine forms.
    """

    model: ir.Model
    times: Times
    whole: Callable[[frozenset[str]], float] = lambda rewrites: 1.0
    made: list[tuple[ir.Model, dict[str, Form], frozenset[str]]] = field(default_factory=list)
    profiled: list[dict[str, Form]] = field(default_factory=list)

    def build(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str]) -> Built:
        model = self.model.clone()
        for index, name in enumerate(sorted(engine_forms)):
            next(iter(model.graph)).name = f"{name}{index}"  # another rewrite gives another graph
        self.made.append((model, dict(forms), frozenset(engine_forms)))
        return Built(model, dict(forms))

    def profile(self, model: ModelLike) -> tuple[Profile, ir.Model]:
        forms = next(f for m, f, _ in self.made if m is model)
        self.profiled.append(forms)
        return profile_of(self.times(forms)), self.model

    def compare(self, models: Mapping[str, ModelLike]) -> dict[str, Timing]:
        found = {}
        for name, model in models.items():
            rewrites = next(r for m, _, r in self.made if m is model)
            found[name] = Timing(self.whole(rewrites), 2 * self.whole(rewrites), 3)
        return found


def search(
    body: str, times: Times, whole: Callable[[frozenset[str]], float] = lambda rewrites: 1.0, **frozen: Form
) -> tuple[SpeedSearch, Machine, dict[str, Group]]:
    model, groups = net(body)
    machine = Machine(model, times, whole)
    elements = {str(v.name): 1000 for g in groups.values() for v in (*g.data, *g.results)}
    return SpeedSearch(model, list(groups.values()), machine.build, machine, elements, frozen), machine, groups


FIVE = chain("Conv", "Conv", "Tanh", "Conv", "Conv", "Tanh")  # two regions: c0 c1, c3 c4


def regions(body: str, **forms: Form) -> list[list[str]]:
    found, _, groups = search(body, lambda f: {})
    return sorted(sorted(r) for r in found.regions({n: forms.get(n, "static") for n in groups}))


def test_groups_that_hand_each_other_integers_are_one_region() -> None:
    assert regions(FIVE) == [["c0", "c1"], ["c3", "c4"]]


def test_a_float_group_parts_a_region() -> None:
    assert regions(FIVE, c1="float") == [["c0"], ["c3", "c4"]]
    assert regions(chain("Conv", "Conv", "Conv"), c1="float") == [["c0"], ["c2"]]


def test_readers_of_one_quantized_value_are_one_region() -> None:
    assert regions(f"[a] p = Conv{SAME}(x, w) [b] q = Conv{SAME}(x, v) [s] y = Sum(p, q)") == [["a", "b"]]


def test_a_residual_addition_joins_its_sources() -> None:
    body = f"[a] p = Conv{SAME}(x, w) [t] q = Tanh(x) [b] r = Conv{SAME}(q, v) [s] z = Add(p, r) [n] y = Neg(z)"
    assert regions(body) == [["a", "b", "s"]]
    assert regions(body, s="float") == [["a"], ["b"]]


def test_all_float_has_no_regions() -> None:
    assert regions(FIVE, c0="float", c1="float", c3="float", c4="float") == []


ALL: dict[str, Form] = dict.fromkeys(("c0", "c1", "c3", "c4"), "static")


def costs(slow: Mapping[str, float], conversions: Mapping[str, float] | None = None) -> Times:
    """Return times: 100 in float, 50 or as said on integers; ``node@group`` only while that group is an integer one."""

    def times(forms: Mapping[str, Form]) -> dict[str, float]:
        found = {n: 100.0 if forms.get(n, "float") == "float" else slow.get(n, 50.0) for n in ALL}
        for name, us in (conversions or {}).items():
            if forms.get(name.partition("@")[2], "float") != "float":
                found[name.partition("@")[0]] = us
        return found

    return times


def run(times: Times, **frozen: Form) -> tuple[dict[str, Form], SpeedSearch, Machine]:
    made, machine, _ = search(FIVE, times, **frozen)
    made.float_costs = made.costs({}, {})
    return made.return_losers(ALL, {}), made, machine


def floats(forms: Mapping[str, Form]) -> set[str]:
    return {n for n, f in forms.items() if f == "float"}


def test_where_all_win_nothing_returns() -> None:
    forms, made, machine = run(costs({}))
    assert forms == ALL
    assert "regions_returned" not in made.figures
    assert len(machine.profiled) == 2  # float and the one look


def test_exactly_the_region_that_loses_returns_whole() -> None:
    forms, made, machine = run(costs({"c3": 400.0}))
    assert floats(forms) == {"c3", "c4"}
    assert made.figures["regions_returned"] == [{"groups": ["c3", "c4"], "loss_us": 250.0}]
    assert made.why["c3"] == made.why["c4"] == "float: its region was measured 250 us slower on integers"
    assert "c0" not in made.why
    assert floats(machine.profiled[-1]) == {"c3", "c4"}  # looked at again after the change


def test_conversions_at_the_border_count() -> None:
    forms, made, _ = run(costs({}, {"x/QuantizeLinear@c0": 60.0, "c1:dequantize@c1": 60.0}))
    assert floats(forms) == {"c0", "c1"}
    assert made.figures["regions_returned"] == [{"groups": ["c0", "c1"], "loss_us": 20.0}]


def test_a_difference_in_the_noise_is_no_loss() -> None:
    assert floats(run(costs({"c3": 152.0}))[0]) == set()  # 202 against 200
    assert floats(run(costs({"c3": 160.0}))[0]) == {"c3", "c4"}  # 210 against 200


def test_what_a_return_uncovers_returns_in_the_next_round() -> None:
    """With the second region in float, the first one turns out slow."""

    def times(forms: Mapping[str, Form]) -> dict[str, float]:
        slow = {"c3": 400.0} if forms.get("c3", "float") != "float" else {"c0": 400.0}
        return dict(costs(slow)(forms))

    forms, made, _ = run(times)
    assert set(forms.values()) == {"float"}
    assert [r["groups"] for r in made.figures["regions_returned"]] == [["c3", "c4"], ["c0", "c1"]]


def test_a_pinned_integer_group_stays_in_a_losing_region() -> None:
    forms, made, _ = run(costs({"c3": 400.0}), c3="static")
    assert floats(forms) == {"c4"}
    assert "c3" not in made.why
    assert made.figures["regions_returned"] == [{"groups": ["c4"], "loss_us": 250.0}]


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [({}, set()), ({"one": 1.009}, set()), ({"one": 1.02}, {"one"}), ({"one": 1.5, "two": 0.8}, {"one"}),
     ({"one": 1.5, "two": 1.5}, {"one", "two"})],
)  # fmt: skip
def test_a_trap_is_avoided_where_that_was_measured_to_win(gains: dict[str, float], chosen: set[str]) -> None:
    def whole(rewrites: frozenset[str]) -> float:
        seconds = 1.0
        for name in rewrites & gains.keys():
            seconds /= gains[name]
        return seconds

    made, _, _ = search(FIVE, costs({}), whole)
    found = made.avoid_traps(ALL, {"one": "first trap", "two": "second trap"}, {"emit:c0": "qoperator"})
    assert found == {"emit:c0": "qoperator", **dict.fromkeys(sorted(chosen), "avoid")}
    assert made.figures["traps"] == {n: round(gains.get(n, 1.0), 3) for n in ("one", "two")}


def test_a_trap_that_changes_no_graph_is_not_timed() -> None:
    made, machine, _ = search(FIVE, costs({}))
    machine.build = lambda forms, engine_forms: Built(machine.model, dict(forms))  # type: ignore[method-assign]
    made.build = machine.build
    assert made.avoid_traps(ALL, {"one": ""}, {}) == {}
    assert "traps" not in made.figures


def test_the_ratio_is_reference_over_model_by_minimum_and_median() -> None:
    made, machine, _ = search(FIVE, costs({}), lambda rewrites: 0.5 if rewrites else 2.0)
    reference, model = machine.build({}, {}).model, machine.build({}, {"fast": "avoid"}).model
    assert made.ratio(reference, model) == (4.0, 4.0)


def test_builds_are_the_same_if_their_nodes_are() -> None:
    model, _ = net(FIVE)
    other = model.clone()
    assert same_nodes(model, other)
    next(iter(other.graph)).name = "renamed"
    assert not same_nodes(model, other)
