"""Models whose work is done in bodies of Loop, Scan and If, made in memory, and seeded feeds for them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from qcompiler.engine import Array
from tests.synthetic import normal

F = np.float32
WIDTH = 64

_CELL = """
    [cell_x] p = MatMul(x, wx) [cell_b] pb = Add(p, b)
    [cell_h] q = MatMul(h, wh) [cell_sum] s = Add(pb, q) [cell_tanh] hn = Tanh(s)
"""
"""A recurrent cell on a captured activation x and the carried state h, float32 [n, 64] each."""


def weights() -> dict[str, Array]:
    """Return the constants of the cell; the state contracts, so that an error does not grow with the steps."""
    return {
        "wx": normal(1, WIDTH, WIDTH, fan=2 * WIDTH),
        "wh": normal(2, WIDTH, WIDTH, fan=8 * WIDTH),
        "b": normal(3, WIDTH) * F(0.1),
        "wo": normal(4, WIDTH, 32, fan=WIDTH),
    }


def parse(text: str, constants: dict[str, Array], opset: int = 21) -> onnx.ModelProto:
    """Return a model of ONNX text (``(inputs) => (outputs) { nodes }``) and constants of the main graph."""
    made = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> main {text}')
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items())
    return made


def recurrent_loop() -> onnx.ModelProto:
    """Return a Loop of at most ``steps`` iterations that also stops behind iteration ``last``.

    x and h0 float32 [n, 64] to the last state [n, 64] and the rows [iterations, n, 32] that a product reads off each.
    """
    text = f"""(int64 steps, int64 last, float[n,64] x, float[n,64] h0) => (float[n,64] state, float[t,n,32] rows) {{
      [loop] state, rows = Loop (steps, , h0) <body = cell (int64 i, bool go, float[n,64] h)
        => (bool again, float[n,64] hn, float[n,32] row) {{
          {_CELL}
          [out] row = MatMul(hn, wo) [again] again = Less(i, last)
      }}>
    }}"""
    return parse(text, weights())


def loop_feeds(count: int = 8, rows: int = 3) -> list[dict[str, Array]]:
    """Return feeds of `recurrent_loop`; the number of iterations is from 3 to 6."""
    rng = np.random.default_rng(7)
    return [
        {
            "steps": np.asarray(6), "last": np.asarray(int(rng.integers(2, 8))),
            "x": rng.standard_normal((rows, WIDTH)).astype(F),
            "h0": np.tanh(rng.standard_normal((rows, WIDTH))).astype(F),
        }
        for _ in range(count)
    ]  # fmt: skip


def recurrent_scan() -> onnx.ModelProto:
    """Return the same cell over the rows of a sequence: xs [t, n, 64] and h0 [n, 64] to state and rows [t, n, 32]."""
    text = f"""(float[t,n,64] xs, float[n,64] h0) => (float[n,64] state, float[t,n,32] rows) {{
      [scan] state, rows = Scan <num_scan_inputs = 1, body = cell (float[n,64] h, float[n,64] x)
        => (float[n,64] hn, float[n,32] row) {{ {_CELL} [out] row = MatMul(hn, wo) }}> (h0, xs)
    }}"""
    return parse(text, weights())


def scan_feeds(count: int = 8) -> list[dict[str, Array]]:
    """Return feeds of `recurrent_scan`, of 2 to 5 steps."""
    rng = np.random.default_rng(8)
    return [
        {
            "xs": rng.standard_normal((2 + i % 4, 3, WIDTH)).astype(F),
            "h0": np.tanh(rng.standard_normal((3, WIDTH))).astype(F),
        }
        for i in range(count)
    ]


def nested_loops() -> onnx.ModelProto:
    """Return a Loop that, by a captured switch, runs a Loop over the cell or a single product, then a product.

    steps int64, deep bool, x and h0 float32 [n, 64] to y [n, 64]. x is the same in all iterations of both Loops.
    """
    text = f"""(int64 steps, bool deep, float[n,64] x, float[n,64] h0) => (float[n,64] y) {{
      [outer] y = Loop (steps, , h0) <body = a (int64 i, bool go, float[n,64] u) => (bool again, float[n,64] w) {{
        [choose] v = If (deep) <
          then_branch = yes () => (float[n,64] vy) {{
            [inner] vy = Loop (steps, , u) <body = c (int64 j, bool go2, float[n,64] h)
              => (bool again2, float[n,64] hn) {{ {_CELL} [again2] again2 = Identity(go2) }}>
          }},
          else_branch = no () => (float[n,64] vn) {{ [bend] e = Tanh(x) [single] vn = MatMul(e, wo64) }}>
        [mix] m = MatMul(v, wx) [tanh] w = Tanh(m) [again] again = Identity(go)
      }}>
    }}"""
    return parse(text, {**weights(), "wo64": normal(5, WIDTH, WIDTH, fan=WIDTH)})


def nested_feeds(count: int = 8, deep: bool = True) -> list[dict[str, Array]]:
    """Return feeds of `nested_loops` that all take one branch."""
    rng = np.random.default_rng(9)
    return [
        {
            "steps": np.asarray(3), "deep": np.asarray(deep), "x": rng.standard_normal((3, WIDTH)).astype(F),
            "h0": np.tanh(rng.standard_normal((3, WIDTH))).astype(F),
        }
        for _ in range(count)
    ]  # fmt: skip


def convolution_loop() -> onnx.ModelProto:
    """Return a Loop over a residual convolution that also adds a captured activation; x and y float32 [n, 8, 12, 12].

    The captured activation is the output of a convolution in front of the Loop; every state is also a scan output.
    """
    constants = {
        "w0": normal(1, 8, 8, 3, 3, fan=72), "w1": normal(2, 8, 8, 3, 3, fan=300), "b1": normal(3, 8) * F(0.1),
        "w2": normal(4, 8, 8, 3, 3, fan=300),
    }  # fmt: skip
    text = """(int64 steps, float[n,8,12,12] x) => (float[n,8,12,12] y, float[t,n,8,12,12] states) {
      [front] c0 = Conv<pads=[1,1,1,1]>(x, w0) [front_relu] r0 = Relu(c0)
      [loop] y, states = Loop (steps, , x) <body = step (int64 i, bool go, float[n,8,12,12] v)
        => (bool again, float[n,8,12,12] z, float[n,8,12,12] out) {
          [conv1] c1 = Conv<pads=[1,1,1,1]>(v, w1, b1) [relu1] r1 = Relu(c1)
          [conv2] c2 = Conv<pads=[1,1,1,1]>(r1, w2)
          [add] z = Add(c2, r0) [copy] out = Identity(z) [again] again = Identity(go)
      }>
    }"""
    return parse(text, constants)


def image_feeds(count: int = 6) -> list[dict[str, Array]]:
    """Return feeds of `convolution_loop`."""
    rng = np.random.default_rng(10)
    return [{"steps": np.asarray(2 + i % 3), "x": rng.standard_normal((2, 8, 12, 12)).astype(F)} for i in range(count)]
