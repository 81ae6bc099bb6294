"""Microsoft Olive: its documented flow with our pass writes the bytes of ``qcompiler compile``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from qcompiler.errors import CalibrationError, TargetError
from tests.doors.demo import BATCH, NAMES, Reference, compile_by_command

pytest.importorskip("olive", reason="olive-ai is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Olive's and torch's own

SCRIPT = """
import numpy as np
import torch
from olive.data.component.dataset import BaseDataset
from olive.data.registry import Registry


@Registry.register_dataset()
def rows_of_npz(file, **kwargs):
    with np.load(file) as archive:
        columns = dict(archive)
    count = len(next(iter(columns.values())))
    return BaseDataset([{name: torch.from_numpy(c[i]) for name, c in columns.items()} for i in range(count)])
"""


def workflow(reference: Reference, folder: Path, batch: int, **options: Any) -> dict[str, Any]:
    script = folder / "data.py"
    script.write_text(SCRIPT)
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(reference.model)},
        "systems": {"local": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "data_configs": [
            {
                "name": "calibration",
                "user_script": str(script),
                "load_dataset_config": {"type": "rows_of_npz", "params": {"file": str(reference.data)}},
                "dataloader_config": {"batch_size": batch},
            }
        ],
        "passes": {"compile": {"type": "QCompilerQuantization", "data_config": "calibration", **options}},
        "host": "local",
        "target": "local",
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_writes_the_bytes_of_the_command(name: str, tmp_path: Path) -> None:
    from olive.workflows import run

    from qcompiler.doors.olive import package_config

    reference = compile_by_command(name, tmp_path / "ref")
    config = workflow(reference, tmp_path, BATCH[name], guard=False, decisions=str(reference.decisions))
    result = run(config, package_config=package_config())
    out = tmp_path / "out"
    assert (out / "model.onnx").read_bytes() == reference.compiled.read_bytes()
    assert result.has_output_model()
    forms = json.loads((out / "model.decisions.json").read_text())["forms"]
    assert forms == json.loads(reference.decisions.read_text())["forms"]
    assert len(forms) > 3
    assert json.loads((out / "model.report.json").read_text())["bytes_after"] == reference.compiled.stat().st_size


def test_the_command_line_of_olive_writes_them_too(tmp_path: Path) -> None:
    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    config = workflow(reference, tmp_path, 32, guard=False, decisions=str(reference.decisions))
    (tmp_path / "workflow.json").write_text(json.dumps(config))
    packages = tmp_path / "packages.json"
    subprocess.run([sys.executable, "-m", "qcompiler.doors.olive", str(packages)], check=True, cwd=tmp_path)
    command = ["olive", "run", "--config", "workflow.json", "--package-config", str(packages)]
    environment = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}  # it would wait for an answer
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=tmp_path, capture_output=True, env=environment)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == reference.compiled.read_bytes()


def run_alone(reference: Reference, folder: Path, provider: str = "CPUExecutionProvider", **options: Any) -> Any:
    """Run the pass as Olive's guide for advanced users does, without a workflow."""
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    from qcompiler.doors.olive import QCompilerQuantization

    spec = AcceleratorSpec("cpu", provider)
    made = create_pass_from_dict(QCompilerQuantization, options, disable_search=True, accelerator_spec=spec)
    return made.run(ONNXModelHandler(str(reference.model)), str(folder / "alone"))


def test_the_pass_alone_takes_calibration_by_path_and_lists_its_files(tmp_path: Path) -> None:
    reference = compile_by_command("code_lm", tmp_path / "ref")
    handler = run_alone(reference, tmp_path, calibration=str(reference.data), guard=False)
    assert Path(handler.model_path).read_bytes() == reference.compiled.read_bytes()
    assert [Path(f).name for f in handler.model_attributes["additional_files"]] == [
        "model.decisions.json",
        "model.report.json",
    ]


@pytest.mark.parametrize(
    ("provider", "target"),
    [
        ("CPUExecutionProvider", "host"),
        ("OpenVINOExecutionProvider", "ort-openvino"),
        ("TensorrtExecutionProvider", "ort-tensorrt"),
        ("NvTensorRTRTXExecutionProvider", "tensorrt"),
        ("CUDAExecutionProvider", "ort-cuda"),
        ("QNNExecutionProvider", None),
    ],
)
def test_the_execution_provider_names_the_target(provider: str, target: str | None) -> None:
    from olive.hardware.accelerator import AcceleratorSpec

    from qcompiler.doors.olive import QCompilerQuantization
    from qcompiler.targets.target import target_names

    spec = AcceleratorSpec("cpu", provider)
    config = QCompilerQuantization.generate_config(spec, {}, disable_search=True)
    assert config.target == target
    assert target in ("host", "tensorrt", None) or target in target_names()
    assert QCompilerQuantization.validate_config(config, spec) is (target is not None)
    chosen = QCompilerQuantization.generate_config(spec, {"target": "ort-x86"}, disable_search=True)
    assert chosen.target == "ort-x86"


def test_a_target_of_the_user_s_wins_and_is_compiled_for(tmp_path: Path) -> None:
    reference = compile_by_command("digits_resnet", tmp_path / "ref", "--target", "ort-x86-avx2")
    options = {"calibration": str(reference.data), "guard": False, "target": "ort-x86-avx2"}
    handler = run_alone(reference, tmp_path, "QNNExecutionProvider", **options)
    assert Path(handler.model_path).read_bytes() == reference.compiled.read_bytes()


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    with pytest.raises(TargetError, match="no target stands for QNNExecutionProvider: set the pass's target"):
        run_alone(reference, tmp_path, "QNNExecutionProvider", guard=False)
    both = {"data_config": {"name": "d", "type": "DummyDataContainer"}, "calibration": str(reference.data)}
    with pytest.raises(CalibrationError, match="give one of data_config and calibration"):
        run_alone(reference, tmp_path, **both)


def test_olive_s_own_passes_stay_in_the_configuration() -> None:
    from olive.package_config import OlivePackageConfig

    from qcompiler.doors.olive import package_config

    own = OlivePackageConfig.load_default_config().passes
    ours = OlivePackageConfig.model_validate(package_config()).passes
    assert set(ours) - set(own) == {"qcompilerquantization"}
    assert ours["qcompilerquantization"].module_path == "qcompiler.doors.olive.QCompilerQuantization"


def test_other_passes_follow(tmp_path: Path) -> None:
    from olive.workflows import run

    from qcompiler.doors.olive import package_config

    reference = compile_by_command("digits_resnet", tmp_path / "ref")
    config = workflow(reference, tmp_path, 32, guard=False)
    config["passes"] = {"opset": {"type": "OnnxOpVersionConversion", "target_opset": 21}, **config["passes"]}
    run(config, package_config=package_config())
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert any(n.op_type == "DequantizeLinear" for n in made.graph.node)
