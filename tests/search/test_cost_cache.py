"""The cache of measured costs: safe among processes, healed where damaged, and nothing is profiled that it knows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.cli_cache import cache_command
from qcompiler.quant.plan import Form
from qcompiler.search.cost_cache import CostCache, EngineKey, Remembered, clear_costs, cost_folder, list_costs
from tests.search.cost_machine import THREE, CostMachine, all_static, machine_of, meter_of

KEY = EngineKey("onnxruntime", "1.31.1", "x86_64 Some Xeon", 1)
DAY = "2026-03-04"


def cache_in(root: Path, key: EngineKey = KEY) -> CostCache:
    return CostCache(cost_folder(root), key, today=DAY)


def measured(machine: CostMachine, cache: CostCache) -> list[float]:
    table = meter_of(machine, cache).table({"static": all_static(machine)})
    return [table.total({}), table.total(all_static(machine)), table.total({"c1": "static"})]


def test_what_is_stored_is_there_for_the_next(tmp_path: Path) -> None:
    cache_in(tmp_path).store({"a": 5.0, "b": 0.0}, {"a": "Conv static"})
    cache = cache_in(tmp_path)
    assert cache.get("a") == Remembered(5.0, 1, DAY, "Conv static")
    assert cache.get("b") == Remembered(0.0, 1, DAY, "")
    assert cache.get("c") is None
    assert cache.warnings == []


def test_the_least_time_stays_and_measurements_are_counted(tmp_path: Path) -> None:
    for us in (5.0, 3.0, 9.0):
        cache_in(tmp_path).store({"a": us})
    known = cache_in(tmp_path).get("a")
    assert known is not None
    assert (known.us, known.count, known.date) == (3.0, 3, DAY)


@pytest.mark.parametrize(
    "other",
    [
        EngineKey("onnxruntime", "1.32.0", KEY.processor, 1),
        EngineKey("openvino", KEY.version, KEY.processor, 1),
        EngineKey("onnxruntime", KEY.version, "x86_64 Another", 1),
        EngineKey("onnxruntime", KEY.version, KEY.processor, 2),
        EngineKey("onnxruntime", KEY.version, KEY.processor, 1, scheme=KEY.scheme + 1),
    ],
)
def test_another_engine_processor_or_scheme_shares_nothing(tmp_path: Path, other: EngineKey) -> None:
    cache_in(tmp_path).store({"a": 5.0})
    assert cache_in(tmp_path, other).get("a") is None
    assert other.name != KEY.name


def test_no_number_is_not_kept(tmp_path: Path) -> None:
    cache_in(tmp_path).store({"a": math.nan, "b": math.inf, "c": -1.0})
    assert list_costs(tmp_path) == []


def _damage(path: Path, how: str) -> None:
    text = path.read_text(encoding="utf-8")
    damaged = {
        "cut": text[: len(text) // 2],
        "empty": "",
        "changed": text.replace("5.0", "0.1"),
        "foreign": json.dumps({"costs": {}}),
        "binary": None,
    }[how]
    if damaged is None:
        path.write_bytes(b"\xff\xfe\x00SQLite")
    else:
        path.write_text(damaged, encoding="utf-8")


@pytest.mark.parametrize("how", ["cut", "empty", "changed", "foreign", "binary"])
def test_a_damaged_file_is_told_once_and_made_anew(tmp_path: Path, how: str) -> None:
    first = cache_in(tmp_path)
    first.store({"a": 5.0})
    _damage(first.path, how)
    cache = cache_in(tmp_path)
    assert cache.get("a") is None
    assert cache.get("b") is None
    assert len(cache.warnings) == 1
    assert "are ignored and will be measured anew" in cache.warnings[0]
    cache.store({"a": 6.0})
    assert len(cache.warnings) == 1
    again = cache_in(tmp_path)
    assert again.get("a") == Remembered(6.0, 1, DAY, "")
    assert again.warnings == []


def test_a_file_under_the_name_of_another_key_is_not_believed(tmp_path: Path) -> None:
    other = cache_in(tmp_path, EngineKey("openvino", "1", "p", 1))
    other.store({"a": 5.0})
    cache = cache_in(tmp_path)
    cache.path.write_bytes(other.path.read_bytes())
    assert cache.get("a") is None
    assert "it is of openvino 1, p, 1 thread" in cache.warnings[0]


def test_a_folder_that_cannot_be_written_costs_no_compilation(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    cache = CostCache(blocked, KEY)
    cache.store({"a": 5.0})
    assert len(cache.warnings) == 1
    assert "cannot be written" in cache.warnings[0]
    known = cache.get("a")
    assert known is not None
    assert known.us == 5.0


STORING = """
import sys
from pathlib import Path
from qcompiler.search.cost_cache import CostCache, EngineKey, cost_folder
root, name = Path(sys.argv[1]), sys.argv[2]
for turn in range(5):
    cache = CostCache(cost_folder(root), EngineKey("onnxruntime", "1.31.1", "x86_64 Some Xeon", 1))
    cache.store({f"{name}-{turn}": 1.0, "common": float(name)})
    assert not cache.warnings, cache.warnings
"""


def test_many_processes_lose_nothing(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", STORING, str(tmp_path), name] for name in "123"]
    workers = [subprocess.Popen(command) for command in commands]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    cache = cache_in(tmp_path)
    assert all(cache.get(f"{name}-{turn}") is not None for name in (1, 2, 3) for turn in range(5))
    common = cache.get("common")
    assert common is not None
    assert (common.us, common.count) == (1.0, 15)
    assert not list(cost_folder(tmp_path).glob("*.part"))


def test_nothing_is_profiled_that_the_cache_knows(tmp_path: Path) -> None:
    first = machine_of()
    expected = measured(first, cache_in(tmp_path))
    assert len(first.profiled) == 4  # float, static, and for the crossings two that alternate
    second = machine_of()
    meter = meter_of(second, cache_in(tmp_path))
    table = meter.table({"static": all_static(second)})
    assert (len(second.profiled), second.timed, len(second.made)) == (0, 1, 1)  # float, for the pace of the machine
    totals = [table.total({}), table.total(all_static(second)), table.total({"c1": "static"})]
    assert totals == pytest.approx(expected)
    assert set(table.counts()) == {"cached"}
    assert table.fixed_origin == "cached"


def test_only_variants_with_something_unknown_are_profiled(tmp_path: Path) -> None:
    first = machine_of()
    meter_of(first, cache_in(tmp_path)).table({})
    second = machine_of()
    meter = meter_of(second, cache_in(tmp_path))
    meter.table({"static": all_static(second)})
    assert meter.profiled[:2] == ["float", "static"]
    third = machine_of()
    meter = meter_of(third, cache_in(tmp_path))
    meter.table({"static": all_static(third)})
    assert meter.profiled == []


@pytest.mark.parametrize("variants", [["float"], ["float", "static"]])
def test_costs_of_a_slower_time_are_brought_to_the_present(tmp_path: Path, variants: list[str]) -> None:
    """Whatever the cache has of a time when the machine was slower: totals are those of now, in one scale."""
    slow = machine_of()
    slow.pace = 2.0
    meter_of(slow, cache_in(tmp_path)).table({n: all_static(slow) for n in variants if n != "float"})
    now = machine_of()
    table = meter_of(now, cache_in(tmp_path)).table({"static": all_static(now)})
    assert table.total({}) == pytest.approx(now.whole_us({}))
    assert table.total(all_static(now)) == pytest.approx(now.whole_us(all_static(now)), rel=0.01)


def test_cached_costs_beside_new_ones_are_brought_to_the_pace_of_now(tmp_path: Path) -> None:
    """Static costs are of a time when the machine was half as fast; the dynamic variant is new."""
    us = {name: {**costs, "dynamic": 2.0 * costs["static"]} for name, costs in THREE.items()}
    slow = machine_of(us=us)
    slow.pace = 2.0
    meter_of(slow, cache_in(tmp_path)).table({"static": all_static(slow)})
    now = machine_of(us=us)
    dynamic: dict[str, Form] = dict.fromkeys(all_static(now), "dynamic")
    meter = meter_of(now, cache_in(tmp_path))
    table = meter.table({"static": all_static(now), "dynamic": dynamic})
    assert "static" not in meter.profiled
    for forms in (all_static(now), dynamic):
        assert table.total(forms) == pytest.approx(now.whole_us(forms), rel=0.02)


def test_another_rewrite_of_the_engine_is_measured_anew(tmp_path: Path) -> None:
    measured(machine_of(), cache_in(tmp_path))
    machine = machine_of()
    meter_of(machine, cache_in(tmp_path), {"skip-layer-norm": "avoid"}).table({"static": all_static(machine)})
    assert machine.profiled


@pytest.mark.parametrize(("unsteady", "slower"), [(1.5, 1.0), (1.0, 3.0)])
def test_a_busy_machine_does_not_poison_the_cache(tmp_path: Path, unsteady: float, slower: float) -> None:
    busy = machine_of()
    busy.unsteady, busy.slower = unsteady, slower
    measured(busy, cache_in(tmp_path))
    assert list_costs(tmp_path) == []
    idle = machine_of()
    assert measured(idle, cache_in(tmp_path))[0] == pytest.approx(idle.whole_us({}))


def test_a_later_measurement_that_is_faster_wins(tmp_path: Path) -> None:
    machine = machine_of()
    cache = cache_in(tmp_path)
    meter = meter_of(machine, cache)
    meter.table({"static": all_static(machine)})
    slow = dict(cache._known or {})
    cache.store({name: known.us / 2 for name, known in slow.items()})
    assert {k: v.us for k, v in (cache_in(tmp_path)._known or cache_in(tmp_path)._load()).items()} == {
        name: pytest.approx(known.us / 2) for name, known in slow.items()
    }


def test_the_command_lists_and_clears_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_in(tmp_path).store({"a": 1.0, "b": 2.0})
    cache_command("list", tmp_path, None)
    printed = " ".join(capsys.readouterr().out.split())
    assert "onnxruntime 1.31.1" in printed
    assert DAY in printed
    cache_command("clear", tmp_path, "4000w")
    assert len(list_costs(tmp_path)) == 1
    cache_command("clear", tmp_path, None)
    assert "and 1 files of measured costs from" in " ".join(capsys.readouterr().out.split())
    assert list_costs(tmp_path) == []


def test_list_and_clear(tmp_path: Path) -> None:
    assert list_costs(tmp_path) == []
    assert clear_costs(tmp_path) == 0
    old = CostCache(cost_folder(tmp_path), EngineKey("openvino", "2026.1", "p", 2), today="2026-01-01")
    old.store({"a": 1.0, "b": 2.0})
    cache_in(tmp_path).store({"a": 1.0})
    listed = list_costs(tmp_path)
    assert [(str(item.key), item.count, item.date) for item in listed] == [
        ("onnxruntime 1.31.1, x86_64 Some Xeon, 1 thread", 1, DAY),
        ("openvino 2026.1, p, 2 threads", 2, "2026-01-01"),
    ]
    assert all(item.size > 0 for item in listed)
    assert clear_costs(tmp_path, before="2026-02-01") == 1
    assert [item.key for item in list_costs(tmp_path)] == [KEY]
    cache_in(tmp_path).path.write_text("damaged", encoding="utf-8")
    assert clear_costs(tmp_path) == 1
    assert list(cost_folder(tmp_path).glob("*.json")) == []
