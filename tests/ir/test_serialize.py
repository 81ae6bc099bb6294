from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser

from qcompiler.errors import ModelError
from qcompiler.ir import serialize
from qcompiler.ir.importer import import_model
from qcompiler.ir.serialize import save_model, to_bytes, weight_bytes

NUMBERS = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)


def model() -> ir.Model:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N,32] x) => (float[N,32] y) <float b = {0.5}>
        { [m] h = MatMul(x, w) [a] y = Add(h, b) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(NUMBERS, "w"))
    return import_model(proto)


def run(path: str | bytes) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options).run(None, {"x": np.eye(32, dtype=np.float32)})[0]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_inline_and_external_files_hold_the_same_model(tmp_path: Path) -> None:
    save_model(model(), tmp_path / "a.onnx")
    save_model(model(), tmp_path / "b.onnx", external="b.weights")
    assert names(tmp_path) == ["a.onnx", "b.onnx", "b.weights"]
    assert (tmp_path / "b.weights").stat().st_size == weight_bytes(model()) - 4 == 4096
    assert (tmp_path / "b.onnx").stat().st_size < 4096
    expected = NUMBERS + np.float32(0.5)
    for name in ("a.onnx", "b.onnx"):
        np.testing.assert_array_equal(run(str(tmp_path / name)), expected)
    assert to_bytes(import_model(tmp_path / "b.onnx")) == (tmp_path / "a.onnx").read_bytes()
    assert oct((tmp_path / "a.onnx").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for index in range(2):
        folder = tmp_path / str(index)
        folder.mkdir()
        save_model(model(), folder / "m.onnx", external="m.data")
    assert (tmp_path / "0/m.onnx").read_bytes() == (tmp_path / "1/m.onnx").read_bytes()
    assert (tmp_path / "0/m.data").read_bytes() == (tmp_path / "1/m.data").read_bytes()
    assert to_bytes(model()) == to_bytes(model())


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    given = model()
    tensor = given.graph.initializers["w"].const_value
    save_model(given, tmp_path / "m.onnx", external="m.data")
    assert given.graph.initializers["w"].const_value is tensor


def test_strip_removes_what_the_compiler_added() -> None:
    given = model()
    given.metadata_props["qcompiler.opset"] = "kept"
    given.metadata_props["author"] = "a"
    assert b"qcompiler" in to_bytes(given)
    stripped = onnx.load_model_from_string(to_bytes(given, strip=True))
    assert b"qcompiler" not in stripped.SerializeToString()
    assert [(p.key, p.value) for p in stripped.metadata_props] == [("author", "a")]
    assert given.graph[0].metadata_props


def test_large_weights_go_outside_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialize, "MAX_INLINE_BYTES", 4000)
    save_model(model(), tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    with pytest.raises(ModelError, match="4100 bytes of weights"):
        to_bytes(model())


def test_a_model_can_replace_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    save_model(model(), tmp_path / "m.onnx", external="m.data")
    loaded = import_model(tmp_path / "m.onnx")
    loaded.graph.register_initializer(
        ir.Value(name="c", const_value=ir.Tensor(np.zeros(1024, np.float32), name="c"), shape=ir.Shape([1024]))
    )
    save_model(loaded, tmp_path / "m.onnx", external="m.data")
    np.testing.assert_array_equal(run(str(tmp_path / "m.onnx")), NUMBERS + np.float32(0.5))
    np.testing.assert_array_equal(run(to_bytes(loaded)), NUMBERS + np.float32(0.5))


@pytest.mark.parametrize("external", [None, "m.data"])
def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: str | None) -> None:
    for name in ("m.onnx", "m.data"):
        (tmp_path / name).write_bytes(b"old")

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ModelError, match=r"cannot write .*m\.onnx: no space left on device"):
        save_model(model(), tmp_path / "m.onnx", external=external)
    assert names(tmp_path) == ["m.data", "m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == (tmp_path / "m.data").read_bytes() == b"old"


def test_a_model_that_cannot_be_replaced_keeps_its_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights have their name already when the model fails."""
    for name in ("m.onnx", "m.data"):
        (tmp_path / name).write_bytes(b"old")
    real = os.replace

    def held(source: Path, target: Path) -> None:
        if target.name == "m.onnx":
            raise PermissionError(errno.EACCES, "permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", held)
    with pytest.raises(ModelError, match=r"cannot write .*m\.onnx: permission denied"):
        save_model(model(), tmp_path / "m.onnx", external="m.data")
    assert names(tmp_path) == ["m.data", "m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == (tmp_path / "m.data").read_bytes() == b"old"


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot write .*nowhere/m\.onnx: No such file"):
        save_model(model(), tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(ModelError, match="it is a folder"):
        save_model(model(), tmp_path)
    for wrong in ("../w", "a/b", "", "m.onnx"):
        with pytest.raises(ModelError, match="external data"):
            save_model(model(), tmp_path / "m.onnx", external=wrong)
    assert names(tmp_path) == []
