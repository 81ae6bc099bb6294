"""Predicted cost of forms where nothing can be timed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompiler.errors import TargetError
from qcompiler.ir.importer import import_model
from qcompiler.search.analytic import (
    SHARE,
    Rates,
    analytic_cost,
    analytic_costs,
    known_rates,
    rates_for,
    rates_named,
)
from qcompiler.targets.groups import find_groups
from qcompiler.targets.host import Processor
from qcompiler.targets.target import load_target, target_names
from tests import synthetic
from tests.search.nets import SAME, net

LAW = Rates(
    "law",
    "by hand",
    overhead=1.0,
    bandwidth=1000.0,
    float_bytes=4,
    rate={
        "product": {"float": 100.0, "static-float": 400.0, "dynamic": 200.0},
        "convolution": {"float": 100.0, "static": 400.0},
        "depthwise": {"float": 10.0},
        "arithmetic": {"float": 50.0, "static": 100.0},
        "mover": {"float": 50.0, "static": 100.0},
        "recurrent": {"float": 10.0},
    },
    conversion={"quantize": 1.0, "dequantize": 2.0, "dynamic": 3.0},
)


def test_work_is_weighed_by_form() -> None:
    groups = find_groups(import_model(synthetic.residual_cnn()), load_target("ort-x86"))
    predict = analytic_cost(groups)
    products = [g.name for g in groups if g.row.kind == "weighted"]
    assert len(products) >= 2
    whole = predict({})
    alone = {name: whole - predict({name: "static"}) for name in products}
    assert all(saved > 0 for saved in alone.values())
    # Costs add up, and every product is halved by 8 bits.
    assert predict(dict.fromkeys(products, "static")) == pytest.approx(whole - sum(alone.values()))
    assert predict(dict.fromkeys(products, "static")) == pytest.approx(SHARE["static"] * whole)
    assert predict(dict.fromkeys(products, "weight-only")) < predict(dict.fromkeys(products, "dynamic")) < whole


def test_what_is_no_product_costs_nothing() -> None:
    groups = find_groups(import_model(synthetic.residual_cnn()), load_target("ort-x86"))
    others = {g.name: "static" for g in groups if g.row.kind != "weighted"}
    assert others
    assert analytic_cost(groups)(others) == analytic_cost(groups)({})


def test_the_law_by_hand() -> None:
    """A convolution of 4 x 4 filters of 3 x 3 on 1 x 4 x 8 x 8."""
    _, groups = net(f"[c0] a = Conv{SAME}(x, w) [t0] y = Tanh(a)")
    table = analytic_costs(list(groups.values()), {"x": 256, "a": 256}, LAW)
    work = 256 * 4 * 9
    assert table.groups["c0"] == {"float": pytest.approx(1 + work / 100), "static": pytest.approx(1 + work / 400)}
    assert table.conversions["x"].quantize == pytest.approx(1 + 0.256)
    assert table.conversions["a"].dequantize == pytest.approx(1 + 2 * 0.256)
    assert table.fixed == 0.0
    assert table.counts() == {"analytic": 4}
    assert table.total({"c0": "static"}) == pytest.approx(1 + work / 400 + 1.256 + 1.512)


def test_a_product_of_one_row_is_bound_by_reading_its_weight() -> None:
    _, groups = net("[m0] a = MatMul(x, m) [t0] y = Tanh(a)", "float[1,64] x")
    fast = replace(LAW, rate={**LAW.rate, "product": {"float": 1e9, "static-float": 1e9, "dynamic": 1e9}})
    table = analytic_costs(list(groups.values()), {}, fast)
    floats, dynamic = table.groups["m0"]["float"], table.groups["m0"]["dynamic"]
    assert floats == pytest.approx(1 + 4 * (64 * 64 + 64 + 64) / 1000)
    assert dynamic == pytest.approx(1 + (64 * 64 + 64 + 4 * 64) / 1000)


def test_what_moves_data_goes_by_its_elements() -> None:
    _, groups = net(f"[c0] a = Conv{SAME}(x, w) [a0] y = Add(a, x)")
    table = analytic_costs(list(groups.values()), {}, LAW)
    moved = 256 * 3
    assert table.groups["a0"] == {"float": pytest.approx(1 + moved / 50), "static": pytest.approx(1 + moved / 100)}


def test_elements_of_the_feed_count_where_axes_are_open() -> None:
    _, groups = net("[m0] a = MatMul(x, m) [t0] y = Tanh(a)", "float[n,64] x")
    one = analytic_costs(list(groups.values()), {}, LAW).groups["m0"]["float"]
    many = analytic_costs(list(groups.values()), {"x": 6400, "a": 6400}, LAW).groups["m0"]["float"]
    assert one == pytest.approx(1 + 64 * 64 / 100)
    assert many == pytest.approx(1 + 100 * 64 * 64 / 100)


def test_every_shipped_class_is_complete() -> None:
    kinds = {"product", "convolution", "depthwise", "recurrent", "arithmetic", "mover"}
    names = [rates.name for rates in known_rates()]
    assert names[-1] == "generic"
    assert len(set(names)) == len(names)
    for rates in known_rates():
        assert set(rates.rate) == kinds, rates.name
        assert set(rates.conversion) == {"quantize", "dequantize", "dynamic"}
        assert all("float" in forms and min(forms.values()) > 0 for forms in rates.rate.values())
        product = rates.rate["product"]
        assert product["static"] >= product["dynamic"] > product["float"]
        assert any(word in rates.about for word in ("Measured", "Derived", "data sheet", "Not measured"))


@pytest.mark.parametrize(
    ("target", "features", "expected"),
    [
        ("ort-x86", {"vnni"}, "x86-vnni"),
        ("ort-x86", {"vnni", "amx_int8", "avx2"}, "x86-amx"),
        ("ort-x86", None, "x86-vnni"),  # what its table requires
        ("ort-x86-avx2", {"avx2"}, "x86-avx2"),
        ("ort-arm", {"asimddp"}, "arm-dotprod"),
        ("ort-arm", None, "generic"),  # its table asks for nothing
        ("ort-generic", None, "generic"),
        ("tensorrt-sm90", None, "gpu-sm90"),
        ("tensorrt-sm89", None, "gpu-sm80"),
        ("triton-sm100", None, "gpu-sm90"),
        ("tensorrt", None, "gpu-sm80"),
        ("ort-cuda", None, "gpu-sm80"),
        ("openvino", {"vnni"}, "x86-vnni"),
    ],
)
def test_the_class_of_a_target(target: str, features: set[str] | None, expected: str) -> None:
    table = load_target(target)
    processor = None if features is None else Processor(table.processor, "", frozenset(features))
    assert rates_for(table, processor).name == expected


def test_every_shipped_target_has_a_class_with_a_rate_for_its_forms() -> None:
    for name in target_names():
        assert rates_for(load_target(name)).overhead > 0


def test_an_unknown_class() -> None:
    with pytest.raises(TargetError, match="no rates for 'abacus'; known: x86-amx, x86-vnni"):
        rates_named("abacus")
