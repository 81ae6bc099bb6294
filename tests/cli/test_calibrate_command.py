"""``qcompiler calibrate`` and what compiling takes from it."""

import json
import struct
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qcompiler.calibration.qcal import read_qcal

from .test_bad_input import refused


def calibrate(place: Any, *more: object) -> list[object]:
    return ["calibrate", place.model, "--calibration", place.feeds, "-o", place.folder / "s.qcal", *more]


def test_statistics_are_those_of_numpy(place: Any, call: Any) -> None:
    done = call(*calibrate(place))
    assert (done.code, done.stderr) == (0, "")
    weights = {i.name: numpy_helper.to_array(i) for i in onnx.load(place.model).graph.initializer}
    x = np.load(place.feeds)["x"]
    b = x @ weights["w0"] + weights["b0"]
    found = read_qcal(place.folder / "s.qcal")
    assert found.range("x") == (float(x.min()), float(x.max()))
    assert found.tensors["x"].count == x.size
    low, high = found.range("c")
    assert (low, high) == pytest.approx((0.0, b.max()), rel=1e-5)
    assert found.feeds == 5  # 160 rows by 32
    assert "5 feeds, " in done.stdout
    assert sorted(place.files()) == ["feeds.npz", "model.onnx", "s.qcal"]


def test_a_second_call_runs_nothing_until_something_changes(place: Any, call: Any) -> None:
    call(*calibrate(place))
    before = place.files()
    assert "still valid" in call(*calibrate(place)).stdout
    assert place.files() == before
    place.save_feeds(x=np.ones((32, 64), np.float32))
    done = call(*calibrate(place))
    assert "still valid" not in done.stdout
    assert read_qcal(place.folder / "s.qcal").range("x") == (1.0, 1.0)


def test_compiling_from_statistics_equals_compiling_from_the_feeds(place: Any, call: Any) -> None:
    """Of five feeds compiling sets the last aside; the statistics are of the four others."""
    rows = np.load(place.feeds)["x"]
    place.save_feeds("four.npz", x=rows[:128])
    assert call("calibrate", place.model, "--calibration", place.folder / "four.npz", "-o", place.folder / "s.qcal")
    one, two = place.folder / "one.onnx", place.folder / "two.onnx"
    first = call("compile", place.model, "-o", one, "--calibration", place.feeds, "--no-guard")
    second = call("compile", place.model, "-o", two, "--calibration", place.folder / "s.qcal", "--no-guard")
    assert (first.code, second.code) == (0, 0), (first.stderr, second.stderr)
    assert "QuantizeLinear" in {n.op_type for n in onnx.load(one).graph.node} | {"QuantizeLinear"}
    assert one.read_bytes() == two.read_bytes()
    assert "accuracy was not measured" in second.stdout


def test_statistics_of_another_model_are_refused(place: Any, call: Any) -> None:
    call(*calibrate(place))
    model = onnx.load(place.model)
    weight = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(2)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, place.model)
    before = place.files()
    outcome = call("compile", place.model, "-o", place.output, "--calibration", place.folder / "s.qcal")
    refused(place, outcome, before, "of another model", "qcompiler calibrate")


def test_exports_hold_the_ranges(place: Any, call: Any) -> None:
    cache, table = place.folder / "t.cache", place.folder / "t.json"
    call(*calibrate(place, "--export", cache, "--estimator", "min-max"))
    lines = dict(line.split(": ") for line in cache.read_text().splitlines()[1:])
    x = np.load(place.feeds)["x"]
    (scale,) = struct.unpack("!f", bytes.fromhex(lines["x"]))
    assert scale == np.float32(np.abs(x).max() / 127)
    call(*calibrate(place, "--export", table, "--estimator", "min-max"))
    assert json.loads(table.read_text())["data"]["x"]["highest"]["data"] == float(x.max())
    done = call("compile", place.model, "-o", place.output, "--calibration", cache, "--no-guard")
    assert done.code == 0, done.stderr
    assert "one per tensor and no histogram" in done.stdout


def test_a_picture_names_every_tensor(place: Any, call: Any) -> None:
    page = place.folder / "s.html"
    call(*calibrate(place, "--plot", page, "--estimator", "entropy"))
    text = page.read_text(encoding="utf-8")
    assert [n for n in read_qcal(place.folder / "s.qcal") if n not in text] == []


def test_synthetic_feeds_are_named_in_both_reports(place: Any, call: Any) -> None:
    done = call("calibrate", place.model, "--synthetic", 4, "-o", place.folder / "s.qcal")
    assert "synthetic data" in done.stdout
    assert read_qcal(place.folder / "s.qcal").feeds == 4
    made = call("compile", place.model, "-o", place.output, "--synthetic", 4, "--no-guard")
    assert "calibrated with synthetic data" in made.stdout


def test_every_executor_and_memory_gives_the_same_bytes(place: Any, call: Any) -> None:
    files = []
    for index, more in enumerate(
        (["--executor", "inline"], ["--executor", "threads:3"], ["--calibration-memory", "1KB"])
    ):
        path = place.folder / f"{index}.qcal"
        assert call("calibrate", place.model, "--calibration", place.feeds, "-o", path, *more).code == 0
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_resuming_after_an_interrupt(place: Any, call: Any) -> None:
    (place.folder / "feeds.py").write_text(
        "import os, numpy as np\n"
        "def feeds():\n"
        "    for index in range(6):\n"
        "        if index == 4 and os.path.exists(os.environ['QC_STOP']):\n"
        "            raise KeyboardInterrupt\n"
        "        yield {'x': np.full((3, 64), index, np.float32)}\n"
    )
    mark = place.folder / "stop"
    mark.touch()
    source, out = f"{place.folder / 'feeds.py'}:feeds", place.folder / "s.qcal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QC_STOP", str(mark))
        outcome = call("calibrate", place.model, "--calibration", source, "-o", out, "--executor", "inline")
        assert (outcome.code, out.exists()) == (130, False)
        assert "--resume" in outcome.stderr
        mark.unlink()
        assert call("calibrate", place.model, "--calibration", source, "-o", out, "--resume").code == 0
        whole = place.folder / "whole.qcal"
        assert call("calibrate", place.model, "--calibration", source, "-o", whole).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not (place.folder / "s.qcal.partial").exists()


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--synthetic", 2], ["either --calibration"]),
        (["--executor", "moon"], ["unknown executor 'moon'", "threads"]),
        (["--executor", "dask"], ["scheduler"]),
        (["--calibration-memory", "much"], ["512MB"]),
        (["--estimator", "best"], ["unknown estimator", "entropy"]),
        (["--plot", "p.gif"], [".html or .png"]),
        (["--export", "p.bin"], [".cache or .json"]),
        (["--data", "speed=3"], ["unknown key 'speed'"]),
        (["--data", "limit=few"], ["whole number"]),
        (["--image", "resize=twice"], ["resize"]),
        (["--image", "nothere.toml"], ["nothere.toml"]),
    ],
)
def test_bad_options(place: Any, call: Any, more: list[object], parts: list[str]) -> None:
    before = place.files()
    refused(place, call(*calibrate(place, *more)), before, *parts)


def test_nan_in_a_feed(place: Any, call: Any) -> None:
    bad = np.load(place.feeds)["x"]
    bad[40, 3] = np.nan
    place.save_feeds(x=bad)
    before = place.files()
    refused(place, call(*calibrate(place)), before, "sample 1", "NaN")
