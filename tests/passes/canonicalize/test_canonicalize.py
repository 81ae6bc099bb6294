"""The whole of canonicalize: order, fixpoint, and real and shipped models."""

import glob
import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from qcompiler.errors import ModelError
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import parse_text, print_model
from qcompiler.ir.verify import verify
from qcompiler.passes.canonicalize import CANONICALIZE, Canonicalize, canonical_passes
from qcompiler.pipeline.parse import print_pass
from qcompiler.pipeline.state import ChangeLog, CompileState
from qcompiler.targets.target import load_target

_MODELS = Path(__file__).resolve().parents[3].parent / "shared" / "models"
_SHIPPED = os.path.join(os.path.dirname(onnx.__file__), "backend", "test", "data")
_ENGINE_ERRORS = (RuntimeError, ValueError, NotImplementedError, *(
    error for error in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(error, type) and issubclass(error, Exception)
))  # fmt: skip


def state_of(model) -> CompileState:
    return CompileState(model, load_target("ort-x86"))


def runner(source) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def test_pipeline_string_says_what_runs():
    assert ",".join(print_pass(step) for step in canonical_passes()) == CANONICALIZE


def test_factor_of_gelu_is_not_taken_by_the_next_weight(run, text, rng):
    body = """
    a = Div(x, r) e = Erf(a) s = Add(one, e) p = Mul(x, s) g = Mul(half, p) y = MatMul(g, w)
    """
    weights = {"r": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    weights["w"] = rng.normal(size=(4, 4)).astype(np.float32)
    found = run(Canonicalize(), text("float[n,3,4] x", "float[n,3,4] y", body, weights))
    assert found.ops == {"Gelu": 1, "MatMul": 1}


def test_separable_rounds_reach_one_form(run, text, rng):
    """A padded convolution behind shape arithmetic, with its norm and activation spelled out."""
    body = """
    s = Shape(x) c = Gather(s, one) q = Mul(c, zero) u = Unsqueeze(q, ax) p = Concat<axis=0>(u, u, k, k, u, u, k, k)
    a = Pad(x, p) b = Conv(a, w) d = BatchNormalization(b, g, o, m, v) e = Max(d, fz) i = Identity(e)
    y = Clip(i, fz, six)
    """
    f = np.float32
    weights = {
        "one": np.int64(1), "zero": np.int64(0), "ax": np.array([0]), "k": np.array([1]), "fz": f(0), "six": f(6),
        "w": rng.normal(size=(4, 3, 3, 3)).astype(f), "v": rng.uniform(1, 2, 4).astype(f),
    } | {n: rng.normal(size=4).astype(f) for n in "gom"}  # fmt: skip
    found = run(Canonicalize(), text("float[n,3,8,8] x", "float[n,4,8,8] y", body, weights))
    assert found.ops == {"Conv": 1, "Clip": 1}
    assert list(found.node("Conv").attributes["pads"].as_ints()) == [1, 1, 1, 1]


def test_limit_on_changes_is_kept(text):
    source = text("float[n] x", "float[n] y", "a = Identity(x) b = Identity(a) c = Relu(b) y = Relu(c)")
    state = state_of(parse_text(source))
    state.changes = ChangeLog(limit=1)
    Canonicalize().run(state)
    assert [change.rule for change in state.changes.applied] == ["identity"]
    assert Counter(node.op_type for node in all_nodes(state.model)) == {"Identity": 1, "Relu": 2}


def test_same_model_twice_gives_the_same_text(text):
    source = text("float[n,m] x", "float[n,m] y", "s = Shape(x) t = Shape(x) a = Reshape(x, s) y = Reshape(a, t)")
    texts = []
    for _ in range(2):
        state = state_of(parse_text(source))
        Canonicalize().run(state)
        texts.append(print_model(state.model))
    assert texts[0] == texts[1]


def shipped_models() -> list[str]:
    return sorted(glob.glob(os.path.join(_SHIPPED, "*", "*", "model.onnx")))


def test_models_shipped_with_onnx_keep_their_results():
    compared = 0
    for path in shipped_models():
        proto = onnx.load(path)
        folder = os.path.join(os.path.dirname(path), "test_data_set_0")
        feeds = {}
        for index, value in enumerate(proto.graph.input):
            file = os.path.join(folder, f"input_{index}.pb")
            if not value.type.HasField("tensor_type") or not os.path.exists(file):
                break
            feeds[value.name] = numpy_helper.to_array(onnx.load_tensor(file))
        try:
            reference = runner(proto.SerializeToString()).run(None, feeds)
            model = import_model(proto)
        except (ModelError, *_ENGINE_ERRORS):
            continue  # the engine has no kernel, or import refuses: nothing to compare
        Canonicalize().run(state_of(model))
        verify(model, Phase.FLOAT)
        results = runner(_bytes(model)).run(None, feeds)
        for x, y in zip(reference, results, strict=True):
            if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.size:
                scale = float(np.nanmax(np.abs(x), initial=0.0))
                np.testing.assert_allclose(y, x, rtol=0, atol=1e-3 * scale, err_msg=path)
            elif isinstance(x, np.ndarray):
                np.testing.assert_array_equal(y, x, err_msg=path)
        compared += 1
    assert compared >= 50


def _bytes(model) -> bytes:
    return ir.to_proto(model).SerializeToString()


_LEFT = {
    "efficientnet_lite0": {"Conv": 49, "Clip": 33, "Add": 9, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1},
    "vww_mobilenetv1": {
        "Conv": 27,
        "Relu": 27,
        "Transpose": 1,
        "AveragePool": 1,
        "Reshape": 1,
        "Gemm": 1,
        "Softmax": 1,
    },
}
_GONE = {
    "minilm_l6": {"Erf", "ConstantOfShape"},
    "vit_cifar10": {"Erf", "Pow", "Div", "Cast"},
    "stories260k": {"Where", "Equal", "ConstantOfShape"},
    "silero_vad": {"Constant", "Cast"},
}


@pytest.mark.models
@pytest.mark.parametrize("name", sorted({*_LEFT, *_GONE}))
def test_reference_model(name):
    path = _MODELS / name / "model.onnx"
    if not path.exists():
        pytest.skip(f"the reference model {name} is not beside the checkout")
    model = import_model(path)
    Canonicalize().run(state_of(model))
    verify(model, Phase.FLOAT)
    left = Counter(node.op_type for node in all_nodes(model))
    if name in _LEFT:
        assert left == _LEFT[name]
    assert not _GONE.get(name, set()) & set(left)
