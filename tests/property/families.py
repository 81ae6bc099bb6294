"""The families of random models: convolutional nets, perceptrons, attention, branches, movers, recurrences, loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.property.bodies import conv_branch, linear_branch, loop, scan
from tests.property.net import Array, Net, T, make_model

HARSH = 7
"""One seed in so many gets weights and feeds as no training leaves them."""
OPEN_LENGTH = 3
"""Greatest length of an open axis in a feed."""


@dataclass(frozen=True)
class Input:
    """A model input: its shape with open axes as names, and how to fill it."""

    name: str
    shape: tuple[int | str, ...]
    kind: str = "normal"

    @property
    def info(self) -> onnx.ValueInfoProto:
        types = {"index": TensorProto.INT64, "bool": TensorProto.BOOL}
        return helper.make_tensor_value_info(self.name, types.get(self.kind, TensorProto.FLOAT), list(self.shape))


@dataclass(frozen=True)
class Case:
    """A random model and how to feed it.

    Attributes:
        seed: makes the case again.
        family: which writer made it.
        model: the ONNX model.
        inputs: its inputs.
        benign: whether 8-bit quantization of it is known to be mild.
        size: standard deviation of its float inputs.
    """

    seed: int
    family: str
    model: onnx.ModelProto
    inputs: tuple[Input, ...]
    benign: bool
    size: float = 1.0

    def feeds(self, count: int, salt: int = 0) -> list[dict[str, Array]]:
        """Return feeds; open axes of one name have one length within a feed."""
        rng = np.random.default_rng([self.seed, salt])
        return [self._feed(rng, index) for index in range(count)]

    def _feed(self, rng: np.random.Generator, index: int) -> dict[str, Array]:
        names = sorted({d for i in self.inputs for d in i.shape if isinstance(d, str)})
        lengths = {name: int(rng.integers(1, OPEN_LENGTH + 1)) for name in names}
        feed: dict[str, Array] = {}
        for source in self.inputs:
            shape = [d if isinstance(d, int) else lengths[d] for d in source.shape]
            if source.kind == "index":
                feed[source.name] = rng.integers(0, 16, shape)
            elif source.kind == "bool":
                # A branch is taken by some feeds and not by others; a mask leaves at least one place open.
                feed[source.name] = np.asarray(index % 2 == 0) if not shape else _mask(rng, shape)
            else:
                feed[source.name] = rng.normal(0, self.size, shape).astype(np.float32)
        return feed


def _mask(rng: np.random.Generator, shape: list[int]) -> Array:
    made = rng.random(shape) < 0.7
    made[..., 0] = True
    return made


def make_case(seed: int) -> Case:
    """Return the random model of a seed."""
    rng = np.random.default_rng(seed)
    net = Net(rng, int(rng.integers(13, 22)), harsh=seed % HARSH == HARSH - 1)
    names = list(FAMILIES)
    family = names[seed % len(names)]
    return FAMILIES[family](net, seed, family)


# ---- convolutional ----------------------------------------------------------------------------------------------


def _cnn_input(net: Net) -> tuple[Input, T]:
    size = net.pick(8, 12, 16)
    channels = net.pick(1, 3, 4, 8)
    batch: int | str = net.pick("batch", "batch", 1, 2)
    return Input("x", (batch, channels, size, size)), T("x", (1, channels, size, size))


def _block(net: Net, x: T) -> T:
    kind = net.pick("plain", "plain", "residual", "depthwise", "concat", "pool", "strided", "scale", "resize", "excite")
    c = x.channels
    if kind == "residual":
        inner = net.act(net.conv(x, c), "Relu", "Relu6", "SiLU")
        inner = net.conv(inner, c, net.pick(1, 3))
        return net.act(net.binary("Add", x, inner), "Relu", "none")
    if kind == "depthwise":
        made = net.act(net.conv(x, c, 3, net.pick(1, 1, 2) if x.shape[2] > 4 else 1, group=c), "Relu6", "Relu")
        return net.act(net.conv(made, net.pick(8, 16, 24), 1))
    if kind == "concat":
        parts = [net.act(net.conv(x, net.pick(4, 8, 16), k)) for k in (1, 3)[: net.pick(1, 2)]]
        parts.append(
            x if net.chance(0.5) else net.unary("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
        )
        return net.concat(parts, 1)
    if kind == "pool" and x.shape[2] >= 4:
        half = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
        return net.unary(net.pick("MaxPool", "AveragePool"), x, shape=half, kernel_shape=[2, 2], strides=[2, 2])
    if kind == "strided" and x.shape[2] >= 4:
        return net.act(net.conv(x, net.pick(16, 32), 3, 2), "Relu", "LeakyRelu", "none")
    if kind == "scale":
        factor = net.const(net.rng.uniform(0.5, 1.5, (1, c, 1, 1)).astype(np.float32))
        return net.conv(net.binary("Mul", x, factor), c, net.pick(1, 3))
    if kind == "resize" and x.shape[2] <= 8:
        return _upscale(net, x)
    if kind == "excite":
        pooled = net.unary("GlobalAveragePool", x, shape=(*x.shape[:2], 1, 1))
        gate = net.unary("Sigmoid", net.conv(net.act(net.conv(pooled, 8, 1), "Relu"), c, 1))
        return net.binary("Mul", x, gate)
    made = net.conv(x, net.pick(8, 16, 32))
    return net.act(net.batch_norm(made) if net.chance(0.5) else made)


def _upscale(net: Net, x: T) -> T:
    shape = (*x.shape[:2], x.shape[2] * 2, x.shape[3] * 2)
    scales = net.const(np.asarray([1, 1, 2, 2], np.float32))
    if net.chance(0.7):
        return net.unary(
            "Resize",
            x,
            "",
            scales,
            shape=shape,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    return net.unary("Resize", x, "", scales, shape=shape, mode="linear", coordinate_transformation_mode="half_pixel")


def _head(net: Net, x: T) -> T:
    if net.chance(0.6):
        x = net.unary("GlobalAveragePool", x, shape=(*x.shape[:2], 1, 1))
    size = int(np.prod(x.shape[1:]))
    x = (
        net.unary("Flatten", x, shape=(x.shape[0], size))
        if net.chance(0.5)
        else net.reshape(x, [0, -1], (x.shape[0], size))
    )
    x = net.linear(x, net.pick(5, 10))
    return net.unary("Softmax", x, axis=-1) if net.chance(0.3) else x


def cnn(net: Net, seed: int, family: str) -> Case:
    """Return a small convolutional net, with a classifier or without."""
    given, x = _cnn_input(net)
    for _ in range(int(net.rng.integers(3, 9))):
        x = _block(net, x)
    outputs = [x]
    if net.chance(0.7):
        kept = net.chance(0.2)
        outputs = [_head(net, x), *([x] if kept else [])]
    return _case(net, seed, family, (given,), outputs)


def conv1d(net: Net, seed: int, family: str) -> Case:
    """Return a net of one-dimensional and transposed convolutions."""
    x = T("x", (1, net.pick(2, 8), 16))
    given = Input("x", (net.pick("batch", 1), *x.shape[1:]))
    for _ in range(int(net.rng.integers(2, 5))):
        x = net.act(net.conv(x, net.pick(8, 16), net.pick(1, 3, 5)), "Relu", "none", "SiLU")
    if net.chance(0.4):
        w = net.weight([x.channels, 8, 2], x.channels)
        x = net.unary("ConvTranspose", x, w, shape=(1, 8, x.shape[2] * 2), strides=[2])
    x = net.act(net.conv(x, 4, 1))
    return _case(net, seed, family, (given,), [x])


def movers(net: Net, seed: int, family: str) -> Case:
    """Return convolutions with operators between them that only move data."""
    given, x = _cnn_input(net)
    x = net.act(net.conv(x, 16), "Relu", "none")
    for _ in range(int(net.rng.integers(2, 6))):
        x = _move(net, x)
        x = net.act(net.conv(x, 16, net.pick(1, 3)), "Relu", "SiLU", "none")
    outputs = [x]
    if net.chance(0.3):
        outputs.append(net.crop(x, 1, 0, 4))
    return _case(net, seed, family, (given,), outputs)


def _move(net: Net, x: T) -> T:
    n, c, h, w = x.shape
    kind = net.pick(
        "split", "transpose", "slice", "reshape", "shuffle", "depth", "pool", "gather", "pad", "squeeze", "stride"
    )
    if kind == "split":
        a, b = net.split(x, 1, 2)
        return net.concat([b, a] if net.chance(0.5) else [a, net.act(net.conv(b, b.channels, 3), "Relu")], 1)
    if kind == "transpose":
        turned = net.transpose(x, [0, 2, 3, 1])
        turned = net.unary("Relu", turned) if net.chance(0.4) else turned
        return net.transpose(turned, [0, 3, 1, 2])
    if kind == "slice":
        return net.crop(x, net.pick(2, 3), 1, 2**31 - 1)
    if kind == "reshape":
        return net.reshape(net.reshape(x, [0, c, -1], (n, c, h * w)), [0, c, h, w], x.shape)
    if kind == "shuffle" and c % 2 == 0:
        parted = net.reshape(x, [0, 2, c // 2, h, w], (n, 2, c // 2, h, w))
        return net.reshape(net.transpose(parted, [0, 2, 1, 3, 4]), [0, c, h, w], x.shape)
    if kind == "depth" and c % 4 == 0:
        return net.unary("DepthToSpace", x, shape=(n, c // 4, h * 2, w * 2), blocksize=2, mode=net.pick("DCR", "CRD"))
    if kind == "pool" and h >= 4:
        return net.unary("MaxPool", x, shape=(n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])
    if kind == "gather":
        order = net.rng.permutation(c)[: max(4, c // 2)]
        return net.unary("Gather", x, net.const(order.astype(np.int64)), shape=(n, len(order), h, w), axis=1)
    if kind == "pad":
        pads = net.ints(0, 0, 1, 1, 0, 0, 1, 1)
        return net.unary("Pad", x, pads, shape=(n, c, h + 2, w + 2), mode=net.pick("constant", "reflect"))
    if kind == "squeeze":
        return net.unary(
            "Squeeze", net.unary("Unsqueeze", x, net.ints(2), shape=(n, c, 1, h, w)), net.ints(2), shape=x.shape
        )
    if kind == "stride" and h % 2 == 0 and w % 2 == 0 and h > 2:
        parts = [net.crop(net.crop(x, 2, i, 2**31 - 1, 2), 3, j, 2**31 - 1, 2) for i in (0, 1) for j in (0, 1)]
        return net.concat(parts, 1)
    return net.unary("Identity", x)


# ---- matrices ---------------------------------------------------------------------------------------------------


def mlp(net: Net, seed: int, family: str) -> Case:
    """Return a perceptron with skips, norms and products."""
    size = net.pick(16, 32, 48, 64)
    middle: tuple[int | str, ...] = net.pick((), (), ("steps",), (3,))
    given = Input("x", (net.pick("batch", 2), *middle, size))
    x = T("x", (1, *[1 if isinstance(d, str) else d for d in middle], size))
    for _ in range(int(net.rng.integers(3, 8))):
        kind = net.pick("plain", "plain", "skip", "gate", "concat", "dropout")
        width = net.pick(32, 48, 64)
        if kind == "skip":
            x = net.binary("Add", x, net.linear(net.act(net.linear(x, width), "Relu", "Gelu", "Tanh"), x.shape[-1]))
        elif kind == "gate":
            x = net.binary("Mul", net.linear(x, width), net.unary("Sigmoid", net.linear(x, width)))
        elif kind == "concat":
            x = net.concat([net.linear(x, 32), net.act(net.linear(x, width), "Relu")], x.rank - 1)
        elif kind == "dropout":
            x = net.unary("Dropout", x)
        else:
            x = net.act(net.linear(x, width), "Relu", "Gelu", "SiLU", "Relu6", "LeakyRelu", "HardSwish")
    return _case(net, seed, family, (given,), [net.linear(x, 10)])


def attention(net: Net, seed: int, family: str) -> Case:
    """Return a block of attention and feed-forward layers, over an open sequence."""
    heads, size = net.pick((2, 32), (4, 32), (2, 64))
    shape: tuple[int | str, ...] = (net.pick("batch", 1), net.pick("sequence", "sequence", 5), size)
    inputs = [Input("x", shape)]
    x = T("x", (1, shape[1] if isinstance(shape[1], int) else 1, size))
    if net.chance(0.4):
        inputs = [Input("x", shape[:2], "index")]
        table = net.const(net.rng.normal(0, 1, (16, size)).astype(np.float32), "table")
        x = T(net.op("Gather", table, "x")[0], x.shape)
    mask = None
    if net.chance(0.6):
        inputs.append(Input("mask", (shape[0], 1, 1, shape[1]), "bool"))
        mask = "mask"
    for _ in range(net.pick(1, 1, 2)):
        x = _attention_layer(net, x, heads, mask)
    return _case(net, seed, family, tuple(inputs), [x])


def _attention_layer(net: Net, x: T, heads: int, mask: str | None) -> T:
    n, s, size = x.shape
    normed = net.layer_norm(x) if net.chance(0.7) else x
    if net.chance(0.4):
        parts = net.split(net.linear(normed, 3 * size), 2, 3)
    else:
        parts = [net.linear(normed, size) for _ in range(3)]
    each = size // heads
    parted = [net.reshape(p, [0, 0, heads, each], (n, s, heads, each)) for p in parts]
    q, v = (net.transpose(p, [0, 2, 1, 3]) for p in (parted[0], parted[2]))
    k = net.transpose(parted[1], [0, 2, 3, 1])
    if net.chance(0.5):
        q = net.div(q, float(np.sqrt(each)))
        scores = T(net.op("MatMul", q.name, k.name)[0], (n, heads, s, s))
    else:
        scores = net.div(T(net.op("MatMul", q.name, k.name)[0], (n, heads, s, s)), float(np.sqrt(each)))
    if mask is not None:
        scores = _masked(net, scores, mask)
    weights = net.unary("Softmax", scores, axis=-1)
    mixed = T(net.op("MatMul", weights.name, v.name)[0], (n, heads, s, each))
    joined = net.reshape(net.transpose(mixed, [0, 2, 1, 3]), [0, 0, size], x.shape)
    x = net.binary("Add", x, net.linear(joined, size))
    inner = net.act(net.linear(net.layer_norm(x), net.pick(32, 64)), "Gelu", "Relu", "SiLU")
    return net.binary("Add", x, net.linear(inner, size))


def _masked(net: Net, scores: T, mask: str) -> T:
    low = net.pick(-1e4, -1e9)
    if net.chance(0.5):
        return T(net.op("Where", mask, scores.name, net.scalar(low))[0], scores.shape)
    given = net.op("Cast", mask, to=TensorProto.FLOAT)[0]
    away = net.op("Sub", net.scalar(1.0), given)[0]
    return net.binary("Add", scores, net.op("Mul", away, net.scalar(low))[0])


def recurrent(net: Net, seed: int, family: str) -> Case:
    """Return an LSTM between linear layers."""
    size, hidden = net.pick(32, 48), net.pick(32, 48)
    directions = net.pick(1, 1, 2)
    x = net.linear(T("x", (1, 1, 32)), size)
    w = net.const(net.rng.normal(0, 0.2, (directions, 4 * hidden, size)).astype(np.float32), "w")
    r = net.const(net.rng.normal(0, 0.2, (directions, 4 * hidden, hidden)).astype(np.float32), "r")
    more = (
        [net.const(net.rng.normal(0, 0.1, (directions, 8 * hidden)).astype(np.float32), "b")] if net.chance(0.7) else []
    )
    direction = "bidirectional" if directions == 2 else net.pick("forward", "reverse")
    y, last, _ = net.op("LSTM", x.name, w, r, *more, outputs=3, hidden_size=hidden, direction=direction)
    if directions == 1:
        made = net.linear(net.unary("Squeeze", T(y, (1, 1, 1, hidden)), net.ints(1), shape=(1, 1, hidden)), 16)
    else:
        turned = net.transpose(T(y, (1, 2, 1, hidden)), [0, 2, 1, 3])
        made = net.linear(net.reshape(turned, [0, 0, 2 * hidden], (1, 1, 2 * hidden)), 16)
    given = Input("x", ("steps", net.pick("batch", 1), 32))
    return _case(net, seed, family, (given,), [made, T(last, (directions, 1, hidden))] if net.chance(0.5) else [made])


# ---- branches ---------------------------------------------------------------------------------------------------


def branches(net: Net, seed: int, family: str) -> Case:
    """Return an If whose bodies compute with constants and values of the outer graph."""
    if net.chance(0.5):
        given, x = _cnn_input(net)
        x = net.act(net.conv(x, 16), "Relu")
        shared = net.weight([16, 16, 3, 3], 144)
        bodies = [conv_branch(net, x, shared) for _ in range(2)]
    else:
        given, x = Input("x", ("batch", 32)), T("x", (1, 32))
        x = net.act(net.linear(x, 48), "Relu", "Gelu")
        bodies = [linear_branch(net, x) for _ in range(2)]
    name = net.op("If", "flag", then_branch=bodies[0], else_branch=bodies[1])[0]
    x = T(name, (1, 16, *x.shape[2:]) if x.rank == 4 else (1, 32))
    x = net.conv(x, 8, 1) if x.rank == 4 else net.linear(x, 8)
    return _case(net, seed, family, (given, Input("flag", (), "bool")), [x])


# ---- loops ------------------------------------------------------------------------------------------------------


def loops(net: Net, seed: int, family: str) -> Case:
    """Return a Loop or a Scan behind a layer, whose body may hold a Loop or an If in turn."""
    if net.chance(0.4):
        given, x = _cnn_input(net)
        x = net.act(net.conv(x, 8), "Relu", "Tanh")
        return _case(net, seed, family, (given,), loop(net, x)[: net.pick(1, 2)])
    x = net.act(net.linear(T("x", (1, 32)), 48), "Relu", "Tanh")
    inputs = [Input("x", ("batch", 32))]
    if net.chance(0.5):
        inputs.append(Input("steps", (net.pick(1, 3), "batch", 48)))
        made = scan(net, x, T("steps", (1, 1, 48)))
    else:
        made = loop(net, x)
    return _case(net, seed, family, tuple(inputs), made[: net.pick(1, 2)])


# ---- together ---------------------------------------------------------------------------------------------------


def _case(net: Net, seed: int, family: str, inputs: tuple[Input, ...], outputs: list[T]) -> Case:
    named = [T(net.unary("Identity", y).name, y.shape) if y.name in {i.name for i in inputs} else y for y in outputs]
    model = make_model(net, [i.info for i in inputs], [(y.name, y.rank) for y in named])
    size = float(net.pick(1e-3, 1.0, 1e3)) if net.harsh else 1.0
    return Case(seed, family, model, inputs, not net.harsh, size)


Family = Callable[[Net, int, str], Case]

FAMILIES: Mapping[str, Family] = {
    "cnn": cnn, "mlp": mlp, "attention": attention, "movers": movers, "branches": branches,
    "cnn-2": cnn, "mlp-2": mlp, "conv1d": conv1d, "recurrent": recurrent, "loops": loops,
}  # fmt: skip
