"""Run a TensorRT engine on a GPU, with NumPy arrays or with torch tensors that are there already.

Never executed where this was written: there was no GPU. The GPU tests (``pytest -m tensorrt_gpu``) do.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.backends.onnxruntime import engine_value
from qcompiler.backends.tensorrt.api import find_flavours, import_flavour, require_flavours
from qcompiler.backends.tensorrt.cuda import Driver, Memory, device_sms, load_driver, require_device
from qcompiler.backends.tensorrt.probe import Prober, require_built
from qcompiler.engine import Array, EngineOptions, EngineValue, Feeds, ModelLike, Profile, TensorInfo
from qcompiler.errors import CalibrationError, ModelError, TargetError
from qcompiler.ir.serialize import to_bytes

_DTYPES: dict[str, Any] = {
    "FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "INT8": np.int8, "UINT8": np.uint8,
    "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_, "FP8": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
"""NumPy type of each of TensorRT's, by name."""
_TORCH = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool", "FP8": "float8_e4m3fn",
}  # fmt: skip
_SUFFIXES = (".plan", ".engine", ".trt")


def _name_of(member: Any) -> str:
    """Return an enumeration member's own name: ``DataType.HALF`` is HALF."""
    return str(member.name if hasattr(member, "name") else member).rpartition(".")[2]


@dataclass
class TrtRunner:
    """An engine on the first GPU.

    Attributes:
        engine: TensorRT's object.
        memory: on the GPU.
        keep: what must outlive the engine (TensorRT's runtime and its log).
    """

    engine: Any
    memory: Memory
    keep: tuple[Any, ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def _context(self) -> Any:
        made = self.engine.create_execution_context()
        if made is None:
            raise TargetError("tensorrt made no execution context: the GPU's memory may be full")
        return made

    @cached_property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Return the inputs that a caller feeds."""
        return self._ports("INPUT")

    @cached_property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Return the outputs in the model's order."""
        return self._ports("OUTPUT")

    def _ports(self, mode: str) -> tuple[TensorInfo, ...]:
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        wanted = [name for name in names if _name_of(self.engine.get_tensor_mode(name)) == mode]
        return tuple(
            TensorInfo(
                name, self._dtype(name), tuple(d if d >= 0 else None for d in self.engine.get_tensor_shape(name))
            )
            for name in wanted
        )

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = _name_of(self.engine.get_tensor_dtype(name))
        if kind not in _DTYPES:
            raise ModelError(f"the engine's tensor {name} is of type {kind}, which numpy has no equal of")
        found: np.dtype[Any] = np.dtype(_DTYPES[kind])
        return found

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Copy arrays to the GPU, run once, and copy the named outputs back.

        Raises:
            CalibrationError: a feed does not fit the engine or the shapes that it was built for.
            TargetError: the GPU fails.
        """
        wanted = [info.name for info in self.outputs] if outputs is None else list(outputs)
        arrays = {info.name: self._feed(info, feeds) for info in self.inputs}
        with self._lock:  # a context serves one caller at a time
            self.memory.enter()
            self.memory.wait_for_device()
            for name, array in arrays.items():
                self._place(name, array)
            shapes = self._infer()
            for name, shape in shapes.items():
                self._context.set_tensor_address(name, self.memory.block(name, _size(shape, self._dtype(name))))
            if not self._context.execute_async_v3(self.memory.stream):
                raise TargetError("tensorrt could not run the engine; its log says why")
            made = {name: np.empty(shapes[name], self._dtype(name)) for name in wanted}
            for name, array in made.items():
                if array.nbytes:
                    self.memory.download(array.ctypes.data, self.memory.block(name, array.nbytes), array.nbytes)
            self.memory.wait()
        return made

    def _feed(self, info: TensorInfo, feeds: Feeds) -> Array:
        if info.name not in feeds:
            raise CalibrationError(f"the feed lacks {info.name}; expected {', '.join(i.name for i in self.inputs)}")
        array = np.asarray(feeds[info.name], order="C")
        if array.dtype != info.dtype:
            raise CalibrationError(f"{info.name} is {array.dtype}, expected {info.dtype}")
        return array

    def _place(self, name: str, array: Array) -> None:
        """Put an input where the engine reads it: shapes on the host, all else on the GPU."""
        self._set_shape(name, array.shape)
        if _name_of(self.engine.get_tensor_location(name)) == "HOST":
            self._context.set_tensor_address(name, array.ctypes.data)
            return
        address = self.memory.block(name, array.nbytes)
        if array.nbytes:
            self.memory.upload(address, array.ctypes.data, array.nbytes)
        self._context.set_tensor_address(name, address)

    def _set_shape(self, name: str, shape: Sequence[int]) -> None:
        if not self._context.set_input_shape(name, tuple(shape)):
            least, _, most = self.engine.get_tensor_profile_shape(name, 0)
            raise CalibrationError(
                f"{name} has the shape {list(shape)}, and the engine was built for {list(least)} to {list(most)}"
            )

    def _infer(self) -> dict[str, tuple[int, ...]]:
        """Return the outputs' shapes for the inputs that were set."""
        missing = self._context.infer_shapes()
        if missing:
            raise CalibrationError(f"the engine still lacks {', '.join(map(str, missing))}")
        found = {info.name: tuple(self._context.get_tensor_shape(info.name)) for info in self.outputs}
        for name, shape in found.items():
            if any(length < 0 for length in shape):
                raise ModelError(f"the shape of {name} depends on its data, which this runner has no memory for")
        return found

    def run_tensors(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once on torch tensors of the GPU, on torch's current stream, and return torch tensors of the GPU.

        Nothing is copied and nothing is waited for.

        Raises:
            CalibrationError: a feed is no CUDA tensor or does not fit the engine.
            TargetError: torch is not imported, or the GPU fails.
        """
        torch = sys.modules.get("torch")
        if torch is None:
            raise TargetError("run_tensors takes torch tensors, but torch is not imported")
        packed = {info.name: self._tensor(torch, info, feeds) for info in self.inputs}
        with self._lock:
            for name, tensor in packed.items():
                self._set_shape(name, tuple(tensor.shape))
                self._context.set_tensor_address(name, tensor.data_ptr())
            device = next(iter(packed.values())).device if packed else torch.device("cuda", 0)
            made = {}
            for name, shape in self._infer().items():
                kind = getattr(torch, _TORCH[_name_of(self.engine.get_tensor_dtype(name))])
                made[name] = torch.empty(shape, dtype=kind, device=device)
                self._context.set_tensor_address(name, made[name].data_ptr())
            if not self._context.execute_async_v3(torch.cuda.current_stream(device).cuda_stream):
                raise TargetError("tensorrt could not run the engine; its log says why")
        return made

    def _tensor(self, torch: ModuleType, info: TensorInfo, feeds: Mapping[str, Any]) -> Any:
        tensor = feeds.get(info.name)
        if not isinstance(tensor, torch.Tensor) or not tensor.is_cuda:
            raise CalibrationError(f"{info.name} is no torch tensor on a GPU; give numpy arrays to run instead")
        if _name_of(self.engine.get_tensor_location(info.name)) == "HOST":
            raise CalibrationError(f"{info.name} is a shape, which tensorrt reads on the host; use run")
        kind = getattr(torch, _TORCH[_name_of(self.engine.get_tensor_dtype(info.name))])
        if tensor.dtype != kind:
            raise CalibrationError(f"{info.name} is {tensor.dtype}, expected {kind}")
        return tensor.contiguous()

    def run_values(self, values: Mapping[str, EngineValue], outputs: Sequence[str]) -> dict[str, EngineValue]:
        """Run once on values of an engine and return the named outputs as such."""
        made = self.run({name: value.array() for name, value in values.items()}, outputs)
        return {name: engine_value(array) for name, array in made.items()}

    def close(self) -> None:
        """Give the GPU's memory back; the runner is of no use after that."""
        with self._lock:
            self.__dict__.pop("_context", None)
            self.memory.close()


def _size(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class TrtEngine:
    """TensorRT on the first GPU as an `qcompiler.engine.Engine`.

    Attributes:
        prober: builds ONNX models.
        find_driver: returns libcuda, None where it is not.
    """

    prober: Prober = field(default_factory=Prober, compare=False)
    find_driver: Callable[[], Driver | None] = load_driver
    name = "tensorrt"

    @property
    def version(self) -> str:
        """Return flavour and version of what is installed, empty if nothing is."""
        found = find_flavours()
        return f"{found[0].name} {found[0].version}" if found else ""

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> TrtRunner:
        """Load an engine file, or build an ONNX model for the GPU that is here and load that.

        The driver is asked before the library is touched, which would end the process without one.

        Args:
            model: path of a .plan; or a model, a path or the bytes of an ONNX model.
            options: not used; TensorRT has no threads.

        Raises:
            ModelError: TensorRT refuses the model or the engine.
            TargetError: there is no GPU, or no flavour is installed.
        """
        driver = self.find_driver()
        sm = require_device(device_sms(driver))
        assert driver is not None
        require_flavours()
        return deserialize(self._plan(model, sm), driver)

    def _plan(self, model: ModelLike, sm: int) -> bytes:
        if isinstance(model, str | Path) and Path(model).suffix in _SUFFIXES:
            try:
                return Path(model).read_bytes()
            except OSError as error:
                raise ModelError(f"cannot read {model}: {error.strerror or error}") from error
        source = to_bytes(model) if isinstance(model, ir.Model) else Path(model) if isinstance(model, str) else model
        report = require_built(self.prober.probe(source, [sm], keep=True)[sm])
        if report.plan is None:
            raise ModelError(f"{report.flavour} {report.version} handed no engine out")
        return report.plan

    def value(self, array: Array) -> EngineValue:
        """Return a tensor as a value that runs take."""
        return engine_value(array)

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        """Raise: times of layers are not read.

        Raises:
            TargetError: always.
        """
        raise TargetError("tensorrt's layers are not timed here; trtexec --dumpProfile times them")

    def optimized_graph(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> ir.Model:
        """Raise: TensorRT hands no graph back.

        Raises:
            TargetError: always.
        """
        raise TargetError("tensorrt hands no graph back; its layers are in the report of a probe")


def deserialize(plan: bytes, driver: Driver) -> TrtRunner:
    """Load an engine with the first installed flavour that takes it.

    Args:
        plan: the engine's bytes.
        driver: libcuda, which found a GPU.

    Raises:
        ModelError: no flavour takes it; the text has their reasons.
        TargetError: no flavour can be imported.
    """
    from qcompiler.backends.tensorrt.worker import make_log

    reasons = []
    for flavour in require_flavours():
        trt = import_flavour([flavour.name])
        log = make_log(trt)
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return TrtRunner(engine, Memory(driver), (runtime, log))
        reasons.append(f"{flavour.name} {flavour.version}: {log.errors[0] if log.errors else 'no reason given'}")
    raise ModelError(f"the engine is not taken by {'; '.join(reasons)}")
