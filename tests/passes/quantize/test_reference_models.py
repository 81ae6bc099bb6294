"""The reference models beside the checkout: no planned group is missed, and true integers stay within a step."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qcompiler.backends.readback import planned_fusions, prove
from qcompiler.backends.reference import integer_gaps
from qcompiler.calibration.observe import observe
from qcompiler.ir.importer import import_model
from qcompiler.observed import wanted_values
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.front import front_passes
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.groups import find_groups
from qcompiler.targets.placement import Policy, propose
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import ENGINE, OPTIMIZED, Lab, outputs, reference_outputs

FOLDER = Path(__file__).parents[4] / "shared" / "models"
SMALL = ("mnist_cnn_opset8", "resnet8_cifar10", "resnet8_cifar10_int8", "silero_vad", "stories260k")

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(not (FOLDER / "load.py").exists(), reason="the reference models are not beside the checkout"),
]
FUSED: tuple[Pass, ...] = (PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq())
POLICIES = {"dynamic": Policy(), "static": Policy(matmul="static-float")}


@cache
def loader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_models", FOLDER / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def prepared(name: str) -> Lab:
    model = loader().load(name)
    state = CompileState(import_model(model.path), load_target("ort-x86"))
    Pipeline(front_passes()).run(state)
    feeds = [{k: np.asarray(v) for k, v in feed.items()} for feed in model.calib[:2]]
    names = list(dict.fromkeys(wanted_values(state.model, find_groups(state.model, state.target))))
    state.statistics = observe(state.model, names, feeds, ENGINE)
    return Lab(state, feeds)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SMALL)
def test_every_planned_group_is_fused_by_the_engine(name, policy):
    work = prepared(name)
    forms = propose(find_groups(work.base.model, work.base.target), POLICIES[policy])
    fused = work.run(FUSED, forms)
    planned = planned_fusions(fused.model, fused.plan)
    lowered = work.run((*FUSED, LowerOnnxruntime(), AvoidEngineTraps()), forms)
    proof = prove(planned, ENGINE.optimized_graph(lowered.model, OPTIMIZED))
    assert proof.missed == ()
    chosen = {name for name, choice in fused.plan.choices.items() if choice.form != "float"}
    assert chosen
    # A quantized model may also bring pairs around an operator that no table asks for; they fuse by themselves.
    brought = [p for p in planned if p.group not in chosen]
    assert len(planned) - len(brought) == len(chosen)
    assert all(p.kind == "Softmax" and work.base.imported for p in brought)


@pytest.mark.parametrize("name", SMALL)
def test_true_integers_are_within_a_step_of_every_body(name):
    work = prepared(name)
    forms = propose(find_groups(work.base.model, work.base.target), POLICIES["static"])
    gaps = integer_gaps(
        work.run(FUSED, forms).model, [{k: v[:1] if v.ndim == 4 else v for k, v in work.feeds[0].items()}]
    )
    assert gaps
    for gap in gaps:
        assert gap.steps <= (1 if gap.kind not in ("MatMul", "Gemm") else 1e-3), gap
        if gap.kind not in ("MatMul", "Gemm"):
            assert gap.differing <= 1e-3, gap


def sqnr(wanted: np.ndarray, found: np.ndarray) -> float:
    wide = wanted.astype(np.float64)
    noise = float(np.mean((wide - found.astype(np.float64)) ** 2))
    return np.inf if noise == 0 else 10 * np.log10(float(np.mean(wide**2)) / noise)


@pytest.mark.parametrize("name", ["mnist_cnn_opset8", "resnet8_cifar10", "resnet8_cifar10_int8"])
def test_the_engine_is_nearer_to_true_integers_than_to_its_own_qdq(name):
    """Q/DQ in float rounds ties its own way, layer by layer; integers are what the kernels compute."""
    work = prepared(name)
    forms = propose(find_groups(work.base.model, work.base.target), POLICIES["static"])
    fused = work.run(FUSED, forms).model
    lowered = work.run((*FUSED, LowerOnnxruntime()), forms).model
    feed = work.feeds[0]
    executed = outputs(lowered, feed, OPTIMIZED)
    for truth, plain, engine in zip(reference_outputs(fused, feed), outputs(lowered, feed), executed, strict=True):
        assert sqnr(truth, engine) > 55
        assert sqnr(truth, engine) >= sqnr(plain, engine) > 35
