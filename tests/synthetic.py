"""Small models of the families that people compile, made in memory, and seeded feeds for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
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
        list(made.node),
        "g",
        infos(inputs),
        infos(outputs),
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
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


def residual_cnn(batch: int | str = "n") -> onnx.ModelProto:
    """Return a convolution, a residual block, a pool and a classifier; x [batch, 3, 16, 16] to logits [batch, 10]."""
    weights = {
        "w0": normal(1, 16, 3, 3, 3, fan=27), "b0": normal(2, 16), "w1": normal(3, 16, 16, 3, 3, fan=72),
        "b1": normal(4, 16), "w2": normal(5, 16, 16, 3, 3, fan=144), "wf": normal(6, 16, 10, fan=4),
        "bf": normal(7, 10),
    }  # fmt: skip
    body = """
    /stem/Conv: c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
    /stem/Relu: r0 = Relu(c0)
    /block/Conv1: c1 = Conv<pads=[1,1,1,1]>(r0, w1, b1)
    /block/Relu1: r1 = Relu(c1)
    /block/Conv2: c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    /block/Add: s = Add(c2, r0)
    /block/Relu2: r2 = Relu(s)
    /pool: p = GlobalAveragePool(r2)
    /flatten: f = Flatten(p)
    /fc: logits = Gemm(f, wf, bf)
    """
    return model(body, {"x": (batch, 3, 16, 16)}, {"logits": (batch, 10)}, weights)


def transformer_block(opset: int = 17) -> onnx.ModelProto:
    """Return a block with a mask; x [2, length, 64] and mask [2, 1, 1, length] (0 or 1) to y [2, length, 64]."""
    names = ("q", "k", "v", "o")
    weights = {f"w{n}": normal(i, 64, 64, fan=64) for i, n in enumerate(names)}
    weights |= {f"b{n}": normal(10 + i, 64) * F(0.1) for i, n in enumerate(names)}
    weights |= {
        "wu": normal(20, 64, 256, fan=64), "wd": normal(21, 256, 64, fan=128), "g": np.ones(64, F),
        "z": np.zeros(64, F), "heads": np.asarray([2, -1, 4, 16]), "flat": np.asarray([2, -1, 64]),
        "one": F(1), "low": F(-1e4), "scale": F(0.25),
    }  # fmt: skip
    lines = ["/n1: n1 = LayerNormalization<axis=-1>(x, g, z)"]
    for n in names[:3]:
        lines += [f"/attn/{n}/MatMul: {n}m = MatMul(n1, w{n})", f"/attn/{n}/Add: {n}a = Add({n}m, b{n})"]
        lines += [f"/attn/{n}/Reshape: {n}r = Reshape({n}a, heads)"]
    lines += [
        "/attn/q/T: qt = Transpose<perm=[0,2,1,3]>(qr)", "/attn/k/T: kt = Transpose<perm=[0,2,3,1]>(kr)",
        "/attn/v/T: vt = Transpose<perm=[0,2,1,3]>(vr)", "/attn/scores: sc = MatMul(qt, kt)",
        "/attn/scale: ss = Mul(sc, scale)", "/attn/not: nm = Sub(one, mask)", "/attn/floor: fm = Mul(nm, low)",
        "/attn/mask: sm = Add(ss, fm)", "/attn/softmax: p = Softmax<axis=-1>(sm)", "/attn/mix: c = MatMul(p, vt)",
        "/attn/back: ct = Transpose<perm=[0,2,1,3]>(c)", "/attn/join: cr = Reshape(ct, flat)",
        "/attn/o/MatMul: om = MatMul(cr, wo)", "/attn/o/Add: oa = Add(om, bo)", "/res1: h = Add(x, oa)",
        "/n2: n2 = LayerNormalization<axis=-1>(h, g, z)", "/mlp/up: u = MatMul(n2, wu)", "/mlp/act: a = Relu(u)",
        "/mlp/down: d = MatMul(a, wd)", "/res2: y = Add(h, d)",
    ]  # fmt: skip
    inputs = {"x": (2, "length", 64), "mask": (2, 1, 1, "length")}
    return model("\n".join(lines), inputs, {"y": (2, "length", 64)}, weights, opset=opset)


def lstm_in_if() -> onnx.ModelProto:
    """Return an LSTM in one branch and a product in the other; x [5, 2, 64] and loud (bool) to y [5, 2, 64]."""
    weights = {"w": normal(1, 1, 256, 64, fan=64), "r": normal(2, 1, 256, 64, fan=64), "m": normal(3, 64, 64, fan=64)}
    body = """
    /choose: t = If (loud) <then_branch = a () => (float[5,2,64] p) { [lstm] h = LSTM<hidden_size=64>(x, w, r) [sq] p = Squeeze(h, one) }, else_branch = b () => (float[5,2,64] q) { [product] q = MatMul(x, m) }>
    /tanh: y = Tanh(t)
    """  # noqa: E501
    types = {"loud": TensorProto.BOOL}
    shapes = {"x": (5, 2, 64), "loud": ()}
    return model(body, shapes, {"y": (5, 2, 64)}, {**weights, "one": np.asarray([1])}, types=types)


def qdq_cnn(dtype: type) -> onnx.ModelProto:
    """Return a quantized model of two convolutions with an integer interface; x and y [n, 8, 8, 8] of the type."""
    rng = np.random.default_rng(3)
    zero, least = (0, -128) if dtype is np.int8 else (128, 0)
    weights: dict[str, Array] = {
        "zx": np.asarray(zero, dtype),
        "z1": np.asarray(least, dtype),
        "z0": np.zeros(8, np.int8),
        "zb": np.zeros(8, np.int32),
    }
    for name, scale in (("sx", 0.05), ("s1", 0.04), ("sy", 0.06)):
        weights[name] = np.asarray(scale, F)
    for layer, source in ((1, "sx"), (2, "s1")):
        weights[f"w{layer}"] = rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
        weights[f"sw{layer}"] = rng.uniform(1e-3, 3e-3, 8).astype(F)
        weights[f"b{layer}"] = rng.integers(-2000, 2000, 8).astype(np.int32)
        weights[f"sb{layer}"] = (weights[f"sw{layer}"] * weights[source]).astype(F)
    body = """
    /in: x0 = DequantizeLinear(x, sx, zx)
    /w1: w1f = DequantizeLinear<axis=0>(w1, sw1, z0)
    /b1: b1f = DequantizeLinear<axis=0>(b1, sb1, zb)
    /conv1: c1 = Conv<pads=[1,1,1,1]>(x0, w1f, b1f)
    /relu: r1 = Relu(c1)
    /q1: q1 = QuantizeLinear(r1, s1, z1)
    /dq1: d1 = DequantizeLinear(q1, s1, z1)
    /w2: w2f = DequantizeLinear<axis=0>(w2, sw2, z0)
    /b2: b2f = DequantizeLinear<axis=0>(b2, sb2, zb)
    /conv2: c2 = Conv<pads=[1,1,1,1]>(d1, w2f, b2f)
    /out: y = QuantizeLinear(c2, sy, zx)
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(body, {"x": ("n", 8, 8, 8)}, {"y": ("n", 8, 8, 8)}, weights, types={"x": kind, "y": kind})


def half_mlp() -> onnx.ModelProto:
    """Return a float16 network; x float16 [4, 64] to y float16 [4, 64]."""
    weights = {n: normal(i, 64, 64, fan=64).astype(np.float16) for i, n in enumerate(("w1", "w2"))}
    body = """
    /m1: a = MatMul(x, w1)
    /relu: b = Relu(a)
    /m2: y = MatMul(b, w2)
    """
    types = dict.fromkeys("xy", TensorProto.FLOAT16)
    return model(body, {"x": (4, 64)}, {"y": (4, 64)}, weights, types=types)


def brain_mlp() -> onnx.ModelProto:
    """Return a network stored in bfloat16 that computes in float32; x bfloat16 [4, 64] to y bfloat16 [4, 64]."""
    weights = {n: normal(i, 64, 64, fan=64).astype(ml_dtypes.bfloat16) for i, n in enumerate(("w1", "w2"))}
    body = """
    /x: xf = Cast<to=1>(x)
    /w1: w1f = Cast<to=1>(w1)
    /w2: w2f = Cast<to=1>(w2)
    /m1: a = MatMul(xf, w1f)
    /relu: b = Relu(a)
    /m2: c = MatMul(b, w2f)
    /y: y = Cast<to=16>(c)
    """
    types = dict.fromkeys("xy", TensorProto.BFLOAT16)
    return model(body, {"x": (4, 64)}, {"y": (4, 64)}, weights, types=types)


def two_heads() -> onnx.ModelProto:
    """Return boxes and class scores of one trunk; x [1, 8, 16, 16], boxes [1, 4, 16, 16], scores [1, 6, 16, 16]."""
    weights = {"wt": normal(1, 16, 8, 3, 3, fan=72), "wb": normal(2, 4, 16, 3, 3, fan=72),
               "ws": normal(3, 6, 16, 3, 3, fan=72)}  # fmt: skip
    body = """
    /trunk: t = Conv<pads=[1,1,1,1]>(x, wt)
    /relu: r = Relu(t)
    /boxes: boxes = Conv<pads=[1,1,1,1]>(r, wb)
    /scores: s = Conv<pads=[1,1,1,1]>(r, ws)
    /sigmoid: scores = Sigmoid(s)
    """
    shapes = {"boxes": (1, 4, 16, 16), "scores": (1, 6, 16, 16)}
    return model(body, {"x": (1, 8, 16, 16)}, shapes, weights)


def recurrent_step() -> onnx.ModelProto:
    """Return one step with a state of its own; x [1, 64] and h0 [1, 64] to y [1, 10] and hn [1, 64]."""
    weights = {"wx": normal(1, 64, 64, fan=64), "wh": normal(2, 64, 64, fan=128), "wy": normal(3, 64, 10, fan=64)}
    body = """
    /wx: a = MatMul(x, wx)
    /wh: b = MatMul(h0, wh)
    /sum: c = Add(a, b)
    /tanh: hn = Tanh(c)
    /wy: y = MatMul(hn, wy)
    """
    return model(body, {"x": (1, 64), "h0": (1, 64)}, {"y": (1, 10), "hn": (1, 64)}, weights)
