"""Whole compilations on an invented machine: exactly what is slow there becomes float, and the record repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import INTEGER_KERNELS
from qcompiler.compiled import CompiledModel
from qcompiler.compiler import compile_model
from qcompiler.decisions import Decisions
from qcompiler.engine import ModelLike
from qcompiler.ir.graph import all_nodes
from qcompiler.options import Options
from qcompiler.search.timing import Timing
from tests.search.machine import InventedMachine
from tests.synthetic import feeds_of, image_feeds, model, normal, regions_cnn

CNN = regions_cnn().SerializeToString()
FEEDS = image_feeds()
REGIONS = ("r0", "r1", "r2")
GROUPS = {f"/{r}/c{i}" for r in REGIONS for i in (0, 1)}


def of(region: str) -> set[str]:
    return {n for n in GROUPS if n.startswith(f"/{region}/")}


def compiled(machine: InventedMachine | None = None, decisions: Decisions | Path | None = None) -> CompiledModel:
    return compile_model(CNN, Options(calibration=FEEDS, stopwatch=machine, decisions=decisions))


def forms(made: CompiledModel) -> dict[str, str]:
    return {g.group: g.form for g in made.report.groups}


def integer_kernels(made: CompiledModel) -> set[str]:
    executed = OrtEngine().optimized_graph(made.model)
    return {str(n.name).split("_token")[0] for n in all_nodes(executed) if n.op_type in INTEGER_KERNELS}


def test_on_a_machine_that_is_fast_everywhere_all_run_on_integers() -> None:
    made = compiled(InventedMachine())
    assert forms(made) == dict.fromkeys(GROUPS, "static")
    assert integer_kernels(made) == GROUPS
    assert made.report.integer_share == 1.0
    assert made.report.speedup is not None
    assert made.report.speedup > 1.5


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("from_profile", [0, 2], ids=["seen at once", "seen once all is put together"])
def test_exactly_the_slow_region_becomes_float(region: str, from_profile: int) -> None:
    machine = InventedMachine(lambda name: name.startswith(f"/{region}/"), from_profile=from_profile)
    made = compiled(machine)
    expected = {n: "float" if n in of(region) else "static" for n in GROUPS}
    assert forms(made) == expected
    assert integer_kernels(made) == GROUPS - of(region)
    assert made.decisions.forms == dict.fromkeys(sorted(GROUPS - of(region)), "static")
    assert made.report.integer_share == pytest.approx(2 / 3, abs=1e-4)
    assert not made.report.proof.missed

    for name in of(region):
        assert made.decisions.why[name].startswith("float: ")
    first = f"/{region}/c0"
    assert "static 5000 us" in made.decisions.why[first] or "static 5010 us" in made.decisions.why[first]
    plans = made.decisions.figures["plans"]
    if from_profile == 0:
        assert list(plans) == ["plan 1"]
    else:
        assert plans["plan 1"]["measured_us"] > plans["plan 1"]["predicted_us"] + 9000
        assert plans["plan 2"]["measured_us"] == pytest.approx(plans["plan 2"]["predicted_us"], rel=0.05)
        assert made.decisions.figures["chosen"] == "plan 2"
    why = {g.group: g.why for g in made.report.groups}
    assert {n: why[n] for n in of(region)} == {n: made.decisions.why[n] for n in of(region)}


@pytest.mark.parametrize("region", REGIONS)
def test_the_record_repeats_the_bytes_without_measuring(region: str, tmp_path: Path) -> None:
    made = compiled(InventedMachine(lambda name: name.startswith(f"/{region}/")))
    watch = InventedMachine()
    again = compiled(watch, made.decisions)
    assert again.to_bytes() == made.to_bytes()
    assert (watch.profiles, watch.compared) == (0, [])
    assert again.decisions == made.decisions
    assert again.report.groups == made.report.groups
    assert again.report.speedup is None
    assert again.report.forms_tried == made.report.forms_tried

    made.save(tmp_path / "model.onnx")
    from_file = compiled(None, tmp_path / "model.decisions.json")
    from_file.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert (tmp_path / "again.decisions.json").read_text() == (tmp_path / "model.decisions.json").read_text()


def test_the_same_machine_gives_the_same_bytes() -> None:
    slow = InventedMachine(lambda name: name.startswith("/r1/"))
    other = InventedMachine(lambda name: name.startswith("/r1/"))
    assert compiled(slow).to_bytes() == compiled(other).to_bytes()


def test_one_slow_kernel_alone_returns_where_leaving_its_chain_pays() -> None:
    made = compiled(InventedMachine(lambda name: name == "/r1/c1"))
    assert {n for n, f in forms(made).items() if f == "float"} == {"/r1/c1"}


def test_where_everything_is_slow_the_model_stays_float_and_the_report_shows_what_was_tried() -> None:
    made = compiled(InventedMachine(lambda name: True))
    assert forms(made) == dict.fromkeys(GROUPS, "float")
    assert integer_kernels(made) == set()
    assert made.decisions.forms == {}
    report = made.report.to_dict()
    tried = report["forms_tried"]
    assert tried["static"]["profile_us"] > 6 * 5000
    assert tried["static"]["sqnr_db"] > 20
    assert made.decisions.figures["profile_us"]["float"] < tried["static"]["profile_us"]
    assert report["speedup"] >= 1.0
    assert report["integer_share"] == 0.0
    assert report["proof"]["planned"] == 0
    for group in report["groups"]:
        assert group["form"] == "float"
        assert "measured float" in group["why"]
        assert "static 50" in group["why"]
    feed = FEEDS[0]
    float_output = OrtEngine().load(CNN).run(feed)["y"]
    np.testing.assert_allclose(OrtEngine().load(made.model).run(feed)["y"], float_output, atol=1e-6)


def test_a_whole_model_that_is_slower_than_its_parts_promised_falls_back_to_float() -> None:
    """The profiler sees fast kernels, the comparison of whole models does not."""
    made = compiled(InventedMachine(lambda name: True, from_profile=10**9))
    assert forms(made) == dict.fromkeys(GROUPS, "float")
    tried = made.report.to_dict()["forms_tried"]
    assert tried["chosen"]["speedup"] < 0.1
    assert tried["without losing regions"]["speedup"] < 0.1
    assert tried["float"]["speedup"] >= 1.0
    assert made.report.speedup == tried["float"]["speedup"]
    text = "float: no integer form of the model was measured faster than float"
    assert {g.why for g in made.report.groups} == {text}


def test_what_a_user_pinned_stays_on_a_machine_that_is_slow_at_it(tmp_path: Path) -> None:
    overrides = tmp_path / "pins.toml"
    overrides.write_text('[[override]]\nmatch = "/r1/*"\nform = "static"\n')
    machine = InventedMachine(lambda name: name.startswith("/r1/"))
    made = compile_model(CNN, Options(calibration=FEEDS, stopwatch=machine, overrides=overrides))
    assert {n for n, f in forms(made).items() if f == "static"} >= of("r1")


# ---- products: float, dynamic or static by measurement -------------------------------------------------------------

MLP = model(
    """
    /a/MatMul: a = MatMul(x, wa)
    /a/Tanh: b = Tanh(a)
    /b/MatMul: c = MatMul(b, wb)
    /b/Exp: y = Tanh(c)
    """,
    {"x": (64, 128)}, {"y": (64, 128)}, {"wa": normal(1, 128, 128, fan=128), "wb": normal(2, 128, 128, fan=128)},
)  # fmt: skip


@pytest.mark.parametrize("slow", ["/a/MatMul", "/b/MatMul"])
def test_a_slow_product_stays_float_and_the_other_is_dynamic(slow: str) -> None:
    feeds = feeds_of({"x": (64, 128)})
    options = Options(calibration=feeds, stopwatch=InventedMachine(lambda name: name == slow))
    made = compile_model(MLP.SerializeToString(), options)
    (other,) = {"/a/MatMul", "/b/MatMul"} - {slow}
    assert forms(made) == {slow: "float", other: "dynamic"}
    replay = Options(calibration=feeds, decisions=made.decisions)
    assert compile_model(MLP.SerializeToString(), replay).to_bytes() == made.to_bytes()
    bare = Options(decisions=made.decisions)
    assert compile_model(MLP.SerializeToString(), bare).to_bytes() == made.to_bytes()  # dynamic needs no data


class Unsteady(InventedMachine):
    """A machine whose medians tell another story than its minima."""

    def compare(self, models: Mapping[str, ModelLike]) -> dict[str, Timing]:
        found = super().compare(models)
        return {n: Timing(t.minimum, t.median * (3.0 if n == "model" else 1.0), t.rounds) for n, t in found.items()}


def test_unsteady_timing_is_told() -> None:
    def said(machine: InventedMachine) -> list[str]:
        made = compile_model(CNN, Options(calibration=FEEDS, stopwatch=machine))
        return [w for w in made.report.warnings if "timing was unsteady" in w]

    assert said(InventedMachine()) == []
    (warning,) = said(Unsteady())
    assert "compile again when it is idle" in warning
