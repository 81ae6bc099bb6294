"""The demo models of our own: compiled by rule, as good as float, and both language models on one weights file."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

import qcompiler
from qcompiler.compiled import CompiledModel
from tests.families import COVERED

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("digits_resnet", "code_lm", "code_lm_cached")


@functools.cache
def demo_data() -> ModuleType:
    name = "qcompiler_demo_models_under_test"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / "demo_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@functools.cache
def demo(name: str) -> Any:
    (found,) = [m for m in demo_data().demo_models() if m.name == name]
    return found


@functools.cache
def compiled(name: str) -> CompiledModel:
    model = demo(name)
    return qcompiler.compile(model.path, calibration=model.calibration, guard=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_demo_model_loses_less_than_a_point(name: str) -> None:
    model = demo(name)
    reference = qcompiler.load(model.path, threads=1)
    before = model.metric([reference.run(feed) for feed in model.evaluation])
    session = compiled(name).session(threads=1)
    outputs = [o.name for o in session.get_outputs()]
    after = model.metric([dict(zip(outputs, session.run(None, dict(f)), strict=True)) for f in model.evaluation])
    assert before > 0.65  # the model learned something
    assert after >= before - 0.01


@COVERED
@pytest.mark.parametrize("name", NAMES)
def test_all_of_a_demo_model_runs_on_integers(name: str) -> None:
    report = compiled(name).report.to_dict()
    assert report["proof"]["missed"] == []
    assert report["proof"]["planned"] >= 14
    assert report["integer_share"] > 0.99
    assert report["bytes_after"] < 0.3 * report["bytes_before"]
    assert min(report["sqnr_db"].values()) > 20
    assert report["warnings"] == []


def test_a_demo_model_is_the_same_bytes_each_time() -> None:
    model, made = demo("digits_resnet"), compiled("digits_resnet")
    again = qcompiler.compile(model.path, calibration=model.calibration, guard=False)
    assert again.to_bytes() == made.to_bytes()


def test_both_language_models_share_one_weights_file() -> None:
    places = {}
    for name in ("code_lm", "code_lm_cached"):
        proto = onnx.load(demo(name).path, load_external_data=False)
        stored = [{e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data]
        assert stored
        places[name] = {entry["location"] for entry in stored}
    assert places["code_lm"] == places["code_lm_cached"] == {"code_lm.weights"}


def test_what_is_committed_stays_small() -> None:
    assert sum(f.stat().st_size for f in (EXAMPLES / "models").iterdir()) <= 24 * 2**20
