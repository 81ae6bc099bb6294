"""Writing models: the same graph gives the same bytes, and a file is either whole or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError, first_line
from qcompiler.ir.graph import ORIGIN, all_graphs
from qcompiler.ir.schemas import NOTE
from qcompiler.staging import Staging

MAX_INLINE_BYTES = 1_900_000_000
"""Weights beyond this go to a file of their own: one protobuf ends at 2 GB."""

EXTERNAL_THRESHOLD = 1024
"""Tensors of fewer bytes stay in the model file."""

_ALIGNMENT = 64


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers, subgraphs included, as stored."""
    return sum(
        value.const_value.nbytes
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def to_bytes(model: ir.Model, *, strip: bool = False) -> bytes:
    """Return the model as one protobuf with all weights inside; equal graphs give equal bytes.

    Args:
        model: the model; external weights are read in.
        strip: leave out the metadata that the compiler added (origins, the opset note).

    Raises:
        ModelError: the weights do not fit into one protobuf.
    """
    size = weight_bytes(model)
    if size > MAX_INLINE_BYTES:
        raise ModelError(f"{size} bytes of weights do not fit into one protobuf: save the model with external data")
    with _replaced(model, _inlined(model)):
        return _serialize(model, strip)


def graph_digest(model: ir.Model) -> str:
    """Return 32 hex digits that differ where the graph, a name or a weight does; any number of weights is read once.

    Origins and notes of the compiler do not count.
    """
    made = hashlib.sha256()
    small: dict[ir.Value, ir.TensorProtocol] = {}
    for value, tensor in _stored(model):
        made.update(f"{value.name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        made.update(repr(tensor.numpy().tolist()).encode() if tensor.dtype == ir.DataType.STRING else tensor.tobytes())
        small[value] = ir.tensor([0], name=value.name)
    with _replaced(model, small):
        made.update(_serialize(model, strip=True))
    return made.hexdigest()[:32]


def to_bytes_with(model: ir.Model, tensors: Mapping[ir.Value, ir.TensorProtocol], *, strip: bool = False) -> bytes:
    """Return the model as one protobuf in which some initializers are others, such as pointers into a weights file.

    Args:
        model: the model; it is not changed.
        tensors: what is written in place of an initializer's own contents.
        strip: leave out the metadata that the compiler added.
    """
    with _replaced(model, dict(tensors)):
        return _serialize(model, strip)


def stored_tensors(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield every initializer, subgraphs included, with its contents."""
    return _stored(model)


def save_model(model: ir.Model, path: str | Path, *, external: str | None = None, strip: bool = False) -> None:
    """Write a model; on failure nothing new is left behind and an older file stays.

    Args:
        model: the model; it is not changed.
        path: where the model goes.
        external: name of a weights file beside it; by default weights go there (``<name>.data``) only if they are too
            large for one protobuf.
        strip: leave out the metadata that the compiler added.

    Raises:
        ModelError: a file cannot be written; the text has the path and the system's reason.
    """
    target = Path(path)
    if external is not None and (not external or os.path.basename(external) != external):
        raise ModelError(f"external data goes beside the model: expected a file name, found {external!r}")
    if external == target.name:
        raise ModelError(f"the model and its external data cannot both be named {external!r}")
    if external is None and weight_bytes(model) > MAX_INLINE_BYTES:
        external = f"{target.name}.data"
    try:
        with Staging() as staging:
            if external is None:
                staging.stage_file(target).write_bytes(to_bytes(model, strip=strip))
            else:
                _write_external(model, target, external, strip, staging)
            staging.commit()
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}") from error


def _write_external(model: ir.Model, target: Path, external: str, strip: bool, staging: Staging) -> None:
    pointers: dict[ir.Value, ir.TensorProtocol] = {}
    offset = 0
    # Reading every tensor here also keeps an old file of the same name mapped after it has been replaced.
    with open(staging.stage_file(target.with_name(external)), "xb") as file:
        for value, tensor in _stored(model):
            if tensor.dtype == ir.DataType.STRING or tensor.nbytes < EXTERNAL_THRESHOLD:
                if isinstance(tensor, ir.ExternalTensor):
                    pointers[value] = _in_memory(tensor)
                continue
            start = -(-offset // _ALIGNMENT) * _ALIGNMENT
            file.write(b"\0" * (start - offset))
            file.write(tensor.tobytes())
            offset = start + tensor.nbytes
            pointers[value] = ir.ExternalTensor(
                external,
                start,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
    with _replaced(model, pointers):
        data = _serialize(model, strip)
    staging.stage_file(target).write_bytes(data)


def _stored(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value


def _inlined(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    return {v: _in_memory(t) for v, t in _stored(model) if isinstance(t, ir.ExternalTensor)}


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


@contextmanager
def _replaced(model: ir.Model, tensors: dict[ir.Value, ir.TensorProtocol]) -> Iterator[None]:
    """Let values hold other tensors for the time of the block."""
    before = {value: value.const_value for value in tensors}
    try:
        for value, tensor in tensors.items():
            value.const_value = tensor
        yield
    finally:
        for value, old in before.items():
            value.const_value = old


def _serialize(model: ir.Model, strip: bool) -> bytes:
    try:
        proto = ir.serde.serialize_model(model)
        _tidy(proto, strip)
        return bytes(proto.SerializeToString(deterministic=True))
    except ModelError:
        raise
    except Exception as error:  # protobuf and the serializer raise several unrelated types
        raise ModelError(f"cannot serialize the model: {first_line(error)}") from error


def _tidy(proto: onnx.ModelProto, strip: bool) -> None:
    imports = sorted((o.domain, o.version) for o in proto.opset_import)
    del proto.opset_import[:]
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in imports)
    if not strip:
        return
    kept = [p for p in proto.metadata_props if p.key != NOTE]
    if len(kept) != len(proto.metadata_props):
        kept = [onnx.StringStringEntryProto(key=p.key, value=p.value) for p in kept]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
    for node in (*proto.graph.node, *(n for f in proto.functions for n in f.node)):
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    if any(p.key == ORIGIN for p in node.metadata_props):
        kept = [onnx.StringStringEntryProto(key=p.key, value=p.value) for p in node.metadata_props if p.key != ORIGIN]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
        for body in bodies:
            for inner in body.node:
                _strip_node(inner)
