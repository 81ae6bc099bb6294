import importlib.util
import os
import stat
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from qcompiler.backends.readback import Planned
from qcompiler.backends.tensorrt import probe as probing
from qcompiler.backends.tensorrt.api import RTX, RTX_SMS, Flavour, find_flavours, import_flavour, version_tuple
from qcompiler.backends.tensorrt.build import build_plan
from qcompiler.backends.tensorrt.probe import Prober, describe_failure, probe, require_built
from qcompiler.backends.tensorrt.proof import prove_engine
from qcompiler.engine import ShapeRange
from qcompiler.errors import ModelError, TargetError
from tests.backends.tensorrt_models import Maker, half_quantized, two_convolutions

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT for RTX (extra trt-rtx)"
)
GONE = (Flavour("no_such_tensorrt", "", (80, 89)),)


@needs_rtx
def test_the_installed_flavour_is_found_without_importing_it() -> None:
    found = {flavour.name: flavour for flavour in find_flavours()}
    assert found[RTX].sms == RTX_SMS
    assert version_tuple(found[RTX].version) >= (1, 5)
    assert "tensorrt_rtx" not in sys.modules


def test_versions_are_compared_by_numbers() -> None:
    assert version_tuple("11.4.0.106") == (11, 4, 0, 106)
    assert version_tuple("1.10.0rc1") > version_tuple("1.9.2")
    assert version_tuple("unknown") == ()


def test_the_next_lower_target_stands_in() -> None:
    rtx = Flavour(RTX, "1.7", RTX_SMS)
    assert [rtx.nearest(sm) for sm in (70, 75, 87, 89, 90, 100, 121, 130)] == [0, 75, 86, 89, 89, 89, 121, 121]


def test_modules_that_are_missing_or_too_old_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.16.1'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(TargetError, match=r"tensorrt is version 10\.16\.1, expected 11\.0 or newer"):
        import_flavour(["tensorrt"])
    sys.modules.pop("tensorrt", None)
    with pytest.raises(TargetError, match="no_such_module does not import: No module named"):
        import_flavour(["no_such_module"])


def test_nothing_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"pip install 'qcompiler\[trt-rtx\]'"):
        Prober().probe(b"", [89])


@needs_rtx
def test_an_engine_is_built_for_each_target_with_int8_convolutions() -> None:
    found = Prober().probe(two_convolutions().SerializeToString(), [80, 89])
    for sm, report in found.items():
        assert (report.built, report.sm, report.flavour, report.notes) == (True, sm, RTX, ())
        convolutions = [layer for layer in report.layers if layer.kind == "correlation"]
        assert [layer.origins[0] for layer in convolutions] == ["conv1", "conv2"]
        assert all(layer.inputs[0].element == layer.constants[0].element == "Int8" for layer in convolutions)


@needs_rtx
def test_a_target_that_is_not_there_is_built_for_the_next_lower_one() -> None:
    model = two_convolutions().SerializeToString()
    found = Prober().probe(model, [90, 70])
    assert found[90].sm == 89
    assert found[90].notes == ("tensorrt_rtx has no target sm90; this is from sm89",)
    assert [issue.code for issue in found[70].issues] == ["TARGET"]
    with pytest.raises(TargetError, match="does not build for sm70 here; it builds for sm75"):
        require_built(found[70])


@needs_rtx
def test_open_axes_get_a_profile_that_is_reported() -> None:
    model = two_convolutions("n").SerializeToString()
    report = probe(model, 89)
    assert report.built
    assert report.profiles == {"x": ShapeRange((1, 8, 16, 16), (1, 8, 16, 16), (8, 8, 16, 16))}
    assert report.notes[0].startswith("x was built for the shapes 1x8x16x16..8x8x16x16")
    given = {"x": ShapeRange((2, 8, 16, 16), (2, 8, 16, 16), (4, 8, 16, 16))}
    assert probe(model, 89, given).profiles == given


@needs_rtx
def test_a_model_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prober, model, asked = Prober(), two_convolutions().SerializeToString(), []
    run = probing._run

    def counted(*arguments: object) -> object:
        asked.append(arguments[2])
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(probing, "_run", counted)
    first = prober.probe(model, [89])
    assert prober.probe(model, [89, 90]) == {89: first[89], 90: prober.probe(model, [90])[90]}
    assert asked == [[89]]


@needs_rtx
def test_what_the_parser_refuses_is_named_by_its_node() -> None:
    model = two_convolutions()
    for node in model.graph.node:
        if node.name == "second/QuantizeLinear":
            node.metadata_props.add(key="qcompiler.origin", value="/relu;/conv")
    for tensor in model.graph.initializer:
        if tensor.name == "second:z":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.int8), tensor.name))
    report = probe(model.SerializeToString(), 89)
    issue = report.issues[0]
    assert not report.built
    assert (issue.node, issue.operator, issue.origin) == ("second/QuantizeLinear", "QuantizeLinear", ("/relu", "/conv"))
    with pytest.raises(ModelError, match=r"does not build the model for sm89: \w+ at QuantizeLinear 'second/"):
        require_built(report)


@needs_rtx
def test_what_the_builder_refuses_is_named_by_its_node() -> None:
    maker = Maker()
    maker.constant("w", np.ones((8, 8), np.float32))
    report = probe(maker.proto({"x": [4, 8]}, maker.op("MatMul", ["x", "w"], "mm")).SerializeToString(), 75)
    assert (report.issues[0].code, report.issues[0].node) == ("BUILD", "mm")
    assert "FP32 GEMM is not supported" in report.issues[0].text


@needs_rtx
@pytest.mark.parametrize(("model", "code"), [(b"", "EMPTY"), (b"garbage", "MODEL_DESERIALIZE_FAILED")])
def test_what_is_no_model_is_refused(model: bytes, code: str) -> None:
    assert [issue.code for issue in probe(model, 89).issues] == [code]


@needs_rtx
def test_weights_beside_the_model_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(two_convolutions(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    prober = Prober()
    assert prober.probe(path, [89])[89].built
    (tmp_path / "w.bin").unlink()
    report = prober.probe(path, [89])[89]
    assert not report.built  # the digest covers the file beside it


def _python(tmp_path: Path, body: str) -> str:
    """Return a stand-in for the interpreter that the worker is started with."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("kill -SEGV $$", "DIED", "tensorrt ended its process by SIGSEGV"),
        ("echo 'terminate called' >&2; kill -ABRT $$", "DIED", "by SIGABRT: terminate called"),
        ("exit 7", "DIED", "tensorrt ended its process with status 7"),
        ("exec sleep 30", "TIMEOUT", "tensorrt was still building after 0.2 s, and was ended"),
    ],
)
def test_a_worker_that_ends_badly_is_an_issue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, code: str, text: str
) -> None:
    monkeypatch.setattr(sys, "executable", _python(tmp_path, body))
    found = Prober(flavours=GONE, timeout=0.2 if code == "TIMEOUT" else 60.0).probe(b"", [80, 89])
    for sm in (80, 89):
        assert [issue.code for issue in found[sm].issues] == [code]
        assert text in found[sm].issues[0].text
        assert f"for sm{sm}: {code}" in describe_failure(found[sm])


@needs_rtx
def test_one_target_that_kills_the_worker_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, once = sys.executable, tmp_path / "once"
    body = f'if [ ! -e {once} ]; then touch {once}; kill -SEGV $$; fi\nexec {real} "$@"'
    monkeypatch.setattr(sys, "executable", _python(tmp_path, body))
    found = Prober().probe(two_convolutions().SerializeToString(), [80, 89])
    assert [issue.code for issue in found[80].issues] == ["DIED"]
    assert found[89].built


def test_a_flavour_that_does_not_load_is_an_issue_of_the_target() -> None:
    report = Prober(flavours=GONE).probe(b"", [89])[89]
    assert [issue.code for issue in report.issues] == ["LOAD"]
    with pytest.raises(TargetError, match="no_such_tensorrt does not import"):
        require_built(report)


def _planned(*names: str, kind: str = "MatMul") -> list[Planned]:
    return [Planned(name, kind, (), (f"{name}:out",)) for name in names]


@needs_rtx
def test_planned_products_are_matched_with_layers() -> None:
    model = half_quantized()
    report = probe(model.SerializeToString(), 89)
    proof = prove_engine(_planned("both", "weight", "along_k", "gone"), report, ir.from_proto(model))
    assert proof.planned == 4
    assert proof.fused["both"] == "Int8 x Int8 gemm"
    assert proof.fused["weight"].startswith("Float x Int8 decoded in runtime_fusion")
    assert {miss.group: miss.reason for miss in proof.missed} == {
        "along_k": "engine-decoded-both",
        "gone": "engine-renamed",
    }
    assert proof.note.startswith("tensorrt_rtx 1.")
    assert proof.note.endswith("sm89")


@needs_rtx
def test_a_product_left_in_float_is_a_miss_that_says_how_it_ran() -> None:
    maker = Maker()
    maker.constant("w", np.ones((64, 64), np.float32))
    model = maker.proto({"x": [4, 64]}, maker.op("MatMul", ["x", "w"], "mm"))
    proof = prove_engine(_planned("mm"), probe(model.SerializeToString(), 89), ir.from_proto(model))
    (miss,) = proof.missed
    assert (miss.reason, miss.text) == ("engine-kept-float", "ran as Float x Float gemm")


@needs_rtx
def test_movers_may_vanish_and_pools_stay_on_integers() -> None:
    maker = Maker()
    y = maker.pair(maker.conv(maker.pair("x", "first"), "conv1"), "second")
    y = maker.pair(maker.op("MaxPool", [y], "pool", kernel_shape=[2, 2], strides=[2, 2]), "third")
    y = maker.pair(maker.op("Transpose", [y], "swap", perm=[0, 1, 3, 2]), "fourth")
    y = maker.pair(maker.op("GlobalAveragePool", [maker.conv(y, "conv2")], "mean"), "fifth")
    model = maker.proto({"x": [1, 8, 16, 16]}, y)
    report = probe(model.SerializeToString(), 89)
    planned = [Planned(name, kind, (), ()) for name, kind in (("pool", "MaxPool"), ("swap", "Transpose"))]
    proof = prove_engine([*planned, *_planned("conv1", "conv2", kind="Conv")], report, ir.from_proto(model))
    assert proof.missed == ()
    assert proof.fused["pool"] == "maxpool Int8 -> Int8"
    assert proof.fused["conv1"] == proof.fused["conv2"] == "Int8 x Int8 correlation"


@needs_rtx
def test_nothing_is_proven_of_a_model_that_is_refused() -> None:
    proof = prove_engine(_planned("mm"), probe(b"garbage", 89), ir.from_proto(half_quantized()))
    assert (proof.planned, proof.fused, [m.reason for m in proof.missed]) == (1, {}, ["engine-refused"])


@needs_rtx
def test_an_engine_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.plan"
    report = build_plan(two_convolutions().SerializeToString(), 89, None, path)
    assert report.plan is not None
    assert path.read_bytes() == report.plan
    assert len(report.plan) > 1000
    with pytest.raises(ModelError, match="does not build the model for sm89"):
        build_plan(b"garbage", 89, None, path)
    assert path.read_bytes() == report.plan
    with pytest.raises(TargetError, match="does not build for sm90 here"):
        build_plan(two_convolutions().SerializeToString(), 90, None, path)
    with pytest.raises(ModelError, match="cannot write"):
        build_plan(two_convolutions().SerializeToString(), 89, None, tmp_path / "none" / "m.plan")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.plan"]


@needs_rtx
def test_an_input_that_holds_a_shape_is_profiled_by_its_values() -> None:
    reshape = helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")
    graph = helper.make_graph(
        [reshape], "graph",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 6]),
            helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    given = model.SerializeToString()
    shapes = {"shape": ShapeRange((1, 1), (4, 6), (24, 24))}
    assert Prober().probe(given, [89], shapes, values=["shape"])[89].built
    shapes = {"shape": ShapeRange((1, 24), (4, 6), (24, 24))}
    (issue,) = Prober().probe(given, [89], shapes, values=["shape"])[89].issues
    assert (issue.code, issue.text) == ("API", "opt input provided for shape tensor is inconsistent with other inputs.")
