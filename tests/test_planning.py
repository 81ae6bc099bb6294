"""Budgets on real builds: what a plan promises of a file is what is written, and what cannot hold is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from qcompiler.cli import app
from qcompiler.compiler import compile_model
from qcompiler.errors import BudgetError, CalibrationError
from qcompiler.exploring import Exploration, Explorer
from qcompiler.options import Objective, Options
from qcompiler.search.forms_problem import forms_problem
from qcompiler.search.solution import evaluate
from tests import synthetic
from tests.families import FAMILIES, source
from tests.passes.quantize.lab import model_of, normal
from tests.search.machine import InventedMachine

NAMES = ("residual", "two outputs", "transformer")


def options(name: str, *budget: str, objective: Objective = "latency", machine: object = None) -> Options:
    return Options(
        target="ort-x86", calibration=FAMILIES[name].feeds(), budget=budget, objective=objective, threads=1,
        stopwatch=machine or InventedMachine(),  # type: ignore[arg-type]
    )  # fmt: skip


@functools.cache
def explored(name: str) -> tuple[Explorer, Exploration]:
    explorer = Explorer(source(name), options(name))
    return explorer, explorer.explore(steps=6)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_told_within_a_hundredth_and_bits_exactly(name: str) -> None:
    explorer, _ = explored(name)
    sizes, problem = explorer.tables.sizes, explorer.tables.problem()
    assert sizes is not None
    random = np.random.default_rng(0)
    for _ in range(6):
        choice = {g: str(random.choice([o.name for o in found])) for g, found in problem.options.items()}
        seen = explorer.meter.stored(choice)  # type: ignore[arg-type]
        told = evaluate(problem, choice)
        assert abs(told.bytes / seen.total - 1.0) < 0.015
        if {g: seen.forms.get(g, "float") for g in choice} == choice:
            assert told.bits == pytest.approx(seen.bits / sizes.weights)
            again = forms_problem(
                explorer.tables.groups, explorer.tables.allowed, explorer.tables.costs, None, sizes.corrected(seen)
            )
            assert evaluate(again, choice).bytes == seen.total


def test_all_in_float_is_told_to_the_byte() -> None:
    explorer, found = explored("residual")
    assert found.float_point.bytes == explorer.meter.stored({}).total
    assert found.float_point.bits == 32.0


def test_a_weight_that_two_groups_read_counts_once() -> None:
    body = "[m0] a = MatMul(x, m) [t0] b = Tanh(a) [m1] c = MatMul(b, m) [t1] y = Tanh(c)"
    model = model_of("float[8,64] x", "float[8,64] y", body, {"m": normal(1, 64, 64) / 8})
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal((8, 64)).astype(np.float32)} for _ in range(6)]
    explorer = Explorer(model, Options(target="ort-x86", calibration=feeds, threads=1, stopwatch=InventedMachine()))
    found = explorer.explore(("bytes",), steps=4)
    sizes = explorer.tables.sizes
    assert sizes is not None
    assert sizes.weights == 64 * 64
    least = min(found.points, key=lambda p: p.bytes)
    assert least.bits == pytest.approx(8 + 8 * 64 * 5 / 4096), "int8, and per column a scale and a zero point"
    assert explorer.meter.stored(least.choice).bits == least.bits * sizes.weights  # type: ignore[arg-type]


def test_bytes_hold_on_the_written_file(tmp_path: Path) -> None:
    _, found = explored("residual")
    least, plain = min(p.bytes for p in found.points), found.float_point.bytes
    limit = round(least + 0.3 * (plain - least))
    made = compile_model(source("residual"), options("residual", f"bytes<={limit}"))
    made.save(tmp_path / "out.onnx")
    size = (tmp_path / "out.onnx").stat().st_size
    plan = made.report.to_dict()["plan"]
    assert size <= limit
    assert size == plan["bytes"] == plan["predicted_bytes"] == made.report.bytes_after
    assert plan["gap"] == 0.0
    assert plan["held"]


def test_bits_hold_as_stored() -> None:
    made = compile_model(source("residual"), options("residual", "bits<=12"))
    explorer, _ = explored("residual")
    sizes = explorer.tables.sizes
    assert sizes is not None
    assert explorer.meter.bits(made.model) / sizes.weights <= 12.0
    assert made.report.plan["bits"] == pytest.approx(explorer.meter.bits(made.model) / sizes.weights, abs=1e-4)


def test_the_sqnr_holds_on_the_planners_data() -> None:
    least = 38.0
    made = compile_model(source("residual"), options("residual", f"sqnr>={least}"))
    assert made.report.quality is not None
    assert made.report.quality.worst >= least


def test_the_smallest_is_smaller_than_the_fastest_and_holds_the_bound() -> None:
    small = compile_model(source("two outputs"), options("two outputs", objective="bytes"))
    fast = compile_model(source("two outputs"), options("two outputs"))
    assert small.report.bytes_after <= fast.report.bytes_after
    assert small.report.speedup is not None
    assert small.report.speedup >= 1.0
    assert small.report.quality is not None


def test_what_cannot_hold_names_the_nearest_feasible_point() -> None:
    with pytest.raises(BudgetError, match=r"bytes <= 0.500 kB cannot hold: the best of all plans has .* relax"):
        compile_model(source("residual"), options("residual", "bytes<=500"))


def test_a_form_that_loses_is_not_chosen() -> None:
    """A machine whose integer kernels are slow: not one of them is in the build, whatever is asked for."""
    slow = InventedMachine(slow=lambda name: True)
    made = compile_model(source("residual"), options("residual", machine=slow))
    assert made.decisions.forms == {}


def test_budgets_without_timing_hold_as_well() -> None:
    plain = Options(
        target="ort-x86", calibration=FAMILIES["residual"].feeds(), budget="bits<=12", threads=1, measure=False
    )
    made = compile_model(source("residual"), plain)
    assert made.report.plan["held"]
    assert made.report.plan["bits"] <= 12.0


# ---- exploring -----------------------------------------------------------------------------------------------------


def test_points_are_ordered_and_none_is_beaten() -> None:
    _, found = explored("residual")
    costs = [p.cost_us for p in found.points]
    assert costs == sorted(costs)
    assert len({tuple(sorted(p.choice.items())) for p in found.points}) == len(found.points)
    rows = found.to_dict()["points"]
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["chosen"] for row in rows) == 1
    assert found.to_dict()["float"]["bytes"] == found.float_point.bytes
    assert json.loads(json.dumps(found.to_dict()))["measured"] is True


def test_any_point_can_be_built() -> None:
    explorer, found = explored("residual")
    point = min(found.points, key=lambda p: p.bytes)
    made = explorer.build(point)
    assert made.report.bytes_after == explorer.meter.stored(point.choice).total  # type: ignore[arg-type]
    assert made.decisions.forms == {g: f for g, f in sorted(point.choice.items()) if f != "float"}
    assert made.report.proof.planned == len(made.report.proof.fused)


def test_a_front_of_noise_needs_data() -> None:
    with pytest.raises(CalibrationError, match="against bytes"):
        Explorer(source("residual"), Options(target="ort-x86", stopwatch=InventedMachine())).explore()


def test_a_quantized_model_leaves_nothing_to_plan() -> None:
    with pytest.raises(BudgetError, match="the model is quantized already"):
        Explorer(synthetic.qdq_cnn(np.uint8), Options(target="ort-x86", stopwatch=InventedMachine())).explore(
            ("bytes",)
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.onnx").write_bytes(source("residual"))
    feeds = FAMILIES["residual"].feeds()
    np.savez(tmp_path / "feeds.npz", **{name: np.stack([f[name] for f in feeds]) for name in feeds[0]})
    return tmp_path


def explore(folder: Path, *more: str) -> tuple[int, str, str]:
    given = ["explore", str(folder / "model.onnx"), "--calibration", str(folder / "feeds.npz"), "--no-measure"]
    result = CliRunner().invoke(app, [*given, "--points", "4", "--target", "ort-x86", *more])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_shows_draws_writes_and_builds(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'qcompiler[plot]'")
    named = ["--plot", str(folder / "f.svg"), "--json", str(folder / "f.json"), "--build", "1", "-o"]
    code, out, error = explore(folder, *named, str(folder / "out.onnx"))
    assert code == 0, error
    assert "latency us" in out
    assert "*" in out
    rows = json.loads((folder / "f.json").read_text())["points"]
    assert (folder / "f.svg").read_text().startswith("<?xml")
    assert (folder / "out.onnx").stat().st_size == pytest.approx(rows[0]["bytes"], rel=0.015)
    assert json.loads((folder / "out.decisions.json").read_text())["forms"] == rows[0]["choice"]
    assert ir.load(folder / "out.onnx").graph.name is not None


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--plot", "f.pdf"], "expected a name that ends in .png or .svg"),
        (["--build", "1"], "--build N and -o OUT go together"),
        (["--build", "99", "-o", "x.onnx"], "there is no point 99"),
        (["--budget", "bytes<=100"], "bytes <= 0.100 kB cannot hold"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(folder: Path, more: list[str], text: str) -> None:
    code, _, error = explore(folder, *more)
    assert code == 2
    assert text in error
    assert not list(Path.cwd().glob("x.onnx"))


def test_an_infeasible_budget_writes_nothing(folder: Path) -> None:
    given = [
        "compile",
        str(folder / "model.onnx"),
        "-o",
        str(folder / "out.onnx"),
        "--no-measure",
        "--budget",
        "bits<=2",
    ]
    result = CliRunner().invoke(app, [*given, "-c", str(folder / "feeds.npz"), "--target", "ort-x86"])
    assert result.exit_code == 2
    assert "bits <= 2 bits per weight cannot hold: the best of all plans has" in result.stderr
    assert "the nearest feasible point has" in result.stderr
    assert not (folder / "out.onnx").exists()
    assert not (folder / "out.decisions.json").exists()
