"""Closeness: figures against plain NumPy, and the sample that was spoilt is the worst."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.evaluating.closeness import compare
from qcompiler.search.quality import CEILING


def runs(wanted, found, width: int = 3):
    return [({"x": np.zeros((len(a["y"]), width))}, a, b) for a, b in zip(wanted, found, strict=True)]


def noisy(seed: int = 0, feeds: int = 6, rows: int = 5):
    generator = np.random.default_rng(seed)
    wanted = [{"y": generator.standard_normal((rows, 7)).astype(np.float32)} for _ in range(feeds)]
    found = [{"y": (a["y"] + 0.01 * generator.standard_normal((rows, 7))).astype(np.float32)} for a in wanted]
    return wanted, found


def test_figures_are_those_of_numpy() -> None:
    wanted, found = noisy()
    result = compare(runs(wanted, found), ["y"], ["y"])
    a, b = (np.concatenate([o["y"] for o in side]).astype(np.float64) for side in (wanted, found))
    figure = result.outputs[0]
    assert figure.sqnr_db == pytest.approx(10 * np.log10(np.square(a).sum() / np.square(a - b).sum()))
    assert figure.cosine == pytest.approx((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()))
    assert figure.agreement == (a.argmax(-1) == b.argmax(-1)).mean()
    assert (figure.rows, result.samples, result.unit) == (30, 30, "row")
    assert figure.sqnr_interval is not None
    assert figure.sqnr_interval.covers(figure.sqnr_db)
    assert figure.sqnr_interval.high - figure.sqnr_interval.low < 3
    assert figure.agreement_interval is not None
    assert "exact" in figure.agreement_interval.method


def test_the_spoilt_sample_is_the_worst_and_says_what_differs() -> None:
    wanted, found = noisy()
    wanted[4]["y"][2] = np.linspace(-1, 1, 7)
    found[4]["y"][2] = wanted[4]["y"][2]
    found[4]["y"][2, 3] = 5.0
    result = compare(runs(wanted, found), ["y"], [])
    worst = result.worst[0]
    assert (worst.index, worst.place.feed, worst.place.row, worst.output) == (22, 4, 2, "y")
    assert worst.sqnr_db < -5
    assert worst.text == "largest error at [3]: 0 of float, 5 of the compiled"
    assert result.worst[1].sqnr_db > 20
    assert result.sample_db[22] == pytest.approx(worst.sqnr_db)
    classes = compare(runs(wanted, found), ["y"], ["y"])
    assert classes.worst[0].text == "class 6 of float, 3 of the compiled"
    assert [s.index for s in classes.changed] == [22]


def test_places_of_one_sample_are_not_counted_as_samples() -> None:
    generator = np.random.default_rng(0)
    wanted = [{"y": generator.standard_normal((4, 50, 9))} for _ in range(5)]
    found = [{"y": a["y"] + 0.5 * generator.standard_normal((4, 50, 9))} for a in wanted]
    figure = compare(runs(wanted, found), ["y"], ["y"]).outputs[0]
    assert figure.rows == 1000
    assert figure.agreement_interval is not None
    assert "over 20 samples" in figure.agreement_interval.method


def test_a_value_that_is_not_finite_has_no_interval() -> None:
    wanted, found = noisy()
    found[1]["y"][0, 0] = np.nan
    result = compare(runs(wanted, found), ["y"], [])
    figure = result.outputs[0]
    assert figure.sqnr_db == -CEILING
    assert (figure.sqnr_interval, figure.cosine) == (None, None)
    assert result.worst[0].index == 5
    assert "nan" in result.worst[0].text


def test_integers_and_lengths_that_differ_are_counted() -> None:
    wanted = [{"n": np.asarray([[1, 2, 3]])}, {"n": np.asarray([[4, 5, 6]])}]
    found = [{"n": np.asarray([[1, 2, 9]])}, {"n": np.asarray([[4, 5]])}]
    result = compare([({"x": np.zeros((1, 2))}, a, b) for a, b in zip(wanted, found, strict=True)], ["n"], [])
    assert result.outputs[0].differing == pytest.approx(4 / 6)
    assert result.unit == "feed"
    assert result.outputs[0].sqnr_db is None


def test_equal_outputs_are_exact_and_no_sample_is_worst() -> None:
    wanted, _ = noisy()
    result = compare(runs(wanted, wanted), ["y"], ["y"])
    assert (result.outputs[0].sqnr_db, result.outputs[0].agreement, result.worst) == (CEILING, 1.0, ())
    assert result.least_db == CEILING
