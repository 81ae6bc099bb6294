"""The smaller reference models beside the checkout, where there are any: compiled by rule, proven, as good as float."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import qcompiler
from qcompiler.compiled import CompiledModel
from qcompiler.compiler import compile_model
from qcompiler.options import Options
from tests.families import COVERED
from tests.search.machine import InventedMachine

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "models"

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(not (FOLDER / "load.py").is_file(), reason="no reference models beside the checkout"),
]

LEAST_DB = {
    "mnist_cnn_opset8": 35.0, "resnet8_cifar10": 20.0, "resnet8_cifar10_int8": 30.0, "vww_mobilenetv1": 25.0,
    "silero_vad": 15.0, "stories260k": 28.0,
}  # fmt: skip
"""Least SQNR in dB without the accuracy guard; silero_vad, whose state is judged in a loop, needs that guard."""
METRICS = {"top1": 1, "auc": 1, "loss": -1}
"""Figures to compare, and whether more (1) or less (-1) is better."""


@functools.cache
def loader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qcompiler_reference_models", FOLDER / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def reference(name: str) -> Any:
    return loader().load(name)


@functools.cache
def compiled(name: str) -> CompiledModel:
    model = reference(name)
    return qcompiler.compile(model.path, calibration=model.calib, guard=False)


def figures(name: str, session: Any) -> dict[str, float]:
    model = reference(name)
    found: dict[str, float] = model.metric(model.run_all(lambda feed: session.run(None, feed)))
    return found


def drop(name: str, session: Any) -> float:
    """Return by how much the model's figure is worse than float's: points, or per cent where it is unbounded."""
    found, float_ = figures(name, session), reference(name).meta["fp32"]
    (metric,) = [m for m in METRICS if m in found]
    fall = METRICS[metric] * (float_[metric] - found[metric])
    return round(100.0 * (fall if METRICS[metric] > 0 else fall / float_[metric]), 9)  # 0.77 - 0.76 > 0.01 in binary


@COVERED
@pytest.mark.parametrize("name", LEAST_DB)
def test_every_planned_fusion_is_made_or_explained(name: str) -> None:
    report = compiled(name).report.to_dict()
    assert report["proof"]["planned"] > 0
    assert report["proof"]["fused"] + len(report["proof"]["missed"]) == report["proof"]["planned"]
    assert all(miss["reason"] and miss["text"] for miss in report["proof"]["missed"])
    assert all(group["why"] for group in report["groups"])
    assert report["integer_share"] > 0.6
    assert report["bytes_after"] < report["bytes_before"] or name == "resnet8_cifar10_int8"
    assert report["warnings"] == []


@COVERED
@pytest.mark.parametrize("name", LEAST_DB)
def test_outputs_are_close_to_float(name: str) -> None:
    found = compiled(name).report.to_dict()["sqnr_db"]
    assert found
    assert min(found.values()) >= LEAST_DB[name]


@COVERED
@pytest.mark.parametrize("name", LEAST_DB)
def test_the_task_metric_stays_within_a_point_of_float(name: str) -> None:
    assert drop(name, compiled(name).session(threads=1)) <= 1.0


@pytest.mark.parametrize("name", ["resnet8_cifar10", "resnet8_cifar10_int8", "silero_vad"])
def test_two_builds_and_a_replay_are_the_same_bytes(name: str) -> None:
    model, made = reference(name), compiled(name)
    again = qcompiler.compile(model.path, calibration=model.calib, guard=False)
    assert again.to_bytes() == made.to_bytes()
    replayed = qcompiler.compile(model.path, calibration=model.calib, decisions=made.decisions)
    assert replayed.to_bytes() == made.to_bytes()


def test_an_imported_model_keeps_its_integer_interface() -> None:
    session = compiled("resnet8_cifar10_int8").session(threads=1)
    assert [i.type for i in session.get_inputs()] == ["tensor(int8)"]
    assert [o.type for o in session.get_outputs()] == ["tensor(int8)"]


@COVERED
@pytest.mark.parametrize("name", ["silero_vad", "resnet8_cifar10"])
def test_with_the_accuracy_guard_every_bound_is_met(name: str) -> None:
    """Prices come from an invented machine, so that the guard goes the same way on every one."""
    model = reference(name)
    made = compile_model(model.path, Options(calibration=model.calib, stopwatch=InventedMachine()))
    least = {"silero_vad": {"output": 18.0, "stateN": 30.0}, "resnet8_cifar10": {"Identity": 15.0}}[name]
    found = made.report.to_dict()["sqnr_db"]
    assert set(found) == set(least)
    assert all(found[output] >= db for output, db in least.items())
    assert made.report.warnings == ()
    assert drop(name, made.session(threads=1)) <= 1.0
    replayed = compile_model(model.path, Options(calibration=model.calib, decisions=made.decisions))
    assert replayed.to_bytes() == made.to_bytes()


def test_an_imported_model_survives_the_safe_form() -> None:
    """Weights of 8 bits are quantized anew to 7; clipped to them, the model would lose two thirds of its accuracy."""
    model = reference("resnet8_cifar10_int8")
    made = qcompiler.compile(model.path, target="ort-generic", calibration=model.calib, guard=False)
    assert drop(model.name, made.session(threads=1)) <= 1.0


@COVERED
def test_silero_vad_says_of_every_node_what_became_of_it() -> None:
    """It holds one network per sampling rate in the branches of an If, and every feed has the same rate."""
    made = compiled("silero_vad")
    groups = made.report.to_dict()["groups"]
    assert all(g["why"].startswith(f"{g['form']}: ") for g in groups)
    idle = [g for g in groups if g["operator"] == "Conv" and "never-observed" in g["why"]]
    busy = [g for g in groups if g["operator"] == "Conv" and "never-observed" not in g["why"]]
    assert len(idle) == len(busy) == 6
    assert ({g["form"] for g in idle}, {g["form"] for g in busy}) == ({"float"}, {"static"})
    assert {r.node for r in made.remarks if r.reason == "never-observed"} >= {g["group"] for g in idle}
    assert {g["form"] for g in groups if g["operator"] == "LSTM"} == {"dynamic"}
