"""The demo's language model, plain and with caches: half the bytes, the same integers, the same outputs, the metric."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qcompiler
from qcompiler.compiled_set import CompiledSet

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("code_lm", "code_lm_cached")


@pytest.fixture(scope="module")
def models() -> dict[str, object]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from demo_data import demo_models  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLES))
    return {m.name: m for m in demo_models() if m.name in NAMES}


@pytest.fixture(scope="module")
def made(models: dict[str, object]) -> CompiledSet:
    calibration = {name: list(models[name].calibration) for name in NAMES}  # type: ignore[attr-defined]
    paths = {name: models[name].path for name in NAMES}  # type: ignore[attr-defined]
    return qcompiler.compile_together(paths, calibration=calibration, guard=False)


def test_together_they_take_half_the_bytes(made: CompiledSet, tmp_path: Path):
    made.save(tmp_path / "out")
    together = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.suffix in (".onnx", ".bin"))
    alone = sum(len(made[name].to_bytes()) for name in NAMES)
    assert together == made.report.together
    assert 0.5 <= together / alone < 0.53


def test_every_shared_weight_has_the_same_integers_and_scales(made: CompiledSet):
    assert len(made.weights) == 29
    assert made.report.deviations == ()
    stored = []
    for name in NAMES:
        graph = onnx.load_model_from_string(made[name].to_bytes()).graph
        stored.append({t.name: numpy_helper.to_array(t) for t in graph.initializer})
    plain, cached = stored
    for row in made.weights:
        for part in ("q", "scale"):
            a, b = plain[f"{row.names['code_lm']}:{part}"], cached[f"{row.names['code_lm_cached']}:{part}"]
            assert a.dtype == b.dtype == (np.int8 if part == "q" else np.float32)
            np.testing.assert_array_equal(a, b)


def test_outputs_are_those_of_the_graphs_compiled_alone_and_the_metric_holds(
    made: CompiledSet, models: dict[str, object], tmp_path: Path
):
    made.save(tmp_path / "out")
    for name in NAMES:
        model = models[name]
        alone = qcompiler.compile(
            model.path, calibration=list(model.calibration), decisions=made[name].decisions, guard=False  # type: ignore[attr-defined]
        )  # fmt: skip
        assert alone.to_bytes() == made[name].to_bytes()
        runner = qcompiler.load(tmp_path / "out" / f"{name}.onnx", threads=1)
        outputs = [runner.run(feed) for feed in model.evaluation]  # type: ignore[attr-defined]
        reference = qcompiler.load(model.path, threads=1)  # type: ignore[attr-defined]
        floats = model.metric([reference.run(feed) for feed in model.evaluation])  # type: ignore[attr-defined]
        assert abs(model.metric(outputs) - floats) < 0.01  # type: ignore[attr-defined]
