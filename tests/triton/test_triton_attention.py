"""Products of two activations: their kernel, the strides by which it reads them, and what keeps them in float."""

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
from qcompiler.backends.triton.executor import Executor  # noqa: E402
from qcompiler.backends.triton.kernel_calls import kernel_call  # noqa: E402
from qcompiler.backends.triton.plan import make_plan  # noqa: E402
from qcompiler.backends.triton.program import KERNEL, Program, Step, build_program  # noqa: E402
from qcompiler.backends.triton.rendering import render_plan  # noqa: E402
from qcompiler.backends.triton.tensors import to_numpy, to_torch  # noqa: E402
from qcompiler.backends.triton.work import Work, count_work  # noqa: E402
from qcompiler.compilation import Compilation  # noqa: E402
from qcompiler.compiled import CompiledModel  # noqa: E402
from qcompiler.kernels.catalog import reference_of  # noqa: E402
from qcompiler.options import Options  # noqa: E402

HEADS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, t, 48] x, float[n, 1, 1, t] mask) => (float[n, t, 48] y) {
  split = Constant <value_ints = [0, 0, 3, 16]> ()
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
  masked = Add (scaled, mask)
  p = Softmax <axis = -1> (masked)
  o = MatMul (p, v)
  b = Transpose <perm = [0, 2, 1, 3]> (o)
  m = Reshape (b, whole)
  y = MatMul (m, wo)
}
"""


def _weights(*names: str, rows: int = 48) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {n: (rng.normal(size=(rows, rows)) * 0.3).astype(np.float32) for n in names}


def _model(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # inference finds it
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    return model


def attention() -> onnx.ModelProto:
    return _model(HEADS, root=np.asarray(4.0, np.float32), **_weights("wq", "wk", "wv", "wo"))


def feeds(batch: int = 2, tokens: int = 7, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    mask = np.zeros((batch, 1, 1, tokens), np.float32)
    mask[0, ..., -2:] = -100.0
    return [{"x": rng.normal(size=(batch, tokens, 48)).astype(np.float32), "mask": mask} for _ in range(count)]


def _pair(inputs: str, body: str) -> str:
    return f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[d] y) {{ {body} }}'


def _compiled(model: onnx.ModelProto, data: list[dict[str, np.ndarray]]) -> CompiledModel:
    job = Compilation(model, Options(target="triton-sm90", recipe="int8-static", calibration=data, guard=False))
    made = job.run()
    made_twin = job.workshop.computable(job.workshop.build(made.decisions.forms))
    wanted = open_backend(made.target).engine.load(made_twin).run(data[0])["y"]
    found = TritonEngine("cpu").load(made.model).run(data[0])["y"]
    # One step of an inner quantization may fall the other way and moves an output by a few of 255.
    steps = np.abs(found - wanted) / (np.ptp(wanted) / 255)
    assert steps.max() < 4
    assert steps.mean() < 0.2
    return made


def _products(program: Program) -> list[Step]:
    return [s for s in program.steps if s.kind == KERNEL and s.attributes.get("multiplier") == "scalar"]


def _check_against_numpy(made: CompiledModel, feed: dict[str, np.ndarray]) -> list[str]:
    """Assert that every product of two activations equals the kernel's NumPy reference; return the batches' axes."""
    executor = Executor(build_program(made.model))
    values = {n: to_torch(a) for n, a in feed.items()}
    prepared = executor.prepare({n: tuple(v.shape) for n, v in values.items()})
    values |= prepared.constants
    prepared.views.clear()
    batches = []
    for step in prepared.plan.steps:
        executor.execute(step, values, prepared)
        if step.attributes.get("multiplier") != "scalar":
            continue
        known = {**executor.weights, **values}
        inputs = {a: known[n].contiguous() for a, n in zip(step.arguments, step.inputs, strict=True)}
        call = kernel_call(step, inputs, {"out": values[step.outputs[0]].contiguous()})
        assert call is not None
        given = {n: to_numpy(t) if isinstance(t, torch.Tensor) else t for n, t in call.tensors.items() if n != "out"}
        wanted = reference_of("int8_matmul").reference(given, call.options)["out"]
        np.testing.assert_array_equal(to_numpy(call.tensors["out"]), wanted, err_msg=step.name)
        batches.append(call.options["batch"])
    return batches


def test_heads_are_read_and_written_where_they_lie() -> None:
    made = _compiled(attention(), feeds())
    program = build_program(made.model)
    assert [s.name for s in program.steps if s.operator in ("Transpose", "MatMul", "Div")] == []
    scores, mixed = _products(program)
    assert scores.attributes["a_axes"] == [0, 2, 1, 3]
    assert scores.attributes["w_axes"] == [0, 2, 1, 3]  # the keys' own order is that of packed weights
    assert (scores.attributes["w_layout"], scores.attributes["out"]) == ("nk", "float32")
    assert (mixed.attributes["w_layout"], mixed.attributes["out"]) == ("kn", "int8")
    assert "a_axes" not in mixed.attributes
    assert mixed.attributes["out_axes"] == [0, 2, 1, 3]
    assert {scores.name, mixed.name} <= set(made.report.proof.fused)
    assert made.report.proof.missed == ()
    assert _check_against_numpy(made, feeds()[0]) == ["two", "two"]


def test_the_scores_factor_stands_in_the_multiplier() -> None:
    scores = _products(build_program(_compiled(attention(), feeds()).model))[0]
    plain = _model(HEADS, root=np.asarray(1.0, np.float32), **_weights("wq", "wk", "wv", "wo"))
    unscaled = _products(build_program(_compiled(plain, feeds()).model))[0]
    assert scores.attributes["scale"] == pytest.approx(unscaled.attributes["scale"] / 4, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_plans_hold_for_other_lengths(tokens: int) -> None:
    made = _compiled(attention(), feeds())
    assert _check_against_numpy(made, feeds(3, tokens, 1)[0]) == ["two", "two"]


MATRICES = "float[3, 5, 16] a, float[3, 16, 9] b"
CASES = {
    "matrices by matrices": (MATRICES, "y = MatMul (a, b)", ["one"]),
    "rows by one matrix": ("float[3, 5, 16] a, float[16, 9] b", "y = MatMul (a, b)", ["one"]),
    "a matrix by matrices": ("float[5, 16] a, float[3, 16, 9] b", "y = MatMul (a, b)", ["one"]),
    "shared along one axis": ("float[2, 1, 5, 16] a, float[1, 3, 16, 9] b", "y = MatMul (a, b)", ["two"]),
    "more axes": ("float[2, 1, 3, 5, 16] a, float[2, 2, 1, 16, 9] b", "y = MatMul (a, b)", ["one"]),
    "transposed": ("float[5, 16] a, float[9, 16] b", "t = Transpose (b) y = MatMul (a, t)", ["one"]),
    "the transposed read twice": (
        "float[2, 17, 16] a, float[2, 17, 16] b",
        "t = Transpose <perm = [0, 2, 1]> (b) u = MatMul (a, t) v = MatMul (t, a) "
        "axes = Constant <value_ints = [1, 2]> () p = ReduceSum (u, axes) q = ReduceSum (v, axes) y = Add (p, q)",
        ["one", "one"],
    ),
    "by itself": ("float[2, 5, 16] a, float[2] b", "t = Transpose <perm = [0, 2, 1]> (a) y = MatMul (a, t)", ["one"]),
    "result transposed": (MATRICES, "u = MatMul (a, b) y = Transpose <perm = [1, 0, 2]> (u)", ["one"]),
    "result turned": (MATRICES, "u = MatMul (a, b) y = Transpose <perm = [0, 2, 1]> (u)", ["one"]),
    "read inside out": (
        "float[16, 3, 5] a, float[3, 16, 9] b",
        "t = Transpose <perm = [1, 2, 0]> (a) y = MatMul (t, b)",  # the last axis moves: a copy
        ["one"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operands_of_all_shapes(name: str) -> None:
    inputs, body, batches = CASES[name]
    model = _model(_pair(inputs, body))
    rng = np.random.default_rng(5)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    data = [{n: rng.normal(0.3, 1, s).astype(np.float32) for n, s in shapes.items()} for _ in range(4)]
    made = _compiled(model, data)
    assert _check_against_numpy(made, data[0]) == batches
    assert made.report.proof.missed == ()


def test_a_constant_is_quantized_as_an_activation_in_front() -> None:
    model = _model(_pair("float[2, 16, 9] a", "y = MatMul (c, a)"), c=_weights("c", rows=16)["c"])
    rng = np.random.default_rng(5)
    data = [{"a": rng.normal(size=(2, 16, 9)).astype(np.float32)} for _ in range(4)]
    made = _compiled(model, data)
    assert _check_against_numpy(made, data[0]) == ["one"]


@pytest.mark.parametrize(
    ("inputs", "code", "text"),
    [
        ("float[3, 5, 15] a, float[3, 15, 9] b", "too-small", "each output sums 15 products"),
        ("float[16] a, float[3, 16, 9] b", "rank", "the operands have the ranks [1, 3]"),
    ],
)
def test_what_stays_in_float_says_why(inputs: str, code: str, text: str) -> None:
    model = _model(_pair(inputs, "y = MatMul (a, b)"))
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    data = [{n: np.ones(s, np.float32) for n, s in shapes.items()}]
    options = Options(target="triton-sm90", recipe="int8-static", calibration=data, guard=False)
    job = Compilation(model, options)
    assert _products(build_program(job.run().model)) == []
    [group] = job.workshop.groups
    assert {(c, t.startswith(text)) for _, c, t in group.refusals} == {(code, True)}


def test_a_plan_counts_its_multiply_adds() -> None:
    program = build_program(_compiled(attention(), feeds()).model)
    n, t = 2, 7
    counted = count_work(make_plan(program, {"x": (n, t, 48), "mask": (n, 1, 1, t)}), program)
    assert counted == Work(n * (4 * t * 48 * 48 + 2 * 3 * t * t * 16), 0)
    assert counted.share == 1.0
    text = render_plan(program, 90, {"x": (n, t, 48), "mask": (n, 1, 1, t)})
    assert "138 thousand multiply-adds, 100.0 % of them in kernels" in text.splitlines()[-1]


def test_products_of_torch_count_against_the_kernels() -> None:
    text = _pair("float[3, 5, 32] a, float[9] b", "p = MatMul (a, c) q = MatMul (p, b) y = Relu (q)")
    model = _model(text, c=_weights("c", rows=32)["c"][:, :9])
    rng = np.random.default_rng(5)
    data = [{n: rng.normal(size=s).astype(np.float32) for n, s in (("a", (3, 5, 32)), ("b", (9,)))}]
    program = build_program(_compiled(model, data).model)
    counted = count_work(make_plan(program, {"a": (3, 5, 32), "b": (9,)}), program)
    assert counted == Work(3 * 5 * 32 * 9, 3 * 5 * 9)  # of a vector there is no kernel


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
def test_the_real_kernel_gives_the_same_interpreted(tmp_path: Path) -> None:
    _compiled(attention(), feeds()).save(tmp_path / "m.qc")
    np.savez(tmp_path / "feed.npz", **feeds(2, 19, 1)[0])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "m.qc"), str(tmp_path / "feed.npz")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0.0
