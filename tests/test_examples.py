"""The examples run as their README says."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import onnx
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Load the example as a script would be: its own folder is on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("many_targets", EXAMPLES / "one_calibration_many_targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("demo_data", None)


def test_one_calibration_serves_many_targets(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = (("ort-arm", "int8"), ("tensorrt-sm80", "int8"), ("tensorrt-sm80", "fp8"), ("ort-cuda", "int8-weights"))
    monkeypatch.setattr(example, "BUILDS", builds)
    example.main(["--output", str(tmp_path)])
    shown = capsys.readouterr().out
    rows = {tuple(line.split()[:2]): line for line in shown.splitlines() if line.split()[:1]}
    assert "int8" in rows["ort-arm", "int8"].split()[2:]
    assert "dB" in rows["tensorrt-sm80", "int8"]
    assert "has no scheme 'fp8'" in rows["tensorrt-sm80", "fp8"]
    written = {p.name: onnx.load(p) for p in tmp_path.glob("*.onnx")}
    assert set(written) == {"ort-arm.int8.onnx", "tensorrt-sm80.int8.onnx", "ort-cuda.int8-weights.onnx"}
    kinds = {
        name: {i.data_type for i in model.graph.initializer if i.name.endswith(":zero_point")}
        for name, model in written.items()
    }
    assert kinds["tensorrt-sm80.int8.onnx"] == {onnx.TensorProto.INT8}
