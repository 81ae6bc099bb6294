from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="the executor needs torch")

from qcompiler.backends.catalog import open_backend  # noqa: E402
from qcompiler.backends.readback import Planned  # noqa: E402
from qcompiler.backends.triton.backend import prove_steps  # noqa: E402
from qcompiler.backends.triton.engine import TritonEngine  # noqa: E402
from qcompiler.backends.triton.plan import make_plan  # noqa: E402
from qcompiler.backends.triton.program import KERNEL, Program, build_program  # noqa: E402
from qcompiler.backends.triton.work import count_work  # noqa: E402
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
        "pointwise": 2, "int8_conv": 5, "int8_pool": 1, "int8_matmul": 1,
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


def test_silu_stands_in_the_epilogue_of_what_computes_its_argument() -> None:
    made = models.compiled(models.silu_cnn(), CNN)
    program = build_program(made.model)
    assert _kernels(program) == {"pointwise": 1, "int8_conv": 3, "int8_matmul": 1}
    steps = {s.name: s for s in program.steps}
    assert [steps[n].attributes["activation"] for n in ("c1", "c2")] == ["silu", "silu"]
    assert made.report.proof.missed == ()
    assert made.report.proof.fused["s2"] == made.report.proof.fused["m2"] == "int8_conv c2"


def test_silu_of_what_something_else_reads_stays_a_table_and_a_product() -> None:
    program = build_program(models.compiled(models.silu_cnn(extra=True), CNN).model)
    steps = {s.name: s for s in program.steps}
    assert steps["c1"].attributes["activation"] == "silu"
    assert "activation" not in steps["c2"].attributes
    assert [steps[n].attributes["op"] for n in ("s2", "m2", "a2")] == ["table", "mul", "add"]


AVERAGE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 8, 12, 12] x) => (float[n, 8, p, q] y) {
  c = Conv <pads = [1, 1, 1, 1]> (x, w)
  a = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], count_include_pad = COUNT> (c)
  y = Conv (a, v)
}
"""


@pytest.mark.parametrize("count", [0, 1])
def test_an_average_is_a_kernel_where_all_windows_weigh_the_same(count: int) -> None:
    model = onnx.parser.parse_model(AVERAGE.replace("COUNT", str(count)))
    rng = np.random.default_rng(3)
    for name, shape in (("w", (8, 8, 3, 3)), ("v", (8, 8, 1, 1))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    made = models.compiled(model, models.feeds(4, 2, 8, 12, 12))
    kernels = _kernels(build_program(made.model))
    assert (kernels["int8_conv"], kernels["int8_pool"]) == ((3, 0) if count else (2, 1))
    assert [miss.kind for miss in made.report.proof.missed] == ([] if count else ["AveragePool"])


def test_a_stand_in_is_a_miss_with_its_reason() -> None:
    node = ir.Node("qcompiler.kernels", "int8_pool", [], attributes=[ir.AttrString("op", "average")], name="p")
    chosen = ir.Node("qcompiler.kernels", "int8_pool", [], attributes=[ir.AttrString("op", "max")], name="m")
    model = ir.Model(ir.Graph([], [], nodes=[node, chosen], opset_imports={"": 21}), ir_version=10)
    proof = prove_steps([Planned("p", "AveragePool", (), ()), Planned("m", "MaxPool", (), ())], model)
    assert proof.fused == {"m": "MaxPool of bytes"}
    assert [(m.group, m.reason) for m in proof.missed] == [("p", "no-kernel")]
    assert proof.missed[0].text.startswith("runs as torch functions on integers: averages have a kernel where")


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


@pytest.mark.parametrize("model", [models.residual_cnn(), models.silu_cnn()], ids=["residual", "silu"])
def test_a_cnn_computes_what_onnx_runtime_computes(model: onnx.ModelProto) -> None:
    worst, mean = _gap(model, CNN)
    assert worst < 4
    assert mean < 0.2


def test_the_artifact_runs(tmp_path: Path) -> None:
    import qcompiler

    made = models.compiled(models.residual_cnn(), CNN)
    made.save(tmp_path / "m.qc")
    loaded = qcompiler.load(tmp_path / "m.qc", threads=1).run(CNN[0])["y"]
    np.testing.assert_array_equal(loaded, TritonEngine("cpu").load(made.model).run(CNN[0])["y"])


AWKWARD = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 3, 6, 7] x) => (float[n, 5, 3, 9] y) {
  c = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, w)
  r = Relu (c)
  s = Conv <group = 5, pads = [1, 1, 1, 1]> (r, v)
  u = MatMul (s, a)
  h = Gelu (u)
  y = MatMul (h, b)
}
"""


@pytest.mark.parametrize("recipe", ["int8-static", "fp8"])
def test_lengths_that_are_no_multiples_of_16_run_in_kernels(recipe: str) -> None:
    """No contract asks for them: 3 channels, sums of 17 products, 9 columns (sums of 7 are too short: floats)."""
    model = onnx.parser.parse_model(AWKWARD)
    rng = np.random.default_rng(3)
    for name, shape in (("w", (5, 3, 3, 3)), ("v", (5, 1, 3, 3)), ("a", (7, 17)), ("b", (17, 9))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    made = models.compiled(model, models.feeds(4, 2, 3, 6, 7), recipe)
    program = build_program(made.model)
    work = count_work(make_plan(program, {"x": (2, 3, 6, 7)}), program)
    first, last = 2 * 5 * 3 * 7 * 27, 2 * 5 * 3 * 17 * 9
    short, convs = 2 * 5 * 3 * 7 * 17, first + 2 * 5 * 3 * 7 * 9
    assert (work.kernels, work.torch) == (convs + short + last, 0)
    assert work.floats == short + (0 if recipe == "int8-static" else convs)
    assert work.quantized == pytest.approx((work.kernels - work.floats) / work.kernels)
