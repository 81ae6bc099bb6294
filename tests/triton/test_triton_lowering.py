from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the executor needs torch")

from qcompiler.backends.catalog import open_backend  # noqa: E402
from qcompiler.backends.triton.engine import TritonEngine  # noqa: E402
from qcompiler.backends.triton.program import KERNEL, Program, build_program  # noqa: E402
from qcompiler.compilation import Compilation  # noqa: E402
from qcompiler.options import Options  # noqa: E402
from tests.triton import models  # noqa: E402

CNN = models.feeds(6, 2, 3, 16, 16)
ROWS = models.feeds(6, 2, 5, 32)


def _kernels(program: Program) -> Counter[str]:
    return Counter(s.operator for s in program.steps if s.kind == KERNEL)


def _gap(model: object, data: list, recipe: str = "int8-static") -> tuple[float, float]:
    """Return the largest difference to ONNX Runtime on the same quantized graph in 1/255 of its range, and the mean."""
    job = Compilation(model, Options(target="triton-sm90", recipe=recipe, calibration=data, guard=False))
    made = job.run()
    build = job.workshop.build(made.decisions.forms)
    twin = open_backend(made.target).engine.load(job.workshop.computable(build))
    mine = TritonEngine("cpu").load(made.model)
    worst, mean = 0.0, 0.0
    for feed in data:
        wanted, found = twin.run(feed)["y"], mine.run(feed)["y"]
        steps = np.abs(wanted - found) / (np.ptp(wanted) / 255)
        worst, mean = max(worst, float(steps.max())), max(mean, float(steps.mean()))
    return worst, mean


def test_a_cnn_is_kernels_from_the_first_quantization_to_the_classifier() -> None:
    made = models.compiled(models.residual_cnn(), CNN)
    program = build_program(made.model)
    assert _kernels(program) == {
        "norm_quantize": 1, "int8_conv": 4, "int8_lookup": 1, "int8_pool": 2, "int8_matmul": 1,
    }  # fmt: skip
    assert made.report.proof.missed == ()
    assert made.report.proof.fused["s"].startswith("int8_conv")


def test_transposes_stand_at_the_borders_only() -> None:
    steps = build_program(models.compiled(models.residual_cnn(), CNN).model).steps
    moved = [i for i, s in enumerate(steps) if s.operator == "Transpose"]
    convs = [i for i, s in enumerate(steps) if s.operator == "int8_conv"]
    assert len(moved) == 2
    assert moved[0] < convs[0]
    assert moved[1] > convs[-1]


def test_the_residual_sum_stands_in_the_epilogue_of_its_convolution() -> None:
    steps = {s.name: s for s in build_program(models.compiled(models.residual_cnn(), CNN).model).steps}
    conv = steps["c2"]
    assert conv.attributes["residual"] == "before"
    assert "residual" in conv.arguments
    assert conv.attributes["out"] == "int8"
    assert steps["c3"].attributes["kind"] == "depthwise"


def test_a_transformer_block_fuses_norms_and_epilogues() -> None:
    made = models.compiled(models.mlp_block(), ROWS)
    program = build_program(made.model)
    assert _kernels(program) == {"norm_quantize": 2, "int8_matmul": 3}
    assert len(program.steps) == 5
    steps = {s.name: s for s in program.steps}
    assert (steps["p1"].attributes["activation"], steps["p1"].attributes["out"]) == ("gelu", "int8")
    assert steps["p2"].attributes["residual"] == "after"
    assert made.report.proof.missed == ()


@pytest.mark.parametrize("recipe", ["int8-static", "int4-weights", "fp8"])
def test_numbers_are_those_of_onnx_runtime_on_the_same_graph(recipe: str) -> None:
    worst, mean = _gap(models.mlp_block(), ROWS, recipe)
    # One step of an inner quantization may fall the other way and moves an output by a few of 255.
    assert worst < 4
    assert mean < 0.2


def test_a_cnn_computes_what_onnx_runtime_computes() -> None:
    worst, mean = _gap(models.residual_cnn(), CNN)
    assert worst < 4
    assert mean < 0.2


def test_the_artifact_runs(tmp_path: Path) -> None:
    import qcompiler

    made = models.compiled(models.residual_cnn(), CNN)
    made.save(tmp_path / "m.qc")
    loaded = qcompiler.load(tmp_path / "m.qc", threads=1).run(CNN[0])["y"]
    np.testing.assert_array_equal(loaded, TritonEngine("cpu").load(made.model).run(CNN[0])["y"])
