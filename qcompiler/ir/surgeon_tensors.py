"""Tensors of an ``onnx_graphsurgeon.Graph``: their contents, types and shapes as onnx-ir has them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError


def is_a(source: object, name: str) -> bool:
    """Return whether an object is of a class of onnx-graphsurgeon, which is not imported for that."""
    return any(t.__name__ == name and t.__module__.startswith("onnx_graphsurgeon") for t in type(source).__mro__)


def tensor_of(constant: Any) -> ir.TensorProtocol:
    """Return a constant's contents: as they lie in the graph, in their own type, loaded or not."""
    name, values = constant.name, constant._values
    if is_a(values, "SparseValues"):
        raise ModelError(f"constant {name!r} is sparse: store it dense first")
    if isinstance(kept := getattr(values, "ir_tensor", None), ir.TensorProtocol):
        return kept
    if is_a(values, "LazyValues"):
        return ir.serde.deserialize_tensor(values.tensor)
    array = np.asarray(values)
    if array.dtype.kind in "OSU":
        flat = [t if isinstance(t, bytes) else str(t).encode() for t in array.reshape(-1).tolist()]
        return ir.StringTensor(flat, shape=ir.Shape(array.shape), name=name)
    if constant._export_dtype is not None:
        array = _converted(array, dtype_of(constant._export_dtype, name))
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)


def _converted(array: np.ndarray[Any, Any], dtype: ir.DataType) -> np.ndarray[Any, Any]:
    """Return float values in another type; those beyond its range saturate where it has no infinity."""
    wanted = dtype.numpy()
    if array.dtype == wanted:
        return array
    if dtype.bitwidth <= 8 and dtype.is_floating_point():
        largest = float(ml_dtypes.finfo(wanted).max)  # type: ignore[no-untyped-call]  # ml_dtypes has no types
        array = np.clip(array, -largest, largest)
    return array.astype(wanted)


def dtype_of(dtype: Any, name: str) -> ir.DataType:
    """Return an element type: the library keeps NumPy's, or the number of ONNX's where NumPy has none."""
    try:
        return ir.DataType(dtype) if isinstance(dtype, int) else ir.DataType.from_numpy(np.dtype(dtype))
    except (TypeError, ValueError) as error:
        raise ModelError(f"tensor {name!r} has the type {dtype!r}, which no ONNX type is: {error}") from error


def type_of(tensor: Any) -> ir.TypeProtocol | None:
    """Return a tensor's type, None where the graph does not say.

    Raises:
        ModelError: a type of which the library keeps a part only.
    """
    if tensor.dtype is None:
        return None
    if isinstance(tensor.dtype, onnx.TypeProto):
        if tensor.type != "optional_type":
            raise _partly_kept(tensor)
        inner = ir.serde.deserialize_type_proto_for_type(tensor.dtype)
        return None if inner is None else ir.OptionalType(inner)
    dtype = dtype_of(tensor.dtype, tensor.name)
    kinds: dict[str | None, ir.TypeProtocol] = {
        None: ir.TensorType(dtype),
        "tensor_type": ir.TensorType(dtype),
        "sequence_type": ir.SequenceType(ir.TensorType(dtype)),
        "sparse_tensor_type": ir.SparseTensorType(dtype),
    }
    if tensor.type not in kinds:
        raise _partly_kept(tensor)
    return kinds[tensor.type]


def _partly_kept(tensor: Any) -> ModelError:
    return ModelError(f"tensor {tensor.name!r} is a {tensor.type}, of which onnx-graphsurgeon keeps a part only")


def shape_of(tensor: Any) -> ir.Shape | None:
    """Return a tensor's shape, None where the graph does not say; a length of -1 is an open axis."""
    if tensor.shape is None:
        return None
    axes = [None if d is None or (not isinstance(d, str) and d < 0) else d for d in tensor.shape]
    return ir.Shape([d if d is None or isinstance(d, str) else int(d) for d in axes])
