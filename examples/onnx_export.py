"""Export torch modules to bare ONNX files: readable names, no stack traces, paths or other metadata."""

from __future__ import annotations

import ast
import hashlib
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)
from torch import nn

OPSET = 20
IR_VERSION = 9
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 64
SCOPES = "pkg.torch.onnx.name_scopes"


def export_scripted(
    module: nn.Module,
    arguments: tuple[object, ...],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
) -> onnx.ModelProto:
    """Export `module` with the TorchScript exporter, which keeps BatchNormalization and GlobalAveragePool.

    The newer exporter folds the former into Conv and spells the latter as ReduceMean and Reshape.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "scripted.onnx"
        torch.onnx.export(
            module.eval(),
            arguments,
            path,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={key: dict(axes) for key, axes in dynamic_axes.items()},
            opset_version=OPSET,
        )
        proto = onnx.load(path)
    return clean(ir.from_proto(proto))


def export_traced(
    module: nn.Module,
    arguments: tuple[object, ...],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[object, ...],
    prefix: str = "",
) -> onnx.ModelProto:
    """Export `module` with torch.export, which gives symbolic shapes and a third of the other exporter's nodes.

    `dynamic_shapes` mirrors `arguments`; `prefix` is a wrapper's scope to drop from all names.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            optimize=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return clean(program.model, prefix)


def clean(model: ir.Model, prefix: str = "") -> onnx.ModelProto:
    """Name nodes and values `scope.Operator`, drop all metadata and doc strings, infer shapes, and check."""
    graph = model.graph
    read_shapes_from_first_inputs(graph)
    for tidy in (IdentityEliminationPass(), CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass()):
        tidy(model)
    scopes = {id(node): scope_of(node) for node in graph}
    seen: Counter[str] = Counter()
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    unnamed = 0
    for value in list(graph.initializers.values()):
        value.name = (value.name or "").removeprefix(prefix)
        if re.fullmatch(r"val_\d+", value.name):
            value.name, unnamed = f"constant_{unnamed}", unnamed + 1
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.name = value.name
    for node in graph:
        scope = f"{scopes[id(node)]}.".removeprefix(prefix)
        name = f"{scope.lstrip('.')}{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
        node.doc_string = None
        node.metadata_props.clear()
        for index, value in enumerate(node.outputs):
            value.doc_string = None
            value.metadata_props.clear()
            if id(value) not in kept:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"
    for value in (*graph.inputs, *graph.outputs):
        value.doc_string = None
        value.metadata_props.clear()
    for owner in (model, graph):
        owner.doc_string = None
        owner.metadata_props.clear()
    graph.name, model.ir_version = "main", IR_VERSION
    model.producer_name, model.producer_version = "torch.onnx", torch.__version__.split("+")[0]
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def scope_of(node: ir.Node) -> str:
    """Return the dotted path of the module that `node` comes from, empty for the outermost.

    A node that the exporter's optimizer made carries none and takes that of its first input's producer.
    """
    if SCOPES in node.metadata_props:
        scopes: list[str] = ast.literal_eval(node.metadata_props[SCOPES])
        return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
    if (node.name or "").startswith("/"):
        return ".".join((node.name or "").split("/")[1:-1])
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return scope_of(producer) if producer is not None else ""


def read_shapes_from_first_inputs(graph: ir.Graph) -> None:
    """Let each one-axis Shape read the first input that has that symbolic axis.

    Where several inputs share an axis the exporter picks one of them, not the same in every run.
    """
    owner: dict[str, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            owner.setdefault(str(dim), (value, axis))
    for node in graph:
        if node.op_type != "Shape" or "start" not in node.attributes or node.inputs[0] not in graph.inputs:
            continue
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        start, end = node.attributes["start"].as_int(), node.attributes["end"].as_int()
        if shape is not None and end == start + 1:
            value, axis = owner[str(shape[start])]
            node.replace_input_with(0, value)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)


def save(models: Mapping[Path, onnx.ModelProto], weights: Path | None = None) -> None:
    """Write each model; with `weights`, move their larger initializers there, equal ones stored once.

    `weights` must lie in the folder of the models, which refer to it by its bare name.
    """
    blob = bytearray()
    stored: dict[bytes, int] = {}
    for path, model in models.items():
        for tensor in model.graph.initializer if weights is not None else ():
            content = tensor.raw_data
            if len(content) < EXTERNAL_FROM_BYTES:
                continue
            key = hashlib.sha256(content).digest()
            if key not in stored:
                blob.extend(bytes(-len(blob) % ALIGNMENT))
                stored[key] = len(blob)
                blob.extend(content)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            assert weights is not None
            for field, value in (("location", weights.name), ("offset", stored[key]), ("length", len(content))):
                tensor.external_data.add(key=field, value=str(value))
        path.write_bytes(model.SerializeToString(deterministic=True))
    if weights is not None:
        weights.write_bytes(blob)
    for path in models:
        onnx.checker.check_model(path, full_check=True)
