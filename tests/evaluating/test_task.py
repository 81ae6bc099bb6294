"""A metric of both models: what a sample changes, what the interval says, what cannot be said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from qcompiler.errors import BudgetError
from qcompiler.evaluating.task import measure_task

CLASSES = 4


def batches(samples: int, batch: int, seed: int = 0):
    """Return labels, and feeds and scores of a model that is right on all of them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, samples)
    feeds = [{"x": np.zeros((batch, 3), np.float32)} for _ in range(samples // batch)]
    return labels, feeds, [{"y": _scores(part)} for part in labels.reshape(-1, batch)]


def _scores(labels: np.ndarray) -> np.ndarray:
    return np.eye(CLASSES, dtype=np.float32)[labels]


def flipped(outputs: Sequence[dict], samples: Sequence[int], batch: int) -> list[dict]:
    """Return outputs in which some samples have another class."""
    made = [{"y": o["y"].copy()} for o in outputs]
    for s in samples:
        made[s // batch]["y"][s % batch] = np.roll(made[s // batch]["y"][s % batch], 1)
    return made


def top1(labels: np.ndarray):
    """Return a metric that pairs labels with outputs by their order, as users write it."""
    return lambda outputs, feeds: float((np.concatenate([o["y"].argmax(-1) for o in outputs]) == labels).mean())


def test_the_difference_is_that_of_the_metric_and_the_interval_covers_it() -> None:
    labels, feeds, wanted = batches(200, 8)
    found = flipped(wanted, range(0, 200, 10), 8)
    task = measure_task(top1(labels), feeds, wanted, found)
    assert (task.reference, task.compiled) == (1.0, pytest.approx(0.9))
    assert (task.better, task.worse, task.samples, task.unit) == (0, 20, 200, "rows")
    assert task.p_value == pytest.approx(2 / 2**20)
    assert task.interval is not None
    assert task.interval.covers(-0.1)
    assert task.interval.high < 0, "20 of 200 is no accident"
    assert task.interval.high - task.interval.low == pytest.approx(2 * 1.96 * np.sqrt(0.1 * 0.9 / 200), rel=0.15)
    assert task.calls == 2 + 20, "samples with equal outputs need no call"


def test_a_paired_interval_is_narrower_than_that_of_the_figures() -> None:
    labels, feeds, wanted = batches(400, 8)
    both = flipped(wanted, range(0, 200), 8)  # half of all samples are wrong in both
    found = flipped(both, range(200, 212), 8)
    task = measure_task(top1(labels), feeds, both, found)
    assert task.interval is not None
    assert task.interval.high - task.interval.low < 0.04, "the half that is wrong in both does not count"


def test_few_samples_that_differ_do_not_give_a_certain_difference() -> None:
    labels, feeds, wanted = batches(100, 4)
    task = measure_task(top1(labels), feeds, wanted, [{"y": o["y"] * 1.01} for o in wanted])
    assert task.difference == 0.0
    task = measure_task(top1(labels), feeds, wanted, flipped(wanted, [7], 4))
    assert task.interval is not None
    assert task.interval.low < -0.01 < task.interval.high
    assert "Bonett" in task.interval.method


def test_a_percentage_is_right_or_wrong_too() -> None:
    labels, feeds, wanted = batches(100, 4)
    metric = top1(labels)
    task = measure_task(lambda o, f: 100 * metric(o, f), feeds, wanted, flipped(wanted, [7], 4))
    assert (task.better, task.worse) == (0, 1)
    assert task.interval is not None
    assert task.interval.low < -1 < task.interval.high < 3


def test_feeds_are_samples_where_rows_cannot_be_told() -> None:
    feeds = [{"x": np.zeros((1, 3)), "sizes": np.zeros((2,))} for _ in range(30)]
    wanted = [{"y": np.ones((5,))} for _ in feeds]
    found = [{"y": np.full((5,), 1 - 0.001 * i)} for i in range(30)]
    task = measure_task(lambda o, f: float(np.mean([x["y"].mean() for x in o])), feeds, wanted, found)
    assert (task.samples, task.unit, task.better) == (30, "feeds", None)
    assert task.interval is not None
    assert task.interval.covers(task.difference)


def test_a_metric_that_is_no_mean_is_measured_again_on_resampled_feeds() -> None:
    generator = np.random.default_rng(1)
    feeds = [{"x": np.zeros((1, 3))} for _ in range(40)]
    wanted = [{"y": generator.standard_normal((1, 2))} for _ in feeds]
    found = [{"y": o["y"] + 0.3} for o in wanted]

    def middle(outputs, feeds):  # one sample more or less hardly moves it: the parts do not add up
        return float(np.median([o["y"].sum() for o in outputs]))

    task = measure_task(middle, feeds, wanted, found)
    assert task.unit == "feeds"
    assert task.interval is not None
    assert "measured again" in task.interval.method
    assert task.interval.covers(0.6)


def test_a_metric_with_labels_of_its_own_that_is_no_mean_has_an_estimate() -> None:
    generator = np.random.default_rng(1)
    labels = generator.standard_normal(40)
    feeds = [{"x": np.zeros((1, 3))} for _ in range(40)]
    wanted = [{"y": np.full((1, 1), label)} for label in labels]
    found = [{"y": o["y"] + generator.normal(0, 0.5)} for o in wanted]

    def correlation(outputs, feeds):
        return float(np.corrcoef(np.concatenate([o["y"].ravel() for o in outputs]), labels)[0, 1])

    task = measure_task(correlation, feeds, wanted, found)
    assert task.interval is not None
    assert task.interval.covers(task.difference)
    assert task.interval.high < 0.05
    assert "first-order" in task.note


def test_one_sample_has_no_interval() -> None:
    task = measure_task(lambda o, f: 1.0, [{"x": np.zeros((1, 2))}], [{"y": np.ones((1,))}], [{"y": np.ones((1,))}])
    assert task.interval is None
    assert "one sample only" in task.note


def test_a_metric_that_fails_on_mixed_outputs_still_gives_both_figures() -> None:
    labels, feeds, wanted = batches(40, 4)
    found = flipped(wanted, [3], 4)
    plain = top1(labels)
    seen = []

    def picky(outputs, feeds):
        seen.append(1)
        if len(seen) > 2:
            raise BudgetError("metric fails")
        return plain(outputs, feeds)

    task = measure_task(picky, feeds, wanted, found)
    assert task.difference == pytest.approx(-1 / 40)
    assert task.interval is None
    assert "mixed" in task.note
