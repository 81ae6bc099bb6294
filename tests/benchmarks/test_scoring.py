"""The figures of the benchmark: what counts as usable, and what the headline is made of."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("scoring")


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("measuring")


@pytest.mark.parametrize(
    ("reference", "found", "kept"),
    [
        ({"top1": 0.77}, {"top1": 0.76}, True),  # a point, exactly
        ({"top1": 0.77}, {"top1": 0.7599}, False),
        ({"top1": 0.77}, {"top1": 0.9}, True),
        ({"auc": 0.98, "accuracy": 0.88}, {"auc": 0.98, "accuracy": 0.85}, False),  # every metric counts
        ({"loss": 0.5}, {"loss": 0.504}, True),  # less is better: 1 %, though it lies in 0..1
        ({"loss": 0.5}, {"loss": 0.506}, False),
        ({"ppl": 3.51}, {"ppl": 3.2}, True),
        ({"ppl": 3.51}, {"ppl": 3.55}, False),
        ({"psnr": 40.0}, {"psnr": 39.7}, True),
        ({"psnr": 40.0}, {"psnr": 39.5}, False),
        ({"top1": 0.77}, {"top1": float("nan")}, False),
    ],
)
def test_a_metric_holds_within_a_point(
    scoring: ModuleType, reference: dict[str, float], found: dict[str, float], kept: bool
) -> None:
    assert scoring.holds(reference, found) is kept


@pytest.mark.parametrize(
    ("error", "speedup", "holds", "usable"),
    [
        (None, 1.5, True, 1.5),
        (None, 0.8, True, 1.0),
        (None, 1.5, False, 1.0),
        ("gone", 1.5, True, 1.0),
        (None, None, True, 1.0),
    ],
)
def test_usable_speedup(
    scoring: ModuleType, error: str | None, speedup: float | None, holds: bool, usable: float
) -> None:
    assert scoring.FormResult("f", error, speedup, holds=holds).usable_speedup == usable


def test_sqnr_per_output(scoring: ModuleType) -> None:
    meter = scoring.SqnrMeter(["a", "b", "c", "d"])
    for sign in (1.0, -1.0):
        wanted = [np.float32([10, 0]) * sign, np.int8([100, 0]), np.array([7]), np.float32([1])]
        found = [np.float32([9, 0]) * sign, np.int8([90, 0]), np.array([8]), np.float32([1])]
        meter.add(wanted, found)
    assert meter.decibels() == pytest.approx({"a": 20.0, "b": 20.0, "d": scoring.CEILING}, rel=1e-12)


def test_sqnr_of_what_is_no_number_or_has_another_shape(scoring: ModuleType) -> None:
    meter = scoring.SqnrMeter(["nan", "shape"])
    meter.add([np.float32([1]), np.float32([1])], [np.float32([np.nan]), np.float32([1, 1])])
    assert meter.decibels() == {"nan": -scoring.CEILING, "shape": -scoring.CEILING}


def test_geometric_mean(scoring: ModuleType) -> None:
    assert scoring.geometric_mean([1.0, 4.0]) == pytest.approx(2.0, rel=1e-15)
    assert scoring.geometric_mean([]) == 1.0


def test_the_best_rival_is_chosen_per_model(scoring: ModuleType, measuring: ModuleType) -> None:
    def model(**speedups: float) -> object:
        forms = {name: scoring.FormResult(name, None, s, holds=s > 0) for name, s in speedups.items()}
        return measuring.ModelResult("models", "m", 30, forms)

    results = [model(a=4.0, b=2.0, ours=1.0), model(a=0.5, b=1.0, ours=9.0), model(a=-1.0, b=-1.0, ours=-1.0)]
    means = measuring.usable_means(results, ["a", "b"], "ours")["models"]
    expected = {
        "best of ONNX Runtime per model": 4 ** (1 / 3),
        "a": 4 ** (1 / 3),
        "b": 2 ** (1 / 3),
        "ours": 9 ** (1 / 3),
    }
    assert means == pytest.approx(expected, rel=1e-12)
    assert results[2].best_of(["a", "b"]) is None
