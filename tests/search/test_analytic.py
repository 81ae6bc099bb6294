"""Predicted cost of forms where nothing can be timed."""

from __future__ import annotations

import pytest

from qcompiler.ir.importer import import_model
from qcompiler.search.analytic import SHARE, analytic_cost
from qcompiler.targets.groups import find_groups
from qcompiler.targets.target import load_target
from tests import synthetic


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
