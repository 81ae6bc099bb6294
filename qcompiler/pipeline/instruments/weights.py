"""One weights file that several models share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
from onnx_ir import serde

from qcompiler.errors import ModelError
from qcompiler.ir.graph import all_graphs
from qcompiler.ir.serialize import EXTERNAL_THRESHOLD
from qcompiler.plugins import plugin_versions

WEIGHTS_FILE = "weights.bin"
_ALIGNMENT = 64
_LIBRARIES = ("qcompiler", "onnx", "onnx-ir", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of the compiler, the libraries that carry its graphs, and the packages that extend it."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return {**plugin_versions(), **found}


class WeightStore:
    """Save models whose larger tensors lie in one file, each distinct content once.

    Tensors are found again by their SHA-256, so a weight that twenty stages share takes its place once. The offsets
    depend only on the order of first use: the same models in the same order give the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        """Start an empty weights file in an existing folder."""
        self._folder = folder
        self._places: dict[tuple[bytes, int], int] = {}
        self._end = 0
        try:
            (folder / WEIGHTS_FILE).write_bytes(b"")
        except OSError as error:
            raise _unwritable(folder / WEIGHTS_FILE, error) from error

    def save(self, model: ir.Model, name: str) -> None:
        """Write a model to ``name`` in the folder; the model is left as it is.

        Raises:
            ModelError: a file cannot be written.
        """
        copy = model.clone()
        try:
            for graph in all_graphs(copy):
                for value in graph.initializers.values():
                    value.const_value = self._stored(value.const_value)
            proto = serde.serialize_model(copy)
            (self._folder / name).write_bytes(proto.SerializeToString(deterministic=True))
        except OSError as error:
            raise _unwritable(self._folder / name, error) from error

    def _stored(self, tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return tensor
        if tensor.nbytes < EXTERNAL_THRESHOLD:
            if isinstance(tensor, ir.ExternalTensor):  # its file may lie elsewhere
                return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
            return tensor
        data = tensor.tobytes()
        offset = self._place(data)
        shape = ir.Shape(int(axis) for axis in tensor.numpy().shape)
        return ir.ExternalTensor(WEIGHTS_FILE, offset, len(data), tensor.dtype, shape=shape, name=tensor.name or "")

    def _place(self, data: bytes) -> int:
        key = (hashlib.sha256(data).digest(), len(data))
        if key not in self._places:
            start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
            with (self._folder / WEIGHTS_FILE).open("ab") as file:
                file.write(b"\0" * (start - self._end))
                file.write(data)
            self._places[key] = start
            self._end = start + len(data)
        return self._places[key]


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Write text files into a folder, making it if need be.

    Raises:
        ModelError: a file cannot be written.
    """
    for name, text in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise _unwritable(folder / name, error) from error


def _unwritable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"cannot write {path}: {error.strerror or error}")
