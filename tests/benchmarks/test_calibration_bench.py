"""The calibration benchmark: what it compares, and how figures become a table."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qcompiler.calibration.statistics import TensorStatistics

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("calibration_tables")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("calibration_worker")


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("reductions")


def _row(seconds: float, peak: float) -> dict[str, object]:
    return {
        "seconds": seconds, "peak_mb": peak, "tensors": 3, "elements": 2_000_000, "feeds": 4,
        "percentile": {"seconds": seconds / 2, "peak_mb": peak},
    }  # fmt: skip


def test_rounds_are_merged_against_us(tables: ModuleType) -> None:
    ours, theirs = tables.Variant("ours", "ours-all"), tables.Variant("theirs", "theirs")
    rounds = [_row(3.0, 100.0), _row(2.0, 120.0)]
    assert tables.merged(ours, rounds) | {"percentile": None} == _row(2.0, 120.0) | {"percentile": None}
    assert tables.merged(theirs, rounds) == _row(2.0, 100.0)
    assert tables.merged(theirs, [_row(3.0, 1.0), {"error": "killed"}]) == {"error": "killed"}


def test_table_has_both_ratios_and_names_failures(tables: ModuleType) -> None:
    figures = {v.name: _row(1.0, 30.0) if v.ours else _row(4.0, 400.0) for v in tables.VARIANTS}
    figures["ours, every value, one core"] = {"error": "ModelError: a|b"}
    text = tables.markdown(tables.Results(models=[tables.ModelRow("m", figures)]), {"timing": "none"})
    lines = [line for line in text.splitlines() if line.startswith("| m |")]
    memory, one, both = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert memory[:5] == ["m", "4", "3", "ModelError: a/b", "3"]
    assert memory[8:] == ["30", "30", "ModelError: a/b", "400", "400", "0.07", "0.07", ""]
    assert one == ["m", "1.00", "ModelError: a/b", "2.00", "4.00", "0.50", "0.25", "", "500.0", "", "2000.0"]
    assert both[5:8] == ["0.50", "0.25", "0.25"]


def test_growth_is_long_over_short(tables: ModuleType) -> None:
    row = {"model": "m", "executor": "inline", "few": _row(1.0, 50.0), "many": _row(9.0, 51.0) | {"feeds": 2000}}
    text = tables.markdown(tables.Results(generator=[row]), {})
    assert "| m | inline | 50.0 | 51.0 | 1.020 | 9.0 |" in text.splitlines()
    assert "| model | executor | 4 feeds | 2000 feeds | ratio | seconds, 2000 feeds |" in text.splitlines()


def test_made_up_feeds_go_through_all_shapes(worker: ModuleType) -> None:
    tokens = [{"tokens": np.arange(32, dtype=np.int64).reshape(4, 8)}]
    feeds = list(worker.made_up(tokens, 32))
    assert {f["tokens"].shape for f in feeds[:8]} == {(1 + i % 4, 1 + i % 8) for i in range(8)}
    assert feeds[7]["tokens"].shape == (4, 8)
    image = [{"image": np.ones((2, 1, 3, 3), np.float32)}]
    first, second, *_ = worker.made_up(image, 4)
    assert (first["image"].shape, second["image"].shape) == ((1, 1, 3, 3), (2, 1, 3, 3))
    assert second["image"].dtype == np.float32
    np.testing.assert_array_equal(second["image"], np.float32(1.001))
    assert not np.shares_memory(first["image"], image[0]["image"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_both_sides_see_the_same_feeds(worker: ModuleType) -> None:
    ours, every, theirs = (
        worker.TASKS[task](worker.Request(task, name="digits_resnet")) for task in ("ours", "ours-all", "theirs")
    )
    assert ours["feeds"] == every["feeds"] == theirs["feeds"] == 8
    assert 0 < ours["tensors"] <= every["tensors"] <= theirs["tensors"]
    assert 0 < ours["elements"] <= every["elements"] <= theirs["elements"]
    assert set(worker.METHODS) < set(theirs)


def test_histogram_in_the_graph_is_ours(reductions: ModuleType) -> None:
    values = np.random.default_rng(0).standard_normal(5000, np.float32)
    (counts,) = reductions.inside(values, reductions.HISTOGRAM, reductions.COUNTS)()
    seen = TensorStatistics()
    reductions.handed_over(values, seen.add)()
    np.testing.assert_array_equal(counts, seen.counts)
    assert seen.count == 5000


def test_unknown_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("calibration")
    assert bench.chosen_subjects(None, ["code_lm"]) == [("demo", "code_lm")]
    with pytest.raises(KeyError, match="no model nothing; known: digits_resnet"):
        bench.chosen_subjects(None, ["nothing"])
