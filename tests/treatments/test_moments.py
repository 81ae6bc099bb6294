"""Moments of inputs: those of the rows that outputs sum, whatever fits the memory at a time; and what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompiler.errors import PassError
from qcompiler.ir.graph import const_array
from qcompiler.quant.spec import QuantSpec
from qcompiler.targets.groups import find_groups
from qcompiler.targets.target import load_target
from qcompiler.treatments import rounding
from qcompiler.treatments.moments import Moments, Window, input_moments, product_work, rounding_work, rows_wanted
from qcompiler.treatments.rounding import RoundWeights, round_weight
from tests.passes.quantize.lab import ENGINE, import_exactly, model_of
from tests.treatments.bench import bench, feeds_of, normal

INT8 = QuantSpec("int8", axis=1, symmetric=True)


def test_moments_of_a_convolution_are_those_of_its_patches() -> None:
    body = "[a] y = Conv<pads=[1,0,1,0], strides=[2,1], dilations=[1,2], group=2>(x, w)"
    model = import_exactly(model_of("float[1,4,9,9] x", "float[] y", body, {"w": normal(1, 6, 2, 3, 3)}))
    (group,) = find_groups(model, load_target("ort-x86"))
    feeds = feeds_of(0, 3, x=(1, 4, 9, 9))
    ((_, found),) = input_moments(model, [group], feeds, ENGINE)
    assert found.shape == (2, 18, 18)
    # The mean power of the outputs of any weight is w' H w, but for what shrinking the off-diagonal takes.
    weight = normal(1, 6, 2, 3, 3).reshape(2, 3, 18).astype(np.float64)
    rows = 3 * 25
    share = 18 / (18 + rows)
    power = np.mean(
        [np.square(ENGINE.load(model).run(f)["y"].astype(np.float64)).mean(axis=(0, 2, 3)) for f in feeds], 0
    )
    diagonal = np.stack([np.diag(np.diag(h)) for h in found])
    whole = (found - share * diagonal) / (1 - share)
    np.testing.assert_allclose(np.einsum("gnk,gkl,gnl->gn", weight, whole, weight).reshape(-1), power, rtol=1e-4)


def products() -> tuple[str, dict[str, np.ndarray]]:
    body = "[a] p = MatMul(x, wa) [b] q = MatMul(x, wb) r = Add(p, q) t = Relu(r) [c] y = MatMul(t, wc)"
    return body, {"wa": normal(1, 64, 48), "wb": normal(2, 64, 48), "wc": normal(3, 48, 12)}


def test_the_feeds_are_run_again_for_layers_that_do_not_fit_the_memory() -> None:
    body, weights = products()
    model = import_exactly(model_of("float[16,64] x", "float[] y", body, weights))
    groups = [g for g in find_groups(model, load_target("ort-x86")) if g.row.kind == "weighted"]
    feeds = feeds_of(0, 3, x=(16, 64))
    read = []

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            read.append(1)
            return super().__iter__()

    whole, small = (
        {g.name: h for g, h in input_moments(model, groups, Counted(feeds), ENGINE, memory=memory)}
        for memory in (1 << 20, 1)
    )
    assert len(read) == 1 + 2  # the two products that read x share its moments
    assert whole["a"] is whole["b"]
    assert list(whole) == ["a", "b", "c"]
    for name in whole:
        np.testing.assert_array_equal(whole[name], small[name])
    x = np.concatenate([f["x"] for f in feeds]).astype(np.float64)
    np.testing.assert_allclose(np.diagonal(whole["a"][0]), np.square(x).mean(axis=0), rtol=1e-5)


def test_few_rows_shrink_what_inputs_have_in_common() -> None:
    moments = Moments(Window(), [], 1, 4)
    moments.add(np.ones((4, 4), np.float32), most=100)
    found = moments.mean()
    assert found is not None
    np.testing.assert_allclose(found[0], 0.5 + 0.5 * np.eye(4))  # 4 rows of 4 inputs: half of it may be chance


def test_numbers_that_are_not_finite_give_no_moments() -> None:
    moments = Moments(Window(), [], 1, 2)
    moments.add(np.array([[1.0, np.inf]], np.float32), most=10)
    assert moments.mean() is None
    assert Moments(Window(), [], 1, 2).mean() is None


@pytest.mark.parametrize(("inputs", "rows"), [(9, 2048), (512, 2048), (700, 2800), (4000, 4096)])
def test_rows_grow_with_the_inputs_up_to_a_bound(inputs: int, rows: int) -> None:
    assert rows_wanted(inputs) == rows


def test_work_is_that_of_moments_factor_and_rounding() -> None:
    body, weights = products()
    given = bench(model_of("float[16,64] x", "float[] y", body, weights), feeds_of(0, 3, x=(16, 64)), [])
    (group,) = [g for g in given.workshop.groups if g.name == "a"]
    assert rounding_work(group) == 64 * 64 * (2048 + 21) + 3 * 64 * 64 * 48
    assert product_work(group, given.statistics) == 3 * 16 * 64 * 48


def test_what_takes_most_is_left_out_where_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    body, weights = products()
    given = bench(
        model_of("float[16,64] x", "float[] y", body, weights), feeds_of(0, 3, x=(16, 64)), feeds_of(1, 2, x=(16, 64))
    )
    treatment = RoundWeights()
    assert set(treatment.choose(given.case)) == {"a", "b", "c"}
    assert treatment.scope(given.case, treatment.choose(given.case)) == {"places": 3.0}
    work = {g.name: rounding_work(g) for g in given.workshop.groups if g.name in "abc"}
    monkeypatch.setattr(rounding, "LEAST_WORK", work["a"] + work["c"])
    monkeypatch.setattr(rounding, "WORK_RATIO", 0.0)
    chosen = treatment.choose(given.case)
    assert set(chosen) == {"a", "c"}
    assert treatment.scope(given.case, chosen) == {"places": 2.0, "left_out_for_time": 1.0}
    made = treatment.apply(given.case, chosen).workshop.base
    assert set(made.rounding) == {"a", "c"}
    assert [r.text for r in made.remarks if r.reason == "left-at-nearest"] == [
        "b: rounding it takes too long, or its inputs were never observed"
    ]


def test_a_weight_is_rounded_alike_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "[a] y = Conv<group=4>(x, w)"
    model = import_exactly(model_of("float[1,8,9,9] x", "float[] y", body, {"w": normal(1, 12, 2, 3, 3)}))
    (group,) = find_groups(model, load_target("ort-x86"))
    ((_, hessian),) = input_moments(model, [group], feeds_of(0, 3, x=(1, 8, 9, 9)), ENGINE)
    spec = replace(INT8, axis=0)
    whole = round_weight(group, spec, hessian)
    monkeypatch.setattr(rounding, "COLUMN_ELEMENTS", 1)
    pieces = round_weight(group, spec, hessian)
    weight = const_array(group.root.inputs[1])
    assert weight is not None
    assert whole.codes.dtype == np.int8
    assert whole.codes.shape == weight.shape
    np.testing.assert_array_equal(whole.codes, pieces.codes)
    assert np.abs(whole.codes * whole.params.scale.reshape(-1, 1, 1, 1) - weight).max() < 3 * whole.params.scale.max()


def test_an_unknown_method_is_named() -> None:
    body, weights = products()
    given = bench(model_of("float[16,64] x", "float[] y", body, weights), feeds_of(0, 3, x=(16, 64)), [])
    with pytest.raises(PassError, match="unknown rounding method 'upwards'; expected one of sequential, soft"):
        RoundWeights().apply(given.case, {"a": "upwards"})
