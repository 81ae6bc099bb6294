"""The deterministic text of a model: one line per node, no ids, times or paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.graph import ORIGIN, origins, shape_of
from qcompiler.ir.importer import check_supported, finish, prepare
from qcompiler.ir.reader import read_model

_INLINE_ELEMENTS = 4
_SHORT = {
    "float": "f32", "float16": "f16", "bfloat16": "bf16", "double": "f64", "bool": "bool", "string": "str",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "int4": "i4", "int2": "i2",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "uint4": "u4", "uint2": "u2",
}  # fmt: skip


def print_model(model: ir.Model) -> str:
    """Return the model as text, local functions last."""
    imports = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in sorted(model.opset_imports.items()))
    lines = [f"model opset {imports or 'none'}"]
    lines += _graph_lines(model.graph, f"graph {model.graph.name or 'main'}", 0)
    for identifier in sorted(model.functions):
        lines += _function_lines(model.functions[identifier])
    return "\n".join(lines) + "\n"


def print_graph(graph: ir.Graph) -> str:
    """Return one graph and the bodies inside it as text."""
    return "\n".join(_graph_lines(graph, f"graph {graph.name or 'main'}", 0)) + "\n"


def _function_lines(function: ir.Function) -> list[str]:
    head = f"function {'::'.join(part for part in function.identifier() if part)}"
    attributes = sorted(function.attributes.values(), key=lambda a: a.name)
    if attributes:
        named = (a.name if a.value is None else f"{a.name}={_attribute_text(a)}" for a in attributes)
        head += "<" + ", ".join(named) + ">"
    return _graph_lines(function.graph, head, 0)


def _graph_lines(graph: ir.Graph, head: str, depth: int) -> list[str]:
    pad = "  " * depth
    inputs = ", ".join(_declared(v) for v in graph.inputs)
    outputs = ", ".join(_declared(v) for v in graph.outputs)
    lines = [f"{pad}{head}({inputs}) -> ({outputs}) {{"]
    for node in graph:
        lines += _node_lines(node, depth + 1)
    for value in graph.outputs:  # a constant output has no node that would show it
        if value.is_initializer():
            lines.append(f"{pad}  {_declared(value)} = {_operand(value)}")
    lines.append(f"{pad}}}")
    return lines


def _node_lines(node: ir.Node, depth: int) -> list[str]:
    pad = "  " * depth
    outputs = ", ".join(_declared(v) for v in node.outputs)
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    if node.overload:
        operator += f":{node.overload}"
    operands = ", ".join(_operand(v) for v in node.inputs)
    plain, bodies = [], []
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            plain.append(f"{name}={_attribute_text(attribute)}")
        else:
            bodies.append(attribute)
    line = f"{pad}{node.name}: {outputs} = {operator}({operands})" + (f" {{{', '.join(plain)}}}" if plain else "")
    origin = node.metadata_props.get(ORIGIN, "")
    comment = f"  # from {', '.join(origins(node))}" if origin and origin != node.name else ""
    if not bodies:
        return [line + comment]
    lines = [line + " [" + comment]
    for attribute in bodies:
        single = attribute.type == ir.AttributeType.GRAPH
        for index, graph in enumerate([attribute.as_graph()] if single else attribute.as_graphs()):
            lines += _graph_lines(graph, attribute.name + ("" if single else f"[{index}]"), depth + 1)
    return [*lines, f"{pad}]"]


def _declared(value: ir.Value) -> str:
    return f"%{value.name}: {type_text(value)}" if value.name else "_"


def type_text(value: ir.Value) -> str:
    """Return a value's type and shape: ``f32 1x3xNx?``, ``f32 scalar``, ``f32 *`` for an unknown rank, ``?``."""
    shape = shape_of(value)
    axes = "*" if shape is None else _axes(shape)
    kind = value.type
    if kind is None:
        return "?" if shape is None else f"? {axes}"
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        name = "seq" if isinstance(kind, ir.SequenceType) else "optional"
        return f"{name}({_dtype(kind.dtype)} {axes})"
    return f"{_dtype(kind.dtype)} {axes}"


def _axes(shape: Sequence[int | str | None]) -> str:
    return "x".join("?" if d is None else str(d) for d in shape) if shape else "scalar"


def _dtype(dtype: ir.DataType) -> str:
    name = dtype.name.lower()
    return _SHORT.get(name, name)


def _operand(value: ir.Value | None) -> str:
    if value is None:
        return "_"
    if value.const_value is not None and value.is_initializer() and not value.is_graph_input():
        return tensor_text(value.const_value)
    return f"%{value.name}"


def tensor_text(tensor: ir.TensorProtocol) -> str:
    """Return a constant as text: ``const<f32 0.5>``, ``const<i64 2 [1, -1]>`` or ``const<f32 64x64 #9f2c>``."""
    shape = tuple(tensor.shape.numpy())
    kind = _dtype(tensor.dtype)
    if tensor.size > _INLINE_ELEMENTS:
        return f"const<{kind} {_axes(shape)} #{_digest(tensor)}>"
    array = tensor.numpy()
    items = [_element(x, tensor.dtype) for x in array.reshape(-1)]
    if shape == ():
        return f"const<{kind} {items[0]}>"
    return f"const<{kind} {_axes(shape)} [{', '.join(items)}]>"


def _element(item: object, dtype: ir.DataType) -> str:
    if dtype == ir.DataType.STRING:
        return repr(item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item))
    return str(item)


def _digest(tensor: ir.TensorProtocol) -> str:
    digest = hashlib.blake2b(digest_size=2)
    for chunk in _chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview[int]]:
    if tensor.dtype == ir.DataType.STRING:
        for item in tensor.numpy().reshape(-1):
            yield (item if isinstance(item, bytes) else str(item).encode()) + b"\0"
        return
    yield np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    kind, value = attribute.type, attribute.value
    if kind == ir.AttributeType.TENSOR:
        return tensor_text(attribute.as_tensor())
    if kind == ir.AttributeType.TENSORS:
        return "[" + ", ".join(tensor_text(t) for t in attribute.as_tensors()) + "]"
    if kind == ir.AttributeType.FLOAT:
        return str(np.float32(attribute.as_float()))
    if kind == ir.AttributeType.FLOATS:
        return "[" + ", ".join(str(np.float32(x)) for x in attribute.as_floats()) + "]"
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return "[" + ", ".join(repr(x) for x in value) + "]"
    if kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return repr(value)
    return kind.name.lower()


def parse_text(text: str) -> ir.Model:
    """Return the model that ONNX's text syntax describes, imported but for the operator set, which stays as written.

    Raises:
        ModelError: the text does not parse, or the model asks for what import refuses.
    """
    try:
        proto = onnx.parser.parse_model(text)
    except onnx.parser.ParseError as error:
        raise ModelError(f"not ONNX text: {error}") from error
    model = read_model(proto)
    check_supported(model)
    prepare(model)
    finish(model)
    return model
