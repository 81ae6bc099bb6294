"""Bodies of If, Loop and Scan for random models: they compute with constants and values of the graph around them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.property.net import Net, T


def conv_branch(net: Net, x: T, shared: str) -> onnx.GraphProto:
    body = net.body()
    bias = [body.vector(16)] if body.chance(0.5) else []
    y = T(body.op("Conv", x.name, shared, *bias, pads=[1] * 4)[0], x.shape)
    y = body.act(y, "Relu", "SiLU")
    y = body.binary("Add", y, x) if body.chance(0.5) else body.conv(y, 16, 1)
    return _graph(body, [], [y])


def linear_branch(net: Net, x: T) -> onnx.GraphProto:
    body = net.body()
    y = body.linear(body.act(body.linear(x, body.pick(32, 64)), "Relu", "Gelu"), 32)
    return _graph(body, [], [y])


def loop(net: Net, x: T, depth: int = 1) -> list[T]:
    """Run a Loop over a state that starts as ``x``, captured as well; return the state and the stacked rows."""
    body = net.body()
    go, state = body.fresh("go"), T(body.fresh("state"), x.shape)
    y, row = _step(body, state, x, depth)
    again = T(body.op("Identity", go)[0], ())
    first = [
        helper.make_tensor_value_info(body.fresh("i"), TensorProto.INT64, []),
        helper.make_tensor_value_info(go, TensorProto.BOOL, []),
    ]
    graph = _graph(body, first, [again, y, row], state)
    trips = net.const(np.asarray(net.pick(1, 2, 3), np.int64), "trips")
    names = net.op("Loop", trips, "", x.name, outputs=2, body=graph)
    return [T(names[0], x.shape), T(names[1], (1, *row.shape))]


def scan(net: Net, x: T, sequence: T) -> list[T]:
    """Run a Scan over the first axis of a sequence; return the last state and the stacked rows."""
    body = net.body()
    state, step = T(body.fresh("state"), x.shape), T(body.fresh("step"), sequence.shape[1:])
    y, row = _step(body, body.binary("Add", state, step), x, 0)
    graph = _graph(body, [], [y, row], state, step)
    names = net.op("Scan", x.name, sequence.name, outputs=2, body=graph, num_scan_inputs=1)
    return [T(names[0], x.shape), T(names[1], (sequence.shape[0], *row.shape))]


def _step(body: Net, state: T, x: T, depth: int) -> tuple[T, T]:
    """Return the next state, which Tanh bounds, and a row read off it."""
    y = _layer(body, state)
    other = _layer(body, x) if body.chance(0.5) else x
    y = body.act(body.binary("Add", y, other), "Tanh", "Relu", "none")
    if depth and body.chance(0.4):
        y = loop(body, y, depth - 1)[0]
    elif body.chance(0.4):
        y = _choice(body, y)
    y = body.unary("Tanh", y)
    return y, _layer(body, y) if body.chance(0.6) else body.unary("Identity", y)


def _layer(net: Net, x: T) -> T:
    return net.conv(x, x.channels) if x.rank == 4 else net.linear(x, x.shape[-1])


def _choice(net: Net, x: T) -> T:
    """Run an If on the sign of a sum: which branch runs may change from step to step."""
    total = net.op("ReduceSum", x.name, keepdims=0)[0]
    flag = net.op("Greater", total, net.scalar(0.0))[0]
    branches = []
    for _ in range(2):
        body = net.body()
        branches.append(_graph(body, [], [_layer(body, x)]))
    return T(net.op("If", flag, then_branch=branches[0], else_branch=branches[1])[0], x.shape)


def _graph(body: Net, first: list[onnx.ValueInfoProto], outputs: list[T], *inputs: T) -> onnx.GraphProto:
    """Return the body; axis 0 stays open, as do the other axes of what leaves it."""
    given = [
        helper.make_tensor_value_info(x.name, TensorProto.FLOAT, [None, *x.shape[1:]] if x.rank else []) for x in inputs
    ]
    made = [
        helper.make_tensor_value_info(y.name, TensorProto.FLOAT if y.rank else TensorProto.BOOL, [None] * y.rank)
        for y in outputs
    ]
    return helper.make_graph(body.nodes, body.fresh("body"), [*first, *given], made)
