"""OpenVINO behind ONNX Runtime's execution provider, with and without that build of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qcompiler
from qcompiler.backends import ort_openvino
from qcompiler.backends.backend import AbsentBackend
from qcompiler.backends.catalog import engine_of, open_backend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.compiled import CompiledModel
from qcompiler.engine import EngineOptions
from qcompiler.errors import TargetError
from qcompiler.targets.target import load_target
from tests import synthetic
from tests.synthetic import feeds_of

FEEDS = feeds_of({"x": (2, 3, 16, 16)}, 5)
ONE = EngineOptions(threads=1)
TARGET = load_target("ort-openvino")
HERE = ort_openvino.PROVIDER in ort.get_available_providers()


def compiled(target: str = "ort-openvino", **more: Any) -> CompiledModel:
    given = {"recipe": "int8-static", "calibration": FEEDS, "guard": False, **more}
    return qcompiler.compile(synthetic.residual_cnn(), target=target, **given)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])


def test_the_table_is_openvinos_by_another_name() -> None:
    other = load_target("openvino")
    assert (TARGET.engine, TARGET.rows, TARGET.signed) == ("ort-openvino", other.rows, other.signed)
    assert TARGET.requires == other.requires


def test_without_the_provider_the_model_is_lowered_and_written(without: None, tmp_path: Path) -> None:
    made = compiled(guard=True)
    made.save(tmp_path / "m.onnx")
    assert engine_of(tmp_path / "m.onnx") == "ort-openvino"
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    assert not any(kind.startswith("QLinear") for kind in kinds)
    assert made.report.speedup is None
    assert made.report.proof.fused == {}
    assert made.report.proof.note == ort_openvino.INSTALL
    assert "pip install onnxruntime-openvino" in ort_openvino.INSTALL
    assert made.report.quality is not None
    assert made.report.quality.worst > 15  # measured on ONNX Runtime's own kernels


def test_what_was_lowered_runs_on_plain_onnx_runtime_and_is_openvinos(without: None, tmp_path: Path) -> None:
    made = compiled()
    wanted = OrtEngine().load(synthetic.residual_cnn().SerializeToString(), ONE).run(FEEDS[0])["logits"]
    found = OrtEngine().load(made.model, ONE).run(FEEDS[0])["logits"]
    assert np.abs(found - wanted).max() < 0.15 * np.abs(wanted).max()
    pytest.importorskip("openvino")
    alone = compiled("openvino")
    assert [n.op_type for n in made.model.graph] == [n.op_type for n in alone.model.graph]


def test_loading_without_the_provider_says_what_to_install(without: None, tmp_path: Path) -> None:
    compiled().save(tmp_path / "m.onnx")
    with pytest.raises(TargetError, match="lacks the OpenVINOExecutionProvider: pip uninstall onnxruntime && pip inst"):
        qcompiler.load(tmp_path / "m.onnx")


def test_openvinos_own_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="compiled for ort-openvino"):
        compiled().save(tmp_path / "m.xml")
    assert list(tmp_path.iterdir()) == []


def test_where_only_openvino_itself_is_missing_the_provider_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(ort, "get_available_providers", lambda: [ort_openvino.PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=None: None if n == "openvino" else real(n, p))
    backend = open_backend(TARGET)
    assert isinstance(backend, AbsentBackend)
    assert backend.engine.name == "ort-openvino"
    assert backend.install.startswith("pip install openvino")


@pytest.mark.skipif(not HERE, reason="this build of onnxruntime has no OpenVINOExecutionProvider")
def test_with_the_provider_it_runs_there(tmp_path: Path) -> None:
    compiled(guard=True).save(tmp_path / "m.onnx")
    runner: Any = qcompiler.load(tmp_path / "m.onnx", threads=1)
    assert runner.session.get_providers()[0] == ort_openvino.PROVIDER
    wanted = OrtEngine().load(synthetic.residual_cnn().SerializeToString(), ONE).run(FEEDS[0])["logits"]
    assert np.abs(runner.run(FEEDS[0])["logits"] - wanted).max() < 0.15 * np.abs(wanted).max()
