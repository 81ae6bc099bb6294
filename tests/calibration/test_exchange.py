"""Ranges of other tools: read what they write, write what they read."""

import json
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorData, TensorsData, load_tensors_data, save_tensors_data
from onnxruntime.quantization.quant_utils import write_calibration_table

from qcompiler.calibration.exchange import (
    RangeTable,
    read_onnxruntime,
    read_ranges,
    read_tensorrt,
    write_onnxruntime,
    write_tensorrt,
)
from qcompiler.calibration.statistics import Statistics, TensorStatistics
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec, affine_params

# The example of NVIDIA's sampleINT8.
CACHE = """TRT-7000-EntropyCalibration2
data: 3c008912
conv1: 3c88edfc
(Unnamed Layer* 48) [Constant]_output: 3ddc858b
a: b: 3c010a14
prob: 0
"""

TABLE = RangeTable({"a": (-3.0, 1.5), "b": (0.0, 6.0), "none": (0.0, 0.0)})


def entry(low: object, high: object) -> TensorData:
    return TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))


# ---- the table -----------------------------------------------------------------------------------------------------


def test_a_table_answers_with_its_ranges_whatever_is_asked() -> None:
    assert TABLE.range("a", "percentile:99.9") == TABLE.range("a", "mse", QuantSpec("int8")) == (-3.0, 1.5)
    assert TABLE.observed("a")
    assert not TABLE.observed("c")
    assert list(TABLE) == ["a", "b", "none"]
    assert TABLE.elements_per_feed("a") == 0
    with pytest.raises(CalibrationError, match="a table of ranges has no range of c"):
        TABLE.range("c")


def test_the_mean_square_is_that_of_a_uniform_distribution() -> None:
    values = np.linspace(-3.0, 1.5, 1_000_001)
    assert TABLE.mean_square("a") == pytest.approx(np.square(values).mean(), rel=1e-5)
    assert TABLE.mean_square("none") == 0.0
    assert "uniform distribution" in TABLE.note


@pytest.mark.parametrize("pair", [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_table_refuses_ranges_that_are_none(pair: tuple[float, float]) -> None:
    with pytest.raises(CalibrationError, match=r"the range of 'x' is .*expected two finite ends"):
        RangeTable({"x": pair})


# ---- TensorRT ------------------------------------------------------------------------------------------------------


def test_the_published_cache_is_read(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(CACHE)
    table = read_tensorrt(tmp_path / "c")
    assert list(table) == ["data", "conv1", "(Unnamed Layer* 48) [Constant]_output", "a: b", "prob"]
    # Numbers from 0 to 1 through data: the scale is a little below 1 / 127.
    scale = struct.unpack(">f", bytes.fromhex("3c008912"))[0]
    assert scale == pytest.approx(0.00784518, rel=1e-6)
    assert table.range("data") == (-127 * scale, 127 * scale)
    assert table.range("a: b")[1] == pytest.approx(1.0, rel=1e-3)
    assert table.range("prob") == (0.0, 0.0)


def test_a_cache_read_gives_the_very_scale_again(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(CACHE)
    table = read_tensorrt(tmp_path / "c")
    spec = QuantSpec("int8", symmetric=True)
    assert affine_params(spec, *table.range("conv1")).scale.view(np.uint32) == 0x3C88EDFC
    write_tensorrt(table, tmp_path / "d", header="TRT-7000-EntropyCalibration2")
    # A tensor that is always zero has the scale 1.
    assert (tmp_path / "d").read_text() == CACHE.replace("prob: 0\n", "prob: 3f800000\n")


def test_a_cache_is_written(tmp_path: Path) -> None:
    assert write_tensorrt(TABLE, tmp_path / "c") == ()
    bits = struct.pack(">f", 3.0 / 127).hex()
    assert (tmp_path / "c").read_text() == (
        f"TRT-8601-EntropyCalibration2\na: {bits}\nb: {struct.pack('>f', 6.0 / 127).hex()}\nnone: 3f800000\n"
    )


def test_names_are_those_of_the_given_model(tmp_path: Path) -> None:
    left = write_tensorrt(TABLE, tmp_path / "c", names={"a": "input.1", "b": "input.1", "other": "x"})
    assert left == ("none",)
    back = read_tensorrt(tmp_path / "c", {"a": "input.1", "b": "input.1", "c": "not there"})
    # Two values of one name there: the wider range.
    reach = 127 * float(np.float32(6 / 127))
    assert back.range("a") == back.range("b") == (-reach, reach)
    assert not back.observed("c")
    with pytest.raises(CalibrationError, match=r"none of its tensors is in the model, such as 'input.1'.* 'y'"):
        read_tensorrt(tmp_path / "c", {"a": "y"})


def test_extreme_scales_stay_finite(tmp_path: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    write_tensorrt(RangeTable({"big": (-largest, largest), "odd": (0.0, 1e41), "small": (0.0, 1e-44)}), tmp_path / "c")
    table = read_tensorrt(tmp_path / "c")
    assert table.range("big")[1] == pytest.approx(largest, rel=2**-23)
    assert table.range("odd")[1] == 127 * largest
    assert table.range("small")[1] == 127 * float(np.finfo(np.float32).tiny), "no scale is zero"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a first line such as TRT-8601-EntropyCalibration2, found ''"),
        ("a: 3c008912\n", "found 'a: 3c008912'"),
        ("TRT-8601-EntropyCalibration2\na 3c008912\n", r"line 2: expected 'name: hexadecimal float32'"),
        ("TRT-8601-EntropyCalibration2\n\na: 0.5\n", "line 3: expected"),
        ("TRT-8601-EntropyCalibration2\na: 3c0089121\n", "line 2: expected"),
        ("TRT-8601-EntropyCalibration2\na: 3c008912\na: 3c008913\n", "line 3: tensor 'a' has two scales"),
        ("TRT-8601-EntropyCalibration2\na: 7fc00000\n", "the range of 'a' is"),
        ("TRT-8601-EntropyCalibration2\na: bf800000\n", "the smaller one first"),
    ],
)
def test_a_cache_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_tensorrt(tmp_path / "c")


def test_what_a_cache_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot hold a name with a line break"):
        write_tensorrt(RangeTable({"a\nb": (0.0, 1.0)}), tmp_path / "c")
    with pytest.raises(CalibrationError, match="has a first line such as"):
        write_tensorrt(TABLE, tmp_path / "c", header="8.6")
    assert not (tmp_path / "c").exists()


# ---- ONNX Runtime --------------------------------------------------------------------------------------------------


def test_what_onnxruntime_saves_is_read(tmp_path: Path) -> None:
    hist = np.array([1, 2], np.int64)
    edges = np.array([-1.0, 0.0, 2.0], np.float32)
    data = {
        "a": entry(-1.25, 2.0),
        "b": TensorData(lowest=np.float32(0.1), highest=np.float32(0.2), hist=hist, hist_edges=edges),
        "channels": entry([-1.0, -7.0], [3.0, 2.0]),
    }
    save_tensors_data(TensorsData(CalibrationMethod.Entropy, data), tmp_path / "t.json")
    table = read_onnxruntime(tmp_path / "t.json")
    assert dict(table.ranges) == {
        "a": (-1.25, 2.0),
        "b": (float(np.float32(0.1)), float(np.float32(0.2))),
        "channels": (-7.0, 3.0),
    }


def test_a_calibration_table_of_onnxruntime_is_read(tmp_path: Path) -> None:
    write_calibration_table({"a": entry(-1.25, 2.0), "b": entry(-3.0, -1.0)}, str(tmp_path))
    table = read_onnxruntime(tmp_path / "calibration.json", {"x": "b"})
    assert dict(table.ranges) == {"x": (-3.0, -1.0)}


def test_the_pairs_of_older_releases_are_read(tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text('{"a": [-1.5, 2.0], "b": [0, 1]}')
    assert dict(read_onnxruntime(tmp_path / "calibration.json").ranges) == {"a": (-1.5, 2.0), "b": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("estimator", "method"),
    [
        ("min-max", CalibrationMethod.MinMax),
        ("entropy", CalibrationMethod.Entropy),
        ("percentile:99.9", CalibrationMethod.Percentile),
        ("mse", CalibrationMethod.MinMax),
    ],
)
def test_onnxruntime_loads_what_is_written(tmp_path: Path, estimator: str, method: CalibrationMethod) -> None:
    assert write_onnxruntime(TABLE, tmp_path / "t.json", estimator) == ()
    found = load_tensors_data(tmp_path / "t.json")
    assert found.calibration_method == method
    assert {n: (float(d.lowest), float(d.highest)) for n, d in found.items()} == dict(TABLE.ranges)
    assert found["a"].lowest.dtype == np.float32
    assert found["a"].lowest.shape == ()
    assert dict(read_onnxruntime(tmp_path / "t.json").ranges) == dict(TABLE.ranges)


def test_the_file_equals_that_of_onnxruntime_byte_for_byte(tmp_path: Path) -> None:
    data = {"a": entry(-3.0, 1.5), "b": entry(0.0, 6.0)}
    table = RangeTable({n: (float(d.lowest), float(d.highest)) for n, d in data.items()})
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), tmp_path / "theirs.json")
    write_onnxruntime(table, tmp_path / "ours.json")
    assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()
    write_calibration_table(data, str(tmp_path))
    write_onnxruntime(table, tmp_path / "table.json", form="table")
    assert (tmp_path / "table.json").read_bytes() == (tmp_path / "calibration.json").read_bytes()


def test_onnxruntime_quantizes_with_what_is_written(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).tobytes(), raw=True)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "m")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    write_onnxruntime(RangeTable({"x": (-2.0, 2.0), "y": (0.0, 5.1)}), tmp_path / "t.json")
    quantize_static(
        tmp_path / "m.onnx", tmp_path / "q.onnx", None, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        calibration_cache_path=tmp_path / "t.json",
    )  # fmt: skip
    made = onnx.load(tmp_path / "q.onnx")
    numbers = {i.name: onnx.numpy_helper.to_array(i) for i in made.graph.initializer}
    assert numbers["x_scale"] == np.float32(4.0 / 255)
    assert numbers["y_scale"] == pytest.approx(5.1 / 255, rel=2**-22)
    assert numbers["y_zero_point"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a table of ranges by tensor, found list"),
        ('{"CLS": "TensorsData", "data": 1}', "found int"),
        ('{"a": {"avg": 1.0}}', r"tensor 'a' has no range \(KeyError: 'lowest'\)"),
        ('{"a": [1, 2, 3]}', "tensor 'a' has no range"),
        ('{"a": ["x", "y"]}', "tensor 'a' has no range"),
        ('{"a": [[], []]}', "tensor 'a' has no range"),
        ('{"a": [-Infinity, 1]}', "the range of 'a' is"),
    ],
)
def test_json_without_ranges_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_onnxruntime(tmp_path / "t.json")


# ---- either --------------------------------------------------------------------------------------------------------


def test_the_two_are_told_apart_by_content(tmp_path: Path) -> None:
    write_tensorrt(TABLE, tmp_path / "one")
    write_onnxruntime(TABLE, tmp_path / "two")
    assert read_ranges(tmp_path / "one", {"a": "a"}).origin == "the TensorRT calibration cache one"
    assert read_ranges(tmp_path / "two").origin == "ONNX Runtime's ranges two"
    (tmp_path / "three").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="is not text"):
        read_ranges(tmp_path / "three")
    (tmp_path / "four").write_text("name value")
    with pytest.raises(CalibrationError, match="four holds no ranges"):
        read_ranges(tmp_path / "four")
    with pytest.raises(CalibrationError, match=r"cannot read .*five: No such file"):
        read_ranges(tmp_path / "five")


def test_statistics_are_written_by_any_estimator(tmp_path: Path) -> None:
    statistics = Statistics({"a": TensorStatistics(), "never": TensorStatistics()}, feeds=1)
    values = np.concatenate([np.linspace(-1, 1, 10_001), [50.0]]).astype(np.float32)
    statistics.tensors["a"].add(values)
    assert write_onnxruntime(statistics, tmp_path / "t.json", "percentile:99.9") == ("never",)
    written = json.loads((tmp_path / "t.json").read_text())["data"]
    low, high = statistics.range("a", "percentile:99.9")
    assert list(written) == ["a"]
    assert written["a"]["highest"]["data"] == np.float32(high)
    assert -1.0 <= low < 0 < high < 1.1, "the outlier is cut off"
    assert write_tensorrt(statistics, tmp_path / "c", "min-max") == ("never",)
    assert read_tensorrt(tmp_path / "c").range("a")[1] == pytest.approx(50.0, rel=2**-23)
