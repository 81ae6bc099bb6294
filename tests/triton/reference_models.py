"""The reference models beside the checkout, compiled for Triton, with what ONNX Runtime computes of the same graph."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Array, Runner
from qcompiler.options import Options

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT.parent / "shared" / "models"
LIGHT = ("mnist_cnn_opset8", "resnet8_cifar10", "resnet8_cifar10_int8", "vit_cifar10")
HEAVY = ("vww_mobilenetv1", "stories260k", "minilm_l6", "efficientnet_lite0", "yolox_nano")
SWEEP = "QCOMPILER_REFERENCE_MODELS"
"""Environment variable: ``all`` tests the heavy models, too."""


@dataclass(frozen=True)
class Built:
    """A compiled reference model.

    Attributes:
        subject: its data and its metric.
        made: for Triton.
        twin: the same graph in Q/DQ.
    """

    subject: Any
    made: CompiledModel
    twin: ir.Model

    def metric(self, runner: Runner) -> dict[str, float]:
        """Return the metrics of all evaluation data."""
        found: Mapping[str, float] = self.subject.metric(self.subject.run_all(lambda feed: _outputs(runner, feed)))
        return dict(found)


def _outputs(runner: Runner, feed: Mapping[str, Array]) -> list[Array]:
    return list(runner.run(feed).values())


def steps_module() -> ModuleType:
    """Return the benchmark's module that compares steps."""
    path = ROOT / "benchmarks" / "triton_steps.py"
    spec = importlib.util.spec_from_file_location("triton_steps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def load_subject(name: str) -> Any:
    """Return a model with its data."""
    spec = importlib.util.spec_from_file_location("reference_models_loader", FOLDER / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name, str(FOLDER))


def build(name: str) -> Built:
    """Compile one for Triton from 32 calibration feeds; yolox needs the guard, others are compiled without."""
    subject = load_subject(name)
    options = Options(target="triton-sm90", calibration=subject.calib[:32], guard=name == "yolox_nano")
    job = Compilation(subject.path, options)
    made = job.run()
    return Built(subject, made, steps_module().twin_of(job, made))
