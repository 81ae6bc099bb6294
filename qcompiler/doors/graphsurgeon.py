"""To and from ``onnx_graphsurgeon.Graph``, the editor that TensorRT's users know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.reader import ModelSource, SurgeonGraph, read_model

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_KINDS: dict[type, str] = {
    ir.TensorType: "tensor_type",
    ir.SequenceType: "sequence_type",
    ir.OptionalType: "optional_type",
    ir.SparseTensorType: "sparse_tensor_type",
}


def from_graphsurgeon(graph: SurgeonGraph) -> ir.Model:
    """Return the model that a graph describes; weights are shared with it, everything else is new.

    `qcompiler.compile` takes the graph itself as well. What the graph's own export would write wrongly is right here:
    see `qcompiler.ir.surgeon.model_of_surgeon_graph`.

    Raises:
        ModelError: no such graph, one with a cycle, or with types that onnx-graphsurgeon keeps a part of only.
    """
    return read_model(graph)


def to_graphsurgeon(model: ModelSource) -> gs.Graph:
    """Return a model as an ``onnx_graphsurgeon.Graph`` whose weights are read when they are first asked for.

    Metadata and documentation of nodes and values have no place in such a graph and are lost.

    Args:
        model: whatever `qcompiler.compile` takes, or the ``model`` of its result.

    Raises:
        ModelError: the model has what such a graph cannot hold (overloaded functions, maps, nested sequences, some
            kinds of attributes), which is named; or onnx-graphsurgeon is not installed.
    """
    try:
        import onnx_graphsurgeon as gs
    except ImportError as error:
        raise ModelError('to_graphsurgeon needs onnx-graphsurgeon: pip install "qcompiler[graphsurgeon]"') from error
    read = read_model(model)
    # One list of functions is shared by the graph, its subgraphs and the functions themselves.
    functions: list[Any] = []
    for function in read.functions.values():
        functions.append(_function(function, read))
    graph = _Writer().graph(
        read.graph,
        producer_name=read.producer_name or "",
        producer_version=read.producer_version or "",
        ir_version=read.ir_version,
    )
    for owner in (graph, *functions):
        _share(owner, functions, gs)
    return graph


def _share(graph: Any, functions: list[Any], gs: Any) -> None:
    graph._functions = functions
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                value.import_domains, value.opset = graph.import_domains, graph.opset
                _share(value, functions, gs)


def _domains(opsets: Mapping[str, int]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]


def _function(function: ir.Function, model: ir.Model) -> Any:
    import onnx_graphsurgeon as gs

    if function.overload:
        raise ModelError(f"function {function.name!r} has overloads, which onnx-graphsurgeon does not know")
    writer = _Writer()
    opsets = function.opset_imports or model.graph.opset_imports
    return gs.Function(
        function.name,
        domain=function.domain,
        inputs=[writer.tensor(v) for v in function.inputs],
        nodes=[writer.node(n) for n in function],
        outputs=[writer.tensor(v) for v in function.outputs],
        doc_string=function.doc_string or "",
        opset=opsets.get("", gs.Graph.DEFAULT_OPSET),
        import_domains=_domains(opsets),
        attrs={a.name: None if a.value is None else writer.attribute(a) for a in function.attributes.values()},
    )


@dataclass
class _Writer:
    """Tensors of one model by the values that they stand for."""

    tensors: dict[ir.Value, Any] = field(default_factory=dict)

    def graph(
        self, graph: ir.Graph, *, producer_name: str = "", producer_version: str = "", ir_version: int | None = None
    ) -> Any:
        import onnx_graphsurgeon as gs

        inputs = [self.tensor(v) for v in graph.inputs]
        for value in graph.initializers.values():
            self.tensor(value)
        return gs.Graph(
            inputs=inputs,
            nodes=[self.node(n) for n in graph],
            outputs=[self.tensor(v) for v in graph.outputs],
            name=graph.name,
            doc_string=graph.doc_string or "",
            opset=graph.opset_imports.get("", gs.Graph.DEFAULT_OPSET),
            import_domains=_domains(graph.opset_imports),
            producer_name=producer_name,
            producer_version=producer_version,
            ir_version=ir_version,
        )

    def node(self, node: ir.Node) -> Any:
        import onnx_graphsurgeon as gs

        if node.overload:
            raise ModelError(f"node {node.name!r} calls an overload, which onnx-graphsurgeon does not know")
        return gs.Node(
            op=node.op_type,
            name=node.name or "",
            attrs={name: self.attribute(a, node) for name, a in node.attributes.items()},
            inputs=[gs.Variable.empty() if v is None else self.tensor(v) for v in node.inputs],
            outputs=[self.tensor(v) for v in node.outputs],
            domain=node.domain or None,
        )

    def tensor(self, value: ir.Value) -> Any:
        import onnx_graphsurgeon as gs

        if not value.name:
            return gs.Variable.empty()
        found = self.tensors.get(value)
        if found is None:
            found = self.tensors[value] = _constant(value) if value.const_value is not None else _variable(value)
        return found

    def attribute(self, attribute: ir.Attr, node: ir.Node | None = None) -> Any:
        import onnx_graphsurgeon as gs
        from onnx_graphsurgeon.util import misc

        kinds = ir.AttributeType
        if attribute.is_ref():
            return gs.Node.AttributeRef(attribute.ref_attr_name, misc.convert_from_onnx_attr_type(attribute.type.value))
        match attribute.type:
            case kinds.INT | kinds.FLOAT | kinds.STRING:
                return attribute.value
            case kinds.INTS | kinds.FLOATS | kinds.STRINGS:
                return list(attribute.value)
            case kinds.TENSOR:
                tensor = attribute.as_tensor()
                return gs.Constant(tensor.name or "", _lazy(tensor))
            case kinds.TENSORS:
                return [gs.Constant(t.name or "", _lazy(t)) for t in attribute.as_tensors()]
            case kinds.GRAPH:
                return self.graph(attribute.as_graph())
            case kinds.TYPE_PROTO:
                return ir.serde.serialize_attribute(attribute).tp
        where = f" of node {node.name!r} ({node.op_type})" if node is not None else ""
        raise ModelError(
            f"attribute {attribute.name!r}{where} is a {attribute.type}, which onnx-graphsurgeon cannot hold"
        )


def _constant(value: ir.Value) -> Any:
    import onnx_graphsurgeon as gs

    assert value.const_value is not None
    return gs.Constant(str(value.name), _lazy(value.const_value))


def _variable(value: ir.Value) -> Any:
    import onnx_graphsurgeon as gs

    kind: type = type(value.type)
    if value.type is None:
        dtype: Any = None
    elif kind is ir.OptionalType:
        # What the library's own import keeps: the type inside.
        dtype = ir.serde.serialize_type(value.type).optional_type.elem_type
    elif kind in _KINDS and (kind is not ir.SequenceType or isinstance(value.type.elem_type, ir.TensorType)):
        dtype = _dtype(value.type.dtype)
    else:
        raise ModelError(f"value {value.name!r} is a {value.type}, which onnx-graphsurgeon cannot hold")
    shape: list[int | str | None] | None = None
    if value.shape is not None:
        shape = [d if isinstance(d, int) else d.value for d in value.shape]
    return gs.Variable(str(value.name), dtype=dtype, shape=shape, type=_KINDS.get(kind, "tensor_type"))


def _dtype(dtype: ir.DataType) -> Any:
    """Return an element type as the library keeps it: NumPy's own, or ONNX's number where NumPy has none."""
    if dtype == ir.DataType.UNDEFINED:
        return None
    return dtype.numpy() if _is_native(dtype) else int(dtype)


def _is_native(dtype: ir.DataType) -> bool:
    return dtype == ir.DataType.STRING or dtype.numpy().isbuiltin == 1


def _lazy(tensor: ir.TensorProtocol) -> Any:
    return _lazy_type()(tensor)


@cache
def _lazy_type() -> type[Any]:
    """Return the class of contents that stay where they are until asked for; it needs the library's base class."""
    import onnx_graphsurgeon as gs

    class IrValues(gs.ir.tensor.LazyValues):  # type: ignore[misc]  # the library has no types
        """Contents of a tensor of onnx-ir, in memory, in a file or another library's."""

        def __init__(self, tensor: ir.TensorProtocol) -> None:
            self.ir_tensor = tensor
            self.shape: Sequence[int] = list(tensor.shape.numpy())
            self.dtype = _dtype(tensor.dtype)
            self.nbytes = tensor.nbytes

        @property
        def tensor(self) -> onnx.TensorProto:
            """Return the contents as the library's export wants them, read now."""
            kept = self.ir_tensor
            if isinstance(kept, ir.ExternalTensor):
                kept = ir.Tensor(kept.numpy(), dtype=kept.dtype, shape=kept.shape, name=kept.name)
            return ir.serde.serialize_tensor(kept)

        def load(self) -> np.ndarray[Any, Any]:
            """Return the contents as an array of their own, in NumPy's type or that of ``ml_dtypes``."""
            return np.array(self.ir_tensor.numpy())

    return IrValues
