"""Activations quantized in blocks whose scales are found at run time (NVFP4, MXFP8): one function per format.

A group of form ``dynamic`` on a target whose activations are float4e2m1 or float8e4m3fn in blocks reads its data
through a call of domain ``qcompiler.block``::

    y = qcompiler.block::QuantizeMXFP8(x)           # blocks of 32 along the last axis, scales powers of two
    y = qcompiler.block::QuantizeNVFP4(x, xo)       # blocks of 16, float8e4m3fn scales under the constant xo

``y`` has the type and shape of ``x`` (float32): it holds the numbers that the quantized data stand for. ``xo`` is a
float32 scalar, the calibrated largest magnitude over 6 x 448. The functions are local to the model and made of plain
ONNX operators, so ONNX Runtime runs any graph that calls them; they stay when fused calls are inlined
(`qcompiler.passes.inlining`), inside the group's call until then, so a lowering finds them either way: by the domain,
with the names in `BLOCK_QUANTIZERS`. A target with the formats puts its own quantization in the place of a call (for
TensorRT ``trt::TRT_MXFP8DynamicQuantize`` or ``TRT_FP4DynamicQuantize`` and the dequantization behind it).

The scales of MXFP8 follow the OCP Microscaling specification 1.0, section 6.3: 2 ** (floor(log2(largest)) - 8).
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

BLOCK_DOMAIN = "qcompiler.block"
BLOCK_SIZES = {"QuantizeMXFP8": 32, "QuantizeNVFP4": 16}
BLOCK_QUANTIZERS = tuple(BLOCK_SIZES)

# In all: blocks along the last axis become an axis of their own.
_HEAD = """<opset_import: ["" : 21], domain: "qcompiler.block">
NAME (ARGUMENTS) => (y) {
  minus = Constant<value_ints=[-1]>()
  shape = Shape(x)
  outer_shape = Shape<end=-1>(x)
  block = Constant<value_ints=[BLOCK]>()
  blocked = Concat<axis=0>(outer_shape, minus, block)
  xb = Reshape(x, blocked)
  magnitude = Abs(xb)
  largest = ReduceMax<keepdims=1>(magnitude, minus)
"""
# Log and Pow may miss a power of two by a hair: compared with the magnitude itself, the exponent is exact.
_MXFP8 = """  least = Constant<value_float=7.52316385e-37>()
  ln2 = Constant<value_float=0.6931471805599453>()
  one = Constant<value_float=1.0>()
  two = Constant<value_float=2.0>()
  shift = Constant<value_float=0.00390625>()
  reach = Max(largest, least)
  log = Log(reach)
  log2 = Div(log, ln2)
  exponent = Floor(log2)
  guess = Pow(two, exponent)
  half = Div(guess, two)
  double = Mul(guess, two)
  over = Greater(guess, reach)
  under = LessOrEqual(double, reach)
  low = Where(over, half, guess)
  power = Where(under, double, low)
  scale = Mul(power, shift)
  ratio = Div(xb, scale)
  top = Constant<value_float=448.0>()
  bottom = Constant<value_float=-448.0>()
  inside = Clip(ratio, bottom, top)
  stored = Cast<to=17>(inside)
  grid = Cast<to=1>(stored)
"""
# The numbers of float4e2m1 are multiples of 0.5 up to 2, of 1 up to 4 and of 2 up to 6; Round takes ties to even, which
# is the even mantissa in each of the three.
_NVFP4 = """  six = Constant<value_float=6.0>()
  minus_six = Constant<value_float=-6.0>()
  two = Constant<value_float=2.0>()
  four = Constant<value_float=4.0>()
  most = Constant<value_float=448.0>()
  tiny = Constant<value_float=0.001953125>()
  reach = Div(largest, six)
  wanted = Div(reach, xo)
  fitted = Clip(wanted, tiny, most)
  stored = Cast<to=17>(fitted)
  numbers = Cast<to=1>(stored)
  scale = Mul(numbers, xo)
  ratio = Div(xb, scale)
  inside = Clip(ratio, minus_six, six)
  size = Abs(inside)
  doubled = Mul(inside, two)
  doubled_grid = Round(doubled)
  fine = Div(doubled_grid, two)
  middle = Round(inside)
  halved = Div(inside, two)
  halved_grid = Round(halved)
  coarse = Mul(halved_grid, two)
  small = LessOrEqual(size, two)
  medium = LessOrEqual(size, four)
  upper = Where(medium, middle, coarse)
  grid = Where(small, fine, upper)
"""
_TAIL = """  result = Mul(grid, scale)
  y = Reshape(result, shape)
}
"""
_BODIES = {"QuantizeMXFP8": _MXFP8, "QuantizeNVFP4": _NVFP4}


def block_quantizer(name: str, opset: int = 21) -> ir.Function:
    """Return the function of one of `BLOCK_QUANTIZERS`, for a model of the given opset."""
    arguments = "x, xo" if "xo" in _BODIES[name] else "x"
    head = _HEAD.replace("NAME", name).replace("ARGUMENTS", arguments).replace("BLOCK", str(BLOCK_SIZES[name]))
    text = head.replace('"" : 21', f'"" : {opset}') + _BODIES[name] + _TAIL
    proto = onnx.parser.parse_function(text)
    for index, node in enumerate(proto.node):
        node.name = f"{node.op_type}_{index}"  # ONNX Runtime needs distinct names inside a body
    return ir.serde.deserialize_function(proto)


def quantizer_of(activation: str, scale_format: str) -> str | None:
    """Return the function for activations of a format with scales of a format, or None if there is none."""
    return {
        ("float8e4m3fn", "float8e8m0"): "QuantizeMXFP8",
        ("float4e2m1", "float8e4m3fn"): "QuantizeNVFP4",
    }.get((activation, scale_format))
