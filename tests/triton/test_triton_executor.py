import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

torch = pytest.importorskip("torch", reason="the executor needs torch")

from qcompiler.backends.triton.engine import TritonEngine  # noqa: E402
from qcompiler.backends.triton.executor import MOST_PLANS, Executor  # noqa: E402
from qcompiler.backends.triton.plan import make_plan  # noqa: E402
from qcompiler.backends.triton.program import build_program  # noqa: E402
from qcompiler.errors import CalibrationError, ModelError, TargetError  # noqa: E402
from tests.triton import models  # noqa: E402

ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, t, 8] x) => (float[n, t, 8] y) {
  shape = Shape (x)
  two = Constant <value_ints = [2]> ()
  four = Constant <value_ints = [4]> ()
  head = Slice (shape, zero, twob)
  split = Concat <axis = 0> (head, two, four)
  r = Reshape (x, split)
  q = Transpose <perm = [0, 2, 1, 3]> (r)
  k = Transpose <perm = [0, 2, 3, 1]> (r)
  s = MatMul (q, k)
  p = Softmax <axis = -1> (s)
  o = MatMul (p, q)
  b = Transpose <perm = [0, 2, 1, 3]> (o)
  y = Reshape (b, shape)
}
"""


def _model(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    return model


def _attention() -> onnx.ModelProto:
    return _model(ATTENTION, zero=np.asarray([0], np.int64), twob=np.asarray([2], np.int64))


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def test_what_depends_on_shapes_alone_is_computed_while_planning() -> None:
    plan = make_plan(build_program(ir.from_proto(_attention())), {"x": (2, 5, 8)})
    assert [s.operator for s in plan.steps] == [
        "Reshape", "Transpose", "Transpose", "MatMul", "Softmax", "MatMul", "Transpose", "Reshape",
    ]  # fmt: skip
    assert plan.constants["split"].tolist() == [2, 5, 2, 4]
    assert plan.unplanned == ()
    assert plan.buffers["r"].view_of == "x"
    assert plan.buffers["y"].view_of == "b"


def test_plans_are_made_per_shape_and_the_oldest_goes() -> None:
    model = _attention()
    executor = Executor(build_program(ir.from_proto(model)))
    wanted = ReferenceEvaluator(model)
    for length in range(1, MOST_PLANS + 4):
        x = _x(2, length, 8)
        np.testing.assert_allclose(executor.run({"x": x})["y"].numpy(), wanted.run(None, {"x": x})[0], atol=1e-5)
    assert len(executor.plans) == MOST_PLANS
    assert (("x", (2, 1, 8)),) not in executor.plans


def test_results_survive_the_next_run() -> None:
    runner = TritonEngine("cpu").load(ir.from_proto(_attention()))
    first = runner.run({"x": _x(1, 3, 8)})["y"]
    kept = first.copy()
    runner.run({"x": _x(1, 3, 8) * 9})
    np.testing.assert_array_equal(first, kept)


def test_the_arena_gives_what_separate_buffers_give() -> None:
    data = models.feeds(3, 2, 3, 16, 16)
    program = build_program(models.compiled(models.residual_cnn(), data).model)
    executor, plain = Executor(program), Executor(program)
    shapes = {"x": (2, 3, 16, 16)}
    assert executor.prepare(shapes).plan.arena >= executor.prepare(shapes).plan.peak > 0
    plain.prepare(shapes).views.clear()
    for feed in data:
        np.testing.assert_array_equal(executor.run(feed)["y"].numpy(), plain.run(feed)["y"].numpy())


def test_torch_in_torch_out() -> None:
    runner = TritonEngine("cpu").load(ir.from_proto(_attention()))
    x = torch.from_numpy(_x(1, 3, 8))
    found = runner.run({"x": x})["y"]
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), runner.run({"x": x.numpy()})["y"])


def test_a_branch_that_shapes_decide_is_taken_while_planning() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[n] x) => (float[m] y) {
      size = Size (x)
      small = Less (size, four)
      y = If (small) <then_branch = a () => (float[m] u) { u = Neg (x) },
                      else_branch = b () => (float[m] v) { v = Abs (x) }>
    }
    """
    program = build_program(ir.from_proto(_model(text, four=np.asarray(4, np.int64))))
    assert [s.operator for s in make_plan(program, {"x": (3,)}).steps] == ["Neg", "Identity"]
    found = Executor(program)
    assert found.run({"x": np.asarray([1.0, -2.0], np.float32)})["y"].tolist() == [-1.0, 2.0]
    assert found.run({"x": np.asarray([1.0, -2.0, 3.0, -4.0], np.float32)})["y"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_missing_input_is_told() -> None:
    with pytest.raises(CalibrationError, match="inputs are x; the feed has z"):
        TritonEngine("cpu").load(ir.from_proto(_attention())).run({"z": _x(1)})


def test_another_type_is_told() -> None:
    with pytest.raises(CalibrationError, match="input x is float32"):
        TritonEngine("cpu").load(ir.from_proto(_attention())).run({"x": _x(1, 3, 8).astype(np.float64)})


def test_recurrent_operators_are_named() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[2, 1, 3] x, float[1, 4, 3] w, float[1, 4, 4] r) => (float[2, 1, 1, 4] y) {
      y = RNN <hidden_size = 4> (x, w, r)
    }
    """
    with pytest.raises(ModelError, match=r"no step for RNN \(.*\) \(recurrent operators have none\)"):
        build_program(ir.from_proto(_model(text)))


def test_an_unknown_device_is_told() -> None:
    with pytest.raises(TargetError, match="unknown device 'tpu'"):
        TritonEngine("tpu")
