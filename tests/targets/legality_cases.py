"""For every row of the legality tables the smallest graph that breaks it alone, and a corrected twin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from tests.backends.quantized_graphs import Quant, Spec, build

OPSET = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "trt" : 1]> '
NEWER = '<ir_version: 11, opset_import: ["" : 23]> '
CONSTANTS = (
    "<float s = {0.1}, int8 z = {0}, int8[2,2] w = {1, 2, 3, 4}, float[2] two = {0.1, 0.2}, int8[2] zz = {0, 0}>"
)

PAIR = Spec("pair")
INT8 = Quant()
FP8 = Quant("float8e4m3fn")
FP4 = Quant("float4e2m1")
FLOAT = Quant(form="float")
BLOCKS = Quant("int4", axis=0, block=32, form="dq")
WEIGHT_ONLY = Spec("matmul", x=FLOAT, w=BLOCKS)
FLOATS = Spec("conv-transpose", real="bfloat16", x=FLOAT, w=FLOAT)


@dataclass(frozen=True)
class Case:
    """A graph that breaks one row, and its twin that does not.

    Attributes:
        bad: breaks the row.
        good: breaks no row but those of ``also``.
        sm: compute capability of both.
        flavour: library; empty for the table's first.
        also: other rows that the first graph cannot but break.
    """

    bad: Spec | str
    good: Spec | str
    sm: int = 89
    flavour: str = ""
    also: tuple[str, ...] = ()


def serialized(graph: Spec | str) -> bytes:
    """Return a graph's model."""
    if isinstance(graph, Spec):
        return build(graph)
    model = onnx.parser.parse_model(graph if graph.startswith("<") else OPSET + graph)
    for output in model.graph.output:
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return bytes(model.SerializeToString())


def pair(quant: Quant, opset: int = 21, real: str = "float32") -> Spec:
    return Spec("pair", opset, real, quant)


def net(body: str, inputs: str = "float[4,2] x") -> str:
    return f"g ({inputs}) => (y) {CONSTANTS} {{ {body} }}"


def contrib(call: str, outputs: str = "y") -> str:
    return net(f"q = QuantizeLinear(x, s, z) {outputs} = com.microsoft.{call}")


GOOD_PAIR = net("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)")
TRT_OP = "y = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>(x)"
QLC = "y = QLinearConv(x, s, z, k, {}, {}, s, z)"
QLC_HEAD = (
    "g (int8[1,1,4,4] x) => (int8[1,2,4,4] y) <float s = {0.1}, int8 z = {0}, float[2] two = {0.1, 0.2}, "
    "int8[2] zz = {0, 0}, int8[2,1,1,1] k = {1, 2}>"
)


def nbits(block: int) -> str:
    numbers = "{" + ", ".join(["1"] * 32) + "}"
    return (
        f"g (float16[4,32] x) => (float16[4,2] y) <uint8[2,1,16] b = {numbers}, float16[2] t = {{1, 1}}> "
        f"{{ y = com.microsoft.MatMulNBits<K = 32, N = 2, bits = 4, block_size = {block}>(x, b, t) }}"
    )


def relu_behind(quantized: bool) -> str:
    middle = "q2 = QuantizeLinear(m, s, z) d2 = DequantizeLinear(q2, s, z)" if quantized else "d2 = Identity(m)"
    both = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, s, z) m = MatMul(d, e) "
    return net(both + middle + " y = Relu(d2)")


def attention(body: str) -> str:
    shape = "float16[1,2,8,16]"
    return f"{NEWER}g ({shape} x, {shape} k) => ({shape} y) <float16 s = {{11878}}, int8 z = {{0}}> {{ {body} }}"


def named(name: str) -> str:
    return net(f"[{name}] q = QuantizeLinear(x, s, z) [other] y = DequantizeLinear(q, s, z)")


TENSORRT = {
    "uint8-quantization": Case(pair(Quant("uint8")), PAIR),
    "zero-point-missing": Case(pair(Quant(zero="missing")), pair(Quant(zero="attr"))),
    "stored-type-unsupported": Case(pair(Quant("int16")), PAIR),
    "bias-quantized": Case(Spec("gemm", bias="int32"), Spec("gemm", bias="float")),
    "zero-point-type": Case(Spec("gather", w=Quant(zero="type", form="dq")), Spec("gather")),
    "stored-constant-moved": Case(
        net("g = Gather(w, i) y = DequantizeLinear(g, s, z)", "int64[3] i"),
        net("d = DequantizeLinear(w, s, z) y = Gather(d, i)", "int64[3] i"),
    ),
    "zero-point-not-zero": Case(pair(Quant(zero="nonzero")), PAIR),
    "zero-point-not-constant": Case(
        net("q = QuantizeLinear(x, s, v) y = DequantizeLinear(q, s, v)", "float[4,2] x, int8 v"), GOOD_PAIR
    ),
    "zero-point-shape": Case(Spec("gather", w=Quant(axis=0, zero="scalar", form="dq")), Spec("gather")),
    "scale-not-positive": Case(pair(Quant(scale="zero")), PAIR),
    "scale-not-finite": Case(pair(Quant(scale="inf")), PAIR),
    "scale-not-constant": Case(pair(Quant(scale="computed")), PAIR),
    "scale-shape": Case(
        "g (int64[3] i) => (float[3,3] y) <float[2] s = {0.1, 0.2}, int8[2,3] w = {1, 2, 3, 4, 5, 6}> "
        "{ d = DequantizeLinear<axis = 1>(w, s) y = Gather(d, i) }",
        "g (int64[3] i) => (float[3,3] y) <float[2] s = {0.1, 0.2}, int8[2,3] w = {1, 2, 3, 4, 5, 6}> "
        "{ d = DequantizeLinear<axis = 0>(w, s) y = Gather(d, i) }",
    ),
    "e8m0-native": Case(pair(Quant(scale_type="float8e8m0"), 24), pair(INT8, 24)),
    "scale-type-unsupported": Case(pair(Quant(scale_type="float8e4m3fn")), PAIR),
    "scale-type-differs": Case(pair(Quant(scale_type="float16")), pair(INT8, real="float16")),
    "float-types-differ": Case(
        Spec("matmul", w=Quant(scale_type="float16", form="dq")), Spec("matmul", real="float16")
    ),
    "activation-per-channel": Case(pair(Quant(axis=1)), PAIR),
    "activation-blocked": Case(pair(Quant(axis=1, block=16)), PAIR),
    "weight-axis": Case(Spec("matmul", w=Quant(axis=0, form="dq")), Spec("matmul", w=Quant(axis=1, form="dq"))),
    "block-not-dividing": Case(replace(WEIGHT_ONLY, w=replace(BLOCKS, block=128)), WEIGHT_ONLY),
    "block-axis": Case(
        Spec("conv1d", x=FLOAT, w=Quant("int8", axis=0, block=16, form="dq")),
        Spec("conv1d", x=FLOAT, w=Quant("int8", axis=1, block=8, form="dq")),
        also=("int8-blocked", "operand-unquantized"),
    ),
    "int8-blocked": Case(Spec("gather", w=Quant(axis=1, block=16, form="dq")), Spec("gather")),
    "int4-activation": Case(pair(Quant("int4")), PAIR),
    "int4-not-weight-only": Case(Spec("matmul", w=BLOCKS), WEIGHT_ONLY),
    "int4-convolution": Case(
        Spec("conv1d", 23, x=FLOAT, w=replace(FP4, form="dq")), Spec("conv1d", 23, x=FLOAT, w=FLOAT), sm=120
    ),
    "int4-per-channel": Case(replace(WEIGHT_ONLY, w=Quant("int4", axis=1, form="dq")), WEIGHT_ONLY),
    "int4-per-tensor": Case(replace(WEIGHT_ONLY, w=Quant("int4", form="dq")), WEIGHT_ONLY),
    "int4-block": Case(replace(WEIGHT_ONLY, w=replace(BLOCKS, block=8)), WEIGHT_ONLY),
    "int4-block-axis": Case(replace(WEIGHT_ONLY, w=replace(BLOCKS, axis=1)), WEIGHT_ONLY),
    "int4-odd": Case(replace(WEIGHT_ONLY, columns=31), WEIGHT_ONLY),
    "matmulnbits-plugin": Case(nbits(32), WEIGHT_ONLY, flavour="tensorrt-rtx"),
    "matmulnbits-form": Case(nbits(16), nbits(32), flavour="tensorrt"),
    "fp8-needs-sm89": Case(pair(FP8), PAIR, sm=80),
    "fp4-needs-sm100": Case(pair(FP4, 23), pair(INT8, 23)),
    "block-operators-need-sm100": Case(
        net(TRT_OP.replace("y =", "y, v ="), "float[4,64] x"), net("y = Relu(x)", "float[4,64] x")
    ),
    "operator-form": Case(net("y, a, b = DynamicQuantizeLinear(x)"), GOOD_PAIR),
    "contrib-operator": Case(contrib("QLinearAdd(q, s, z, q, s, z, s, z)"), GOOD_PAIR),
    "mixed-operand-types": Case(Spec("matmul", w=replace(FP8, form="dq")), Spec("matmul", x=FP8, w=FP8)),
    "moved-across-types": Case(Spec("gather", w=Quant(form="dq"), output=FP8), Spec("gather", output=INT8)),
    "operand-unquantized": Case(Spec("matmul", x=FLOAT), Spec("matmul")),
    "conv-transpose-float": Case(Spec("conv-transpose"), Spec("conv-transpose", x=FLOAT, w=FLOAT)),
    "conv-transpose-bfloat16": Case(FLOATS, replace(FLOATS, real="float16"), flavour="tensorrt-rtx"),
    "activation-before-quantization": Case(relu_behind(True), relu_behind(False)),
    "attention-quantized": Case(
        attention("q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Attention(d, k, k)"),
        attention("y = Attention(x, k, k)"),
    ),
    "attention-one-tensor": Case(
        attention("y = Attention(x, x, x)"), attention("y = Attention(x, k, k)"), flavour="tensorrt-rtx"
    ),
    "node-name-shared": Case(named("z"), named("quantize")),
    "opset-out-of-range": Case(pair(INT8, 26), pair(INT8, 25)),
    "opset-per-channel": Case(
        Spec("gather", 12, w=Quant(axis=0, form="dq")), Spec("gather", 13, w=Quant(axis=0, form="dq"))
    ),
    "opset-scale-type": Case(pair(INT8, 17, "float16"), pair(INT8, 19, "float16")),
    "opset-fp8": Case(pair(FP8, 18), pair(FP8, 19)),
    "opset-int4": Case(replace(WEIGHT_ONLY, opset=20), WEIGHT_ONLY, also=("opset-blocks",)),
    "opset-blocks": Case(
        Spec("gather", 20, w=Quant(axis=1, block=16, form="dq")),
        Spec("gather", 21, w=Quant(axis=1, block=16, form="dq")),
        also=("int8-blocked",),
    ),
    "opset-output-dtype": Case(pair(Quant(zero="attr"), 20), pair(Quant(zero="attr"), 21)),
    "opset-fp4": Case(pair(FP4, 22), pair(FP4, 23), sm=120),
}

OPENVINO = {
    "qlinear-conv-per-channel": Case(
        f"{QLC_HEAD} {{ {QLC.format('two', 'zz')} }}", f"{QLC_HEAD} {{ {QLC.format('s', 'z')} }}"
    ),
    "contrib-wrong-numbers": Case(contrib("QLinearMul(q, s, z, q, s, z, s, z)"), GOOD_PAIR),
    "contrib-operator": Case(contrib("QLinearGlobalAveragePool<channels_last = 0>(q, s, z, s, z)"), GOOD_PAIR),
    "dynamic-quantization": Case(net("y, a, b = DynamicQuantizeLinear(x)"), GOOD_PAIR),
    "weight-unsigned": Case(Spec("matmul", w=Quant("uint8", form="dq")), Spec("matmul")),
    "weight-zero-point": Case(Spec("conv", w=Quant(zero="nonzero", form="dq")), Spec("conv")),
    "weight-16-bits": Case(Spec("matmul", x=FLOAT, w=Quant("int16", form="dq")), Spec("matmul", x=FLOAT)),
    "conv-transpose-float": Case(Spec("conv-transpose"), Spec("conv-transpose", x=FLOAT, w=FLOAT)),
    "operand-unquantized": Case(Spec("conv", x=FLOAT), Spec("conv")),
}

CASES = {"tensorrt": TENSORRT, "openvino": OPENVINO}
