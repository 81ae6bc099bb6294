"""Reading a model from a file, bytes or another library's object, without loading external weights."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompiler.errors import ModelError
from qcompiler.ir.graph import all_graphs
from qcompiler.ir.shapes import SMALL_TENSOR_BYTES


def read_model(source: str | Path | bytes | onnx.ModelProto | ir.Model) -> ir.Model:
    """Return an IR model that shares no mutable object with ``source``; external weights stay memory-mapped.

    Raises:
        ModelError: the file is missing, empty, truncated or no ONNX model, or its external data is missing or short.
    """
    if isinstance(source, ir.Model):
        model = _clone(source)
    else:
        proto, folder, label = _read_proto(source)
        model = _from_proto(proto, folder, label)
    _own_tensors(model)
    return model


def _read_proto(source: str | Path | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, str, str]:
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
