"""What a step gives for inputs of known shapes: its outputs' types, or their very contents where no data is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from qcompiler.backends.triton.program import TENSOR, TORCH, Step
from qcompiler.engine import Array
from qcompiler.errors import ModelError
from qcompiler.quant.window import resolve_window

MOST_FOLDED = 1 << 20
"""Elements of the largest result that is computed while planning."""
_NUMBERS = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "string": 8, "bool": 9,
    "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "bfloat16": 16, "float8e4m3fn": 17, "float8e4m3fnuz": 18,
    "float8e5m2": 19, "float8e5m2fnuz": 20, "uint4": 21, "int4": 22,
}  # fmt: skip
_NAMES = {number: name for name, number in _NUMBERS.items()}
_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2,
          "int16": 2, "uint16": 2}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """What is known of a value: dtype, shape (None if it depends on data) and contents, if they are constant."""

    dtype: str
    shape: tuple[int, ...] | None
    contents: Array | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes, 0 if its shape is unknown."""
        return 0 if self.shape is None else int(np.prod(self.shape, dtype=np.int64)) * _BYTES.get(self.dtype, 1)


def dtype_of_array(array: Array) -> str:
    """Return the name of an array's element type, as programs have it."""
    names = {
        "float8_e4m3fn": "float8e4m3fn", "float8_e5m2": "float8e5m2", "float8_e4m3fnuz": "float8e4m3fnuz",
        "float8_e5m2fnuz": "float8e5m2fnuz", "float8_e8m0fnu": "float8e8m0",
    }  # fmt: skip
    return names.get(array.dtype.name, array.dtype.name)


def infer(step: Step, inputs: Sequence[Tensor | None], weights: Mapping[str, Array], opset: int) -> list[Tensor]:
    """Return what is known of a step's outputs."""
    unknown = [Tensor("", None) for _ in step.outputs]
    if step.kind != TORCH:
        found = None if step.operator not in KERNEL_SHAPES else KERNEL_SHAPES[step.operator](step, inputs)
        return unknown if found is None else found
    first = inputs[0] if inputs else None
    if step.operator in ("Shape", "Size") and first is not None and first.shape is not None:
        return [_shape_result(step, first.shape)]
    known = [t for t in inputs if t is not None]
    if all(t.contents is not None for t in known) and step.operator not in ("DequantizeLinear", "QuantizeLinear"):
        folded = _fold(step, inputs, weights, opset)
        if folded is not None:
            return folded
    if any(t.shape is None for t in known):
        return unknown
    return _infer_onnx(step, inputs, weights, opset) or unknown


def _shape_result(step: Step, shape: tuple[int, ...]) -> Tensor:
    if step.operator == "Size":
        return Tensor("int64", (), np.asarray(int(np.prod(shape, dtype=np.int64)), np.int64))
    start, end = step.attributes.get("start", 0), step.attributes.get("end")
    part = np.asarray(shape[start : end if end is not None else None], np.int64)
    return Tensor("int64", part.shape, part)


def _node(step: Step, inputs: Sequence[Tensor | None], weights: Mapping[str, Array]) -> onnx.NodeProto:
    attributes = {}
    for name, value in step.attributes.items():
        if isinstance(value, str) and value.startswith(TENSOR):
            attributes[name] = onnx.numpy_helper.from_array(weights[value.removeprefix(TENSOR)])
        else:
            attributes[name] = value
    names = [f"i{k}" if t is not None else "" for k, t in enumerate(inputs)]
    outputs = [f"o{k}" if n else "" for k, n in enumerate(step.outputs)]
    return onnx.helper.make_node(step.operator, names, outputs, **attributes)


def _fold(step: Step, inputs: Sequence[Tensor | None], weights: Mapping[str, Array], opset: int) -> list[Tensor] | None:
    """Compute a step whose inputs are all constant, where the result is not large."""
    inferred = _infer_onnx(step, inputs, weights, opset)
    if inferred and any(t.shape is not None and np.prod(t.shape, dtype=np.int64) > MOST_FOLDED for t in inferred):
        return None
    node = _node(step, inputs, weights)
    feeds = {f"i{k}": t.contents for k, t in enumerate(inputs) if t is not None}
    types = {f"i{k}": _NUMBERS.get(t.dtype, 1) for k, t in enumerate(inputs) if t is not None}
    graph = onnx.helper.make_graph(
        [node], "fold", [onnx.helper.make_tensor_value_info(name, number, None) for name, number in types.items()],
        [onnx.helper.make_tensor_value_info(n, 0, None) for n in node.output if n],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        made = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # the evaluator lacks it: it is computed at run time
        return None
    arrays = iter(made)
    found = []
    for name in step.outputs:
        array = np.asarray(next(arrays)) if name else None
        if array is not None and array.size > MOST_FOLDED:
            return None
        found.append(Tensor("", None) if array is None else Tensor(dtype_of_array(array), array.shape, array))
    return found


def _infer_onnx(
    step: Step, inputs: Sequence[Tensor | None], weights: Mapping[str, Array], opset: int
) -> list[Tensor] | None:
    try:
        schema = onnx.defs.get_schema(step.operator, opset)
    except onnx.defs.SchemaError as error:
        raise ModelError(f"{step.name}: ONNX opset {opset} has no operator {step.operator}") from error
    types, data = {}, {}
    for k, tensor in enumerate(inputs):
        if tensor is None or tensor.shape is None or tensor.dtype not in _NUMBERS:
            continue
        types[f"i{k}"] = onnx.helper.make_tensor_type_proto(_NUMBERS[tensor.dtype], tensor.shape)
        if tensor.contents is not None and tensor.contents.size <= MOST_FOLDED:
            data[f"i{k}"] = onnx.numpy_helper.from_array(tensor.contents)
    imports = [onnx.helper.make_opsetid("", opset)]
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, _node(step, inputs, weights), types, data, opset_imports=imports, ir_version=10
        )
    except Exception:  # inference has no answer: the step is run with what it is given
        return None
    return [_type(found.get(f"o{k}")) for k in range(len(step.outputs))]


def _type(found: onnx.TypeProto | None) -> Tensor:
    if found is None or not found.HasField("tensor_type"):
        return Tensor("", None)
    tensor = found.tensor_type
    name = _NAMES.get(tensor.elem_type, "")
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return Tensor(name, None)
    return Tensor(name, tuple(d.dim_value for d in tensor.shape.dim))


# ---- kernels --------------------------------------------------------------------------------------------------------


def _argument(step: Step, inputs: Sequence[Tensor | None], name: str) -> Tensor | None:
    return inputs[step.arguments.index(name)] if name in step.arguments else None


def _product(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    a, w = _argument(step, inputs, "a"), _argument(step, inputs, "w")
    if a is None or a.shape is None or w is None or w.shape is None:
        return None
    return [Tensor(str(step.attributes["out"]), (*a.shape[:-1], w.shape[-2]))]


def _integer_product(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    if step.attributes.get("multiplier") != "scalar":
        return _product(step, inputs)
    return _strided_product(step, inputs)


def _strided_product(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Return the shape of a product of two activations, each transposed by its axes."""
    shapes = []
    for name, key in (("a", "a_axes"), ("w" if "w" in step.arguments else "w_kn", "w_axes")):
        tensor = _argument(step, inputs, name)
        if tensor is None or tensor.shape is None:
            return None
        shape = tensor.shape
        shapes.append(tuple(shape[i] for i in step.attributes[key]) if key in step.attributes else shape)
    a, w = shapes
    columns = w[-2] if "w" in step.arguments else w[-1]
    made = (*np.broadcast_shapes(a[:-2], w[:-2]), a[-2], columns)
    axes = step.attributes.get("out_axes", range(len(made)))
    return [Tensor(str(step.attributes["out"]), tuple(made[i] for i in axes))]


def _block_product(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    a, scales = _argument(step, inputs, "a"), _argument(step, inputs, "scales")
    if a is None or a.shape is None or scales is None or scales.shape is None:
        return None
    return [Tensor(str(step.attributes["out"]), (*a.shape[:-1], scales.shape[-1]))]


def _conv(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    x, w, rso = (_argument(step, inputs, name) for name in ("x", "w", "w_rso"))
    shape = w.shape if w is not None else None if rso is None or rso.shape is None else (rso.shape[2], *rso.shape[:2])
    if x is None or x.shape is None or shape is None:
        return None
    places = []
    for axis, (letter, begin, end) in enumerate((("h", "top", "bottom"), ("w", "left", "right"))):
        reach = (shape[1 + axis] - 1) * step.attributes[f"dilation_{letter}"] + 1
        room = x.shape[1 + axis] + step.attributes[f"pad_{begin}"] + step.attributes[f"pad_{end}"] - reach
        places.append(room // step.attributes[f"stride_{letter}"] + 1)
    return [Tensor(str(step.attributes["out"]), (x.shape[0], *places, shape[0]))]


def _window_lengths(attributes: Mapping[str, Any], kernel: Sequence[int], spatial: Sequence[int]) -> tuple[int, ...]:
    window = resolve_window(
        kernel, spatial, strides=attributes.get("strides"), dilations=attributes.get("dilations"),
        pads=attributes.get("pads"), auto_pad=attributes.get("auto_pad", "NOTSET"),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )  # fmt: skip
    found = []
    for axis, length in enumerate(spatial):
        reach = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        room = length + window.begin[axis] + window.end[axis] + window.extra[axis] - reach
        found.append(room // window.strides[axis] + 1)
    return tuple(found)


def _pool(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    x = _argument(step, inputs, "x")
    if x is None or x.shape is None:
        return None
    last = step.attributes["layout"] == "NHWC"
    spatial = x.shape[1:-1] if last else x.shape[2:]
    if step.attributes["op"] == "global_average":
        places: tuple[int, ...] = (1,) * len(spatial)
    else:
        places = _window_lengths(step.attributes, step.attributes["kernel_shape"], spatial)
    shape = (x.shape[0], *places, x.shape[-1]) if last else (*x.shape[:2], *places)
    return [Tensor("int8", shape)]


def _broadcast(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    operands = [_argument(step, inputs, name) for name in ("a", "b", "x")]
    shapes = [t.shape for t in operands if t is not None]
    if any(s is None for s in shapes):
        return None
    shape = np.broadcast_shapes(*(s for s in shapes if s is not None))
    return [Tensor(str(step.attributes["out"]), tuple(shape))]


def _dynamic(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    x = inputs[0]
    return None if x is None else [Tensor("int8", x.shape), Tensor("float32", ()), Tensor("int32", ())]


def _rows(step: Step, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    x = inputs[0]
    return (
        None
        if x is None
        else [Tensor(str(step.attributes["out"]), x.shape), Tensor(x.dtype, x.shape), Tensor(x.dtype, x.shape)]
    )


KERNEL_SHAPES = {
    "int8_matmul": _integer_product, "fp8_matmul": _product, "int4_matmul": _block_product,
    "float_matmul": _strided_product, "int8_conv": _conv, "float_conv": _conv, "int8_pool": _pool,
    "pointwise": _broadcast, "dynamic_quantize": _dynamic, "norm_quantize": _rows,
}  # fmt: skip
"""Shapes of kernels' results by their names."""
