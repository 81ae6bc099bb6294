"""Products and convolutions that stay in float: their kernels, what is fused behind them, and what stays in torch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

torch = pytest.importorskip("torch", reason="the executor needs torch")

from qcompiler.backends.catalog import open_backend  # noqa: E402
from qcompiler.backends.triton.engine import TritonEngine  # noqa: E402
from qcompiler.backends.triton.plan import make_plan  # noqa: E402
from qcompiler.backends.triton.program import KERNEL, Program, Step, build_program  # noqa: E402
from qcompiler.backends.triton.rendering import render_plan  # noqa: E402
from qcompiler.backends.triton.work import count_work  # noqa: E402
from qcompiler.compilation import Compilation  # noqa: E402
from qcompiler.compiled import CompiledModel  # noqa: E402
from qcompiler.options import Options  # noqa: E402

HEADS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, t, 48] x) => (float[n, t, 48] y) {
  split = Constant <value_ints = [0, 0, 6, 8]> ()
  whole = Constant <value_ints = [0, 0, 48]> ()
  qp = MatMul (x, wq)
  kp = MatMul (x, wk)
  vp = MatMul (x, wv)
  qr = Reshape (qp, split)
  kr = Reshape (kp, split)
  vr = Reshape (vp, split)
  q = Transpose <perm = [0, 2, 1, 3]> (qr)
  k = Transpose <perm = [0, 2, 3, 1]> (kr)
  v = Transpose <perm = [0, 2, 1, 3]> (vr)
  s = MatMul (q, k)
  scaled = Div (s, root)
  p = Softmax <axis = -1> (scaled)
  o = MatMul (p, v)
  b = Transpose <perm = [0, 2, 1, 3]> (o)
  m = Reshape (b, whole)
  y = MatMul (m, wo)
}
"""
IMAGES = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 3, 12, 12] x) => (float[n, 8, 6, 6] y) {
  first = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  gate = Sigmoid (first)
  silu = Mul (first, gate)
  deep = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 16> (silu, w2)
  act = Relu (deep)
  last = Conv (act, w3, b3)
  y = Relu (last)
}
"""
TOKENS, PICTURES = (2, 7, 48), (2, 3, 12, 12)
FIRST = ("Conv_0", "Sigmoid_1", "Mul_2", "Conv_3")
"""Groups of the images that are kept in float: all up to the Relu."""


def _random(name: str, *shape: int) -> np.ndarray:
    return (np.random.default_rng(list(name.encode())).normal(size=shape) * 0.3).astype(np.float32)


def _model(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # inference finds it
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    return model


def heads() -> onnx.ModelProto:
    return _model(HEADS, root=np.asarray(2.0, np.float32), **{n: _random(n, 48, 48) for n in ("wq", "wk", "wv", "wo")})


def images() -> onnx.ModelProto:
    weights = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "w3": (8, 16, 1, 1), "b3": (8,)}
    return _model(IMAGES, **{n: _random(n, *shape) for n, shape in weights.items()})


def _feeds(*shape: int, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def _compiled(
    folder: Path, model: onnx.ModelProto, data: list[dict[str, np.ndarray]], floats: tuple[str, ...] = ()
) -> CompiledModel:
    """Compile with some groups kept in float, and compare with ONNX Runtime on the same graph in Q/DQ."""
    rows = folder / "floats.toml"
    rows.write_text("".join(f'[[override]]\nmatch = "{name}"\nform = "float"\n' for name in floats))
    options = Options(
        target="triton-sm90", recipe="int8-static", calibration=data, guard=False, overrides=rows if floats else None
    )
    job = Compilation(model, options)
    made = job.run()
    twin = job.workshop.computable(job.workshop.build(made.decisions.forms))
    wanted = open_backend(made.target).engine.load(twin).run(data[0])["y"]
    found = TritonEngine("cpu").load(made.model).run(data[0])["y"]
    # One step of an inner quantization may fall the other way and moves an output by a few of 255.
    steps = np.abs(found - wanted) / (np.ptp(wanted) / 255)
    assert steps.max() < 4
    assert steps.mean() < 0.2
    return made


def _kernels(program: Program, operator: str) -> list[Step]:
    return [s for s in program.steps if s.kind == KERNEL and s.operator == operator]


def test_short_heads_are_read_and_written_where_they_lie(tmp_path: Path) -> None:
    made = _compiled(tmp_path, heads(), _feeds(*TOKENS))
    program = build_program(made.model)
    assert [s.name for s in program.steps if s.operator in ("Transpose", "MatMul", "Div")] == []
    [scores] = _kernels(program, "float_matmul")  # probabilities by values sum over tokens
    assert (scores.attributes["a_axes"], scores.attributes["w_axes"]) == ([0, 2, 1, 3], [0, 2, 1, 3])
    assert (scores.attributes["w_layout"], scores.attributes["factor"]) == ("nk", "scalar")
    assert scores.attributes["scale"] == pytest.approx(0.5)
    plan = make_plan(program, {"x": TOKENS})
    work = count_work(plan, program)
    short = 2 * 6 * 7 * 7 * 8
    assert (work.torch, work.floats) == (0, short)
    assert work.quantized == pytest.approx((work.kernels - short) / work.kernels)
    assert f"{100 * work.quantized:.1f} % on stored numbers" in render_plan(program, 90, {"x": TOKENS})


@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_plans_hold_for_other_lengths(tokens: int, tmp_path: Path) -> None:
    made = _compiled(tmp_path, heads(), _feeds(3, tokens, 48))
    program = build_program(made.model)
    assert count_work(make_plan(program, {"x": (3, tokens, 48)}), program).torch == 0


def test_a_product_by_weights_keeps_what_stands_behind_it(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[n, t, 48] x) => (float[n, t, 32] y) {
      p = MatMul (x, a)
      q = Add (p, bias)
      r = Gelu (q)
      y = MatMul (r, b)
    }
    """
    constants = {"a": _random("a", 48, 20), "bias": _random("bias", 20), "b": _random("b", 20, 32)}
    made = _compiled(tmp_path, _model(text, **constants), _feeds(*TOKENS), ("MatMul_0",))
    program = build_program(made.model)
    [first] = _kernels(program, "float_matmul")
    assert [s.operator for s in program.steps if s.kind != KERNEL] == []
    assert [s.operator for s in program.steps] == ["float_matmul", "int8_matmul"]
    assert first.arguments == ("a", "w", "bias")
    assert [first.attributes[n] for n in ("bias", "activation", "out", "out_scale")] == [
        "channel", "gelu", "int8", "scalar",
    ]  # fmt: skip
    np.testing.assert_array_equal(program.weights[first.inputs[1]].reshape(20, 48), constants["a"].T)


def test_convolutions_in_float_keep_layout_and_epilogue(tmp_path: Path) -> None:
    made = _compiled(tmp_path, images(), _feeds(*PICTURES), FIRST)
    program = build_program(made.model)
    first, deep = _kernels(program, "float_conv")
    assert [first.attributes[n] for n in ("activation", "out", "pad")] == ["silu", "float32", "zero"]
    assert [deep.attributes[n] for n in ("kind", "activation", "out")] == ["depthwise", "relu", "int8"]
    kinds = [s.operator for s in program.steps]
    assert kinds == ["Transpose", "float_conv", "float_conv", "int8_conv", "pointwise", "Transpose"]
    work = count_work(make_plan(program, {"x": PICTURES}), program)
    assert (work.torch, work.floats) == (0, 2 * 16 * 12 * 12 * 27 + 2 * 16 * 6 * 6 * 9)


def test_a_convolution_of_one_dimension_is_one_of_two(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 4, 20] x) => (float[n, 8, 10] y) {
      y = Conv <pads = [1, 1], strides = [2]> (x, w)
    }
    """
    made = _compiled(tmp_path, _model(text, w=_random("w", 8, 4, 3)), _feeds(2, 4, 20), ("Conv_0",))
    [conv] = _kernels(build_program(made.model), "float_conv")
    assert [conv.attributes[n] for n in ("stride_h", "stride_w", "pad_top", "pad_left", "group")] == [1, 2, 0, 1, 1]


STAYS = {
    "a vector": ("float[5, 16] x", "y = MatMul (x, v)", {"v": (16,)}),
    "transposed data": ("float[16, 5] x", "y = Gemm <transA = 1> (x, w)", {"w": (16, 4)}),
    "a transposed convolution": ("float[1, 4, 5, 5] x", "y = ConvTranspose (x, w)", {"w": (4, 3, 2, 2)}),
    "computed weights": ("float[1, 4, 5, 5] x", "s = Softmax <axis = 1> (x) y = Conv <pads = [1, 1, 1, 1]> (x, s)", {}),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_has_no_kernel_stays_in_torch(name: str, tmp_path: Path) -> None:
    inputs, body, shapes = STAYS[name]
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[d] y) {{ {body} }}'
    model = _model(text, **{n: _random(n, *shape) for n, shape in shapes.items()})
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    program = build_program(_compiled(tmp_path, model, _feeds(*shape)).model)
    assert [s for s in program.steps if s.kind == KERNEL] == []


SCRIPT = """
import sys
import numpy as np
from qcompiler.backends.triton.engine import TritonEngine
feed = dict(np.load(sys.argv[2]))
a = TritonEngine("cpu").load(sys.argv[1]).run(feed)["y"]
b = TritonEngine("interpreter").load(sys.argv[1]).run(feed)["y"]
print(float(np.abs(a - b).max() / np.ptp(a)))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="interpreting needs triton")
@pytest.mark.parametrize("kind", ["heads", "images"])
def test_the_real_kernels_give_the_same_interpreted(kind: str, tmp_path: Path) -> None:
    model, data = (heads(), _feeds(*TOKENS)) if kind == "heads" else (images(), _feeds(*PICTURES))
    made = _compiled(tmp_path, model, data, () if kind == "heads" else FIRST)
    made.save(tmp_path / "m.qc")
    np.savez(tmp_path / "feed.npz", **data[0])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "m.qc"), str(tmp_path / "feed.npz")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 2 / 255
