"""Pairs of models for the evaluation's tests: classifiers and builds with a planted fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.engine import Array

F = np.float32
CLASSES = 10
LAYERS = 5


def chain(seed: int = 0, width: int = 32, prefix: str = "fc") -> onnx.ModelProto:
    """Return x float32 [n, width] through five MatMul, Add, Relu to logits y float32 [n, 10]."""
    generator = np.random.default_rng(seed)
    nodes, weights, x = [], {}, "x"
    for i in range(LAYERS):
        out = CLASSES if i == LAYERS - 1 else width
        weights[f"w{i}"] = generator.standard_normal((width, out)) * np.sqrt(2 / width)
        weights[f"b{i}"] = generator.standard_normal(out) * 0.1
        nodes += [
            helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], name=f"{prefix}{i}"),
            helper.make_node("Add", [f"m{i}", f"b{i}"], ["y" if i == LAYERS - 1 else f"s{i}"], name=f"bias{i}"),
        ]
        if i < LAYERS - 1:
            nodes.append(helper.make_node("Relu", [f"s{i}"], [f"r{i}"], name=f"relu{i}"))
            x = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", 1, ["n", width])],
        [helper.make_tensor_value_info("y", 1, ["n", CLASSES])],
        [numpy_helper.from_array(w.astype(F), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def quantized_chain(
    model: onnx.ModelProto, data: Array, *, broken: int | None = None, factor: float = 1.0
) -> onnx.ModelProto:
    """Return the model with a QuantizeLinear, DequantizeLinear pair behind every Relu, as another tool writes it.

    Args:
        model: of `chain`.
        data: float32 [n, width], for the ranges.
        broken: number of the layer whose scale is wrong.
        factor: what that scale is multiplied by.
    """
    from onnx.reference import ReferenceEvaluator

    names = [f"r{i}" for i in range(LAYERS - 1)]
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in names)
    values = dict(zip(names, ReferenceEvaluator(shown).run(names, {"x": data}), strict=True))
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes = list(made.graph.node)
    for i, name in enumerate(names):
        scale = float(values[name].max()) / 255 * (factor if i == broken else 1.0)
        made.graph.initializer.extend([
            numpy_helper.from_array(np.asarray(scale, F), f"{name}:scale"),
            numpy_helper.from_array(np.asarray(0, np.uint8), f"{name}:zero"),
        ])  # fmt: skip
        numbers = [f"{name}:scale", f"{name}:zero"]
        for node in nodes:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = f"{name}:dq"
        place = next(k for k, n in enumerate(nodes) if name in n.output) + 1
        nodes[place:place] = [
            helper.make_node("QuantizeLinear", [name, *numbers], [f"{name}:q"], name=f"{name}/Q"),
            helper.make_node("DequantizeLinear", [f"{name}:q", *numbers], [f"{name}:dq"], name=f"{name}/DQ"),
        ]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    onnx.checker.check_model(made)
    return made


@dataclass(frozen=True)
class Files:
    """A float model, a quantized one, and feeds on disk."""

    model: Path
    compiled: Path
    feeds: Path


def write(folder: Path, *, broken: int | None = None, factor: float = 1.0, rows: int = 96) -> Files:
    """Write a chain, its quantized form and feeds."""
    data = np.random.default_rng(9).standard_normal((rows, 32)).astype(F)
    model = chain()
    files = Files(folder / "model.onnx", folder / "compiled.onnx", folder / "feeds.npz")
    onnx.save(model, files.model)
    onnx.save(quantized_chain(model, data, broken=broken, factor=factor), files.compiled)
    np.savez(files.feeds, x=data)
    return files
