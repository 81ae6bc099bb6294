"""The reference engine: fused calls on true integers, and what it finds that running the body cannot."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.reference import Gap, ReferenceEngine, has_integer_truth, integer_gaps
from qcompiler.engine import Engine, EngineOptions
from qcompiler.errors import CalibrationError, ModelError
from qcompiler.ir.serialize import to_bytes
from tests.passes.quantize.lab import import_exactly, lab, model_of, normal

F = np.float32
W = {"w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "m": normal(4, 64, 32, scale=0.1), "mb": normal(5, 32)}
IMAGE = "float[n,4,8,8] x"


def fused(body: str = "c = Conv(x, w, b) y = Relu(c)", **forms: str):
    work = lab(model_of(IMAGE, "float[n,8,6,6] y", body, W))
    return work, work.fused(**(forms or {"Conv": "static"})).model


def test_it_is_an_engine():
    engine: Engine = ReferenceEngine()
    assert engine.name == "reference"
    assert engine.version.count(".") >= 1
    _, model = fused()
    runner = engine.load(model)
    assert [(i.name, i.dtype, i.shape) for i in runner.inputs] == [("x", np.dtype(F), ("n", 4, 8, 8))]
    assert [o.name for o in runner.outputs] == ["y"]


def test_a_model_comes_as_a_graph_as_bytes_or_as_a_file(tmp_path):
    work, model = fused()
    data = to_bytes(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    results = [ReferenceEngine().load(source).run(work.feeds[0])["y"] for source in (model, data, path, str(path))]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_the_outputs_asked_for_are_returned():
    model = import_exactly(model_of(IMAGE, IMAGE.replace(" x", " y") + ", " + IMAGE.replace(" x", " z"),
                                    "y = Exp(x) z = Tanh(x)"))  # fmt: skip
    feed = {"x": normal(1, 1, 4, 8, 8)}
    runner = ReferenceEngine().load(model)
    assert set(runner.run(feed)) == {"y", "z"}
    np.testing.assert_allclose(runner.run(feed, ["z"])["z"], np.tanh(feed["x"]), rtol=1e-6)


def test_it_rewrites_nothing_and_times_nothing():
    _, model = fused()
    again = ReferenceEngine().optimized_graph(model, EngineOptions())
    assert [n.name for n in again.graph] == [n.name for n in model.graph]
    with pytest.raises(ModelError, match="cannot profile"):
        ReferenceEngine().profile(model, {}, EngineOptions(), 1)


def test_what_it_cannot_load_or_run_is_one_clear_error():
    node = ir.node("Unheard", [ir.Value(name="x")], domain="com.example", name="n")
    node.outputs[0].name = "y"
    graph = ir.Graph(node.inputs, node.outputs, nodes=[node], opset_imports={"": 21, "com.example": 1}, name="g")
    with pytest.raises(ModelError, match="refuses the model"):
        ReferenceEngine().load(ir.Model(graph, ir_version=10))
    _, model = fused()
    with pytest.raises(CalibrationError, match="could not run"):
        ReferenceEngine().load(model).run({"x": np.zeros((1, 3, 8, 8), F)})


def test_dynamic_quantization_agrees_with_the_engine():
    x = normal(3, 5, 64) * 3 + 1
    model = import_exactly(
        model_of("float[n,64] x", "uint8[n,64] q, float s, uint8 z", "q, s, z = DynamicQuantizeLinear(x)")
    )
    first, second = (engine.load(model).run({"x": x}) for engine in (ReferenceEngine(), OrtEngine()))
    for name in ("q", "s", "z"):
        np.testing.assert_array_equal(first[name], second[name])


def test_the_integers_of_a_call_are_those_of_the_engine():
    work, model = fused()
    for value in model.graph.all_nodes():
        if value.op_type.startswith("QConv"):
            model.graph.outputs.append(value.outputs[0])
    feed = work.feeds[0]
    first, second = (e.load(model, EngineOptions(optimize=o)).run(feed) for e, o in ((ReferenceEngine(), False),
                                                                                     (OrtEngine(), True)))  # fmt: skip
    assert first["y:q"].dtype == second["y:q"].dtype == np.uint8
    np.testing.assert_array_equal(first["y:q"], second["y:q"])


def test_a_gap_is_reported_per_call_and_feed():
    work, model = fused("c = Conv(x, w, b) y = Add(c, c)", Conv="static", Add="static")
    gaps = integer_gaps(model, work.feeds[:2])
    assert [(g.call, g.kind) for g in gaps] == [("Conv_0", "Conv"), ("Add_1", "Add")] * 2
    assert all(isinstance(g, Gap) and g.steps <= 1 for g in gaps)


@pytest.mark.parametrize(("kind", "form"), [("Conv", "static"), ("Gemm", "static")])
def test_a_wrong_bias_scale_shows_as_a_gap_although_the_body_hides_it(kind, form):
    """ONNX Runtime adds the stored integers whatever their scale says; so does integer arithmetic."""
    if kind == "Conv":
        work, model = fused()
    else:
        work = lab(model_of("float[n,64] x", "float[n,32] y", "y = Gemm(x, m, mb)", W))
        model = work.fused(Gemm=form).model
    assert max(g.steps for g in integer_gaps(model, work.feeds)) <= 1
    for name, value in model.graph.initializers.items():
        if name.startswith(("b:scale", "mb:scale")):
            value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)
    gaps = integer_gaps(model, work.feeds)
    assert max(g.steps for g in gaps) > 5
    assert min(g.differing for g in gaps) > 0.3


def test_a_gemm_that_is_not_plain_runs_as_its_body_says():
    work = lab(model_of("float[n,64] x", "float[n,32] y", "y = Gemm(x, m, mb)", W))
    model = work.fused(Gemm="static").model
    (function,) = model.functions.values()
    assert has_integer_truth(function)
    (gemm,) = [n for n in function if n.op_type == "Gemm"]
    gemm.attributes["beta"] = ir.AttrFloat32("beta", 0.5)
    assert not has_integer_truth(function)
    assert integer_gaps(model, work.feeds) == ()


def test_a_loop_stacks_its_rows_and_needs_no_condition():
    body = """
    y, rows = Loop(k, , x) <body = b (int64 i, bool go, float[n,2] v) => (bool again, float[n,2] w, float[n,2] r)
      { again = Identity(go) w = Add(v, x) r = Neg(v) }>
    """
    model = import_exactly(model_of("int64 k, float[n,2] x", "float[n,2] y, float[t,n,2] rows", body))
    feed = {"k": np.asarray(3), "x": normal(1, 2, 2)}
    found, wanted = ReferenceEngine().load(model).run(feed), OrtEngine().load(model).run(feed)
    np.testing.assert_allclose(found["y"], 4 * feed["x"], rtol=1e-6)
    assert found["rows"].shape == (3, 2, 2)
    np.testing.assert_array_equal(found["rows"], wanted["rows"])


def test_a_loop_stops_at_its_condition():
    body = """
    y = Loop(k, c, x) <body = b (int64 i, bool go, float[2] v) => (bool again, float[2] w)
      { again = Less(i, last) w = Add(v, x) }>
    """
    given = model_of("int64 k, bool c, float[2] x", "float[2] y", body, {"last": np.asarray(1)})
    runner, x = ReferenceEngine().load(import_exactly(given)), normal(1, 2)
    for trips, start, count in ((9, True, 2), (1, True, 1), (9, False, 0)):
        made = runner.run({"k": np.asarray(trips), "c": np.asarray(start), "x": x})["y"]
        np.testing.assert_allclose(made, (1 + count) * x, rtol=1e-6)
