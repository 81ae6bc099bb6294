"""Models in float16 and bfloat16 are compiled like float32 ones: integers inside, their own types at the borders."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import qcompiler
from qcompiler.engine import Array
from tests.passes.canonicalize.test_widen_half_precision import BRAIN, HALF, half, model, value


def network(kind: int) -> onnx.ModelProto:
    """Return an embedding, which stays float, and two products, which do not."""
    weights: dict[str, Array] = {
        "table": half(512, 64), "w": half(64, 128), "b": half(128), "v": half(128, 32),
    }  # fmt: skip
    if kind == BRAIN:
        weights = {n: a.astype(ml_dtypes.bfloat16) for n, a in weights.items()}
    node = onnx.helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("MatMul", ["e", "w"], ["h"], name="up"),
        node("Add", ["h", "b"], ["hb"], name="bias"),
        node("Relu", ["hb"], ["r"], name="relu"),
        node("MatMul", ["r", "v"], ["y"], name="down"),
    ]
    opset = 22 if kind == BRAIN else 21
    return model(
        nodes, [value("ids", onnx.TensorProto.INT64, "n", 16)], [value("y", kind, "n", 16, 32)], weights, opset
    )


def ids() -> list[dict[str, Array]]:
    draw = np.random.default_rng(5)
    return [{"ids": draw.integers(0, 512, (4, 16))} for _ in range(10)]


def bytes_of(model: ir.Model, kind: ir.DataType) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.dtype is kind and v.const_value)


def test_float16_runs_on_integers_and_keeps_its_size() -> None:
    proto = network(HALF)
    compiled = qcompiler.compile(proto, calibration=ids(), guard=False, target="ort-x86")
    report = compiled.report.to_dict()
    assert report["integer_share"] == 1.0
    assert report["bytes_after"] < report["bytes_before"]
    assert bytes_of(compiled.model, ir.DataType.FLOAT16) == 512 * 64 * 2
    plain = onnxruntime.InferenceSession(compiled.to_bytes(), providers=["CPUExecutionProvider"])
    assert plain.get_outputs()[0].type == "tensor(float16)"
    feed = ids()[0]
    found = plain.run(None, feed)[0].astype(np.float64)
    wanted = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    truth = wanted.run(None, feed)[0].astype(np.float64)
    assert 10 * np.log10(np.sum(truth**2) / np.sum((truth - found) ** 2)) > 30


def test_bfloat16_that_the_engine_refuses_is_compiled_and_says_so() -> None:
    proto = network(BRAIN)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = qcompiler.compile(proto, calibration=ids(), target="ort-x86", min_sqnr=25)
    report = compiled.report.to_dict()
    assert any("does not run the model's bfloat16" in w for w in report["warnings"])
    assert report["sqnr_db"]["y"] >= 25
    session = compiled.session()
    assert session.get_outputs()[0].type == "tensor(bfloat16)"


def test_one_calibration_serves_what_the_engine_refuses() -> None:
    proto = network(BRAIN)
    statistics = qcompiler.calibrate(proto, ids())
    compiled = qcompiler.compile(proto, calibration=statistics, guard=False, target="ort-x86")
    assert compiled.report.to_dict()["integer_share"] == 1.0


@pytest.mark.parametrize("target", ["ort-x86", "openvino", "tensorrt-sm89"])
def test_what_stays_float_is_no_larger_on_any_target(target: str, tmp_path: Path) -> None:
    (tmp_path / "float.toml").write_text('[[override]]\nmatch = "*"\nform = "float"\n')
    proto = network(HALF)
    compiled = qcompiler.compile(
        proto, calibration=ids(), guard=False, target=target, overrides=tmp_path / "float.toml"
    )
    assert len(compiled.to_bytes()) < 1.05 * len(proto.SerializeToString())
    assert not [
        p for p in onnx.load_from_string(compiled.to_bytes()).metadata_props if "half" in p.key or "widen" in p.key
    ]
