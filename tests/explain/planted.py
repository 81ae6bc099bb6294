"""Planted non-fusions: Q/DQ written by hand that ONNX Runtime does not fuse, and float models that do not quantize."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.engine import Array
from qcompiler.options import Options
from tests.passes.quantize.lab import normal
from tests.search.machine import InventedMachine

F = np.float32
IMAGE, MATRIX, OUT = "float[1,4,8,8] x", "float[2,64] x", "float[] y"
_INTEGERS = np.random.default_rng(1).integers(-99, 99, (8, 4, 3, 3)).astype(np.int8)

NUMBERS: dict[str, Array] = {
    "s": np.asarray(0.05, F), "s2": np.asarray(0.06, F), "z": np.asarray(120, np.uint8), "z0": np.asarray(0, np.uint8),
    "zi": np.asarray(0, np.int8), "zw": np.asarray(1000, np.uint16), "ws": np.asarray(0.01, F),
    "wz": np.asarray(0, np.int8), "wq": _INTEGERS, "bq": np.arange(8, dtype=np.int32),
    "bs": np.asarray(0.05 * 0.01, F), "mq": np.random.default_rng(2).integers(-99, 99, (64, 32)).astype(np.int8),
    "mb": normal(3, 32), "mbq": np.arange(32, dtype=np.int32), "c0": normal(4, 1, 4, 1, 1),
    "sc": np.asarray([1, 1, 2, 2], F), "hs": np.asarray(0.05, np.float16),
}  # fmt: skip

X = "xq = QuantizeLinear(x, s, z) dx = DequantizeLinear(xq, s, z) "
SIGNED = "xq = QuantizeLinear(x, s, zi) dx = DequantizeLinear(xq, s, zi) "
W = "dw = DequantizeLinear(wq, ws, wz) "
M = "dm = DequantizeLinear(mq, ws, wz) "
Q = " yq = QuantizeLinear(c, s, z) y = DequantizeLinear(yq, s, z)"
SIGNED_Q = " yq = QuantizeLinear(c, s, zi) y = DequantizeLinear(yq, s, zi)"
BRANCH = (
    " e = If(p) <then_branch = g1 () => (float[1,8,6,6] u) { u = Exp(c) }, "
    "else_branch = g2 () => (float[1,8,6,6] v) { v = Tanh(c) }>"
)


@dataclass(frozen=True)
class Given:
    """Q/DQ by hand; the operator in question is named ``n``."""

    body: str
    result: str = OUT
    inputs: str = IMAGE
    opset: int = 21


GIVEN: dict[str, tuple[str, Given]] = {
    # what is planted: (the first cause, the graph)
    "a shared signed dequantization": (
        "signed-activation",
        Given(SIGNED + W + "[n] c = Conv(dx, dw)" + SIGNED_Q + " c2 = Conv(dx, dw) q2 = QuantizeLinear(c2, s, zi) "
              "y2 = DequantizeLinear(q2, s, zi)", OUT + ", float[] y2"),
    ),
    "a signed result with two readers": (
        "signed-activation",
        Given(SIGNED + W + "[n] c = Conv(dx, dw)" + SIGNED_Q + " y2 = DequantizeLinear(yq, s, zi) e = Exp(y2)",
              OUT + ", float[] e"),
    ),
    "the result is a graph output": ("graph-output", Given(X + W + "[n] c = Conv(dx, dw)" + Q, OUT + ", float[] c")),
    "the result is read elsewhere": (
        "interior-used-elsewhere", Given(X + W + "[n] c = Conv(dx, dw) e = Exp(c)" + Q, OUT + ", float[] e")
    ),
    "the result is captured by a branch": (
        "captured", Given(X + W + "[n] c = Conv(dx, dw)" + BRANCH + Q, OUT + ", float[1,8,6,6] e", IMAGE + ", bool p")
    ),
    "two quantizations of one result": (
        "two-quantizations",
        Given(X + W + "[n] c = Conv(dx, dw)" + Q + " q2 = QuantizeLinear(c, s2, z) y2 = DequantizeLinear(q2, s2, z)",
              OUT + ", float[] y2"),
    ),
    "mismatched scales around a mover": (
        "parameters-differ",
        Given(X + "[n] c = MaxPool<kernel_shape=[2,2]>(dx) yq = QuantizeLinear(c, s2, z) "
              "y = DequantizeLinear(yq, s2, z)"),
    ),
    "the Relu trap": ("activation-not-redundant", Given(X + W + "[n] a = Conv(dx, dw) c = Relu(a)" + Q)),
    "a wrong bias scale": (
        "bias-scale", Given(X + W + "db = DequantizeLinear(bq, s, ) [n] c = Conv(dx, dw, db)" + Q)
    ),
    "no quantization behind a convolution": ("no-output-quantize", Given(X + W + "[n] y = Conv(dx, dw)")),
    "a float bias without a quantized result": (
        "float-bias", Given(X + M + "[n] y = Gemm(dx, dm, mb)", inputs=MATRIX)
    ),
    "an addition behind a product": (
        "product-and-add", Given(X + M + "[n] c = MatMul(dx, dm) y = Add(c, mb)", inputs=MATRIX)
    ),
    "a float constant": ("constant-not-quantized", Given(X + "[n] c = Add(dx, c0)" + Q)),
    "a float activation": (
        "input-not-quantized", Given(X + "[n] c = Add(dx, v)" + Q, inputs=IMAGE + ", float[1,4,8,8] v")
    ),
    "no kernel at all": ("no-integer-kernel", Given(X + "[n] c = Exp(dx)" + Q)),
    "a pair in the wrong place": (
        "misplaced",
        Given(X + W + "a = Conv(dx, dw) aq = QuantizeLinear(a, s, z) da = DequantizeLinear(aq, s, z) [n] c = Relu(da)"
              " yq = QuantizeLinear(c, s, z0) y = DequantizeLinear(yq, s, z0)"),
    ),
    "linear interpolation": ("resize-mode", Given(X + '[n] c = Resize<mode="linear">(dx, , sc)' + Q)),
    "indices of MaxPool": (
        "indices-used", Given(X + "[n] c, i = MaxPool<kernel_shape=[2,2]>(dx)" + Q, OUT + ", int64[] i")
    ),
    "a dilated average": ("dilations", Given(X + "[n] c = AveragePool<kernel_shape=[2,2],dilations=[2,2]>(dx)" + Q)),
    "sixteen bits": (
        "sixteen-bits",
        Given("xq = QuantizeLinear(x, s, zw) dx = DequantizeLinear(xq, s, zw) " + W + "[n] c = Conv(dx, dw) "
              "yq = QuantizeLinear(c, s, zw) y = DequantizeLinear(yq, s, zw)"),
    ),
    "half precision": (
        "not-float32",
        Given("xq = QuantizeLinear(x, hs, z) dx = DequantizeLinear(xq, hs, z) dw = DequantizeLinear(wq, hs, wz) "
              "[n] c = Conv(dx, dw) yq = QuantizeLinear(c, hs, z) y = DequantizeLinear(yq, hs, z)",
              "float16[] y", "float16[1,4,8,8] x"),
    ),
    "alpha beside a bias": (
        "gemm-form",
        Given(X + M + "db = DequantizeLinear(mbq, bs, ) [n] c = Gemm<alpha=0.5>(dx, dm, db)" + Q, inputs=MATRIX),
    ),
}  # fmt: skip

FUSED: dict[str, Given] = {
    "a convolution": Given(X + W + "[n] c = Conv(dx, dw)" + Q),
    "a right bias": Given(X + W + "db = DequantizeLinear(bq, bs, ) [n] c = Conv(dx, dw, db)" + Q),
    "a signed chain": Given(SIGNED + W + "[n] c = Conv(dx, dw)" + SIGNED_Q),
    "a shared unsigned dequantization": Given(
        X + W + "[n] c = Conv(dx, dw)" + Q + " c2 = Conv(dx, dw) q2 = QuantizeLinear(c2, s, z) "
        "y2 = DequantizeLinear(q2, s, z)", OUT + ", float[] y2",
    ),
    "a Relu at the end of the range": Given(
        X + W + "[n] a = Conv(dx, dw) c = Relu(a) yq = QuantizeLinear(c, s, z0) y = DequantizeLinear(yq, s, z0)"
    ),
    "equal scales around a mover": Given(X + "[n] c = MaxPool<kernel_shape=[2,2]>(dx)" + Q),
    "a product with float result": Given(X + M + "[n] y = MatMul(dx, dm)", inputs=MATRIX),
    "nearest neighbours": Given(X + '[n] c = Resize<mode="nearest">(dx, , sc)' + Q),
    "alpha without a bias": Given(X + M + "[n] c = Gemm<alpha=0.5>(dx, dm)" + Q, inputs=MATRIX),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A float model; the operator in question is named ``n``."""

    body: str
    result: str = OUT
    inputs: str = "float[n,4,8,8] x"
    options: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = True
    override: str = ""


def machine(integer_us: float) -> dict[str, Any]:
    """Return options under which the guard measures on an invented machine."""
    return {"guard": True, "stopwatch": InventedMachine(integer_us=integer_us)}


WEIGHTS: dict[str, Array] = {
    "w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "w2": normal(3, 8, 8, 3, 3, scale=0.2),
    "m": normal(4, 64, 32, scale=0.1), "mb": normal(5, 1, 32), "double": normal(4, 64, 32).astype(np.float64),
    "batch": normal(6, 2, 64, 32), "small": normal(7, 16, 32), "cat": normal(10, 2, 8, 6, 6),
    "sc": np.asarray([1, 1, 2, 2], F), "lw": normal(12, 1, 64, 64), "lr": normal(13, 1, 64, 16),
    "lb": normal(14, 1, 128),
}  # fmt: skip

NEVER = (
    "[i] y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { [n] u = Conv(x, w) }, "
    "else_branch = g2 () => (float[n,8,6,6] v) { v = Exp(o) }>"
)

PLANNED: dict[str, tuple[str, Planned]] = {
    "a weight that is computed": (
        "weight-not-constant",
        Planned("[n] y = Conv(x, v)", inputs="float[n,4,8,8] x, float[8,4,3,3] v"),
    ),
    "a weight of rank three": ("weight-rank", Planned("[n] y = MatMul(x, batch)", inputs="float[2,5,64] x")),
    "K too small": ("too-small", Planned("[n] y = MatMul(x, small)", inputs="float[n,16] x")),
    "double": ("not-float32", Planned("[n] y = MatMul(x, double)", "double[] y", "double[n,64] x")),
    "never observed": (
        "never-observed",
        Planned(NEVER, "float[n,8,6,6] y", "float[n,4,8,8] x, float[n,8,6,6] o, bool p"),
    ),
    "a Concat with a constant": ("constant-input", Planned("c = Conv(x, w) [n] y = Concat<axis=0>(c, cat)")),
    "linear Resize": ("resize-mode", Planned('c = Conv(x, w) [n] y = Resize<mode="linear">(c, , sc)')),
    "MaxPool with indices": (
        "indices-used",
        Planned("c = Conv(x, w) [n] y, i = MaxPool<kernel_shape=[2,2]>(c)", OUT + ", int64[] i"),
    ),
    "dilated AveragePool": (
        "dilations",
        Planned("c = Conv(x, w) [n] y = AveragePool<kernel_shape=[2,2],dilations=[2,2]>(c)"),
    ),
    "a bias that is computed": (
        "bias-not-constant",
        Planned("[n] y = Conv(x, w, v)", inputs="float[n,4,8,8] x, float[8] v"),
    ),
    "unknown rank": (
        "unknown-rank",
        Planned("e = Squeeze(x, v) c = MatMul(e, m) [n] y = Add(c, mb)", inputs="float[n,1,64] x, int64[k] v",
                options={"recipe": "int8-static"}),
    ),
    "no calibration": ("no-calibration", Planned("[n] y = Conv(x, w)", calibrated=False)),
    "no kernel": ("no-integer-kernel", Planned("c = Conv(x, w) [n] y = Exp(c)")),
    "a neighbour in float": (
        "no-integer-neighbour",
        Planned("c = Exp(x) [n] e = MaxPool<kernel_shape=[2,2]>(c) y = Tanh(e)"),
    ),
    "an activation between float": ("activation-outside", Planned("c = Exp(x) [n] e = Relu(c) y = Tanh(e)")),
    "the user wants float": ("override", Planned("[n] y = Conv(x, w)", override="float")),
    "the accuracy guard returned it": (
        "accuracy-guard",
        Planned("[n] y = Conv(x, w)", options={**machine(50.0), "min_sqnr": 150.0}),
    ),
    "measured slower": ("measured-slower", Planned("[n] y = Conv(x, w)", options=machine(900.0))),
    "folded into another": ("folded", Planned("c = Conv(x, w, b) [n] y = Identity(c)")),
    "indices only": ("not-a-group", Planned("c = Conv(x, w) [n] i = ArgMax(c) y = Identity(c)", OUT + ", int64[] i")),
}  # fmt: skip


def planned_options(case: Planned, feeds: list[dict[str, Array]], override: str = "") -> Options:
    """Return the options of a planted float model: by rule and without timing unless it says else."""
    settings = {"guard": False, "target": "ort-x86", **case.options}
    return Options(calibration=feeds if case.calibrated else None, overrides=override or None, **settings)
