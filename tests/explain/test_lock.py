"""A lock repeats a build byte for byte, or names what differs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qcompiler.api import calibrate
from qcompiler.compiled import CompiledModel
from qcompiler.compiler import compile_model
from qcompiler.engine import ShapeRange
from qcompiler.explaining.lock import Lock, LockError, compile_locked, locked_options, make_lock, read_lock
from qcompiler.options import Options
from tests.synthetic import feeds_of, residual_cnn

SOURCE = residual_cnn().SerializeToString()
FEEDS = feeds_of({"x": (2, 3, 16, 16)}, 8)
OPTIONS = Options(calibration=FEEDS, guard=False, target="ort-x86")


@pytest.fixture(scope="module")
def built() -> tuple[CompiledModel, Lock]:
    made = compile_model(SOURCE, OPTIONS)
    return made, make_lock(SOURCE, OPTIONS, made)


def test_the_same_bytes_again_from_the_file(built: tuple[CompiledModel, Lock], tmp_path: Path) -> None:
    made, lock = built
    path = tmp_path / "model.lock"
    path.write_text(lock.to_json())
    assert read_lock(path) == lock
    assert compile_locked(SOURCE, read_lock(path), Options(calibration=FEEDS)).to_bytes() == made.to_bytes()


def refusal(lock: Lock, options: Options, source: bytes = SOURCE) -> str:
    with pytest.raises(LockError) as raised:
        compile_locked(source, lock, options)
    return str(raised.value)


def test_other_data_is_named_feed_by_feed(built: tuple[CompiledModel, Lock]) -> None:
    _, lock = built
    changed = [{"x": f["x"] + (i == 3)} for i, f in enumerate(FEEDS)]
    assert "1 of 8 feeds, the first is number 3" in refusal(lock, Options(calibration=changed))
    assert "5 feeds, locked with 8" in refusal(lock, Options(calibration=FEEDS[:5]))
    assert "give --calibration" in refusal(lock, Options())


def test_another_model_version_table_and_recipe_are_named_together(
    built: tuple[CompiledModel, Lock], tmp_path: Path
) -> None:
    _, lock = built
    override = tmp_path / "o.toml"
    override.write_text('[[override]]\nmatch = "/block/Add"\nform = "float"\n')
    other = replace(
        lock, versions={**lock.versions, "onnxruntime": "1.2.3"}, digests={**lock.digests, "target": "0" * 32}
    )
    model = residual_cnn()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[::-1]
    text = refusal(other, Options(calibration=FEEDS, overrides=override), model.SerializeToString())
    assert "locked with 1.2.3" in text
    assert "the model differs" in text
    assert "the target's table differs" in text
    assert "the recipe (or its overrides) differs" in text
    assert "calibration" not in text


def test_a_result_of_other_bytes_is_refused(built: tuple[CompiledModel, Lock]) -> None:
    _, lock = built
    assert "all inputs agree" in refusal(replace(lock, output="0" * 64), Options(calibration=FEEDS))


def test_statistics_are_locked_too(tmp_path: Path) -> None:
    statistics = calibrate(SOURCE, FEEDS)
    options = Options(calibration=statistics, guard=False, target="ort-x86")
    made = compile_model(SOURCE, options)
    lock = make_lock(SOURCE, options, made)
    assert lock.feeds == ()
    assert compile_locked(SOURCE, lock, Options(calibration=statistics)).to_bytes() == made.to_bytes()
    fewer = calibrate(SOURCE, FEEDS[:4])
    assert "the calibration data differs" in refusal(lock, Options(calibration=fewer))


def test_synthetic_data_needs_no_data_again() -> None:
    options = Options(synthetic_calibration=4, guard=False, target="ort-x86")
    made = compile_model(SOURCE, options)
    lock = make_lock(SOURCE, options, made)
    assert compile_locked(SOURCE, lock).to_bytes() == made.to_bytes()


def test_shapes_and_ranges_come_back(built: tuple[CompiledModel, Lock]) -> None:
    made, _ = built
    shapes = {"x": (2, 3, 16, 16)}
    lock = make_lock(SOURCE, replace(OPTIONS, shapes=shapes), made)
    assert locked_options(Lock.from_json(lock.to_json()), Options()).shapes == shapes
    ranged = replace(lock, options={**lock.options, "shapes": {"x": [[1, 3], [2, 3], [4, 3]]}})
    assert locked_options(ranged, Options()).shapes == {"x": ShapeRange((1, 3), (2, 3), (4, 3))}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lock": 1}', '{"lock": 9}'])
def test_what_is_no_lock_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.write_text(text)
    with pytest.raises(LockError, match=r"x\.lock: "):
        read_lock(path)
    with pytest.raises(LockError, match="cannot read"):
        read_lock(tmp_path / "absent.lock")


def test_a_lock_has_no_paths_and_no_times(built: tuple[CompiledModel, Lock]) -> None:
    _, lock = built
    data = json.loads(lock.to_json())
    assert set(data) == {"lock", "decisions", "options", "versions", "digests", "feeds", "output"}
    assert "/tmp" not in json.dumps({k: v for k, v in data.items() if k != "decisions"})
