"""OpenVINO's own faults kept from users: crashes, float operators that compute in less, layers that write zeros."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.backends import openvino_probe
from qcompiler.backends.catalog import open_backend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.openvino import OvEngine, save_openvino
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Array, EngineOptions
from qcompiler.errors import ModelError
from qcompiler.ir.importer import import_model
from qcompiler.passes.lower_openvino import EXACT, PRECISION
from qcompiler.search.quality import Quality
from qcompiler.targets.target import load_target
from tests import synthetic
from tests.passes.quantize.lab import model_of, normal
from tests.synthetic import feeds_of

pytest.importorskip("openvino")

ONE = EngineOptions(threads=1)
F = np.float32
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
CHAIN = "a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2)"


def floats() -> ir.Model:
    return import_model(synthetic.residual_cnn())


def compiled(proto: Any, feeds: Any, **more: Any) -> CompiledModel:
    given = {"target": "openvino", "recipe": "int8-static", "calibration": feeds, **more}
    return qcompiler.compile(proto, **given)


def closeness(wanted: Array, actual: Array) -> float:
    """Return 10 log10(signal power / error power)."""
    noise = np.square(wanted.astype(np.float64) - actual).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise))


# ---- crashes -------------------------------------------------------------------------------------------------------


def test_a_model_that_openvino_takes_survives_and_one_that_it_refuses_does_not() -> None:
    assert openvino_probe.survives(floats())
    unknown = ir.from_proto(model_of("float[n] x", "float[n] y", "y = no.such.domain.Op(x)"))
    assert not openvino_probe.survives(unknown)


def test_a_crash_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_probe, "_CODE", CRASH)
    wanted = r"openvino crashes on the model \(SIGSEGV\), tried in a process of its own; .* --target host"
    with pytest.raises(ModelError, match=wanted):
        OvEngine(probe=True).load(floats(), ONE)


def test_a_compiler_that_does_not_come_to_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_probe, "_CODE", "import time; time.sleep(60)")
    with pytest.raises(ModelError, match=r"openvino did not compile the model within 0.2 s"):
        openvino_probe.survives(floats(), seconds=0.2)


def test_only_the_first_graph_of_other_origin_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr("qcompiler.backends.openvino.survives", lambda *a: tried.append(a) or True)
    model, engine = floats(), OvEngine(probe=True)
    engine.load(model, ONE)
    engine.load(model, ONE)
    assert len(tried) == 1
    OvEngine().load(model, ONE)
    made = floats()
    made.metadata_props["qcompiler.engine"] = "openvino"
    OvEngine(probe=True).load(made, ONE)
    assert len(tried) == 1


def test_what_was_refused_is_tried_again_in_its_next_form(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr("qcompiler.backends.openvino.survives", lambda *a: tried.append(a) or len(tried) > 1)
    engine = OvEngine(probe=True)
    for _ in range(3):
        engine.load(floats(), ONE)
    assert len(tried) == 2


def test_compiling_tries_the_model_as_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr("qcompiler.backends.openvino.survives", lambda *a: tried.append(a) or True)
    compiled(synthetic.residual_cnn(), feeds_of({"x": (2, 3, 16, 16)}, 5), guard=False)
    assert len(tried) == 1


# ---- float operators that compute in less --------------------------------------------------------------------------


def asks(model: ir.Model) -> ir.Model:
    model.metadata_props.update(EXACT)
    return model


def precision(engine: OvEngine, model: Any) -> str:
    return str(engine.load(model, ONE).compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())


def test_a_model_that_asks_for_float32_gets_it_in_every_form(tmp_path: Path) -> None:
    model = asks(floats())
    ir.save(model, tmp_path / "m.onnx")
    save_openvino(model, tmp_path / "m.xml")
    assert precision(OvEngine(), model) == "f32"
    assert precision(OvEngine(), (tmp_path / "m.onnx").read_bytes()) == "f32"
    assert precision(OvEngine(), tmp_path / "m.onnx") == "f32"
    assert precision(OvEngine(), tmp_path / "m.xml") == "f32"


def forced(proto: Any, feeds: Any, monkeypatch: pytest.MonkeyPatch, gains: bool) -> CompiledModel:
    """Compile while the float model misses the bounds, unless it computes in float32 and that ``gains``."""
    from qcompiler.search.quality import Judge

    real = Judge.__call__

    def judged(self: Judge, model: Any) -> Quality:
        exact = gains and isinstance(model, ir.Model) and model.metadata_props.get(PRECISION) == "f32"
        found = real(self, model)
        return found if exact else Quality(dict.fromkeys(found.sqnr_db, 3.0), found.agreement)

    monkeypatch.setattr(Judge, "__call__", judged)
    return compiled(proto, feeds)


def test_float32_is_asked_for_where_the_engines_own_float_misses_the_bounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    feeds = feeds_of({"x": (2, 3, 16, 16)}, 5)
    made = forced(synthetic.residual_cnn(), feeds, monkeypatch, gains=True)
    assert made.model.metadata_props[PRECISION] == "f32"
    assert made.decisions.engine_forms[PRECISION] == "f32"
    (told,) = [w for w in made.report.warnings if w.startswith("float operators stay in float32")]
    assert told.startswith("float operators stay in float32: what openvino prefers here misses the accuracy bound by ")
    made.save(tmp_path / "m.onnx")
    runner: Any = qcompiler.load(tmp_path / "m.onnx", threads=1)
    assert runner.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    again = compiled(synthetic.residual_cnn(), feeds, decisions=made.decisions)
    assert again.to_bytes() == made.to_bytes()


def test_float32_is_left_alone_where_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = forced(synthetic.residual_cnn(), feeds_of({"x": (2, 3, 16, 16)}, 5), monkeypatch, gains=False)
    assert PRECISION not in made.model.metadata_props
    assert not any(w.startswith("float operators stay") for w in made.report.warnings)


# ---- layers that write zeros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("bias", ["none", "zero", "even", "own"])
def test_two_small_products_behind_one_another_give_their_numbers(rows: int, bias: str) -> None:
    weights = {name: normal(i, 64, 64) / 8 for i, name in enumerate(("w1", "w2"))}
    body = CHAIN
    if bias != "none":
        values: Mapping[str, Array] = {"zero": np.zeros(64, F), "even": np.full(64, 0.25, F), "own": normal(5, 64)}
        weights["b"] = values[bias]
        body = body.replace("a = MatMul(x, w1)", "a = Gemm(x, w1, b)")
    proto = model_of(f"float[{rows},64] x", f"float[{rows},64] y", body, weights)
    feeds = feeds_of({"x": (rows, 64)}, 6)
    made = compiled(proto, feeds, guard=False)
    assert {g.form for g in made.report.groups} == {"static-float"}
    wanted = OrtEngine().load(made.model, EngineOptions(threads=1, optimize=False)).run(feeds[0])["y"]
    assert closeness(wanted, OvEngine(precision="f32").load(made.model, ONE).run(feeds[0])["y"]) > 60
    given = OrtEngine().load(proto.SerializeToString(), ONE).run(feeds[0])["y"]
    assert closeness(given, wanted) > 30


def test_what_is_given_to_a_product_is_lost_in_rounding() -> None:
    weights = {name: normal(i, 64, 64) / 8 for i, name in enumerate(("w1", "w2"))}
    proto = model_of("float[4,64] x", "float[4,64] y", CHAIN, weights)
    made = compiled(proto, feeds_of({"x": (4, 64)}, 6), guard=False)
    rows = [v.const_value.numpy() for n, v in made.model.graph.initializers.items() if n.endswith(":columns")]
    assert [sorted({float(x) for x in row}) for row in rows] == [[0.0, float(F(1e-30))]] * 2
    many = model_of("float[32,64] x", "float[32,64] y", CHAIN, weights)
    made = compiled(many, feeds_of({"x": (32, 64)}, 6), guard=False)
    assert not any(n.endswith(":columns") for n in made.model.graph.initializers)


def test_a_bfloat16_model_of_fixed_shape_keeps_its_numbers() -> None:
    import ml_dtypes

    feeds = [{"x": f["x"].astype(ml_dtypes.bfloat16)} for f in feeds_of({"x": (4, 64)}, 5)]
    proto = synthetic.brain_mlp()
    made = compiled(proto, feeds, guard=False)
    wanted = OrtEngine().load(proto.SerializeToString(), ONE).run(feeds[0])["y"].astype(F)
    assert closeness(wanted, OvEngine().load(made.model, ONE).run(feeds[0])["y"].astype(F)) > 25


def test_the_backend_that_compiles_tries_and_the_one_that_knows_the_model_does_not() -> None:
    target = load_target("openvino")
    first, second = open_backend(target).engine, open_backend(target, None, {}).engine
    assert isinstance(first, OvEngine)
    assert isinstance(second, OvEngine)
    assert (first.probe, second.probe) == (True, False)
