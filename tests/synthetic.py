"""Small models of the families that people compile, made in memory, and seeded feeds for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.engine import Array

F = np.float32
Shape = Sequence[int | str]


def normal(seed: int, *shape: int, fan: int = 1) -> Array:
    """Return seeded normal numbers; with the fan-in, products keep the size of what they are applied to."""
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(fan)).astype(F)


def model(
    body: str,
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    weights: Mapping[str, Array],
    *,
    opset: int = 17,
    types: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """Return a model of ONNX text; a line may begin with ``name:`` to name its node.

    Args:
        body: one node per line.
        inputs: name to shape, float32 if ``types`` says nothing else.
        outputs: likewise.
        weights: initializers by name.
        opset: version of the ONNX operators.
        types: element types of inputs and outputs.
    """
    lines = [line.strip() for line in body.strip().splitlines() if line.strip()]
    names = [line.split(":", 1)[0].strip() if line.startswith("/") else "" for line in lines]
    text = " ".join(line.split(":", 1)[1] if name else line for name, line in zip(names, lines, strict=True))
    made = onnx.parser.parse_graph(f"g () => () {{ {text} }}")
    for node, name in zip(made.node, names, strict=True):
        node.name = name
    kinds = dict(types or {})

    def infos(of: Mapping[str, Shape]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), list(s)) for n, s in of.items()]

    graph = helper.make_graph(
        list(made.node), "g", infos(inputs), infos(outputs), [numpy_helper.from_array(a, n) for n, a in weights.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def feeds_of(shapes: Mapping[str, Sequence[int]], count: int = 8, seed: int = 0) -> list[dict[str, Array]]:
    """Return seeded float32 feeds."""
    rng = np.random.default_rng(seed)
    return [{n: rng.standard_normal(s).astype(F) for n, s in shapes.items()} for _ in range(count)]


def regions_cnn(regions: int = 3, convolutions: int = 2) -> onnx.ModelProto:
    """Return convolutions in regions that Tanh, which no integer kernel has, keeps apart.

    ``/r0/c0`` is the first convolution of the first region; x and y are float32 [1, 8, 32, 32].
    """
    weights: dict[str, Array] = {}
    lines = []
    value = "x"
    for region in range(regions):
        for index in range(convolutions):
            name = f"r{region}c{index}"
            weights[f"w_{name}"] = normal(10 * region + index, 8, 8, 3, 3, fan=36)
            lines += [f"/r{region}/c{index}: {name} = Conv<pads=[1,1,1,1]>({value}, w_{name})"]
            value = name
            if index + 1 < convolutions:
                lines += [f"/r{region}/a{index}: {name}a = Relu({name})"]
                value = f"{name}a"
        lines += [f"/t{region}: t{region} = Tanh({value})"]
        value = f"t{region}"
    lines[-1] = lines[-1].replace(f" {value} =", " y =")
    shape = {"x": (1, 8, 32, 32)}
    return model("\n".join(lines), shape, {"y": (1, 8, 32, 32)}, weights)


def image_feeds(count: int = 6) -> list[dict[str, Array]]:
    return feeds_of({"x": (1, 8, 32, 32)}, count)
