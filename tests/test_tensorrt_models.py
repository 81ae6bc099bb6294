"""The smaller reference and demo models for TensorRT: every planned layer in 8 bits, and as good as float."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.compiled import CompiledModel
from qcompiler.engine import EngineOptions
from qcompiler.ir.graph import all_nodes, const_array, is_op

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "models"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
AS_WRITTEN = EngineOptions(threads=1, optimize=False)
"""ONNX Runtime rewrites float biases beside float16 scales wrongly (WeightBiasQuantization, seen on 1.31)."""
DEMO = ("digits_resnet", "code_lm")
LEAST_DB = {"mnist_cnn_opset8": 35.0, "resnet8_cifar10": 20.0, "vww_mobilenetv1": 18.0, "digits_resnet": 32.0}
SCHEMES = {
    # recipe: target, what the layers of all products say, least dB on set-aside feeds
    "fp8": ("tensorrt-sm89", "FP8 x FP8 gemm", 28.0),
    "int4-weights": ("tensorrt-sm89", "x Int4 decoded in ", 20.0),
    "nvfp4": ("tensorrt-sm120", "FP4E2M1 x FP4E2M1 gemm", 18.0),
}
BUILDER = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13, whose builder proves the layers"
)
needs_models = pytest.mark.skipif(not (FOLDER / "load.py").is_file(), reason="no reference models beside the checkout")


@functools.cache
def module(path: Path) -> ModuleType:
    name = f"qcompiler_tensorrt_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def reference(name: str) -> Any:
    if name in DEMO:
        return next(m for m in module(EXAMPLES / "demo_data.py").demo_models() if m.name == name)
    if not (FOLDER / "load.py").is_file():
        pytest.skip("no reference models beside the checkout")
    return module(FOLDER / "load.py").load(name)


def calibration(name: str) -> list[dict[str, Any]]:
    model = reference(name)
    return list(model.calibration if name in DEMO else model.calib)


@functools.cache
def compiled(name: str, target: str) -> CompiledModel:
    return qcompiler.compile(reference(name).path, target=target, calibration=calibration(name), guard=False)


def top1(name: str, source: Any) -> float:
    """Return the share of right answers, in points, of a model as it is written."""
    model, runner = reference(name), OrtEngine().load(source, AS_WRITTEN)
    names = [o.name for o in runner.outputs]
    if name in DEMO:
        return 100.0 * float(model.metric([runner.run(feed) for feed in model.evaluation]))
    outputs = model.run_all(lambda feed: [runner.run(feed)[n] for n in names])
    return 100.0 * float(model.metric(outputs)["top1"])


@BUILDER
@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "tensorrt-sm80") for name in LEAST_DB),
        ("mnist_cnn_opset8", "tensorrt-sm89"),
        ("resnet8_cifar10", "tensorrt-sm89"),
    ],
)
def test_every_planned_layer_runs_in_8_bits(name: str, target: str) -> None:
    proof = compiled(name, target).report.to_dict()["proof"]
    assert proof["planned"] >= 5
    assert proof["missed"] == []
    assert proof["fused"] == proof["planned"]


@pytest.mark.parametrize("name", LEAST_DB)
def test_the_model_stays_as_good_as_float(name: str) -> None:
    made = compiled(name, "tensorrt-sm80")
    assert min(made.report.to_dict()["sqnr_db"].values()) >= LEAST_DB[name]
    assert top1(name, made.model) >= top1(name, reference(name).path) - 1.0


@pytest.mark.parametrize("name", [*LEAST_DB, "resnet8_cifar10_int8"])
def test_nothing_is_asymmetric_unsigned_or_an_integer_bias(name: str) -> None:
    for node in all_nodes(compiled(name, "tensorrt-sm80").model):
        if is_op(node, "QuantizeLinear", "DequantizeLinear"):
            zero = const_array(node.inputs[2])
            assert zero is not None
            assert zero.dtype == np.int8
            assert not zero.any()


@BUILDER
@needs_models
def test_a_model_whose_float_form_is_refused_builds_compiled() -> None:
    """The imported integers have zero points and int32 biases, both of which the parser refuses."""
    proof = compiled("resnet8_cifar10_int8", "tensorrt-sm80").report.to_dict()["proof"]
    assert proof["planned"] - proof["fused"] <= 1
    assert all(miss["kind"] == "AveragePool" for miss in proof["missed"])  # a pair of the import; pools run in float


@functools.cache
def language_model(recipe: str) -> CompiledModel:
    feeds = calibration("code_lm")[:3]
    return qcompiler.compile(
        reference("code_lm").path, target=SCHEMES[recipe][0], recipe=recipe, calibration=feeds, guard=False
    )


@BUILDER
@pytest.mark.parametrize("recipe", SCHEMES)
def test_every_product_of_a_language_model_runs_in_the_recipe_s_type(recipe: str) -> None:
    proof = language_model(recipe).report.proof
    assert proof.missed == ()
    assert sum(SCHEMES[recipe][1] in kernel for kernel in proof.fused.values()) == 29


@pytest.mark.parametrize("recipe", SCHEMES)
def test_a_language_model_stays_close_to_float(recipe: str) -> None:
    assert min(language_model(recipe).report.to_dict()["sqnr_db"].values()) >= SCHEMES[recipe][2]
