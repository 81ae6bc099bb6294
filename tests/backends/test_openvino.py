"""OpenVINO behind the engine's interface: numbers, names, refusals, what it executes, and the proof from that."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompiler
from qcompiler.backends.catalog import engine_backend, engine_of
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.openvino import OvEngine, holds, save_openvino
from qcompiler.backends.openvino_proof import prove_layers
from qcompiler.backends.readback import Planned, planned_fusions
from qcompiler.calibration.statistics import Statistics
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Array, EngineOptions
from qcompiler.errors import CalibrationError, ModelError, TargetError
from qcompiler.ir.importer import import_model
from qcompiler.search.attribution import Owners, attribute
from qcompiler.search.timing import EngineStopwatch
from qcompiler.targets.groups import find_groups
from qcompiler.targets.target import load_target
from tests import synthetic
from tests.families import masked
from tests.passes.quantize.lab import import_exactly, model_of, normal
from tests.synthetic import feeds_of

pytest.importorskip("openvino")

ONE = EngineOptions(threads=1)
EXACT = OvEngine(precision="f32")
F = np.float32


def distance(wanted: Array, actual: Array) -> float:
    """Return the largest difference over the largest value."""
    return float(np.abs(wanted.astype(np.float64) - actual).max() / np.abs(wanted).max())


def compiled(proto: onnx.ModelProto, feeds: Any, **more: Any) -> CompiledModel:
    return qcompiler.compile(proto, target="openvino", recipe="int8-static", calibration=feeds, guard=False, **more)


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (synthetic.residual_cnn, {"x": (3, 3, 16, 16)}),
        (synthetic.regions_cnn, {"x": (1, 8, 32, 32)}),
    ],
    ids=["residual", "regions"],
)
def test_float_models_give_onnx_runtimes_numbers(make: Any, shapes: Any) -> None:
    proto = make()
    ov, ort = EXACT.load(proto.SerializeToString(), ONE), OrtEngine().load(proto.SerializeToString(), ONE)
    for feed in feeds_of(shapes, 2):
        wanted, actual = ort.run(feed), ov.run(feed)
        assert list(actual) == list(wanted)
        for name in wanted:
            assert actual[name].dtype == wanted[name].dtype
            assert distance(wanted[name], actual[name]) < 1e-5  # some hundred float32 roundings of 6e-8


def test_an_open_batch_takes_every_length() -> None:
    proto = synthetic.residual_cnn("n").SerializeToString()
    ov, ort = EXACT.load(proto, ONE), OrtEngine().load(proto, ONE)
    assert ov.inputs[0].shape == (None, 3, 16, 16)
    for count in (1, 4, 2):
        (feed,) = feeds_of({"x": (count, 3, 16, 16)}, 1, seed=count)
        actual = ov.run(feed)["logits"]
        assert actual.shape == (count, 10)
        assert distance(ort.run(feed)["logits"], actual) < 1e-5


def test_results_are_copies_that_the_next_run_leaves_alone() -> None:
    runner = EXACT.load(model_of("float[n] x", "float[n] y", "y = Neg(x)").SerializeToString(), ONE)
    first = runner.run({"x": np.ones(3, F)})["y"]
    runner.run({"x": np.full(3, 5, F)})
    assert first.tolist() == [-1, -1, -1]


def test_integers_booleans_and_scalars_come_and_go() -> None:
    body = "a = Add(i, i) c = Cast<to=1>(b) d = Add(c, s) n = Not(b)"
    proto = model_of("int64[n] i, bool[n] b, float s", "int64[n] a, float[n] d, bool[n] n", body)
    runner = EXACT.load(proto.SerializeToString(), ONE)
    assert [(i.name, i.dtype.name) for i in runner.inputs] == [("i", "int64"), ("b", "bool"), ("s", "float32")]
    # A slice is not contiguous: the engine would read past its gaps.
    given = np.arange(6, dtype=np.int64)[::2]
    made = runner.run({"i": given, "b": np.asarray([True, False, True]), "s": np.asarray(0.5, F)})
    assert made["a"].tolist() == [0, 4, 8]
    assert made["d"].tolist() == [1.5, 0.5, 1.5]
    assert made["n"].tolist() == [False, True, False]
    assert made["n"].dtype == np.bool_


def test_bfloat16_comes_and_goes() -> None:
    runner = EXACT.load(model_of("bfloat16[n,3] x", "bfloat16[n,3] y", "y = Neg(x)").SerializeToString(), ONE)
    assert [i.dtype.name for i in (*runner.inputs, *runner.outputs)] == ["bfloat16", "bfloat16"]
    given = np.asarray([[1, -2.5, 3], [1e30, 0.25, -7]]).astype(runner.inputs[0].dtype)
    made = runner.run({"x": given})["y"]
    assert made.dtype == given.dtype
    assert made.tolist() == (-given).tolist()


def test_outputs_carry_the_models_names_in_its_order() -> None:
    # Identity makes one tensor of several outputs: OpenVINO then knows it by all their names at once.
    proto = model_of("float[n] x", "float[n] z, float[n] a, float[n] k", "a = Neg(x) z = Identity(a) k = Identity(a)")
    runner = EXACT.load(proto.SerializeToString(), ONE)
    assert [o.name for o in runner.outputs] == ["z", "a", "k"]
    made = runner.run({"x": np.asarray([1, -2], F)})
    assert {name: a.tolist() for name, a in made.items()} == {key: [-1.0, 2.0] for key in ("z", "a", "k")}
    assert list(runner.run({"x": np.zeros(1, F)}, ["k"])) == ["k"]


def test_two_loads_of_one_model_run_one_after_the_other(tmp_path: Path) -> None:
    # Also from a path, and after the first runner is gone.
    path = tmp_path / "m.onnx"
    onnx.save(synthetic.residual_cnn("n"), path)
    (feed,) = feeds_of({"x": (2, 3, 16, 16)}, 1)
    first = EXACT.load(path, ONE).run(feed)["logits"]
    assert np.array_equal(EXACT.load(str(path), ONE).run(feed)["logits"], first)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_model_with_an_unknown_operator_is_refused_by_its_name() -> None:
    proto = model_of("float[n] x", "float[n] y", "y = com.acme.Frobnicate(x)")
    proto.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    with pytest.raises(ModelError) as caught:
        EXACT.load(proto.SerializeToString(), ONE)
    text = str(caught.value)
    assert text.startswith(f"openvino {EXACT.version} refuses the model: ")
    assert "Frobnicate" in text
    assert "\n" not in text


def test_a_refusal_names_the_reason_and_the_node() -> None:
    # Branches of different ranks leave a tensor of unknown rank.
    body = (
        "r = If(p) <then_branch = g1 () => (float[] u) { u = Identity(x) }, "
        "else_branch = g2 () => (float[] v) { v = Squeeze(x) }> [c] z = Conv(r, w)"
    )
    proto = model_of("float[1,4,8,8] x, bool p", "float[] z", body, {"w": normal(1, 8, 4, 3, 3)})
    with pytest.raises(ModelError, match=r"rank has to be known \(static\) \(at the Conv c\)$"):
        EXACT.load(proto.SerializeToString(), ONE)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"no model at all")
    for source in (path, tmp_path / "absent.onnx", tmp_path / "absent.xml"):
        with pytest.raises(ModelError, match=r"^openvino [\d.]+ (refuses|cannot read) the model: "):
            EXACT.load(source, ONE)


def test_a_feed_that_does_not_fit_is_told() -> None:
    runner = EXACT.load(synthetic.residual_cnn("n").SerializeToString(), ONE)
    with pytest.raises(CalibrationError, match="openvino could not run the model on this feed: "):
        runner.run({"x": np.zeros((1, 4, 16, 16), F)})
    with pytest.raises(CalibrationError, match="openvino could not run the model on this feed: "):
        runner.run({"nonsense": np.zeros((1, 3, 16, 16), F)})


CNN = synthetic.residual_cnn
CNN_FEEDS = feeds_of({"x": (2, 3, 16, 16)}, 4)


def _without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    find, load = importlib.util.find_spec, importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "openvino":
            raise ImportError(name)
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "openvino" else find(name))


def test_without_the_package_what_needs_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _without_openvino(monkeypatch)
    made = qcompiler.compile(synthetic.residual_cnn(), target="openvino", calibration=CNN_FEEDS)
    for call in (
        lambda: engine_backend("openvino"),
        lambda: save_openvino(import_model(synthetic.residual_cnn()), tmp_path / "x.xml"),
        lambda: made.save(tmp_path / "x.xml"),
    ):
        with pytest.raises(TargetError, match=r'pip install "qcompiler\[openvino\]"'):
            call()
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_target_is_lowered_and_checked_on_onnx_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _without_openvino(monkeypatch)
    made = qcompiler.compile(synthetic.residual_cnn(), target="openvino", calibration=CNN_FEEDS)
    assert made.report.proof.planned >= 3
    assert made.report.proof.note == 'OpenVINO is not installed: pip install "qcompiler[openvino]"'
    assert made.report.speedup is None
    assert made.report.quality is not None
    assert made.report.quality.worst > 20.0
    assert any("has no engine on this machine" in w for w in made.report.warnings)
    (path, record) = made.save(tmp_path / "x.onnx").files
    assert (path.name, record.name) == ("x.onnx", "x.decisions.json")
    assert engine_of(path) == "openvino"


# ---- what it executes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cnn() -> CompiledModel:
    return compiled(CNN(), CNN_FEEDS)


def test_every_planned_group_of_a_convolutional_net_is_an_integer_layer(cnn: CompiledModel) -> None:
    report = cnn.report
    assert report.proof.missed == ()
    assert report.proof.planned == len(report.proof.fused) >= 5
    for name in ("/stem/Conv", "/block/Conv1", "/block/Conv2"):
        kind, kernel = report.proof.fused[name].split()
        assert kind == "Convolution"
        assert kernel.lower().endswith("_i8")
    assert report.quality is not None
    assert report.quality.worst > 25


def test_matmuls_are_integer_layers_whatever_openvino_names_them() -> None:
    body = "a = MatMul(x, w) b = Add(a, c) g = Gelu(b) y = MatMul(g, v)"
    weights = {"w": normal(1, 64, 128, scale=0.1), "c": normal(2, 128), "v": normal(3, 128, 32, scale=0.1)}
    for low, stored in ((-3.0, "int8"), (0.0, "uint8")):  # signed numbers without zero point, and unsigned ones
        rng = np.random.default_rng(1)
        feeds = [{"x": rng.uniform(low, 3.0, (8, 64)).astype(F)} for _ in range(4)]
        made = compiled(model_of("float[n,64] x", "float[n,32] y", body, weights), feeds)
        first = next(n for n in made.model.graph if n.op_type == "QuantizeLinear")
        assert first.outputs[0].dtype is not None
        assert first.outputs[0].dtype.name.lower() == stored
        assert made.report.proof.missed == ()
        assert {k.split()[0] for k in made.report.proof.fused.values()} == {"FullyConnected"}


def test_a_product_in_front_of_a_residual_sum_is_found_by_its_weight() -> None:
    # Its scale goes into the sum then, and its name with it.
    made = compiled(synthetic.transformer_block(), masked())
    assert made.report.proof.missed == ()
    assert made.report.proof.fused["/mlp/down"].startswith("FullyConnected ")


def test_a_layer_that_only_stores_its_weight_as_integers_is_a_miss() -> None:
    body = "w = DequantizeLinear(q, s, z) [fc] y = MatMul(x, w)"
    weights = {
        "q": np.random.default_rng(0).integers(-127, 127, (256, 256)).astype(np.int8),
        "s": np.asarray(0.01, F),
        "z": np.asarray(0, np.int8),
    }
    for shape in ("n,256", "8,256"):
        proto = model_of(f"float[{shape}] x", "float[] y", body, weights)
        for engine in (EXACT, OvEngine()):
            executed = engine.load(proto.SerializeToString(), ONE).executed()
            (miss,) = prove_layers([Planned("fc", "MatMul", (), ("y",))], executed).missed
            assert (miss.group, miss.reason) == ("fc", "engine-kept-float")
            assert miss.text.startswith("the engine executes FullyConnected as ")
            assert miss.text.endswith(("f32", "bf16"))


def test_a_group_that_stays_float_is_a_miss_with_its_kernel() -> None:
    # A zero point in the weights keeps a convolution in float.
    weights = {
        "s": np.asarray(0.02, F), "z": np.asarray(128, np.uint8), "ws": np.asarray(0.01, F),
        "wz": np.asarray(100, np.uint8), "w": np.random.default_rng(0).integers(0, 255, (8, 4, 3, 3)).astype(np.uint8),
    }  # fmt: skip
    body = (
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) f = DequantizeLinear(w, ws, wz) [c] y = Conv(d, f)"
    )
    proto = model_of("float[2,4,8,8] x", "float[] y", body, weights)
    (miss,) = prove_layers(
        [Planned("c", "Conv", (), ("y",))], EXACT.load(proto.SerializeToString(), ONE).executed()
    ).missed
    assert (miss.reason, miss.kind) == ("engine-kept-float", "Conv")
    assert miss.text.startswith("the engine executes Convolution as ")
    assert miss.text.endswith("_f32")


def test_a_group_whose_name_is_gone_is_a_miss() -> None:
    executed = EXACT.load(CNN().SerializeToString(), ONE).executed()
    (miss,) = prove_layers([Planned("elsewhere", "Conv", (), ())], executed).missed
    assert miss.reason == "engine-renamed"
    assert prove_layers([Planned("elsewhere", "Reshape", (), ())], executed).fused == {"elsewhere": "moved away"}


def test_names_with_commas_and_with_what_openvino_appends_are_found() -> None:
    (node,) = import_exactly(model_of("float[n] x", "float[n] y", "y = Neg(x)")).graph
    node.name = "e/WithoutBiases/DequantizationMultiply"
    node.metadata_props["originals"] = "a/DequantizationMultiply,b,c/WithoutBiases,d_original"
    for name in ("a", "b,c", "d", "e"):
        assert holds(node, name), name
        assert holds(node, "other", name), name
    for name in ("b,c/Without", "f", "original", ""):
        assert not holds(node, name), name


def test_time_is_attributed_to_groups_by_the_layers_that_hold_them() -> None:
    proto = synthetic.residual_cnn(2)
    model = import_model(proto)
    groups = find_groups(model, load_target("openvino"))
    profile, executed = EngineStopwatch(OvEngine(), CNN_FEEDS[0], ONE, rounds=2).profile(model)
    assert profile.executed is executed  # names of one and the same load
    assert {n.name for n in profile.nodes} <= {n.name for n in executed.graph}
    costs = attribute(profile, executed, Owners.of(model, groups))
    assert abs(costs.total - profile.total) < 1e-6 * profile.total
    assert costs.groups["/block/Conv1"] > 0
    assert sum(costs.groups.values()) > 0.8 * profile.total


def test_counters_of_a_run_are_whole_microseconds_of_named_layers() -> None:
    profile = OvEngine().profile(CNN().SerializeToString(), CNN_FEEDS[0], ONE, 3)
    assert profile.total > 0
    assert all(n.microseconds >= 1 for n in profile.nodes)
    assert any("/block/Conv1" in n.name for n in profile.nodes)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_saved_onnx_and_a_saved_xml_give_the_same_numbers(cnn: CompiledModel, tmp_path: Path) -> None:
    wanted = cnn_run(cnn, "logits")
    for name in ("m.onnx", "m.xml"):
        cnn.save(tmp_path / name)
        assert engine_of(tmp_path / name) == "openvino"
        runner = qcompiler.load(tmp_path / name, threads=1)
        assert [o.name for o in runner.outputs] == ["logits"]
        assert np.array_equal(runner.run(CNN_FEEDS[0])["logits"], wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.decisions.json", "m.onnx", "m.xml"]
    model = onnx.load(tmp_path / "m.onnx")
    assert {p.key: p.value for p in model.metadata_props}["qcompiler.engine"] == "openvino"


def cnn_run(made: CompiledModel, name: str) -> Array:
    return OvEngine().load(made.model, ONE).run(CNN_FEEDS[0])[name]


def test_the_session_is_openvinos_own_object(cnn: CompiledModel) -> None:
    session = cnn.session(1)
    assert type(session).__name__ == "CompiledModel"
    assert [port.any_name for port in session.inputs] == ["x"]


def test_an_xml_of_a_model_for_another_engine_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    made = qcompiler.compile(CNN(), calibration=CNN_FEEDS, guard=False)
    with pytest.raises(TargetError, match=r"asks for openvino.s own form, but the model was compiled for onnxruntime"):
        made.save(tmp_path / "m.xml")
    assert list(tmp_path.iterdir()) == []


def test_an_xml_that_cannot_be_written_is_refused_and_leaves_nothing(cnn: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "m.xml").mkdir()
    with pytest.raises(ModelError, match="cannot write "):
        cnn.save(tmp_path / "m.xml")
    assert [p.name for p in tmp_path.iterdir()] == ["m.xml"]


def test_a_model_that_does_not_say_is_onnx_runtimes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(CNN(), path)
    assert engine_of(path) == "onnxruntime"
    path.write_bytes(b"nonsense")
    assert engine_of(path) == "onnxruntime"


def test_the_form_of_operators_is_refused() -> None:
    with pytest.raises(TargetError, match="OpenVINO reads Q/DQ only; leave --emit away"):
        compiled(CNN(), CNN_FEEDS, emit="qoperator")


def test_planned_is_what_was_handed_over(cnn: CompiledModel) -> None:
    assert cnn.engine == "openvino"
    assert cnn.report.context["engine"] == f"openvino {OvEngine().version}"
    assert not any(n.domain for n in cnn.model.graph)  # standard operators only
    assert planned_fusions(cnn.model) == ()


def test_statistics_serve_openvino_and_onnx_runtime_alike() -> None:
    found = qcompiler.calibrate(CNN(), CNN_FEEDS)
    assert isinstance(found, Statistics)
    made = qcompiler.compile(CNN(), target="openvino", recipe="int8-static", calibration=found, guard=False)
    direct = compiled(CNN(), CNN_FEEDS)
    assert made.report.groups == direct.report.groups


def test_a_model_that_cannot_be_replaced_keeps_its_old_weights(
    cnn: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights have their name already when the .xml fails."""
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_bytes(b"old")
    real = os.replace

    def held(source: Path, target: Path) -> None:
        if target.name == "m.xml":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", held)
    with pytest.raises(ModelError, match=r"cannot write .*m\.xml: Permission denied"):
        cnn.save(tmp_path / "m.xml")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.xml": b"old", "m.bin": b"old"}
