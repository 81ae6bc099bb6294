"""ONNX Runtime as an engine: loading, running, profiling, reading back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import Engine, EngineOptions
from qcompiler.errors import CalibrationError, ModelError
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.serialize import save_model, to_bytes
from tests.passes.quantize.lab import import_exactly, lab, model_of, normal, ops

F = np.float32
W = {"w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "big": normal(3, 64, 64)}
IMAGE, OUT = "float[n,4,8,8] x", "float[n,8,6,6] y"
ENGINE: Engine = OrtEngine()


def convolution():
    return import_exactly(model_of(IMAGE, OUT, "c = Conv(x, w, b) y = Relu(c)", W))


def test_what_a_caller_feeds_and_gets():
    runner = ENGINE.load(convolution())
    assert [(i.name, i.dtype, i.shape) for i in runner.inputs] == [("x", np.dtype(F), ("n", 4, 8, 8))]
    assert [(o.name, o.dtype, o.shape) for o in runner.outputs] == [("y", np.dtype(F), ("n", 8, 6, 6))]
    found = runner.run({"x": normal(4, 2, 4, 8, 8)})
    assert found["y"].shape == (2, 8, 6, 6)
    assert found["y"].min() == 0


@pytest.mark.parametrize("kind", ["bool", "int64", "int32", "uint8", "int8", "float16", "double"])
def test_element_types(kind):
    model = import_exactly(model_of(f"{kind}[2] x", f"{kind}[2] y", "y = Identity(x)"))
    runner = ENGINE.load(model)
    dtype = np.dtype({"double": "float64"}.get(kind, kind))
    assert runner.inputs[0].dtype == dtype
    feed = np.asarray([1, 0]).astype(dtype)
    np.testing.assert_array_equal(runner.run({"x": feed})["y"], feed)


def test_bfloat16_goes_in_and_out():
    model = import_exactly(model_of("bfloat16[3] x", "float[3] y", "y = Cast<to=1>(x)"))
    runner = ENGINE.load(model)
    assert runner.inputs[0].dtype == ml_dtypes.bfloat16
    feed = np.asarray([1.5, -2.0, 1e30], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(runner.run({"x": feed})["y"], feed.astype(F))


def test_a_model_comes_as_a_graph_as_bytes_or_as_a_file(tmp_path):
    model = convolution()
    path = tmp_path / "model.onnx"
    save_model(model, path, external="weights.bin")
    feed = {"x": normal(4, 2, 4, 8, 8)}
    results = [ENGINE.load(source).run(feed)["y"] for source in (model, to_bytes(model), path, str(path))]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_only_the_outputs_asked_for():
    model = import_exactly(model_of("float[2] x", "float[2] y, float[2] z", "y = Exp(x) z = Tanh(x)"))
    assert list(ENGINE.load(model).run({"x": np.zeros(2, F)}, ["z"])) == ["z"]


@pytest.mark.parametrize(
    "feed",
    [{"x": np.zeros((1, 3, 8, 8), F)}, {"x": np.zeros((1, 4, 8, 8), np.float64)}, {"v": np.zeros(1, F)}, {}],
    ids=["shape", "type", "name", "nothing"],
)
def test_a_feed_that_does_not_fit_is_a_calibration_error_of_one_line(feed):
    with pytest.raises(CalibrationError, match="could not run the model on this feed") as caught:
        ENGINE.load(convolution()).run(feed)
    assert "\n" not in str(caught.value)


def test_a_model_that_the_engine_refuses():
    with pytest.raises(ModelError, match=r"onnxruntime \d+\.\d+.* refuses the model") as caught:
        ENGINE.load(b"no model")
    assert "\n" not in str(caught.value)


def test_off_means_as_written_and_on_means_fused():
    model = convolution()
    assert ops(ENGINE.optimized_graph(model, EngineOptions(optimize=False))) == {"Conv": 1, "Relu": 1}
    assert "Relu" not in ops(ENGINE.optimized_graph(model, EngineOptions(optimize=True)))


def test_the_graph_is_left_as_it_was():
    model = convolution()
    before = to_bytes(model)
    ENGINE.optimized_graph(model, EngineOptions())
    ENGINE.profile(model, {"x": normal(4, 2, 4, 8, 8)}, EngineOptions(), 2)
    assert to_bytes(model) == before


def test_a_profile_names_each_node_once_and_adds_up():
    model = import_exactly(model_of("float[n,64] x", "float[n,64] y", "a = MatMul(x, big) y = MatMul(a, big)", W))
    profile = ENGINE.profile(model, {"x": normal(5, 256, 64)}, EngineOptions(optimize=False), 5)
    assert [(n.name, n.op_type) for n in profile.nodes] == [("MatMul_0", "MatMul"), ("MatMul_1", "MatMul")]
    assert profile.total == sum(n.microseconds for n in profile.nodes)
    assert all(n.microseconds >= 0 for n in profile.nodes)


def test_a_profile_looks_into_the_branch_that_runs():
    body = (
        "y = If(p) <then_branch = g1 () => (float[n,64] u) { u = MatMul(x, big) }, "
        "else_branch = g2 () => (float[n,64] v) { v = Exp(x) }>"
    )
    model = import_exactly(model_of("float[n,64] x, bool p", "float[n,64] y", body, W))
    feed = {"x": normal(5, 8, 64), "p": np.asarray(True)}
    profile = ENGINE.profile(model, feed, EngineOptions(optimize=False), 2)
    assert [n.op_type for n in profile.nodes] == ["MatMul"]


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = convolution()
    ENGINE.profile(model, {"x": normal(4, 1, 4, 8, 8)}, EngineOptions(), 1)
    ENGINE.optimized_graph(model, EngineOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_fused_graph_loads_and_its_integer_kernels_are_seen():
    work = lab(model_of(IMAGE, OUT, "c = Conv(x, w, b) y = Relu(c)", W))
    executed = ENGINE.optimized_graph(work.lowered(Conv="static").model, EngineOptions())
    assert ops(executed)["QLinearConv"] == 1
    assert any("Conv_0" in str(n.name) for n in all_nodes(executed))
