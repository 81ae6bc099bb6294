"""Reading a model from a file, bytes or another library's object, without loading external weights."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompiler.errors import ModelError
from qcompiler.ir.graph import all_graphs
from qcompiler.ir.shapes import SMALL_TENSOR_BYTES
from qcompiler.ir.surgeon import is_surgeon_graph, model_of_surgeon_graph


class ExportedProgram(Protocol):
    """What ``torch.onnx.export(..., dynamo=True)`` returns, a ``torch.onnx.ONNXProgram``."""

    @property
    def model(self) -> ir.Model:
        """Return the exported graph."""


class SurgeonGraph(Protocol):
    """An ``onnx_graphsurgeon.Graph``."""

    @property
    def nodes(self) -> Any:
        """Return the nodes in order."""

    @property
    def import_domains(self) -> Any:
        """Return the operator sets."""


ModelSource = str | Path | bytes | onnx.ModelProto | ir.Model | ExportedProgram | SurgeonGraph
"""What a model may come as."""


def read_model(source: ModelSource) -> ir.Model:
    """Return an IR model whose graph is its own; external weights stay memory-mapped.

    Weights in memory are not copied: a later write into an array of ``source`` (of a graphsurgeon constant, a torch
    parameter) may show in the model. Putting another array in its place does not, nor does any other change of
    ``source``.

    Args:
        source: path, serialized model, protobuf, IR model, ``torch.onnx.ONNXProgram`` or ``onnx_graphsurgeon.Graph``.
            The last two are known by their types' names: neither library is imported.

    Raises:
        ModelError: the file is missing, empty, truncated or no ONNX model, its external data is missing or short, or
            the source is none of these kinds.
    """
    if _is_exported_program(source):
        source = source.model  # type: ignore[union-attr]  # known by its type's name, not by its type
    if isinstance(source, ir.Model):
        model = _clone(source)
    elif is_surgeon_graph(source):
        model = model_of_surgeon_graph(source)
    elif isinstance(source, str | bytes | os.PathLike | onnx.ModelProto):
        proto, folder, label = _read_proto(source)
        model = _from_proto(proto, folder, label)
    else:
        raise ModelError(
            f"cannot read a model from a {type(source).__module__}.{type(source).__qualname__}: expected a path, "
            "bytes, an onnx.ModelProto, an onnx_ir.Model, a torch.onnx.ONNXProgram or an onnx_graphsurgeon.Graph"
        )
    _own_tensors(model)
    return model


def _is_exported_program(source: object) -> bool:
    return any(t.__name__ == "ONNXProgram" and t.__module__.startswith("torch.onnx") for t in type(source).__mro__)


def _read_proto(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, str, str]:
    if isinstance(source, onnx.ModelProto):
        return source, "", "the model"
    if isinstance(source, bytes):
        return _parse(source, "the model"), "", "the model"
    path = os.fspath(source)
    try:
        if os.path.splitext(path)[1] in (".txt", ".textproto", ".prototxt", ".pbtxt", ".json", ".onnxtxt", ".onnxjson"):
            return onnx.load(path, load_external_data=False), os.path.dirname(path), path
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the text formats raise several unrelated types
        raise ModelError(f"{path} is not an ONNX model: {_first_line(error)}") from error
    return _parse(data, path), os.path.dirname(path), path


def _parse(data: bytes, label: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{label} is empty: expected an ONNX model")
    try:
        return onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ModelError(f"{label} is not an ONNX model, or is truncated: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _from_proto(proto: onnx.ModelProto, folder: str, label: str) -> ir.Model:
    if not proto.HasField("graph"):
        raise ModelError(f"{label} is not an ONNX model, or is truncated: it has no graph")
    if not proto.opset_import:
        raise ModelError(f"{label} names no operator set: it is truncated, or written for ONNX IR 1 or 2")
    if _has_sparse(proto.graph):
        raise ModelError(f"{label} has sparse initializers: store them dense first")
    try:
        with _quiet():
            model = ir.serde.deserialize_model(proto)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{label} is not a valid ONNX model: {_first_line(cause)}") from error
    if folder:
        ir.external_data.set_base_dir(model.graph, folder)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnx-ir's warnings (inputs that nothing produces) off the terminal: import reports them as errors."""
    logger = logging.getLogger("onnx_ir.serde")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _has_sparse(graph: onnx.GraphProto) -> bool:
    if graph.sparse_initializer:
        return True
    for node in graph.node:
        for attribute in node.attribute:
            if (attribute.type == onnx.AttributeProto.GRAPH and _has_sparse(attribute.g)) or any(
                map(_has_sparse, attribute.graphs)
            ):
                return True
    return False


def _clone(source: ir.Model) -> ir.Model:
    try:
        return source.clone()
    except Exception as error:
        raise ModelError(f"the given model cannot be copied: {_first_line(error)}") from error


def _own_tensors(model: ir.Model) -> None:
    """Give every initializer a tensor object of this model's own: renaming a value renames its tensor."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise ModelError(f"initializer {value.name!r} has no contents")
            value.const_value = own_tensor(tensor, value.name)
            if value.shape is None:
                value.shape = ir.Shape(value.const_value.shape.numpy())
            if value.type is None:
                value.type = ir.TensorType(value.const_value.dtype)


def own_tensor(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    """Return a tensor of the same contents whose name can be changed alone; contents are shared where possible.

    Raises:
        ModelError: external data is missing, short or outside the model's folder.
    """
    if isinstance(tensor, ir.ExternalTensor):
        _check_external(tensor, name)
        if tensor.nbytes <= SMALL_TENSOR_BYTES:  # shape inference wants to see the small ones
            return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, shape=tensor.shape, name=name)
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name or "",
            base_dir=tensor.base_dir,
        )
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy(), shape=ir.Shape(tensor.shape.numpy()), name=name)
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        try:
            return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=name)
        except Exception as error:
            raise ModelError(f"initializer {name!r} is damaged: {_first_line(error)}") from error
    made = copy.copy(tensor)
    made.name = name
    return made


def _check_external(tensor: ir.ExternalTensor, name: str | None) -> None:
    needed = tensor.nbytes
    if needed == 0:
        return
    try:
        size = os.path.getsize(tensor.path)
    except OSError as error:
        raise ModelError(
            f"external data of {name!r} not found: {tensor.path} ({error.strerror}); "
            "keep the weights file beside the model"
        ) from error
    end = (tensor.offset or 0) + needed
    if size < end:
        raise ModelError(f"external data of {name!r} is truncated: {tensor.path} has {size} bytes, expected {end}")
    try:
        tensor._check_path_containment()
    except ValueError as error:
        raise ModelError(f"external data of {name!r} is refused: {_first_line(error)}") from error
