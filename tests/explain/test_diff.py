"""Two builds compared: by model, by dump, by report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcompiler.compiler import compile_model
from qcompiler.explaining.build_diff import Difference, diff_dict, diff_sides
from qcompiler.explaining.build_sides import read_side
from qcompiler.explaining.evidence import ExplainError
from qcompiler.options import Options
from qcompiler.results import report_json
from tests.synthetic import feeds_of, residual_cnn

SOURCE = residual_cnn().SerializeToString()
FEEDS = feeds_of({"x": (2, 3, 16, 16)}, 8)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two builds: in ``b`` the addition is float and another estimator finds one range."""
    folder = tmp_path_factory.mktemp("builds")
    override = folder / "o.toml"
    override.write_text(
        '[[override]]\nmatch = "/block/Add"\nform = "float"\n'
        '[[override]]\nmatch = "/stem/Conv"\nestimator = "min-max"\n'
    )
    for name, given in (("a", None), ("b", override)):
        options = Options(
            calibration=FEEDS, overrides=given, guard=False, target="ort-x86", dump=folder / f"dump-{name}"
        )
        made = compile_model(SOURCE, options)
        made.save(folder / f"{name}.onnx")
        (folder / f"{name}.json").write_text(report_json(made))
    return folder


def of(found: tuple[Difference, ...], what: str) -> dict[str, tuple[str, str]]:
    return {d.name: (d.before, d.after) for d in found if d.what == what}


def test_two_models_differ_in_form_format_scale_kernel_and_figures(builds: Path) -> None:
    a, b = (read_side(builds / f"{n}.onnx", builds / f"{n}.json") for n in "ab")
    found = diff_sides(a, b)
    assert of(found, "form") == dict.fromkeys(("/block/Add", "/pool", "/flatten"), ("static", "float"))
    assert of(found, "kernel")["/block/Add"] == ("QLinearAdd", "")
    assert set(of(found, "format")) == {"r2", "p", "f"}
    assert of(found, "format")["r2"][1] == "float"
    assert {"r0"} <= set(of(found, "scale")) <= {"r0", "x"}
    assert of(found, "operator") == {"/block/Relu2": ("", "Relu")}
    assert {"nodes", "file bytes", "SQNR logits"} <= set(of(found, "figure"))
    assert of(found, "setting") == {"estimator of /stem/Conv": ("", "min-max")}
    size = next(d for d in found if d.name == "file bytes")
    assert int(size.after) == (builds / "b.onnx").stat().st_size


def test_a_scale_that_changed_tells_the_ratio(builds: Path) -> None:
    found = diff_sides(*(read_side(builds / f"dump-{n}") for n in "ab"))
    (scale,) = [d for d in found if d.name == "r0" and d.what == "scale"]
    before, after = (float(t.split(",")[0]) for t in (scale.before, scale.after))
    assert scale.note == f"x {after / before:.3g}"


def test_a_model_does_not_differ_from_itself(builds: Path) -> None:
    side = read_side(builds / "a.onnx", builds / "a.json")
    assert diff_sides(side, side) == ()


def test_reports_and_dumps_say_the_same_forms(builds: Path) -> None:
    by_report = of(diff_sides(*(read_side(builds / f"{n}.json") for n in "ab")), "form")
    by_dump = of(diff_sides(*(read_side(builds / f"dump-{n}") for n in "ab")), "form")
    assert by_report == by_dump == of(diff_sides(*(read_side(builds / f"{n}.onnx") for n in "ab")), "form")


def test_differences_are_json(builds: Path) -> None:
    a, b = (read_side(builds / f"{n}.onnx") for n in "ab")
    data = json.loads(json.dumps(diff_dict(a, b, diff_sides(a, b))))
    assert {d["what"] for d in data["differences"]} >= {"form", "format", "scale"}


def test_what_is_no_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExplainError, match="is no dump"):
        read_side(tmp_path)
    with pytest.raises(ExplainError, match="there is no"):
        read_side(tmp_path / "absent.onnx")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ExplainError, match="is no report"):
        read_side(tmp_path / "x.json")
