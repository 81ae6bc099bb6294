"""ONNX Runtime on CPU: load, run, profile, and read back what it made of a model."""

from __future__ import annotations

import ctypes
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.engine import Array, EngineOptions, EngineValue, Feeds, ModelLike, NodeCost, Profile, TensorInfo
from qcompiler.errors import CalibrationError, ModelError, first_line
from qcompiler.ir.serialize import MAX_INLINE_BYTES, save_model, to_bytes, weight_bytes

_PROVIDERS = ("CPUExecutionProvider",)
_LEVELS = {True: ort.GraphOptimizationLevel.ORT_ENABLE_ALL, False: ort.GraphOptimizationLevel.ORT_DISABLE_ALL}
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})

_BFLOAT16: np.dtype[Any] = ir.DataType.BFLOAT16.numpy()
_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
} | {f"tensor({sign}int{bits})": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def _dtype(text: str) -> np.dtype[Any]:
    if text == "tensor(bfloat16)":
        return _BFLOAT16
    found: np.dtype[Any] = np.dtype(_DTYPES.get(text, np.object_))
    return found


def _array(value: ort.OrtValue) -> Array:
    """Return a tensor's numbers; the binding itself has no NumPy type for bfloat16."""
    if value.data_type() != "tensor(bfloat16)":
        return cast(Array, value.numpy())
    shape = value.shape()
    data = ctypes.string_at(value.data_ptr(), 2 * math.prod(shape))
    return np.frombuffer(data, _BFLOAT16).reshape(shape)


@dataclass(frozen=True)
class OrtEngineValue:
    """An ``OrtValue`` as an `qcompiler.engine.EngineValue`."""

    value: ort.OrtValue

    @cached_property
    def type(self) -> ir.TypeProtocol:
        """Return the ONNX type."""
        return _type(self.value.data_type())

    def array(self) -> Array:
        """Return the numbers, a view of ONNX Runtime's memory that keeps this value alive."""
        text = self.value.data_type()
        if text == "tensor(string)" or not text.startswith("tensor("):
            return cast(Array, self.value.numpy())
        shape, dtype = self.value.shape(), _dtype(text)
        if dtype.hasobject:  # a type that NumPy has no equal of
            return _array(self.value)
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return np.zeros(shape, dtype)
        memory = (ctypes.c_char * size).from_address(self.value.data_ptr())
        memory.owner = self.value  # ctypes arrays take attributes; freed with the view
        made = np.frombuffer(memory, dtype).reshape(shape)
        made.flags.writeable = False
        return made


@dataclass(frozen=True)
class TextValue:
    """A tensor of strings, which ONNX Runtime's binding takes as an array only."""

    text: Array

    @property
    def type(self) -> ir.TypeProtocol:
        """Return the ONNX type."""
        return ir.TensorType(ir.DataType.STRING)

    def array(self) -> Array:
        """Return the strings."""
        return self.text


def _type(text: str) -> ir.TypeProtocol:
    """Read ONNX Runtime's text of a type, such as ``seq(tensor(float))``."""
    outer, _, inner = text.removesuffix(")").partition("(")
    if outer == "seq":
        return ir.SequenceType(_type(inner))
    if outer == "optional":
        return ir.OptionalType(_type(inner))
    return ir.TensorType(ir.DataType[inner.upper()])


def engine_value(array: Array) -> EngineValue:
    """Return a tensor as a value of ONNX Runtime, which shares its memory."""
    if array.dtype.kind in "OSU":
        return TextValue(array)
    array = np.asarray(array, order="C")  # which keeps rank 0; the binding reads the memory as it lies
    if array.dtype == _BFLOAT16:
        return OrtEngineValue(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(ir.DataType.BFLOAT16)))
    return OrtEngineValue(ort.OrtValue.ortvalue_from_numpy(array))


@dataclass(frozen=True)
class OrtRunner:
    """A model loaded by ONNX Runtime on the CPU provider."""

    session: ort.InferenceSession

    @cached_property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Return the inputs that a caller feeds."""
        return tuple(TensorInfo(i.name, _dtype(i.type), tuple(i.shape)) for i in self.session.get_inputs())

    @cached_property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Return the outputs in the model's order."""
        return tuple(TensorInfo(o.name, _dtype(o.type), tuple(o.shape)) for o in self.session.get_outputs())

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the named outputs.

        Raises:
            CalibrationError: a feed does not fit the model; the text is the engine's.
        """
        names = list(outputs) if outputs is not None else [o.name for o in self.outputs]
        try:
            if any(i.dtype == _BFLOAT16 for i in (*self.inputs, *self.outputs)):
                return self._run_ort_values(feeds, names)
            results = self.session.run(names, dict(feeds))
        except Exception as error:  # the binding raises a dozen unrelated types
            raise CalibrationError(f"onnxruntime could not run the model on this feed: {first_line(error)}") from error
        return dict(zip(names, results, strict=True))

    def run_values(self, values: Mapping[str, EngineValue], outputs: Sequence[str]) -> dict[str, EngineValue]:
        """Run once on ONNX Runtime's own values.

        Raises:
            CalibrationError: the engine stops; the text is its own.
        """
        try:
            if any(isinstance(value, TextValue) for value in values.values()):
                arrays = self.session.run(list(outputs), {name: value.array() for name, value in values.items()})
                return {name: engine_value(np.asarray(array)) for name, array in zip(outputs, arrays, strict=True)}
            given = {name: cast(OrtEngineValue, value).value for name, value in values.items()}
            results = self.session.run_with_ort_values(list(outputs), given)
        except Exception as error:  # the binding raises a dozen unrelated types
            raise CalibrationError(f"onnxruntime could not run the model on this feed: {first_line(error)}") from error
        return {name: OrtEngineValue(result) for name, result in zip(outputs, results, strict=True)}

    def _run_ort_values(self, feeds: Feeds, names: list[str]) -> dict[str, Array]:
        """Run through OrtValue, the only way in for bfloat16."""
        values = {
            k: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(v, order="C"), int(ir.DataType.BFLOAT16))
            if v.dtype == _BFLOAT16
            else ort.OrtValue.ortvalue_from_numpy(np.asarray(v, order="C"))
            for k, v in feeds.items()
        }
        results = self.session.run_with_ort_values(names, values)
        return {n: _array(r) for n, r in zip(names, results, strict=True)}


class OrtEngine:
    """ONNX Runtime's CPU execution provider as an `qcompiler.engine.Engine`."""

    name = "onnxruntime"

    def __init__(self, *, signed: bool = False) -> None:
        """Take what to be.

        Args:
            signed: rewrite graphs as on ARM, where signed activations enter integer operators as they are; on x86 they
                are made unsigned first, and only where one operator reads them. The same graph comes out as on ARM.
        """
        self.signed = signed

    @property
    def version(self) -> str:
        """Return the version of the installed ONNX Runtime."""
        return str(ort.__version__)

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> OrtRunner:
        """Load a model on the CPU provider.

        Raises:
            ModelError: ONNX Runtime refuses the model.
        """
        return OrtRunner(self._session(model, _session_options(options)))

    def _session(
        self, model: ModelLike, options: ort.SessionOptions, providers: Sequence[Any] = _PROVIDERS
    ) -> ort.InferenceSession:
        with _loadable(model) as source:
            try:
                return ort.InferenceSession(source, options, providers=list(providers))
            except Exception as error:  # the binding raises a dozen unrelated types
                raise ModelError(f"onnxruntime {self.version} refuses the model: {first_line(error)}") from error

    def value(self, array: Array) -> EngineValue:
        """Return a tensor as a value of ONNX Runtime."""
        return engine_value(array)

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        """Run ``rounds`` times under ONNX Runtime's profiler.

        The time of a node is the minimum over rounds, which on a shared machine is the steadiest figure; control flow
        is left out because its time contains that of its body.
        """
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            settings = _session_options(options)
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")
            session = self._session(model, settings)
            runner = OrtRunner(session)
            for _ in range(rounds):
                runner.run(feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return Profile(tuple(_node_costs(events, rounds)))

    def optimized_graph(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> ir.Model:
        """Return the graph after all of ONNX Runtime's own optimizations for this processor."""
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            path = Path(folder) / "optimized.onnx"
            settings = _session_options(options)
            if self.signed:
                settings.add_session_config_entry("session.qdqisint8allowed", "1")
            settings.optimized_model_filepath = str(path)
            settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
            settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
            self._session(model, settings)
            # The weights vanish with the folder: the read-back graph is for structure, not for numbers.
            return ir.from_proto(onnx.load(path, load_external_data=False))


def _session_options(options: EngineOptions) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = options.threads
    made.inter_op_num_threads = 1
    made.log_severity_level = 4
    made.graph_optimization_level = _LEVELS[options.optimize]
    if options.shared_pool:
        _register_pool()
        made.add_session_config_entry("session.use_env_allocators", "1")
    return made


@cache
def _register_pool() -> None:
    """Register an arena that sessions may share.

    It grows in powers of two: feeds of many shapes would leave holes in one that grows by what each asks for.
    """
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    grow = {"max_mem": 0, "arena_extend_strategy": 0, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    # Raises where the process has registered one for itself: that one serves as well.
    with suppress(RuntimeError):
        ort.create_and_register_allocator(info, ort.OrtArenaCfg(grow))


@contextmanager
def _loadable(model: ModelLike) -> Iterator[bytes | str]:
    """Give what InferenceSession takes: bytes or a path (models too large for one protobuf go through a file)."""
    if isinstance(model, bytes):
        yield model
    elif isinstance(model, str | Path):
        yield str(model)
    else:
        # Weights in external files are read in: bytes have no folder that their paths could start from.
        if weight_bytes(model) <= MAX_INLINE_BYTES:
            yield to_bytes(model)
            return
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            path = Path(folder) / "model.onnx"
            save_model(model, path)
            yield str(path)


def _node_costs(events: list[dict[str, Any]], rounds: int) -> Iterator[NodeCost]:
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            durations[key].append(float(event["dur"]))
    for (name, op_type), times in durations.items():
        if op_type in _CONTROL_FLOW:
            continue
        per_run = max(1, round(len(times) / rounds))
        runs = [sum(times[i : i + per_run]) for i in range(0, len(times) - per_run + 1, per_run)]
        yield NodeCost(name, op_type, min(runs))
