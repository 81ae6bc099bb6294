"""Forms from costs invented by hand: the cut is exact, conversions are paid once, families agree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcompiler.quant.plan import Form
from qcompiler.search.select import Measured, choose_forms, conversion_rate, predict
from qcompiler.targets.groups import Group
from tests.search.nets import SAME, chain, measured, net

BIG = 10_000
"""Elements of a value whose conversion costs 10 us at the rate that `RATED` measures."""
RATED = {"x": 10.0}


def groups_of(body: str, **places: str) -> dict[str, Group]:
    return net(body, **places)[1]


def sizes(groups: dict[str, Group], count: int = BIG) -> dict[str, int]:
    return {str(v.name): count for g in groups.values() for v in (*g.data, *g.results)}


def chosen(groups: dict[str, Group], data: Measured, **frozen: str) -> dict[str, str]:
    return dict(choose_forms(list(groups.values()), data, frozen))  # type: ignore[arg-type]


def same(groups: dict[str, Group], us: float) -> dict[str, float]:
    return dict.fromkeys(groups, us)


def test_the_rate_is_that_of_the_conversions_that_were_measured() -> None:
    groups = groups_of(chain("Conv", "Tanh", "Conv"))
    data = measured(
        groups, same(groups, 1), same(groups, 1), elements={"x": 8192, "v0": 8192, "v1": 100},
        conversions={"x": 4.0, "v0": 12.0, "v1": 99.0, "c0": 50.0},
    )  # fmt: skip
    assert conversion_rate(data) == pytest.approx(16 / 16384)  # small values and nodes that are no values do not count


def test_without_a_measured_conversion_the_default_rate_counts() -> None:
    groups = groups_of(chain("Conv"))
    assert conversion_rate(measured(groups, {"c0": 1}, {"c0": 1})) == pytest.approx(0.2e-3)


def test_a_convolution_that_wins_by_more_than_its_conversions_is_an_integer_one() -> None:
    groups = groups_of(chain("Conv", "Tanh"))
    data = measured(groups, {"c0": 100}, {"c0": 79}, elements=sizes(groups), conversions=RATED)
    assert chosen(groups, data) == {"c0": "static"}  # 79 + 10 + 10 < 100


def test_an_isolated_group_that_wins_by_less_than_its_conversions_stays_float() -> None:
    groups = groups_of(chain("Conv", "Tanh"))
    data = measured(groups, {"c0": 100}, {"c0": 81}, elements=sizes(groups), conversions=RATED)
    assert chosen(groups, data) == {"c0": "float"}  # 81 + 10 + 10 > 100


def test_only_the_loser_of_separate_regions_stays_float() -> None:
    groups = groups_of(chain("Conv", "Tanh", "Conv", "Tanh", "Conv", "Tanh"))
    static = {"c0": 50, "c2": 95, "c4": 50}
    data = measured(groups, same(groups, 100), static, elements=sizes(groups), conversions=RATED)
    assert chosen(groups, data) == {"c0": "static", "c2": "float", "c4": "static"}


def test_a_long_chain_wins_although_no_group_pays_for_its_own_conversions() -> None:
    groups = groups_of(chain(*["Conv"] * 5, "Tanh"))
    static = same(groups, 95)
    data = measured(groups, same(groups, 100), static, elements=sizes(groups), conversions=RATED)
    assert set(chosen(groups, data).values()) == {"static"}  # 5 x 5 won, 2 x 10 paid
    shorter = groups_of(chain(*["Conv"] * 3, "Tanh"))
    data = measured(shorter, same(shorter, 100), same(shorter, 95), elements=sizes(shorter), conversions=RATED)
    assert set(chosen(shorter, data).values()) == {"float"}  # 3 x 5 won, 2 x 10 paid


def test_a_loser_inside_a_chain_is_carried_where_leaving_costs_more() -> None:
    groups = groups_of(chain("Conv", "Conv", "Conv", "Tanh"))
    for slow, expected in ((115, "static"), (125, "float")):  # leaving the chain costs two conversions of 10
        static = {"c0": 20, "c1": slow, "c2": 20}
        data = measured(groups, same(groups, 100), static, elements=sizes(groups), conversions=RATED)
        assert chosen(groups, data) == {"c0": "static", "c1": expected, "c2": "static"}


def same_form(groups: dict[str, Group], form: Form) -> dict[str, Form]:
    return dict.fromkeys(groups, form)


FAN = f"[a] p = Conv{SAME}(x, w) [b] q = Conv{SAME}(x, v) [c] r = Conv{SAME}(x, u) [s] y = Sum(p, q, r)"


def test_several_readers_share_the_conversion_of_what_they_read() -> None:
    groups = groups_of(FAN)
    elements = {"x": 30_000}  # 30 us at the measured rate; what the convolutions write is small
    fan = measured(groups, same(groups, 100), same(groups, 88), elements=elements, conversions={"x": 30.0})
    assert set(chosen(groups, fan).values()) == {"static"}  # 3 x 12 won, 30 + 3 x 0.5 paid
    two = measured(groups, same(groups, 100), {"a": 88, "b": 88}, elements=elements, conversions={"x": 30.0})
    assert set(chosen(groups, two).values()) == {"float"}  # 2 x 12 won


def test_one_dequantization_serves_all_float_readers() -> None:
    groups = groups_of(f"[c] p = Conv{SAME}(x, w) [t] q = Tanh(p) [e] r = Exp(p) [n] s = Neg(p) [z] y = Sum(q, r, s)")
    data = measured(groups, {"c": 100}, {"c": 79}, elements=sizes(groups), conversions=RATED)
    assert chosen(groups, data) == {"c": "static"}


def test_an_output_of_the_model_is_dequantized_even_behind_the_last_group() -> None:
    groups = groups_of(chain("Conv"))
    data = measured(groups, {"c0": 100}, {"c0": 85}, elements=sizes(groups), conversions=RATED)
    assert chosen(groups, data) == {"c0": "float"}  # 15 won, 10 + 10 paid


def test_a_frozen_float_group_is_never_an_integer_one() -> None:
    groups = groups_of(chain("Conv", "Conv", "Tanh"))
    data = measured(groups, same(groups, 100), same(groups, 1), elements=sizes(groups), conversions=RATED)
    assert chosen(groups, data, c0="float") == {"c0": "float", "c1": "static"}


def test_a_frozen_integer_group_stays_one_however_slow_and_pulls_its_neighbours() -> None:
    groups = groups_of(chain("Conv", "Conv", "Conv", "Tanh"))
    static = {"c0": 900, "c1": 105, "c2": 900}
    data = measured(groups, same(groups, 100), static, elements=sizes(groups), conversions=RATED)
    assert set(chosen(groups, data).values()) == {"float"}
    # c1 loses 5 on integers, and would pay for two conversions in float between the two others.
    assert set(chosen(groups, data, c0="static", c2="static").values()) == {"static"}


def test_without_a_static_variant_nothing_is_static() -> None:
    groups = groups_of(chain("Conv", "Conv"))
    assert chosen(groups, measured(groups, same(groups, 100))) == {"c0": "float", "c1": "float"}


def test_the_choice_is_the_cheapest_of_all() -> None:
    """Held against all 2^6 choices on random costs, by the same prediction that the guards use."""
    body = (
        f"[a] p = Conv{SAME}(x, w) [b] q = Conv{SAME}(p, v) [s] r = Add(p, q) [t] k = Tanh(r)"
        f" [c] l = Conv{SAME}(k, u) [d] o = Conv{SAME}(r, w) [m] z = Add(l, o) [e] y = Exp(z)"
    )
    groups = groups_of(body)
    assert list(groups) == ["a", "b", "s", "c", "d", "m"]
    rng = np.random.default_rng(5)
    for _ in range(20):
        float_, static = (dict(zip(groups, rng.uniform(10, 100, 6).tolist(), strict=True)) for _ in range(2))
        elements = {name: int(rng.integers(5_000, 60_000)) for name in sizes(groups)}
        conversions = {"x": elements["x"] * 1e-3}
        data = measured(groups, float_, static, elements=elements, conversions=conversions)
        found = choose_forms(list(groups.values()), data, {})
        best = min(
            predict(list(groups.values()), data, dict(zip(groups, choice, strict=True)))
            for choice in itertools.product(("float", "static"), repeat=6)
        )
        assert predict(list(groups.values()), data, found) == pytest.approx(best, abs=0.01)


# ---- products with a constant matrix -------------------------------------------------------------------------------

ROWS = {"inputs": "float[8,64] x", "outputs": "float[] y"}
QKV = "[q] a = MatMul(x, m) [k] b = MatMul(x, m) [v] c = MatMul(x, m) [s] y = Sum(a, b, c)"


def family(
    float_: float, static: float | None, dynamic: float | None, *, quantize: float = 5.0, convert: float = 5.0
) -> tuple[dict[str, Group], Measured]:
    groups = groups_of(QKV, **ROWS)
    return groups, measured(
        groups, same(groups, float_), None if static is None else same(groups, static),
        None if dynamic is None else same(groups, dynamic), elements={"x": 8192}, conversions={"x": convert},
        dynamic_conversions={"x": quantize},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("float_", "static", "dynamic", "expected"),
    [
        (100, None, 50, "dynamic"),  # no data: there is no static form
        (50, None, 100, "float"),
        (50, 100, None, "float"),
        (100, 50, None, "static-float"),  # no dynamic variant was built
        (100, 50, 60, "static-float"),  # buys its fixed scales with 15 % of the time
        (100, 58, 60, "dynamic"),  # 3 % do not
        (60, 100, 100, "float"),
        (100, 99, 99, "float"),  # 3 won, 5 paid for the one conversion
        (100, 200, 96, "dynamic"),  # 12 won, 5 paid
    ],
)
def test_a_family_takes_the_cheapest_form_together(
    float_: float, static: float | None, dynamic: float | None, expected: str
) -> None:
    groups, data = family(float_, static, dynamic)
    assert chosen(groups, data) == dict.fromkeys("qkv", expected)


def test_a_family_pays_for_one_dynamic_quantization() -> None:
    groups, data = family(100, None, 90, quantize=29.0)
    assert set(chosen(groups, data).values()) == {"dynamic"}  # 30 won, 29 paid
    groups, data = family(100, None, 90, quantize=31.0)
    assert set(chosen(groups, data).values()) == {"float"}


def test_a_pinned_member_keeps_its_form_and_the_rest_still_choose() -> None:
    groups, data = family(100, None, 50)
    assert chosen(groups, data, k="float") == {"q": "dynamic", "k": "float", "v": "dynamic"}
    groups, data = family(50, None, 100)
    assert chosen(groups, data, k="dynamic") == {"q": "float", "k": "dynamic", "v": "float"}


def test_a_member_without_a_dynamic_form_in_the_variant_bars_it_for_all() -> None:
    groups = groups_of(QKV, **ROWS)
    data = measured(groups, same(groups, 100), None, {"q": 10, "k": 10}, elements={"x": 8192})
    assert set(chosen(groups, data).values()) == {"float"}


# ---- prediction ----------------------------------------------------------------------------------------------------


def test_a_prediction_adds_groups_in_their_form_conversions_and_the_rest() -> None:
    groups = groups_of(chain("Conv", "Conv", "Tanh"))
    data = measured(
        groups, {"c0": 100, "c1": 200}, {"c0": 10, "c1": 20}, elements=sizes(groups), conversions=RATED,
        others={"t2": 7},
    )  # fmt: skip
    all_groups = list(groups.values())
    assert predict(all_groups, data, {}) == pytest.approx(307)
    assert predict(all_groups, data, {"c0": "static", "c1": "static"}) == pytest.approx(10 + 20 + 10 + 10 + 7)
    assert predict(all_groups, data, {"c0": "static"}) == pytest.approx(10 + 200 + 10 + 10 + 7)
    assert predict(all_groups, data, {"c1": "static"}) == pytest.approx(100 + 20 + 10 + 10 + 7)


def test_a_prediction_counts_the_conversion_at_an_output_of_the_model() -> None:
    groups = groups_of(f"[c] p = Conv{SAME}(x, w) [d] y = Conv{SAME}(p, v)", outputs="float[] p, float[] y")
    data = measured(groups, same(groups, 100), same(groups, 10), elements=sizes(groups), conversions=RATED)
    assert predict(list(groups.values()), data, same_form(groups, "static")) == pytest.approx(10 + 10 + 3 * 10)


def test_a_prediction_reads_each_form_from_its_variant() -> None:
    groups, data = family(100, 50, 70, convert=4.0)
    rate = conversion_rate(data)
    assert predict(list(groups.values()), data, dict.fromkeys("qkv", "static-float")) == pytest.approx(
        150 + 8192 * rate
    )
    assert predict(list(groups.values()), data, dict.fromkeys("qkv", "dynamic")) == pytest.approx(210 + 8192 * rate)
    mixed = {"q": "dynamic", "k": "static-float"}
    assert predict(list(groups.values()), data, mixed) == pytest.approx(70 + 50 + 100 + 8192 * rate)
