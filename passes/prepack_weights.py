"""prepack-weights: turn constants into what the kernels read, once and ahead of time.

Weights of products become (N, K), of convolutions (O, R, S, C); zero points of activations, which only add a number per
column, become an int32 offset together with an int32 bias; scales become one float32 multiplier per column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import all_graphs, const_array, consumers
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.kernels.int4_matmul.reference import from_blocks
from qcompiler.passes.kernel_nodes import (
    arguments_of,
    is_kernel,
    kernel_node,
    scalar_params,
    settings_of,
    stand_in,
)
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState

_PIECEWISE = ("none", "relu", "clip")
_INT32 = np.iinfo(np.int32)
_MOST_TAPS = 4096
"""Largest window that is averaged as a convolution: a program adds its elements one after the other."""
_HALVES = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


@dataclass(frozen=True)
class PrepackWeights(Pass):
    """Pack the constants of kernels; it comes last, since the passes before it read scales by role."""

    needs = Phase.LOWERED
    numerics: ClassVar[Contract] = WithinStep(1)

    def run(self, state: CompileState) -> int:
        """Pack every kernel's constants and return the number of changes."""
        rewriter = Rewriter(state.model)
        for graph in list(all_graphs(state.model)):
            for node in list(graph):
                if is_kernel(node, *_PACKERS):
                    _PACKERS[node.op_type](_Packing(rewriter, node))
        for graph in all_graphs(state.model):
            for name, value in list(graph.initializers.items()):
                if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                    del graph.initializers[name]
        return rewriter.changes


class _Packing:
    """One node on its way from roles to a kernel's arguments.

    Attributes:
        given: inputs by role.
        settings: options and numbers by role's name.
        arguments: inputs of the packed node.
        numbers: options and numbers of the packed node.
    """

    def __init__(self, rewriter: Rewriter, node: ir.Node) -> None:
        self.rewriter, self.node = rewriter, node
        self.given, self.settings = arguments_of(node), settings_of(node)
        self.arguments: dict[str, ir.Value | None] = {}
        self.numbers: dict[str, Any] = {}

    def array(self, role: str) -> Array | None:
        """Return a constant input."""
        return const_array(self.given.get(role))

    def params(self, role: str) -> tuple[np.float32, int] | None:
        """Return (scale, zero point) of a role, None if it has none."""
        if role + "s" not in self.given:
            return None
        return scalar_params(self.given[role + "s"], self.given.get(role + "z"))

    def constant(self, array: Array, what: str) -> ir.Value:
        """Add a packed constant."""
        return self.rewriter.constant(np.ascontiguousarray(array), f"{self.node.name}:{what}")

    def finish(self, kernel: str = "") -> None:
        """Put the packed node in place of the other one."""
        made = kernel_node(
            self.rewriter, kernel or self.node.op_type, self.arguments, self.numbers, before=self.node,
            origin=[self.node], name=f"{self.node.name}:packed", outputs=len(self.node.outputs),
        )  # fmt: skip
        stand_in(self.rewriter, self.node, made)


def _scales(p: _Packing, columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    found = p.array("ws")
    assert found is not None
    return np.broadcast_to(found.astype(np.float32).reshape(-1), (columns,))


def _epilogue(p: _Packing, sums: Array) -> None:
    """Write multiplier, offset, bias and what is done behind them.

    Args:
        p: the node.
        sums: int64 [N], sum of each column's weights; zeros where the activation has no zero point.
    """
    columns = len(sums)
    x, y = p.params("x"), p.params("y")
    weight_scale, activation = _scales(p, columns), p.settings.get("activation", "none")
    unit = weight_scale if x is None else np.asarray(x[0] * weight_scale, np.float32)
    unit = np.asarray(unit * np.float32(p.settings.get("factor", 1.0)), np.float32)
    offset = np.zeros(columns, np.int64) if x is None else -np.int64(x[1]) * sums
    real = _scaled_last(p)
    bias = p.array("b")
    if bias is not None and "bs" in p.given:
        offset = offset + bias.astype(np.int64).reshape(-1)
    elif bias is not None and y is not None and not real:
        steps = np.rint(bias.astype(np.float64).reshape(-1) / unit.astype(np.float64))
        offset = offset + np.clip(steps, _INT32.min // 2, _INT32.max // 2).astype(np.int64)
    elif bias is not None:
        p.arguments["bias"] = p.constant(bias.astype(np.float32).reshape(-1), "bias")
        p.numbers["bias"] = "channel"
    folded = y is not None and not real
    multiplier = np.asarray(unit / y[0], np.float32) if folded and y is not None else unit
    p.arguments["multiplier"] = p.constant(multiplier, "multiplier")
    if np.any(offset):
        p.arguments["offset"] = p.constant(np.clip(offset, _INT32.min, _INT32.max).astype(np.int32), "offset")
        p.numbers["offset"] = "channel"
    _behind(p, activation, y if folded else None)
    _write(p)


def _scaled_last(p: _Packing) -> bool:
    """Return whether sums are scaled to reals first, and to steps of the output at the end.

    So they are behind a function, and where a sum of floats was stored.
    """
    staged = p.settings.get("stage") == "float" or p.node.op_type == "fp8_matmul"
    return p.params("y") is not None and (staged or p.settings.get("activation", "none") not in _PIECEWISE)


def _write(p: _Packing) -> None:
    """Write the type of the output, and its scale and zero point."""
    y = p.params("y")
    if y is not None and p.settings["out"] == "int8":
        p.numbers["out_zero"] = y[1]
    if y is not None and _scaled_last(p):
        p.numbers |= {"out_scale": "scalar", "out_inverse": float(np.float32(1) / y[0])}
    p.numbers["out"] = p.settings["out"]


def _behind(p: _Packing, activation: str, y: tuple[np.float32, int] | None) -> None:
    """Write activation and residual; with ``y`` all numbers are in steps of the output."""
    step = np.float32(1) if y is None else y[0]
    if activation != "none":
        p.numbers["activation"] = activation
    for name in ("low", "high"):
        if name in p.settings and activation == "clip":
            with np.errstate(over="ignore"):
                bound = np.float32(p.settings[name]) / step
            p.numbers[name] = float(np.clip(bound, -3.4e38, 3.4e38))
    if "residual" not in p.settings:
        return
    residual = p.params("r")
    scale, zero = residual if residual is not None else (np.float32(1), 0)
    p.arguments["residual"] = p.given["residual"]
    p.numbers |= {
        "residual": p.settings["residual"], "residual_scale": float(np.float32(scale / step)), "residual_zero": zero,
    }  # fmt: skip


def _activations(p: _Packing) -> None:
    """Pack a product of two activations: one factor, and both zero points as numbers."""
    x, w, y, bias = p.params("x"), p.params("w"), p.params("y"), p.array("b")
    assert x is not None
    assert w is not None
    step = None if y is None or _scaled_last(p) else y
    unit = np.float32(x[0] * w[0]) * np.float32(p.settings.get("factor", 1.0))
    layout = p.settings.get("w_layout", "kn")
    p.arguments |= {"a": p.given["x"], "w" if layout == "nk" else "w_kn": p.given["w"]}
    p.numbers |= {"w_layout": layout, "multiplier": "scalar", "scale": float(unit if step is None else unit / step[0])}
    if x[1] or w[1]:
        p.numbers |= {"zeros": "kernel", "a_point": x[1], "w_point": w[1]}
    p.numbers |= {name: p.settings[name] for name in ("a_axes", "w_axes", "out_axes") if name in p.settings}
    if bias is not None:
        reals = bias.astype(np.float32).reshape(-1)
        p.arguments["bias"] = p.constant(reals if step is None else reals / step[0], "bias")
        p.numbers["bias"] = "channel"
    _behind(p, p.settings.get("activation", "none"), step)
    _write(p)
    p.finish()


def _matmul(p: _Packing) -> None:
    weight = p.array("w")
    if weight is None:
        _activations(p)
        return
    packed = weight.T
    p.arguments |= {"a": p.given["x"], "w": p.constant(packed[None], "w")}
    sums = packed.astype(np.int64).sum(axis=1) if packed.dtype == np.int8 else np.zeros(len(packed), np.int64)
    if "a_zero_one" in p.given:
        p.arguments |= {name: p.given[name] for name in ("a_scale_one", "a_zero_one")}
        p.arguments["column_sum"] = p.constant(sums.astype(np.int32), "column_sum")
        p.numbers |= {"a_scale": "tensor", "zeros": "tensor"}
    _epilogue(p, sums)
    p.finish()


def _floats(p: _Packing) -> None:
    """Pack a product of floats: a constant matrix as (N, K), anything else as it lies."""
    weight, bias, layout = p.array("w"), p.array("b"), p.settings.get("w_layout", "kn")
    second = p.given["w"]
    if weight is not None and weight.ndim == 2 and layout == "kn":
        second, layout = p.constant(weight.T, "w"), "nk"
    p.arguments |= {"a": p.given["x"], "w" if layout == "nk" else "w_kn": second}
    p.numbers |= {"w_layout": layout}
    p.numbers |= {name: p.settings[name] for name in ("a_axes", "w_axes", "out_axes") if name in p.settings}
    if "factor" in p.settings:
        p.numbers |= {"factor": "scalar", "scale": float(p.settings["factor"])}
    if bias is not None:
        p.arguments["bias"] = p.constant(bias.astype(np.float32).reshape(-1), "bias")
        p.numbers["bias"] = "channel"
    _behind(p, p.settings.get("activation", "none"), None)
    _write(p)
    p.finish()


def _conv(p: _Packing) -> None:
    weight, x = p.array("w"), p.params("x")
    assert weight is not None
    assert x is not None
    _conv_weight(p, weight)
    _epilogue(p, weight.astype(np.int64).sum(axis=(1, 2, 3)))
    _geometry(p, p.settings["strides"], p.settings["dilations"], p.settings["pads"], x[1])
    p.finish()


def _float_conv(p: _Packing) -> None:
    """Pack a convolution of floats, whose border is 0."""
    weight, bias = p.array("w"), p.array("b")
    assert weight is not None
    _conv_weight(p, weight)
    if bias is not None:
        p.arguments["bias"] = p.constant(bias.astype(np.float32).reshape(-1), "bias")
        p.numbers["bias"] = "channel"
    _behind(p, p.settings.get("activation", "none"), None)
    _write(p)
    _geometry(p, p.settings["strides"], p.settings["dilations"], p.settings["pads"], 0)
    p.finish()


def _conv_weight(p: _Packing, weight: Array) -> None:
    """Write data and weight [O, C / group, R, S] of a convolution."""
    packed = weight.transpose(0, 2, 3, 1)
    p.arguments["x"] = p.given["x"]
    group = int(p.settings["group"])
    if weight.shape[1] == 1 and group > 1 and weight.shape[0] % group == 0:
        p.arguments["w_rso"] = p.constant(packed[..., 0].transpose(1, 2, 0), "w")
        p.numbers["kind"] = "depthwise"
    else:
        p.arguments["w"] = p.constant(packed, "w")
        p.numbers["group"] = group


def _pair(p: _Packing) -> None:
    """Pack a sum or product: in float32, as Q/DQ computes it."""
    x, w, y = p.params("x"), p.params("w"), p.params("y")
    assert x is not None
    assert w is not None
    assert y is not None
    p.arguments |= {"a": p.given["x"], "b": p.given["w"]}
    p.numbers |= {"op": p.node.op_type.removeprefix("int8_"), "out": "int8", "arithmetic": "float32"}
    p.numbers |= {"a_scale": float(x[0]), "a_zero": x[1], "b_scale": float(w[0]), "b_zero": w[1]}
    p.numbers |= {"out_scale": float(y[0]), "out_zero": y[1]}
    p.numbers |= {name: p.settings[name] for name in ("activation", "low", "high") if name in p.settings}
    p.finish("pointwise")


def _table(p: _Packing) -> None:
    p.arguments |= {"x": p.given["x"], "table": p.given["table"]}
    p.numbers |= {"op": "table", "out": "int8", "out_scale": 1.0, "out_zero": 0}
    p.finish("pointwise")


def _window(p: _Packing) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Return (kernel, strides, dilations, pads) of an average that weighs all windows alike; None for others."""
    shape = p.given["x"].shape
    if p.settings.get("layout") != "NHWC" or shape is None or len(shape) != 4:
        return None
    if p.settings["op"] == "global_average":
        height, width = shape[1], shape[2]
        if not isinstance(height, int) or not isinstance(width, int):
            return None
        return (height, width), (1, 1), (1, 1), (0, 0, 0, 0)
    pads = tuple(p.settings.get("pads") or (0, 0, 0, 0))
    plain = p.settings.get("auto_pad", "NOTSET") in ("NOTSET", "VALID", "") and not p.settings.get("ceil_mode", 0)
    if not plain or (any(pads) and not p.settings.get("count_include_pad", 0)):
        return None
    kernel = tuple(p.settings["kernel_shape"])
    return kernel, tuple(p.settings.get("strides") or (1, 1)), tuple(p.settings.get("dilations") or (1, 1)), pads


def _average(p: _Packing) -> bool:
    """Pack an average as a convolution of each channel with ones: the sum is exact, one factor scales it."""
    x, y, window = p.params("x"), p.params("y"), _window(p)
    channels = p.given["x"].shape[3] if window is not None else None  # type: ignore[index]  # a pooled value has a shape
    if window is None or x is None or y is None or not isinstance(channels, int):
        return False
    kernel, strides, dilations, pads = window
    count = kernel[0] * kernel[1]
    if count > _MOST_TAPS:
        return False
    factor = np.float32(np.float64(x[0]) / (np.float64(y[0]) * count))
    p.arguments |= {"x": p.given["x"], "w_rso": p.constant(np.ones((*kernel, channels), np.int8), "ones")}
    p.arguments["multiplier"] = p.constant(np.full(channels, factor, np.float32), "multiplier")
    if x[1]:
        p.arguments["offset"] = p.constant(np.full(channels, -x[1] * count, np.int32), "offset")
        p.numbers["offset"] = "channel"
    p.numbers |= {"kind": "depthwise", "out": "int8", "out_zero": y[1], "averages": 1}
    _geometry(p, strides, dilations, pads, x[1])
    p.finish("int8_conv")
    return True


def _geometry(p: _Packing, strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int], zero: int) -> None:
    """Write where windows lie, and what lies around the picture."""
    p.numbers["pad"] = "none" if not any(pads) else "zero" if zero == 0 else "point"
    if p.numbers["pad"] == "point":
        p.numbers["x_zero"] = zero
    for name, steps in (("stride", strides), ("dilation", dilations)):
        p.numbers |= {f"{name}_h": steps[0], f"{name}_w": steps[1]}
    p.numbers |= {f"pad_{side}": n for side, n in zip(("top", "left", "bottom", "right"), pads, strict=True)}


def _pool(p: _Packing) -> None:
    if p.settings["op"] != "max" and _average(p):
        return
    x, y = p.params("x"), p.params("y")
    p.arguments["x"] = p.given["x"]
    p.numbers |= p.settings
    if x is not None and y is not None:
        p.numbers |= {"x_scale": float(x[0]), "x_zero": x[1], "out_scale": float(y[0]), "out_zero": y[1]}
    p.finish()


def _blocks(p: _Packing) -> None:
    """Pack a weight in blocks as the kernels store it; float32 activations are rounded to bfloat16, which never
    overflows and loses far less than the weights did.
    """
    weight, scales, zeros, bias = (p.array(role) for role in ("w", "ws", "wz", "b"))
    assert weight is not None
    assert scales is not None
    bits, x = p.settings["bits"], p.given["x"]
    for name, array in from_blocks(weight, scales, zeros, p.settings["block"], bits).items():
        p.arguments[name] = p.constant(array.astype(np.float32) if name == "scales" else array, name)
    p.arguments["a"] = x if x.dtype in _HALVES else _halved(p, x)
    p.numbers |= {"bits": str(bits), "block": str(p.settings["block"]), "out": p.settings["out"]}
    if "zeros" in p.arguments:
        p.numbers["zeros"] = "block"
    if bias is not None:
        p.arguments["bias"] = p.constant(bias.astype(np.float32).reshape(-1), "bias")
        p.numbers["bias"] = "channel"
    _behind(p, p.settings.get("activation", "none"), None)
    p.finish("int4_matmul")


def _halved(p: _Packing, value: ir.Value) -> ir.Value:
    """Return a value in bfloat16: written so where only such products read it, else converted once for all."""
    maker = value.producer()
    if _for_products_alone(value) and maker is not None:
        maker.attributes["out"] = ir.AttrString("out", "bfloat16")  # its type object may be another value's, too
        p.rewriter.declare(value, ir.DataType.BFLOAT16, value.shape)
        return value
    for node in consumers(value):
        if is_kernel(node, "pointwise") and settings_of(node)["out"] == "bfloat16":
            return node.outputs[0]
    made = kernel_node(
        p.rewriter, "pointwise", {"a": value}, {"op": "convert", "a_scale": 1.0, "a_zero": 0, "out": "bfloat16"},
        before=p.node, origin=[p.node], name=f"{value.name}:bfloat16",
    )  # fmt: skip
    p.rewriter.declare(made.outputs[0], ir.DataType.BFLOAT16, value.shape)
    return made.outputs[0]


def _for_products_alone(value: ir.Value) -> bool:
    maker = value.producer()
    if not is_kernel(maker, "norm_quantize", "int4_matmul", "block_matmul") or value.is_graph_output():
        return False
    assert maker is not None
    if value is not maker.outputs[0] or settings_of(maker)["out"] != "float32":
        return False
    readers = consumers(value)
    return all(
        is_kernel(n, "block_matmul") and [v is value for v in n.inputs].count(True) == 1 for n in readers
    ) and all(arguments_of(n)["x"] is value for n in readers)


_PACKERS: Mapping[str, Callable[[_Packing], None]] = {
    "int8_matmul": _matmul, "fp8_matmul": _matmul, "int8_conv": _conv, "int8_add": _pair, "int8_mul": _pair,
    "int8_pool": _pool, "int8_lookup": _table, "block_matmul": _blocks, "float_matmul": _floats,
    "float_conv": _float_conv,
}  # fmt: skip
