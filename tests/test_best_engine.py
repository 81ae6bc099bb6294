"""Target ``cpu``: both engines from one calibration, the faster that holds the bounds, and what it falls back to."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompiler
from qcompiler import best_engine
from qcompiler.backends.catalog import engine_of
from qcompiler.backends.openvino import OvEngine
from qcompiler.backends.openvino import OvRunner as Ov
from qcompiler.compiled import CompiledModel
from qcompiler.errors import ModelError
from qcompiler.options import Options
from qcompiler.search.timing import EngineStopwatch, Timing
from qcompiler.targets.host import Processor
from tests import synthetic
from tests.synthetic import feeds_of

pytest.importorskip("openvino")

FEEDS = feeds_of({"x": (2, 3, 16, 16)}, 5)
VNNI = Processor("x86_64", "a processor", frozenset({"vnni", "avx2"}))


class Machine:
    """Time whole models by their name, and by the engine that runs them."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.asked: list[dict[str, str]] = []

    def __call__(self, runners: Mapping[str, Any], feeds: Any, **more: Any) -> dict[str, Timing]:
        self.asked.append({n: "openvino" if isinstance(r, Ov) else "onnxruntime" for n, r in runners.items()})
        times = {n: self.milliseconds[n.replace("-", "_").replace(" ", "_")] * 1e-3 for n in runners}
        return {n: Timing(t, 2 * t, 1) for n, t in times.items()}


def twice_as_fast(self: EngineStopwatch, models: Mapping[str, Any]) -> dict[str, Timing]:
    """Time whole models while forms are searched: whatever is not the reference is faster."""
    return {name: Timing(*([1.0, 1.0] if name in ("reference", "with") else [0.5, 0.5]), 1) for name in models}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a machine on which OpenVINO is faster."""
    made = Machine(float=8.0, ort_x86=4.0, openvino=2.0, openvino_float=3.0)
    monkeypatch.setattr(best_engine, "interleave", made)
    monkeypatch.setattr(EngineStopwatch, "compare", twice_as_fast)
    monkeypatch.setattr(best_engine, "detect", lambda: VNNI)
    monkeypatch.setattr("qcompiler.options.detect", lambda: VNNI)
    return made


def best(proto: onnx.ModelProto | None = None, **more: Any) -> CompiledModel:
    given = proto if proto is not None else synthetic.residual_cnn()
    return qcompiler.compile(given, target="cpu", **{"recipe": "int8-static", "calibration": FEEDS, **more})


def test_the_faster_engine_is_kept_and_told_against_float_on_onnx_runtime(machine: Machine) -> None:
    made = best(recipe="int8")
    assert machine.asked == [
        {"float": "onnxruntime", "ort-x86": "onnxruntime", "openvino": "openvino", "openvino float": "openvino"}
    ]
    assert made.engine == "openvino"
    assert (made.report.speedup, made.report.speedup_median) == (4.0, 4.0)
    assert made.report.forms_tried["on ort-x86"]["speedup"] == 2.0
    assert made.report.forms_tried["on openvino"]["speedup"] == 4.0
    assert made.report.forms_tried["on openvino"]["sqnr_db"] > 15
    assert made.report.forms_tried["on openvino float"]["speedup"] == 2.667
    assert made.report.context["target"] == "openvino"
    assert made.report.warnings == ()


def test_onnx_runtime_is_kept_where_it_is_faster(machine: Machine) -> None:
    machine.milliseconds |= {"openvino": 5.0, "openvino_float": 6.0}
    made = best()
    assert made.engine == "onnxruntime"
    assert made.report.speedup == 2.0
    assert made.report.context["target"] == "ort-x86"
    assert made.report.forms_tried["on openvino"]["speedup"] == 1.6


def test_the_model_as_given_is_kept_on_openvino_where_that_is_fastest(machine: Machine) -> None:
    machine.milliseconds["openvino_float"] = 1.0
    given = synthetic.residual_cnn()
    made = best(given)
    assert made.engine == "openvino"
    assert made.report.speedup == 8.0
    assert made.report.proof.planned == 0
    assert [node.op_type for node in made.model.graph] == [node.op_type for node in given.graph.node]
    assert made.decisions.engine_forms == {"as-given": "keep"}
    again = best(given, decisions=made.decisions)
    assert again.to_bytes() == made.to_bytes()


def test_the_model_as_given_is_no_candidate_where_it_misses_the_bounds_on_openvino(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.milliseconds["openvino_float"] = 1.0
    monkeypatch.setattr(best_engine.Compilation, "as_given", lambda self: None)
    assert best().report.speedup == 4.0


def test_an_engine_that_misses_the_bounds_is_not_kept_however_fast(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = best_engine.Compilation.met.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        best_engine.Compilation, "met", property(lambda self: real(self) and self.settings.target.name != "openvino")
    )
    machine.milliseconds["openvino_float"] = 5.0
    assert best().engine == "onnxruntime"
    # Where none holds the bounds, the result is what it would be without a choice.
    monkeypatch.setattr(best_engine.Compilation, "met", property(lambda self: False))
    monkeypatch.setattr(best_engine.Compilation, "as_given", lambda self: None)
    assert best().engine == "onnxruntime"


def test_a_model_that_openvino_refuses_stays_with_onnx_runtime(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: OvEngine, *given: Any) -> Any:
        raise ModelError("openvino 1.0 refuses the model: no such operator")

    monkeypatch.setattr(OvEngine, "_compile", refuse)
    made = best()
    assert made.engine == "onnxruntime"
    assert made.report.speedup == 2.0
    assert "not compiled for openvino: openvino 1.0 refuses the model: no such operator" in made.report.warnings


def test_without_openvino_the_result_is_onnx_runtimes_with_a_word_on_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "openvino" else real(name, package)
    )
    made = best(guard=False)
    assert made.engine == "onnxruntime"
    (told,) = made.report.warnings
    assert told == 'only ONNX Runtime was tried; OpenVINO is not installed: pip install "qcompiler[openvino]"'


def test_a_processor_that_no_table_covers_gets_the_safe_form(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Processor("x86_64", "an old processor", frozenset({"avx2"}))
    monkeypatch.setattr(best_engine, "detect", lambda: old)
    monkeypatch.setattr("qcompiler.options.detect", lambda: old)
    made = best(guard=False)
    assert made.report.context["target"] == "ort-generic"
    assert any(w.startswith("OpenVINO was not tried: its table is for x86_64 with vnni") for w in made.report.warnings)


def test_without_the_guard_nothing_is_measured(machine: Machine) -> None:
    made = best(guard=False)
    assert machine.asked == []
    assert made.engine == "onnxruntime"
    assert made.report.speedup is None


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_record_is_repeated_for_the_engine_that_it_was_made_for(
    machine: Machine, engine: str, tmp_path: Path
) -> None:
    if engine == "onnxruntime":
        machine.milliseconds |= {"openvino": 5.0, "openvino_float": 6.0}
    made = best()
    made.save(tmp_path / "m.onnx")
    asked = len(machine.asked)
    again = best(decisions=tmp_path / "m.decisions.json")
    assert again.engine == made.engine == engine
    assert again.to_bytes() == made.to_bytes()
    assert len(machine.asked) == asked  # nothing was measured
    (feed, *_) = FEEDS
    wanted = qcompiler.load(tmp_path / "m.onnx", threads=1).run(feed)["logits"]
    again.save(tmp_path / "again.onnx")
    assert np.array_equal(qcompiler.load(tmp_path / "again.onnx", threads=1).run(feed)["logits"], wanted)


def test_both_engines_work_from_one_calibration(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = best_engine.Compilation.run.__globals__["open_dataset"]
    monkeypatch.setitem(
        best_engine.Compilation.run.__globals__, "open_dataset", lambda *a: opened.append(1) or real(*a)
    )
    made = best()
    assert len(opened) == 1
    alone = qcompiler.compile(
        synthetic.residual_cnn(), target="openvino", recipe="int8-static", calibration=FEEDS, decisions=made.decisions
    )
    assert alone.to_bytes() == made.to_bytes()


def test_the_target_is_named_where_names_are_listed() -> None:
    with pytest.raises(qcompiler.QCompilerError, match=r"unknown target 'gpu'; known: cpu, host, "):
        qcompiler.compile(synthetic.residual_cnn(), target="gpu", random_calibration=1)
    assert Options(target="cpu").target == best_engine.CPU


# ---- command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(synthetic.residual_cnn(), tmp_path / "given.onnx")
    np.savez(tmp_path / "feeds.npz", x=np.concatenate([f["x"] for f in FEEDS]))
    return tmp_path


def call(*words: object) -> Any:
    from typer.testing import CliRunner

    from qcompiler.cli import app

    return CliRunner().invoke(app, [str(w) for w in words])


def test_the_command_writes_openvinos_own_form(folder: Path) -> None:
    given, feeds, output = folder / "given.onnx", folder / "feeds.npz", folder / "made.xml"
    done = call("compile", given, "--target", "openvino", "--calibration", feeds, "-o", output, "--no-guard")
    assert done.exit_code == 0, done.output
    assert output.read_text(encoding="utf-8").startswith("<?xml")
    assert (folder / "made.bin").stat().st_size > 0
    runner = qcompiler.load(output, threads=1)
    wanted = qcompiler.load(given, threads=1).run(FEEDS[0])["logits"]
    assert np.abs(runner.run(FEEDS[0])["logits"] - wanted).max() < 0.15 * np.abs(wanted).max()


def test_the_command_takes_the_best_engine(machine: Machine, folder: Path) -> None:
    given, feeds, output = folder / "given.onnx", folder / "feeds.npz", folder / "made.onnx"
    done = call("compile", given, "--target", "cpu", "--calibration", feeds, "-o", output)
    assert done.exit_code == 0, done.output
    assert engine_of(output) == "openvino"
    assert qcompiler.load(output, threads=1).run(FEEDS[0])["logits"].shape == (2, 10)


def test_the_command_refuses_openvinos_form_for_another_engine(folder: Path) -> None:
    given, feeds, output = folder / "given.onnx", folder / "feeds.npz", folder / "made.xml"
    done = call("compile", given, "--target", "ort-x86", "--calibration", feeds, "-o", output, "--no-guard")
    assert done.exit_code != 0
    assert not output.exists()
