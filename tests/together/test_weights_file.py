"""The one weights file: equal contents once, whatever their names, shapes and places in the graphs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import ModelError
from qcompiler.ir.reader import read_model
from qcompiler.weights_file import lay_out, write_together

W = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


def branches(name: str, shape: tuple[int, ...]) -> ir.Model:
    """Return y = choose ? x + W : x * W, each branch with a W of its own, of some shape."""
    value = helper.make_tensor_value_info
    bodies = {}
    for branch, op in (("then", "Add"), ("else", "Mul")):
        nodes = [
            helper.make_node("Reshape", [f"{name}_{branch}", f"rows_{branch}"], [f"w_{branch}"]),
            helper.make_node(op, ["x", f"w_{branch}"], [f"y_{branch}"]),
        ]
        held = [
            numpy_helper.from_array(W.reshape(shape), f"{name}_{branch}"),
            numpy_helper.from_array(np.array([16, 32]), f"rows_{branch}"),
        ]
        outputs = [value(f"y_{branch}", TensorProto.FLOAT, [16, 32])]
        bodies[f"{branch}_branch"] = helper.make_graph(nodes, branch, [], outputs, held)
    graph = helper.make_graph(
        [helper.make_node("If", ["choose"], ["y"], **bodies)],
        name,
        [value("choose", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, [16, 32])],
        [value("y", TensorProto.FLOAT, [16, 32])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return read_model(made)


def test_bodies_of_if_and_other_shapes_share_one_content(tmp_path: Path):
    models = {"a": branches("p", (16, 32)), "b": branches("q", (8, 64))}
    layout = lay_out(models)
    (stored,) = layout.stored.values()
    assert {graph: sorted(names) for graph, names in stored.uses.items()} == {
        "a": ["p_else", "p_then"],
        "b": ["q_else", "q_then"],
    }
    assert layout.nbytes == W.nbytes
    write_together(tmp_path / "out", layout, {"note.json": "{}"})
    assert (tmp_path / "out" / layout.name).read_bytes() == W.tobytes()
    x = np.ones((16, 32), np.float32)
    for name in models:
        path = tmp_path / "out" / f"{name}.onnx"
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"choose": np.array(True), "x": x})[0], x + W)
        np.testing.assert_array_equal(session.run(None, {"choose": np.array(False), "x": x})[0], x * W)


def test_the_models_are_not_changed_by_writing(tmp_path: Path):
    models = {"a": branches("p", (16, 32))}
    write_together(tmp_path / "out", lay_out(models), {})
    body = next(iter(models["a"].graph)).attributes["then_branch"].as_graph()
    held = body.initializers["p_then"].const_value
    assert not isinstance(held, ir.ExternalTensor)
    assert held is not None
    np.testing.assert_array_equal(held.numpy(), W)


def test_a_model_whose_weights_lie_in_files_is_read_into_the_one_file(tmp_path: Path):
    source = ir.to_proto(branches("p", (16, 32)))
    onnx.save(source, tmp_path / "given.onnx")
    model = read_model(tmp_path / "given.onnx")
    big = ir.ExternalTensor(
        "raw.bin", 0, W.nbytes, ir.DataType.FLOAT, shape=ir.Shape(W.shape), name="p_then", base_dir=tmp_path
    )
    (tmp_path / "raw.bin").write_bytes(W.tobytes())
    body = next(iter(model.graph)).attributes["then_branch"].as_graph()
    body.initializers["p_then"].const_value = big
    layout = lay_out({"a": model})
    assert [s.nbytes for s in layout.stored.values()] == [W.nbytes]
    write_together(tmp_path / "out", layout, {})
    assert (tmp_path / "out" / layout.name).read_bytes() == W.tobytes()


def test_equal_contents_have_equal_names_and_others_another():
    same = [lay_out({"a": branches("p", (16, 32))}).name, lay_out({"b": branches("q", (8, 64))}).name]
    other = branches("p", (16, 32))
    body = next(iter(other.graph)).attributes["then_branch"].as_graph()
    body.initializers["p_then"].const_value = ir.tensor(W + 1, name="p_then")
    assert same[0] == same[1] != lay_out({"a": other}).name


def shifted(name: str, by: float) -> ir.Model:
    """Return `branches` with other weights."""
    made = branches(name, (16, 32))
    for key in ("then", "else"):
        body = next(iter(made.graph)).attributes[f"{key}_branch"].as_graph()
        body.initializers[f"{name}_{key}"].const_value = ir.tensor(W + np.float32(by), name=f"{name}_{key}")
    return made


@pytest.mark.parametrize("stuck", ["a.onnx", "b.onnx", "decisions.json"])
def test_a_file_that_cannot_be_replaced_leaves_the_older_build_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str
):
    """As on Windows, where a session holds a file that it loaded."""
    folder = tmp_path / "out"
    write_together(folder, lay_out({"a": shifted("p", 1), "b": shifted("q", 2)}), {"decisions.json": "{}"})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == stuck and source.suffix == ".part":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    newer = lay_out({"a": shifted("p", 3), "b": shifted("q", 4)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(ModelError, match=r"cannot write to .*out: Permission denied"):
            write_together(folder, newer, {"decisions.json": '{"new": 1}'})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    x = np.zeros((16, 32), np.float32)
    for name, by in (("a", 1), ("b", 2)):
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"choose": np.array(True), "x": x})[0], W + np.float32(by))
    write_together(folder, newer, {})
    assert {p.name for p in folder.iterdir()} == {"a.onnx", "b.onnx", "decisions.json", newer.name}


def test_places_that_cannot_be_written_are_one_error(tmp_path: Path):
    layout = lay_out({"a": branches("p", (16, 32))})
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write to .*file: it is a file; several graphs go into a folder"):
        write_together(tmp_path / "file", layout, {})
    with pytest.raises(ModelError, match=r"cannot write to .*x/y: No such file or directory"):
        write_together(tmp_path / "x" / "y", layout, {})
    (tmp_path / "out" / "a.onnx").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"cannot write .*a.onnx: it is a folder"):
        write_together(tmp_path / "out", layout, {})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.onnx"]
