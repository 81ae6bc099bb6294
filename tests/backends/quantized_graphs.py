"""Small quantized graphs, right and wrong, from a seed: for what an engine's parser and our legality say of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

K, N, BATCH = 64, 32, 4
"""Reduced length, outputs and rows of the products."""

FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
STORED = {
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int16": TensorProto.INT16, "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4, "uint4": TensorProto.UINT4, "int2": TensorProto.INT2, "uint2": TensorProto.UINT2,
    "int32": TensorProto.INT32, "float8e4m3fn": TensorProto.FLOAT8E4M3FN, "float8e5m2": TensorProto.FLOAT8E5M2,
    "float8e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ, "float4e2m1": TensorProto.FLOAT4E2M1,
    "float8e8m0": TensorProto.FLOAT8E8M0,
}  # fmt: skip
NUMPY = {
    **{n: np.dtype(n) for n in ("int8", "uint8", "int16", "uint16", "int32", "float32", "float16")},
    **{n: np.dtype(getattr(ml_dtypes, n)) for n in ("int4", "uint4", "int2", "uint2", "bfloat16", "float8_e4m3fn")},
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz), "float4e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
    "float8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
FORMS = (
    "matmul", "matmul-transposed", "gemm", "gemm-ta", "gemm-tb", "matmul-acts", "conv1d", "conv", "conv-grouped",
    "conv-depthwise", "conv-transpose", "gather", "add", "concat", "pair",
)  # fmt: skip


@dataclass(frozen=True)
class Quant:
    """How one operand is quantized.

    Attributes:
        stored: stored type.
        axis: None for one scale, else the axis of the scales (of the blocks where ``block`` is set).
        block: elements along the axis that share a scale; 0 without blocks.
        zero: zero, one, nan-free variants: ``zero``, ``nonzero``, ``missing``, ``scalar`` (where the scale is a
            vector), ``type`` (of another stored type) or ``attr`` (``output_dtype`` in its place).
        scale: ``good``, ``zero``, ``negative``, ``nan``, ``inf`` or ``computed``.
        scale_type: float type of the scale; empty for the graph's.
        form: ``qdq``, ``dq`` (a constant of the stored type) or ``float``.
    """

    stored: str = "int8"
    axis: int | None = None
    block: int = 0
    zero: str = "zero"
    scale: str = "good"
    scale_type: str = ""
    form: str = "qdq"


@dataclass(frozen=True)
class Spec:
    """One graph: its product or other operator, float type, operator set, and how its operands are quantized.

    ``place`` is where the nodes lie: ``main``, ``branch`` of an If, or ``function``.
    """

    form: str
    opset: int = 21
    real: str = "float32"
    x: Quant = Quant()
    w: Quant = Quant(form="dq")
    bias: str = "none"
    output: Quant | None = None
    domain: str = ""
    columns: int = N
    place: str = "main"


class _Net:
    def __init__(self, spec: Spec) -> None:
        self.spec, self.rng = spec, np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def name(self, text: str) -> str:
        return f"{text}{len(self.nodes) + len(self.weights) + len(self.inputs)}"

    def node(self, op_type: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        out = self.name(op_type.lower())
        self.nodes.append(helper.make_node(op_type, inputs, [out], name=f"n_{out}", domain=domain, **attributes))
        return out

    def constant(self, array: Any, stored: str) -> str:
        name = self.name("c")
        data = np.asarray(array)
        number = (FLOATS | STORED)[stored]
        if stored in ("int4", "uint4", "int2", "uint2", "float4e2m1"):
            bits = 2 if stored.endswith("2") else 4
            raw = _packed(data.astype(NUMPY[stored]), bits)
        else:
            raw = data.astype(NUMPY[stored]).tobytes()
        self.weights.append(
            TensorProto(name=name, data_type=number, dims=data.shape, raw_data=raw),
        )
        return name

    def input(self, shape: tuple[int, ...], dtype: int | None = None) -> str:
        name = self.name("x")
        self.inputs.append(helper.make_tensor_value_info(name, dtype or FLOATS[self.spec.real], shape))
        return name

    def scale(self, quant: Quant, shape: tuple[int, ...]) -> str:
        kind = quant.scale_type or self.spec.real
        bad = {"zero": 0.0, "negative": -0.02, "nan": np.nan, "inf": np.inf}
        sizes = _scale_shape(quant, shape)
        array = np.full(sizes, bad.get(quant.scale, 0.02))
        if array.size > 1 and quant.scale in bad:
            array.reshape(-1)[:-1] = 0.02
        name = self.constant(array, kind)
        if quant.scale == "computed":
            extra = self.name("s")
            self.inputs.append(helper.make_tensor_value_info(extra, (FLOATS | STORED)[kind], sizes))
            return self.node("Mul", [extra, name])
        return name

    def zero_point(self, quant: Quant, shape: tuple[int, ...]) -> str | None:
        if quant.zero in ("missing", "attr"):
            return None
        sizes = () if quant.zero == "scalar" else _scale_shape(quant, shape)
        array = np.full(sizes, 1 if quant.zero == "nonzero" else 0)
        other = {"int8": "uint8", "uint8": "int8"}.get(quant.stored, "int8")
        return self.constant(array, other if quant.zero == "type" else quant.stored)

    def attributes(self, quant: Quant, quantize: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if quant.axis is not None:
            found["axis"] = quant.axis
        if quant.block:
            found["block_size"] = quant.block
        if quantize and quant.zero == "attr":
            found["output_dtype"] = STORED[quant.stored]
        return found

    def quantized(self, value: str, quant: Quant, shape: tuple[int, ...]) -> str:
        """Return a tensor behind Q and DQ (or as it is)."""
        if quant.form == "float":
            return value
        scale, zero = self.scale(quant, shape), self.zero_point(quant, shape)
        tail = [scale] if zero is None else [scale, zero]
        stored = self.node("QuantizeLinear", [value, *tail], self.spec.domain, **self.attributes(quant, True))
        return self.node("DequantizeLinear", [stored, *tail], self.spec.domain, **self.attributes(quant, False))

    def weight(self, quant: Quant, shape: tuple[int, ...]) -> str:
        if quant.form in ("float", "qdq"):
            data = self.constant(self.rng.standard_normal(shape), self.spec.real)
            return self.quantized(data, quant, shape)
        low, high = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}.get(quant.stored, (1, 6))
        stored = self.constant(self.rng.integers(low, high, shape), quant.stored)
        scale, zero = self.scale(quant, shape), self.zero_point(quant, shape)
        tail = [scale] if zero is None else [scale, zero]
        return self.node("DequantizeLinear", [stored, *tail], self.spec.domain, **self.attributes(quant, False))


def _packed(data: Any, bits: int) -> bytes:
    mask = (1 << bits) - 1
    flat = data.reshape(-1).view(np.uint8) & mask
    per = 8 // bits
    flat = np.pad(flat, (0, -flat.size % per)).reshape(-1, per).astype(np.uint32)
    return bytes((flat << (np.arange(per) * bits).astype(np.uint32)).sum(1).astype(np.uint8).tobytes())


def _scale_shape(quant: Quant, shape: tuple[int, ...]) -> tuple[int, ...]:
    if quant.axis is None:
        return ()
    if not quant.block:
        return (shape[quant.axis],)
    sizes = list(shape)
    sizes[quant.axis] = -(-sizes[quant.axis] // quant.block)
    return tuple(sizes)


def weight_shape(form: str, columns: int = N) -> tuple[int, ...]:
    """Return the shape of a form's weight; ``columns`` is the number of outputs of a product."""
    return {
        "matmul": (K, columns), "gemm": (K, columns), "gemm-ta": (K, columns), "gemm-tb": (columns, K),
        "matmul-transposed": (columns, K),
        "conv1d": (16, 8, 3), "conv": (16, 8, 3, 3), "conv-grouped": (16, 4, 3, 3), "conv-depthwise": (8, 1, 3, 3),
        "conv-transpose": (8, 16, 2, 2), "gather": (20, 64),
    }.get(form, (columns, K))  # fmt: skip


def output_axis(form: str) -> int:
    """Return the axis of a weight that per-channel scales belong to."""
    return {"matmul": 1, "gemm": 1, "gemm-ta": 1, "conv-transpose": 1}.get(form, 0)


def reduced_axis(form: str) -> int:
    """Return the axis of a product's weight that is summed over (of a table: the last one)."""
    return {"matmul": 0, "gemm": 0, "gemm-ta": 0}.get(form, 1)


def build(spec: Spec) -> bytes:
    """Return the serialized model of a spec."""
    net = _Net(spec)
    result = _body(net, spec)
    if spec.output is not None:
        result = net.quantized(result, spec.output, (BATCH, N))
    out = helper.make_tensor_value_info(result, FLOATS[spec.real], None)
    out.type.tensor_type.ClearField("shape")
    opsets = [helper.make_opsetid("", spec.opset), helper.make_opsetid("com.microsoft", 1)]
    nodes, inputs, functions = net.nodes, net.inputs, []
    if spec.place == "branch":
        inside = helper.make_graph(nodes, "inside", [], [out])
        condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
        nodes = [helper.make_node("If", ["condition"], [result], "if", then_branch=inside, else_branch=inside)]
        inputs = [*inputs, condition]
    elif spec.place == "function":
        names = [v.name for v in inputs] + [t.name for t in net.weights]
        functions = [helper.make_function("own", "Inside", names, [result], nodes, opsets)]
        nodes = [helper.make_node("Inside", names, [result], "call", domain="own")]
        opsets = [*opsets, helper.make_opsetid("own", 1)]
    graph = helper.make_graph(nodes, "g", inputs, [out], net.weights)
    version = 8 if spec.opset < 19 else 10 if spec.opset < 23 else 11 if spec.opset < 25 else 13
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=version)
    return bytes(model.SerializeToString())


def _body(net: _Net, spec: Spec) -> str:
    form, shape = spec.form, weight_shape(spec.form, spec.columns)
    if form == "gather":
        return net.node("Gather", [net.weight(spec.w, shape), net.input((BATCH,), TensorProto.INT64)])
    x_shape = {
        "gemm-ta": (K, BATCH), "conv1d": (1, 8, 16), "conv": (1, 8, 8, 8), "conv-grouped": (1, 8, 8, 8),
        "conv-depthwise": (1, 8, 8, 8), "conv-transpose": (1, 8, 8, 8),
    }.get(form, (BATCH, K))  # fmt: skip
    x = net.quantized(net.input(x_shape), spec.x, x_shape)
    if form == "pair":
        return net.node("Relu", [x])
    if form in ("add", "concat", "matmul-acts"):
        other_shape = (K, N) if form == "matmul-acts" else x_shape
        other = net.quantized(net.input(other_shape), spec.w if spec.w.form != "dq" else spec.x, other_shape)
        kind = {"add": "Add", "concat": "Concat", "matmul-acts": "MatMul"}[form]
        return net.node(kind, [x, other], **({"axis": 1} if form == "concat" else {}))
    w = net.weight(spec.w, shape)
    bias = _bias(net, spec, shape[output_axis(form)])
    if form == "matmul":
        return net.node("MatMul", [x, w])
    if form == "matmul-transposed":
        return net.node("MatMul", [x, net.node("Transpose", [w], perm=[1, 0])])
    if form.startswith("gemm"):
        return net.node("Gemm", [x, w, *bias], transA=int(form == "gemm-ta"), transB=int(form == "gemm-tb"))
    group = {"conv-grouped": 2, "conv-depthwise": 8}.get(form, 1)
    kind = "ConvTranspose" if form == "conv-transpose" else "Conv"
    return net.node(kind, [x, w, *bias], group=group)


def _bias(net: _Net, spec: Spec, size: int) -> list[str]:
    if spec.bias == "none":
        return []
    if spec.bias == "float":
        return [net.constant(np.ones(size), spec.real)]
    stored = net.constant(np.arange(size), "int32")
    return [net.node("DequantizeLinear", [stored, net.constant(0.001, spec.real)])]


def legal(rng: random.Random, form: str) -> Spec:
    """Return a random spec that should be right for a symmetric, explicitly quantized engine."""
    real = rng.choice(["float32", "float32", "float16", "bfloat16"])
    kind = rng.choice(["int8"] * 5 + ["float8e4m3fn"] * 2 + ["int4-weight", "int4-weight"])
    if form in ("add", "concat", "pair", "conv1d", "conv-transpose", "gather", "matmul-acts"):
        kind = rng.choice(["int8", "int8", "float8e4m3fn"]) if form != "conv-transpose" else "int8"
    opset = rng.choice([19, 21, 21, 22, 23]) if real != "float32" or kind != "int8" else rng.choice([13, 17, 19, 21])
    weight_only = kind == "int4-weight" and not form.startswith("conv")
    if kind == "int4-weight":
        kind = "int8"
    zero = rng.choice(["zero", "zero", "attr"]) if opset >= 21 else "zero"
    x = Quant(kind, zero=zero)
    w = Quant(kind, axis=rng.choice([None, output_axis(form), output_axis(form)]), form=rng.choice(["dq", "dq", "qdq"]))
    if weight_only:
        opset = max(opset, 21)
        w = Quant("int4", axis=reduced_axis(form), block=rng.choice([16, 32, 64]), form="dq")
        x = Quant(form="float")
    if form == "gather":
        w = replace(w, axis=rng.choice([None, 0]))
    if form in ("add", "concat", "matmul-acts"):
        w = replace(x, form="qdq")
    bias = rng.choice(["none", "float"])
    return Spec(form, opset, real, x, w, bias, output=rng.choice([None, x]) if x.form != "float" else None)


def spoil(rng: random.Random, spec: Spec) -> Spec:
    """Return the spec with one thing changed, most changes being wrong."""
    what = rng.choice(["type", "type", "axis", "block", "zero", "zero", "scale", "scale", "scale_type", "opset",
                       "bias", "domain", "form", "mixed", "place"])  # fmt: skip
    if what == "opset":
        return replace(spec, opset=rng.choice([13, 16, 18, 19, 20, 22, 24, 25]))
    if what == "place":
        return replace(spec, place=rng.choice(["branch", "function"]))
    if what == "bias":
        return replace(spec, bias="int32")
    if what == "domain":
        return replace(spec, domain="com.microsoft")
    side = rng.choice(["x", "w"])
    quant: Quant = getattr(spec, side)
    if what == "mixed":
        other = "int8" if quant.stored != "int8" else rng.choice(["float8e4m3fn", "int4"])
        changed = replace(quant, stored=other)
    elif what == "type":
        types = ["uint8", "uint4", "int16", "uint16", "int2", "float8e5m2", "float8e4m3fnuz", "float4e2m1", "int4"]
        changed = replace(quant, stored=rng.choice(types))
    elif what == "axis":
        axes = [None, 0, 1, -1]
        changed = replace(quant, axis=rng.choice(axes), block=0)
    elif what == "block":
        changed = replace(quant, axis=rng.choice([0, 1]), block=rng.choice([16, 24, 32, 48, 128]))
    elif what == "zero":
        changed = replace(quant, zero=rng.choice(["nonzero", "nonzero", "missing", "scalar", "type", "attr"]))
    elif what == "scale":
        changed = replace(quant, scale=rng.choice(["zero", "negative", "nan", "inf", "computed"]))
    elif what == "scale_type":
        changed = replace(quant, scale_type=rng.choice(["float32", "float16", "bfloat16", "float8e8m0"]))
    else:
        changed = replace(quant, form=rng.choice(["float", "qdq", "dq"]) if side == "w" else "float")
    return replace(spec, **{side: changed})


def specs(count: int, seed: int = 4) -> list[Spec]:
    """Return distinct specs: a third right, a third with one change, a third with two or three."""
    rng = random.Random(seed)
    found: dict[Spec, None] = {}
    while len(found) < count:
        spec = legal(rng, FORMS[len(found) % len(FORMS)])
        for _ in range((0, 1, 1, 2, 3)[rng.randrange(5)]):
            spec = spoil(rng, spec)
        found[spec] = None
    return list(found)
