"""Memory and runs against stand-ins for the driver and the engine, and, where a GPU is, the real ones."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.tensorrt.api import find_flavours
from qcompiler.backends.tensorrt.build import build_plan
from qcompiler.backends.tensorrt.cuda import Memory, device_sms, load_driver
from qcompiler.backends.tensorrt.runtime import TrtEngine, TrtRunner
from qcompiler.engine import EngineOptions
from qcompiler.errors import CalibrationError, ModelError, TargetError
from tests.backends.tensorrt_models import two_convolutions


class FakeDriver:
    """libcuda with host memory: two GPUs, of 8.9 and 12.0."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if self.status == 0:
                self.answer(name, arguments)
            return self.status

        return call

    def answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        first: Any = getattr(arguments[0], "_obj", None) if arguments else None
        if name == "cuDeviceGetCount":
            first.value = 2
        elif name == "cuDeviceGet":
            first.value = arguments[1]
        elif name == "cuDeviceGetAttribute":
            first.value = {75: (8, 12), 76: (9, 0)}[arguments[1]][arguments[2].value]
        elif name in ("cuDevicePrimaryCtxRetain", "cuStreamCreate"):
            first.value = 77
        elif name == "cuMemAlloc_v2":
            block = ctypes.create_string_buffer(arguments[1].value)
            first.value = ctypes.addressof(block)
            self.memory[first.value] = block
        elif name == "cuMemFree_v2":
            del self.memory[arguments[0].value]
        elif name in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"):
            ctypes.memmove(arguments[0].value, arguments[1].value, arguments[2].value)


class FakeEngine:
    """y = 2 x for float32 [n, 3], n up to 4; it reads and writes the addresses that it is given."""

    num_io_tensors = 2
    fails = False

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name == "x" else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_location(self, name: str) -> Any:
        return SimpleNamespace(name="DEVICE")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape or (-1, 3)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (4, 3)]

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return len(shape) == 2 and shape[1] == 3 and 1 <= shape[0] <= 4

    def infer_shapes(self) -> list[str]:
        return []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        size = 3 * self.shape[0]
        x, y = ((ctypes.c_float * size).from_address(self.addresses[name]) for name in ("x", "y"))
        y[:] = [2 * value for value in x]
        return not self.fails


def test_gpus_are_counted_by_their_compute_capability() -> None:
    assert device_sms(FakeDriver()) == (89, 120)
    assert device_sms(FakeDriver(status=100)) == ()
    assert device_sms(None) == ()


def test_memory_is_kept_grown_and_given_back() -> None:
    driver = FakeDriver()
    memory = Memory(driver)
    small = memory.block("x", 8)
    assert memory.block("x", 4) == small
    memory.block("x", 64)
    assert small not in driver.memory
    memory.close()
    assert driver.memory == {}
    assert driver.calls[-2:] == ["cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]
    memory.close()
    assert driver.calls.count("cuDevicePrimaryCtxRelease_v2") == 1


def test_a_driver_that_fails_says_at_what() -> None:
    with pytest.raises(TargetError, match="the cuda driver could not cuDeviceGet: status 2"):
        Memory(FakeDriver(status=2))


def test_arrays_go_to_the_gpu_and_back() -> None:
    runner = TrtRunner(FakeEngine(), Memory(FakeDriver()))
    assert [(i.name, i.dtype, i.shape) for i in runner.inputs] == [("x", np.dtype(np.float32), (None, 3))]
    for rows in (2, 4, 1):
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
        np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)
    turned = np.arange(6, dtype=np.float32).reshape(3, 2).T  # not contiguous
    np.testing.assert_array_equal(runner.run({"x": turned})["y"], 2 * turned)
    assert runner.run({"x": x}, []) == {}
    value = runner.run_values({"x": TrtEngine().value(x)}, ["y"])["y"]
    np.testing.assert_array_equal(value.array(), 2 * x)


def test_feeds_that_do_not_fit_are_refused() -> None:
    runner = TrtRunner(FakeEngine(), Memory(FakeDriver()))
    with pytest.raises(CalibrationError, match="the feed lacks x"):
        runner.run({})
    with pytest.raises(CalibrationError, match="x is float64, expected float32"):
        runner.run({"x": np.zeros((1, 3))})
    with pytest.raises(CalibrationError, match=r"x has the shape \[5, 3\].*built for \[1, 3\] to \[4, 3\]"):
        runner.run({"x": np.zeros((5, 3), np.float32)})


def test_a_run_that_fails_and_a_context_that_is_not_made_say_so() -> None:
    engine = FakeEngine()
    engine.fails = True
    with pytest.raises(TargetError, match="could not run the engine"):
        TrtRunner(engine, Memory(FakeDriver())).run({"x": np.zeros((1, 3), np.float32)})
    broken = SimpleNamespace(create_execution_context=lambda: None)
    with pytest.raises(TargetError, match="made no execution context"):
        _ = TrtRunner(broken, Memory(FakeDriver()))._context


def test_without_a_gpu_nothing_is_touched(tmp_path: Path) -> None:
    engine = TrtEngine(find_driver=lambda: None)
    with pytest.raises(TargetError, match="found no CUDA device"):
        engine.load(tmp_path / "m.plan")
    with pytest.raises(TargetError, match="hands no graph back"):
        engine.optimized_graph(onnx.ModelProto().SerializeToString())
    with pytest.raises(TargetError, match="not timed here"):
        engine.profile(b"", {}, EngineOptions(), 1)


def _gpu() -> str:
    """Return why the tests on a GPU are skipped, empty if they are not."""
    sms = device_sms(load_driver())
    if not sms:
        return "no CUDA device answers"
    return "" if find_flavours() else "neither TensorRT nor TensorRT for RTX is installed"


needs_gpu = pytest.mark.skipif(bool(_gpu()), reason=_gpu() or "there is a GPU")


@pytest.mark.tensorrt_gpu
@needs_gpu
def test_an_engine_computes_what_onnx_runtime_does() -> None:
    model = two_convolutions("n").SerializeToString()
    x = np.random.default_rng(0).normal(size=(2, 8, 16, 16)).astype(np.float32)
    (wanted,) = OrtEngine().load(model, EngineOptions(optimize=False)).run({"x": x}).values()
    (found,) = TrtEngine().load(model).run({"x": x}).values()
    # Rounding in front of the second convolution may differ by one step of 0.05, times weights of at most 1.27.
    step = 0.05 * 1.27
    assert float(np.max(np.abs(found - wanted))) <= 9 * step
    assert float(np.mean(np.abs(found - wanted))) <= 0.1 * step


@pytest.mark.tensorrt_gpu
@needs_gpu
def test_a_written_engine_runs_and_torch_tensors_stay_on_the_gpu(tmp_path: Path) -> None:
    sm = device_sms(load_driver())[0]
    if sm not in find_flavours()[0].sms:
        pytest.skip(f"{find_flavours()[0].name} does not build for sm{sm}")
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.plan"
    build_plan(two_convolutions().SerializeToString(), sm, None, path)
    runner = TrtEngine().load(path)
    x = np.random.default_rng(0).normal(size=(1, 8, 16, 16)).astype(np.float32)
    (wanted,) = runner.run({"x": x}).values()
    (found,) = runner.run_tensors({"x": torch.from_numpy(x).cuda()}).values()
    np.testing.assert_array_equal(found.cpu().numpy(), wanted)
    with pytest.raises(CalibrationError, match="no torch tensor on a GPU"):
        runner.run_tensors({"x": torch.from_numpy(x)})


@pytest.mark.tensorrt_gpu
@needs_gpu
def test_a_broken_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.plan"
    path.write_bytes(b"no engine")
    with pytest.raises(ModelError, match="the engine is not taken by"):
        TrtEngine().load(path)
