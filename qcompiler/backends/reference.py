"""A second engine: ONNX's own reference evaluator, with fused calls computed by true integer arithmetic.

A fused function's body is Q/DQ by construction, so running it says nothing about integer semantics. Here a call runs on
`qcompiler.quant.operators` instead; `integer_gaps` compares that with the body on the same inputs, call by call. It is
slow (plain NumPy) and meant for tests and for the numerics instrument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qcompiler.backends.reference_loop import Loop
from qcompiler.engine import Array, EngineOptions, Feeds, ModelLike, Profile, TensorInfo
from qcompiler.errors import CalibrationError, ModelError
from qcompiler.ir.graph import attr_int, attr_str, is_op, shape_of
from qcompiler.ir.reader import read_model
from qcompiler.ir.serialize import to_bytes
from qcompiler.patterns.operators import attribute_value
from qcompiler.patterns.outline import DOMAIN, ROOT, role_indices
from qcompiler.quant import operators as truth
from qcompiler.quant.formats import format_of
from qcompiler.quant.spec import QuantParams, QuantSpec
from qcompiler.quant.window import Window, resolve_window

_AS_WRITTEN = EngineOptions(optimize=False)
_STEPS = 255
"""Steps that a float output's own range is divided into, as the numerics instrument does."""

Kernel = Callable[["FusedCall"], Array]


@dataclass(frozen=True)
class FusedCall:
    """One call of a fused function with the arrays it reads.

    Attributes:
        function: its body says which nodes and attributes the group has.
        arrays: the inputs by role.
        axes: axis of per-channel scales by role, from the body's DequantizeLinear nodes.
    """

    function: ir.Function
    arrays: Mapping[str, Array]
    axes: Mapping[str, int]

    @property
    def root(self) -> ir.Node:
        """Return the body's computing node."""
        kind = self.function.metadata_props[ROOT]
        return next(n for n in self.function if n.op_type == kind)

    def attribute(self, name: str) -> Any:
        """Return an attribute of the root, or the specification's default."""
        return attribute_value(self.root, name, self.function.opset_imports[""])

    def params(self, role: str) -> QuantParams:
        """Return scale and zero point of a role; one element is per tensor."""
        scale = np.asarray(self.arrays[role + "s"], np.float32)
        given = self.arrays.get(role + "z")
        stored = given if given is not None else self.arrays.get(role, np.zeros((), np.uint8))
        storage = format_of(ir.DataType.from_numpy(stored.dtype))
        assert storage is not None
        axis = None if scale.size == 1 else self.axes.get(role, 1)
        shape = () if axis is None else scale.shape
        zero = np.zeros(shape, np.int64) if given is None else given.astype(np.int64).reshape(shape)
        return QuantParams(QuantSpec(storage.name, axis), scale.reshape(shape), zero)

    def quantized(self, role: str) -> truth.Quantized:
        """Return the integers of a role with their parameters."""
        return truth.Quantized(self.arrays[role], self.params(role))

    @property
    def bias(self) -> Array | None:
        """Return the bias: int32 is added to the accumulator, float32 behind it."""
        return self.arrays.get("b")

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the interval that a Relu or Clip inside the group lets through."""
        low, high = truth.UNBOUNDED
        node = next((n for n in self.function if is_op(n, "Relu", "Clip")), None)
        if node is None or node.op_type == "Relu":
            return (low if node is None else 0.0), high
        names = list(self.function.inputs)
        found = []
        for index, default in ((1, low), (2, high)):
            value = node.inputs[index] if index < len(node.inputs) else None
            given = None if value is None else self.arrays[f"#{names.index(value)}"]
            found.append(default if given is None else float(given.reshape(())))
        return found[0], found[1]

    def window(self, kernel: Sequence[int], spatial: Sequence[int]) -> Window:
        """Return the root's window, resolved."""
        return resolve_window(
            kernel, spatial,
            strides=self.attribute("strides"), dilations=self.attribute("dilations"), pads=self.attribute("pads"),
            auto_pad=attr_str(self.root, "auto_pad", "NOTSET"), ceil_mode=bool(attr_int(self.root, "ceil_mode", 0)),
        )  # fmt: skip


def _conv(c: FusedCall) -> Array:
    x, w = c.quantized("x"), c.quantized("w")
    window = c.window(w.q.shape[2:], x.q.shape[2:])
    group = attr_int(c.root, "group", 1)
    return truth.qlinear_conv(x, w, c.params("y"), window, bias=c.bias, group=group, bounds=c.bounds)


def _matmul(c: FusedCall) -> Array:
    x, w = c.quantized("x"), c.quantized("w")
    if "ys" not in c.arrays:
        return truth.matmul_integer_to_float(x, w, c.bias)
    return truth.qlinear_matmul(x, w, c.params("y"), c.bias, c.bounds)


def _concat(c: FusedCall) -> Array:
    parts = [c.quantized(f"part.{i}.x") for i in range(len(c.root.inputs))]
    return truth.qlinear_concat(parts, attr_int(c.root, "axis", 0), c.params("y"))


def _average_pool(c: FusedCall) -> Array:
    x = c.quantized("x")
    window = c.window(c.attribute("kernel_shape"), x.q.shape[2:])
    return truth.qlinear_average_pool(x, c.params("y"), window, bool(attr_int(c.root, "count_include_pad", 0)))


KERNELS: Mapping[str, Kernel] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _matmul,
    "Add": lambda c: truth.qlinear_add(c.quantized("x"), c.quantized("w"), c.params("y"), c.bounds),
    "Mul": lambda c: truth.qlinear_mul(c.quantized("x"), c.quantized("w"), c.params("y"), c.bounds),
    "Concat": _concat,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda c: truth.qlinear_global_average_pool(c.quantized("x"), c.params("y")),
    "Sigmoid": lambda c: truth.qlinear_sigmoid(c.quantized("x"), c.params("y")),
    "LeakyRelu": lambda c: truth.qlinear_leaky_relu(c.quantized("x"), c.params("y"), float(c.attribute("alpha"))),
}
"""Integer arithmetic by root operator; other groups (movers, LSTM) run as their body says."""


def has_integer_truth(function: ir.Function) -> bool:
    """Return whether calls of the function are computed on integers here."""
    kind = function.metadata_props.get(ROOT, "")
    root = next((n for n in function if n.op_type == kind), None)
    if root is None or kind not in KERNELS or any(v is None for v in root.inputs):
        return False
    if kind in ("Conv", "MatMul", "Gemm") and "xs" not in role_indices(function):
        return False  # only the weight is stored quantized: the body computes in float, as the engine does
    if kind == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        return all(attribute_value(root, k, function.opset_imports[""]) == v for k, v in plain.items())
    return True


def compute(function: ir.Function, inputs: Sequence[Array]) -> Array:
    """Compute one call of a fused function on integers; `has_integer_truth` must hold.

    Args:
        function: a function of the ``qcompiler`` domain.
        inputs: its inputs in order.

    Returns:
        The output: integers of the output's storage type, or float32.
    """
    arrays = {role: np.asarray(inputs[index]) for role, index in role_indices(function).items()}
    # Positions too: an activation's bounds have no role of their own.
    arrays |= {f"#{index}": np.asarray(array) for index, array in enumerate(inputs)}
    call = FusedCall(function, arrays, _axes(function))
    made = KERNELS[function.metadata_props[ROOT]](call)
    return made if "ys" not in arrays else made.astype(call.params("y").spec.storage.dtype)


def _axes(function: ir.Function) -> dict[str, int]:
    """Return role to axis for each DequantizeLinear that reads a function input."""
    names = list(function.inputs)
    by_index = {index: role for role, index in role_indices(function).items()}
    found = {}
    for node in function:
        if is_op(node, "DequantizeLinear") and node.inputs[0] in names:
            found[by_index[names.index(node.inputs[0])]] = attr_int(node, "axis", 1)
    return found


@dataclass(frozen=True)
class Gap:
    """How far integer arithmetic and the Q/DQ body of one fused call are apart on the same inputs.

    Attributes:
        call: the group's name.
        kind: operator of its root.
        steps: largest difference in quantization steps (of a float output: 1/255 of its range).
        differing: share of the elements that differ.
    """

    call: str
    kind: str
    steps: float
    differing: float


def _operator(function: ir.Function, gaps: list[Gap] | None) -> type[OpRun]:
    """Return the evaluator's class for one fused function."""
    body = None if gaps is None else ReferenceEvaluator(ir.to_proto(function))

    def run(self: OpRun, *inputs: Array) -> tuple[Array]:
        made = compute(function, inputs)
        if gaps is not None and body is not None:
            feeds = dict(zip(body.input_names, inputs, strict=True))
            # A function's evaluator insists on the attributes of its call; a fused call has none.
            (wanted,) = map(np.asarray, body.run(None, feeds, attributes={}))
            gaps.append(_gap(self.onnx_node.name, function.metadata_props[ROOT], wanted, made))
        return (made,)

    return type(function.name, (OpRun,), {"op_domain": DOMAIN, "_run": run})


def _gap(call: str, kind: str, wanted: Array, made: Array) -> Gap:
    if wanted.size == 0:
        return Gap(call, kind, 0.0, 0.0)
    first, second = wanted.astype(np.float64), made.astype(np.float64)
    step = 1.0 if wanted.dtype.kind in "iu" else float(np.ptp(first)) / _STEPS or 1.0
    difference = np.abs(first - second) / step
    return Gap(call, kind, float(difference.max()), float((difference > 0).mean()))


class DynamicQuantizeLinear(OpRun):
    """ONNX DynamicQuantizeLinear in float32, as specified."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array, Array, Array]:
        made = truth.dynamic_quantize_linear(x)
        return made.q, made.params.scale, made.params.zero_point.astype(np.uint8)


@dataclass(frozen=True)
class ReferenceRunner:
    """A model loaded by the reference evaluator."""

    evaluator: ReferenceEvaluator
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the named outputs.

        Raises:
            CalibrationError: the evaluator fails on this feed; the text is its reason.
        """
        names = list(outputs) if outputs is not None else [o.name for o in self.outputs]
        try:
            results = self.evaluator.run(names, dict(feeds))
        except Exception as error:  # the evaluator raises whatever NumPy does
            raise CalibrationError(f"the reference evaluator could not run the model on this feed: {error}") from error
        return dict(zip(names, (np.asarray(r) for r in results), strict=True))


class ReferenceEngine:
    """ONNX's reference evaluator as an `qcompiler.engine.Engine`, fused calls on integers.

    It rewrites nothing, so ``EngineOptions`` change nothing, and it is no measure of time.
    """

    name = "reference"

    @property
    def version(self) -> str:
        """Return the version of the onnx package."""
        return str(onnx.__version__)

    def load(self, model: ModelLike, options: EngineOptions = _AS_WRITTEN) -> ReferenceRunner:
        """Load a model.

        Raises:
            ModelError: an operator is unknown to the evaluator.
        """
        return _load(model, None)

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        """Refuse: NumPy's times say nothing about an engine.

        Raises:
            ModelError: always.
        """
        raise ModelError("the reference evaluator cannot profile; use an engine that runs the artifact")

    def optimized_graph(self, model: ModelLike, options: EngineOptions = _AS_WRITTEN) -> ir.Model:
        """Return the graph as it is: the evaluator rewrites nothing."""
        return read_model(model)


def _load(model: ModelLike, gaps: list[Gap] | None) -> ReferenceRunner:
    graph = read_model(model)
    functions = [f for f in graph.functions.values() if f.domain == DOMAIN and has_integer_truth(f)]
    operators = [_operator(f, gaps) for f in functions]
    try:
        evaluator = ReferenceEvaluator(to_bytes(graph), new_ops=[*operators, DynamicQuantizeLinear, Loop])
    except Exception as error:  # missing operators are RuntimeError, NotImplementedError or TypeError
        raise ModelError(f"onnx's reference evaluator refuses the model: {error}") from error
    return ReferenceRunner(evaluator, _infos(graph.graph.inputs), _infos(graph.graph.outputs))


def _infos(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(str(v.name), np.dtype(object) if v.dtype is None else v.dtype.numpy(), shape_of(v)) for v in values
    )


def integer_gaps(model: ModelLike, feeds: Sequence[Feeds]) -> tuple[Gap, ...]:
    """Compare integer arithmetic with the Q/DQ body at every fused call, on the same inputs.

    Args:
        model: a FUSED graph.
        feeds: inputs; each call of each feed gives one figure, in the order of execution.

    Raises:
        ModelError: the evaluator does not know an operator.
        CalibrationError: a feed does not fit.
    """
    gaps: list[Gap] = []
    runner = _load(model, gaps)
    for feed in feeds:
        runner.run(feed)
    return tuple(gaps)
