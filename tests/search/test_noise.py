"""The table of noise: points of a form, sums that count a point once, what movers cover, charges, JSON."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.errors import CalibrationError
from qcompiler.search.noise import NoiseTable, asked_points, family, point_keys
from qcompiler.search.noise_terms import needed_readers, stored_by
from qcompiler.search.quality import decibels
from qcompiler.search.solution import holds
from tests.search.nets import SAME, net

TABLE = NoiseTable(
    ("y",),
    {"value:x": {"y": 1e-4}, "value:m": {"y": 3e-4}, "weight:a": {"y": 2e-4}, "dynamic:x": {"y": 5e-5}},
    {
        "a": {"static-float": ("value:x", "weight:a"), "dynamic": ("dynamic:x", "weight:a")},
        "b": {"static-float": ("value:x",)},
        "move": {"static": ("value:x", "value:m")},
        "c": {"static-float": ("value:m",)},
    },
    covered={"value:m": (("move", "static"),)},
)


def test_the_points_of_each_form() -> None:
    _, groups = net(f"[c] a = Conv{SAME}(x, w) [r] b = Relu(a) [d] y = Conv{SAME}(b, v)")
    assert point_keys(groups["c"], "static") == ("read:x@c", "weight:c", "value:b")
    assert point_keys(groups["c"], "float") == ()
    assert point_keys(groups["d"], "static-float") == ("read:b@d", "weight:d")
    assert point_keys(groups["d"], "weight-only") == ("weight-only:d",)
    assert point_keys(groups["d"], "int4-block") == ("int4-block:d",)


def test_dynamic_reads_another_point_than_static_and_the_same_weight() -> None:
    _, groups = net("[m] y = MatMul(x, m)", "float[2,64] x")
    assert point_keys(groups["m"], "dynamic") == ("dynamic:x@m", "weight:m")
    assert asked_points(groups.values())["m"]["dynamic"] == ("dynamic:x@m", "weight:m")


def test_arithmetic_has_a_weight_only_where_it_reads_a_constant() -> None:
    _, groups = net(f"[c] a = Conv{SAME}(x, w) [s] y = Add(a, x)")
    assert point_keys(groups["s"], "static") == ("read:a@s", "read:x@s", "value:y")


def test_a_value_that_two_groups_read_counts_once() -> None:
    alone = TABLE.of({"a": "static-float"})["y"]
    both = TABLE.of({"a": "static-float", "b": "static-float"})["y"]
    assert alone == both == pytest.approx(3e-4)


def test_a_mover_adds_no_noise_behind_its_input_but_its_output_does_without_it() -> None:
    assert TABLE.of({"c": "static-float"})["y"] == pytest.approx(3e-4)
    assert TABLE.of({"move": "static"})["y"] == pytest.approx(1e-4)
    assert TABLE.of({"move": "static", "c": "static-float"})["y"] == pytest.approx(1e-4)


def test_what_nobody_measured_is_infinite_and_bars_its_form() -> None:
    table = NoiseTable(("y",), {"value:x": {"y": math.inf}}, {"a": {"static": ("value:x",), "dynamic": ("dynamic:x",)}})
    assert table.of({"a": "static"})["y"] == math.inf
    assert table.of({"other": "static"})["y"] == math.inf
    assert table.barred() == {("a", "static"), ("a", "dynamic")}
    assert table.charges({"a": ["static", "dynamic"]}) == ()


def test_a_correction_makes_a_measured_choice_exact_and_leaves_other_families() -> None:
    choice = {"a": "static-float", "c": "static-float"}
    table = TABLE.corrected("static", {"y": 9e-4}, choice, "static")
    assert table.of(choice)["y"] == pytest.approx(9e-4)
    assert table.factors["static"]["y"] == pytest.approx(1.5)
    assert table.of({"a": "dynamic"}) == TABLE.of({"a": "dynamic"})
    assert table.joint == {"static": {"y": 9e-4}}
    mixed = {"a": "dynamic", "c": "static-float"}
    again = table.corrected("dynamic", {"y": 1e-3}, mixed)
    assert again.of(mixed)["y"] == pytest.approx(1e-3)
    assert again.of(choice)["y"] == pytest.approx(9e-4)


def test_a_measurement_that_is_not_finite_corrects_nothing() -> None:
    table = TABLE.corrected("static", {"y": math.inf}, {"a": "static-float"})
    assert table.factors["static"] == {"y": 1.0}


def charged(table: NoiseTable, choice: dict[str, str], allowed: dict[str, list[str]]) -> float:
    found = [c for c in table.charges(allowed) if any(holds(cause, choice) for cause in c.causes)]
    return math.fsum(c.noise.get("y", 0.0) for c in found)


@pytest.mark.parametrize(
    "choice",
    [{}, {"a": "static-float", "b": "static-float"}, {"move": "static", "c": "static-float"}, {"a": "dynamic"}],
)
def test_charges_add_up_to_the_same_as_the_table(choice: dict[str, str]) -> None:
    table = TABLE.corrected("static", {"y": 6e-4}, {"a": "static-float"})
    whole = {"a": "float", "b": "float", "move": "float", "c": "float"} | choice
    forms = {g: list(forms) for g, forms in table.asks.items()}
    assert charged(table, whole, forms) == pytest.approx(table.of(choice)["y"])


def readers(alone: dict[str, float], together: float, *stored: str) -> NoiseTable:
    """Return a table of groups that read x, each under calibrated scales or under those of the run."""
    points = {f"read:x@{g}": {"y": power} for g, power in alone.items()} | {"reads:x": {"y": together}}
    points |= {f"dynamic:x@{g}": {"y": power / 2} for g, power in alone.items()} | {"dynamic:x": {"y": together / 2}}
    points |= {"value:x": {"y": 1.5 * together}}
    asks = {
        g: {"static": (f"read:x@{g}",), "static-float": (f"read:x@{g}",), "dynamic": (f"dynamic:x@{g}",)} for g in alone
    }
    shared = {"reads:x": tuple(f"read:x@{g}" for g in alone), "dynamic:x": tuple(f"dynamic:x@{g}" for g in alone)}
    if not stored:
        return NoiseTable(("y",), points, asks, shared=shared)
    covered = {f"read:x@{g}": tuple((name, "static") for name in stored) for g in alone}
    needed = {"value:x": tuple((g, form) for g in alone for form in ("static", "static-float"))}
    asks |= {name: {"static": ("value:x",), "static-float": ()} for name in stored}
    return NoiseTable(("y",), points, asks, covered, needed, shared)


def test_one_reader_alone_counts_its_own_noise_and_all_of_them_what_was_measured_of_all() -> None:
    for together in (2e-4, 3e-4, 7e-4):  # the errors of two readers cancel in part, are independent, or agree
        table = readers({"q": 1e-4, "k": 2e-4}, together)
        assert table.of({"q": "static"})["y"] == pytest.approx(1e-4)
        assert table.of({"k": "static-float"})["y"] == pytest.approx(2e-4)
        assert table.of({"q": "static", "k": "static"})["y"] == pytest.approx(together)
        assert table.of({"q": "dynamic"})["y"] == pytest.approx(5e-5)
        assert table.of({"q": "dynamic", "k": "dynamic"})["y"] == pytest.approx(together / 2)
        assert table.of({"q": "static", "k": "dynamic"})["y"] == pytest.approx(1e-4 + 1e-4)


def test_of_three_readers_two_add_their_share_of_what_agrees() -> None:
    table = readers({"q": 1e-4, "k": 1e-4, "v": 1e-4}, 9e-4)  # amplitudes add: three times the error
    assert table.of({"q": "static", "v": "static"})["y"] == pytest.approx(4e-4)
    assert table.of({"q": "static", "k": "static", "v": "static"})["y"] == pytest.approx(9e-4)
    table = readers({"q": 3e-4, "k": 2e-4, "v": 1e-4}, 4e-4)
    assert table.of({"v": "static"})["y"] == pytest.approx(1e-4)
    assert table.of({"q": "static", "k": "static", "v": "static"})["y"] == pytest.approx(4e-4)


def test_readers_that_cancel_are_never_promised_less_than_the_largest_one_alone() -> None:
    table = readers({"q": 5e-4, "k": 1e-4}, 2e-4)
    assert table.of({"q": "static"})["y"] == pytest.approx(5e-4)
    assert table.of({"q": "static", "k": "static"})["y"] == pytest.approx(5e-4)


def test_a_value_that_its_producer_stores_counts_once_and_not_without_an_integer_reader() -> None:
    table = readers({"q": 1e-4, "k": 2e-4}, 4e-4, "p")
    assert table.of({"p": "static", "q": "static"})["y"] == pytest.approx(6e-4)
    assert table.of({"p": "static", "q": "static", "k": "static"})["y"] == pytest.approx(6e-4)
    assert table.of({"p": "static"})["y"] == 0.0  # it is built with float output
    assert table.of({"p": "static", "q": "dynamic"})["y"] == pytest.approx(5e-5)
    assert table.of({"p": "static-float", "q": "static"})["y"] == pytest.approx(1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_charges_are_what_the_table_predicts_for_random_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    alone = {g: float(random.uniform(0.1, 1.0)) for g in "qkvw"[: int(random.integers(2, 5))]}
    table = readers(alone, float(random.uniform(0.3, 2.0)) * sum(alone.values()), *("p" if seed % 3 else ""))
    table = table.corrected("static", {"y": 0.7}, {"q": "static"})
    forms = {g: [f for f in forms if random.uniform() < 0.8] for g, forms in table.asks.items()}
    for _ in range(30):
        choice = {g: str(random.choice(["float", *found])) for g, found in forms.items()}
        assert charged(table, choice, forms) == pytest.approx(table.of(choice)["y"], rel=1e-12, abs=1e-15)


def test_what_was_never_measured_together_adds_up() -> None:
    table = readers({"q": 1e-4, "k": 2e-4}, math.inf)
    assert table.of({"q": "static", "k": "static"})["y"] == pytest.approx(3e-4)


def test_which_reads_are_rounded_already_and_which_stores_need_a_reader() -> None:
    _, groups = net("[c] a = Gemm(x, m) [d] b = Gemm(a, m) [s] y = Add(a, b)", "float[2,64] x")
    found = list(groups.values())
    assert stored_by(found) == {
        "read:a@d": (("c", "static"),), "read:a@s": (("c", "static"),), "read:b@s": (("d", "static"),),
    }  # fmt: skip
    # Here the form with float output is an operator of its own, and no substitute for the other.
    assert needed_readers(found) == {}
    row = replace(groups["c"].row, emit={})
    found = [replace(g, row=row) if g.root.op_type == "Gemm" else g for g in found]
    needed = needed_readers(found)
    assert {p: set(keys) for p, keys in needed.items()} == {
        "value:a": {("d", "static"), ("d", "static-float"), ("s", "static")}, "value:b": {("s", "static")},
    }  # fmt: skip
    assert needed_readers(found, ["b"]).keys() == {"value:a"}


def test_the_table_survives_json_infinity_included() -> None:
    table = NoiseTable(
        ("y", "z"), {"value:x": {"y": math.inf, "z": 0.0}, "weight:a": {"y": 1.25e-7, "z": 0.1}},
        {"a": {"static": ("value:x", "weight:a")}}, {"value:x": (("b", "static"),)}, {"value:x": (("c", "static"),)},
        {"reads:x": ("read:x@a", "read:x@b")}, {"static": {"y": 0.5}}, {"static": {"y": 1.5}}, {"value:x": "refused"},
        3.25, 2,
    )  # fmt: skip
    assert NoiseTable.from_json(table.to_json()) == table
    with pytest.raises(CalibrationError, match="not a noise table"):
        NoiseTable.from_json('{"outputs": 3}')


def test_decibels_and_families() -> None:
    assert [decibels(x) for x in (0.0, 1e-3, math.inf, 1e-30)] == [200.0, pytest.approx(30.0), -200.0, 200.0]
    assert [family(f) for f in ("static", "static-float", "dynamic")] == ["static", "static", "dynamic"]
    assert np.isfinite(decibels(math.nan))
