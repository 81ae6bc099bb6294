"""OpenVINO on CPU: load, run, profile, and list what it executes. Needs the extra ``openvino``."""

from __future__ import annotations

import importlib
import math
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.backends.onnxruntime import engine_value
from qcompiler.backends.openvino_probe import survives
from qcompiler.engine import Array, EngineOptions, EngineValue, Feeds, ModelLike, NodeCost, Profile, TensorInfo
from qcompiler.errors import CalibrationError, ModelError, TargetError
from qcompiler.ir.serialize import MAX_INLINE_BYTES, save_model, to_bytes, weight_bytes
from qcompiler.passes.lower_openvino import PRECISION
from qcompiler.staging import Staging

DOMAIN = "openvino"
"""Of the operators in the graph that OpenVINO executes."""
_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_NOISE = (
    "Exception from", "Check ", "While validating", "FrontEnd API failed", "Errors during",
    "Model wasn't fully converted", "Summary:",
)  # fmt: skip
"""How the lines of a message begin that only say where in OpenVINO, or that, something went wrong."""
_WEIGHT = "/transpose_b"
"""Behind the name of a product, of the layer that transposes its weight."""
_NODE = re.compile(r"ONNX node '<Node\((\w+)\): (.*?)>'")
_ENDINGS = ("_original", "/DequantizationMultiply", "/WithoutBiases")
"""Behind the name of a fused operator: it goes by its scale, or by what is left of it without scale or bias."""
ORIGIN = "qcompiler.engine"
"""Metadata of a model that came out of this package."""
INSTALL = 'OpenVINO is not installed: pip install "qcompiler[openvino]"'


def _openvino() -> Any:
    """Import OpenVINO.

    Raises:
        TargetError: it is not installed; says how to.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise TargetError(INSTALL) from None


def _reason(error: Exception) -> str:
    """Return the line of OpenVINO's message that says something, and the node: it begins with places in its source."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_NOISE) and not line.endswith("with a message:")]
    reason = (telling or lines or [type(error).__name__])[0]
    node = _NODE.search(str(error))
    return reason if node is None else f"{reason} (at the {node[1]} {node[2]})"


@dataclass(frozen=True)
class OvRunner:
    """A model compiled by OpenVINO for the CPU.

    Attributes:
        compiled: OpenVINO's object.
        names: of the outputs as the ONNX model calls them: OpenVINO knows a tensor by several names in no order. Empty
            for a model in OpenVINO's own form.
    """

    compiled: Any
    names: tuple[str, ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Return the inputs that a caller feeds."""
        return tuple(_info(port) for port in self.compiled.inputs)

    @cached_property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Return the outputs in the model's order."""
        found = tuple(_info(port) for port in self.compiled.outputs)
        if len(self.names) != len(found):
            return found
        return tuple(replace(info, name=name) for info, name in zip(found, self.names, strict=True))

    @cached_property
    def _request(self) -> Any:
        """Return the one request there is: destroying one before another runs corrupts memory (seen on 2026.4)."""
        return self.compiled.create_infer_request()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the named outputs.

        Raises:
            CalibrationError: a feed does not fit the model; the text is the engine's.
        """
        wanted = {info.name: index for index, info in enumerate(self.outputs)}
        names = list(wanted) if outputs is None else list(outputs)
        given = {name: self._tensor(name, array) for name, array in feeds.items()}
        with self._lock:  # a request holds its tensors, so that it serves one caller at a time
            try:
                self._request.infer(given, share_inputs=True)
            except Exception as error:  # the binding raises RuntimeError and TypeError
                raise CalibrationError(f"openvino could not run the model on this feed: {_reason(error)}") from error
            return {name: self._array(wanted[name]) for name in names}

    def _tensor(self, name: str, array: Array) -> Any:
        """Return a feed as the binding takes it, which has no NumPy type for bfloat16."""
        packed = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
        if packed.dtype != _BFLOAT16:
            return packed
        openvino = _openvino()
        made = openvino.Tensor(openvino.Type.bf16, list(packed.shape))
        made.data[...] = packed.view(made.data.dtype)
        return made

    def _array(self, index: int) -> Array:
        """Return a copy of an output of the last run."""
        numbers = np.array(self._request.get_output_tensor(index).data)
        wanted = self.outputs[index].dtype
        return numbers if numbers.dtype == wanted else numbers.view(wanted)

    def run_values(self, values: Mapping[str, EngineValue], outputs: Sequence[str]) -> dict[str, EngineValue]:
        """Run once on values of an engine and return the named outputs as such."""
        made = self.run({name: value.array() for name, value in values.items()}, outputs)
        return {name: engine_value(array) for name, array in made.items()}

    def executed(self) -> ir.Model:
        """Return what OpenVINO executes as a graph of operators of the domain ``openvino``.

        A node's type is OpenVINO's (Convolution, FullyConnected, Subgraph ...). Its metadata hold ``kernel``, whose
        last part is what it computes in (``brgemm_avx512_amx_I8``, ``jit_avx512_bf16`` ...; the runtime precision of a
        layer that only stores its weights as integers says int8 all the same), and ``originals``, the names of the
        operators that were fused into it, joined by commas, which names may hold as well.
        """
        ports: dict[tuple[str, int], ir.Value] = {}
        nodes = []
        for operator in self.compiled.get_runtime_model().get_ordered_ops():
            info = {key: _text(operator.rt_info[key]) for key in operator.rt_info}
            name = operator.get_friendly_name()
            reads = [port.get_source_output() for port in operator.inputs()]
            inputs = [ports[port.get_node().get_friendly_name(), port.get_index()] for port in reads]
            outputs = [ir.Value(name=f"{name}:{index}" if index else name) for index in range(len(operator.outputs()))]
            ports |= {(name, index): value for index, value in enumerate(outputs)}
            originals = ",".join([info.get("originalLayersNames", ""), *_transposed_for(inputs)])
            fused = (_operator(part) for part in originals.split(","))
            # So that time finds its owner by their names.
            outputs += [ir.Value(name=part) for part in dict.fromkeys(fused) if part and part != name]
            node = ir.Node(DOMAIN, info.get("layerType", "Unknown"), inputs, outputs=outputs, name=name)
            node.metadata_props["kernel"] = info.get("primitiveType", "")
            node.metadata_props["originals"] = originals
            nodes.append(node)
        graph = ir.Graph([], [], nodes=nodes, opset_imports={DOMAIN: 1}, name="executed")
        return ir.Model(graph, ir_version=10)


def _transposed_for(inputs: Sequence[ir.Value]) -> list[str]:
    """Return whose weight a layer reads: of a product whose scale goes elsewhere only its weight keeps the name."""
    producers = [str(node.name) for v in inputs if (node := v.producer()) is not None]
    return [name.removesuffix(_WEIGHT) for name in producers if name.endswith(_WEIGHT)]


def _operator(part: str) -> str:
    """Return the name of the operator of which OpenVINO made a part."""
    for ending in _ENDINGS:
        part = part.removesuffix(ending)
    return part


def holds(node: ir.Node, *names: str) -> bool:
    """Return whether an operator was fused into an executed node, or is the node.

    Args:
        node: of the executed graph.
        names: by which the operator may go: its own, and that of the graph output that it writes.
    """
    originals = f",{node.metadata_props['originals']},"  # names may hold commas, too
    first, second, third = (("", ending) for ending in _ENDINGS)
    known = [name + a + b + c for name in names for c in first for b in second for a in third]
    return any(f",{name}," in originals or node.name == name for name in known)


@dataclass(frozen=True)
class _Header:
    """What a model says of itself.

    Attributes:
        outputs: names of an ONNX model's outputs, none of a model in OpenVINO's own form.
        precision: what its float operators have to compute in, empty if that is left to OpenVINO.
    """

    outputs: tuple[str, ...] = ()
    precision: str = ""


def _header(model: ModelLike) -> _Header:
    if isinstance(model, ir.Model):
        return _Header(tuple(str(v.name) for v in model.graph.outputs), model.metadata_props.get(PRECISION, ""))
    if isinstance(model, str | Path) and Path(model).suffix == ".xml":
        return _Header()
    try:
        proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    except Exception:  # protobuf and the file system raise their own types; OpenVINO says what is wrong with it
        return _Header()
    stated = next((p.value for p in proto.metadata_props if p.key == PRECISION), "")
    return _Header(tuple(v.name for v in proto.graph.output), stated)


def _stated(read: Any) -> str:
    """Return what the float operators of a model that `save_openvino` wrote have to compute in, empty if open."""
    words = PRECISION.split(".")
    return _text(read.get_rt_info(words)) if read.has_rt_info(words) else ""


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def _info(port: Any) -> TensorInfo:
    shape = None
    if not port.partial_shape.rank.is_dynamic:
        shape = tuple(d.get_length() if d.is_static else None for d in port.partial_shape)
    kind = port.element_type
    dtype = _BFLOAT16 if kind.get_type_name() == "bf16" else np.dtype(kind.to_dtype())
    return TensorInfo(port.any_name, dtype, shape)


@dataclass(frozen=True)
class OvEngine:
    """OpenVINO's CPU plugin as an `qcompiler.engine.Engine`.

    Attributes:
        precision: what float operators compute in: empty leaves it to OpenVINO (bfloat16 where the processor has
            instructions for it, and the model does not ask for float32), ``f32`` keeps float32.
        probe: compile graphs of other origin in a process of their own first, until one was taken: a crash of OpenVINO
            then raises instead of ending this process.
    """

    precision: str = ""
    probe: bool = False
    _taken: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)
    name = "openvino"

    @property
    def version(self) -> str:
        """Return the version of the installed OpenVINO."""
        return str(_openvino().__version__).split("-")[0]

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> OvRunner:
        """Compile a model for the CPU.

        A model that is refused with bfloat16 (as happens to some with quantized operators) is compiled in float32.

        Raises:
            ModelError: OpenVINO refuses the model, or crashes on it.
            TargetError: OpenVINO is not installed.
        """
        return self._compile(model, options, {})

    def _compile(self, model: ModelLike, options: EngineOptions, more: Mapping[str, str]) -> OvRunner:
        core, header = _openvino().Core(), _header(model)
        if self.probe and not self._taken and isinstance(model, ir.Model) and ORIGIN not in model.metadata_props:
            # What is built from a graph that was taken is not foreign any more.
            self._taken[:] = [True] if survives(model, self.precision or header.precision) else []
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", **more}
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            read = self._read(core, model)
            if precision := self.precision or header.precision or _stated(read):
                settings["INFERENCE_PRECISION_HINT"] = precision
            try:
                compiled = core.compile_model(read, "CPU", settings)
            except RuntimeError:
                if precision:
                    raise
                compiled = core.compile_model(read, "CPU", {**settings, "INFERENCE_PRECISION_HINT": "f32"})
            return OvRunner(compiled, header.outputs)
        except ModelError:
            raise
        except Exception as error:  # the binding raises RuntimeError and its own types
            raise ModelError(f"openvino {self.version} refuses the model: {_reason(error)}") from error

    def _read(self, core: Any, model: ModelLike) -> Any:
        if isinstance(model, bytes):
            return core.read_model(model, b"")
        if isinstance(model, str | Path):
            return core.read_model(str(model))
        if weight_bytes(model) <= MAX_INLINE_BYTES:
            return core.read_model(to_bytes(model), b"")
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            path = Path(folder) / "model.onnx"
            save_model(model, path)
            return core.read_model(str(path))

    def value(self, array: Array) -> EngineValue:
        """Return a tensor as a value that runs take."""
        return engine_value(array)

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        """Run ``rounds`` times with OpenVINO's counters; the time of a layer is the minimum over rounds."""
        runner = self._compile(model, options, {"PERF_COUNT": "YES"})
        best: dict[tuple[str, str], float] = {}
        runner.run(feeds)
        for _ in range(rounds):
            runner.run(feeds)
            for item in runner._request.profiling_info:
                if item.real_time.total_seconds() > 0:
                    key = (item.node_name, item.node_type)
                    best[key] = min(best.get(key, math.inf), item.real_time.total_seconds() * 1e6)
        nodes = tuple(NodeCost(name, kind, spent) for (name, kind), spent in best.items())
        return Profile(nodes, runner.executed())

    def optimized_graph(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> ir.Model:
        """Return what OpenVINO executes, see `OvRunner.executed`."""
        return self.load(model, options).executed()


def save_openvino(model: ir.Model, path: Path) -> None:
    """Write a model in OpenVINO's own form: ``path`` (.xml) and the weights beside it (.bin).

    Args:
        model: the lowered model.
        path: where the .xml goes.

    Raises:
        ModelError: the model is refused or the path cannot be written.
        TargetError: OpenVINO is not installed.
    """
    openvino = _openvino()
    try:
        with Staging() as staging:
            folder = staging.scratch(path.parent)  # the .bin gets its name from the .xml
            read = openvino.Core().read_model(to_bytes(model, strip=True), b"")
            if precision := model.metadata_props.get(PRECISION):
                read.set_rt_info(precision, PRECISION.split("."))
            openvino.save_model(read, str(folder / "model.xml"), False)
            for suffix in (".bin", ".xml"):
                staging.move(folder / f"model{suffix}", path.with_suffix(suffix))
            staging.commit()
    except (ModelError, TargetError):
        raise
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:  # the binding raises RuntimeError for a full disk as well
        raise ModelError(f"cannot write {path}: {_reason(error)}") from error
