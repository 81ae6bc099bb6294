"""IOBinding whose inputs can be read when a request is made, so that bound requests calibrate too."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort


class SampledBinding(ort.IOBinding):  # type: ignore[misc]  # onnxruntime has no types
    """An ``onnxruntime.IOBinding`` that remembers where its inputs lie."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Bind to a session."""
        super().__init__(session)
        self._qcompiler_inputs: dict[str, Any] = {}

    def bind_cpu_input(self, name: str, arr_on_cpu: Any) -> None:
        """Bind an array."""
        super().bind_cpu_input(name, arr_on_cpu)
        self._qcompiler_inputs[name] = arr_on_cpu

    def bind_ortvalue_input(self, name: str, ortvalue: ort.OrtValue) -> None:
        """Bind an ``OrtValue``."""
        super().bind_ortvalue_input(name, ortvalue)
        self._qcompiler_inputs[name] = ortvalue

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        """Bind memory by its address."""
        super().bind_input(name, device_type, device_id, element_type, shape, buffer_ptr)
        self._qcompiler_inputs[name] = _Memory(device_type, element_type, tuple(shape), buffer_ptr)

    def clear_binding_inputs(self) -> None:
        """Forget the inputs."""
        super().clear_binding_inputs()
        self._qcompiler_inputs.clear()

    def qcompiler_feed(self) -> Mapping[str, Any] | None:
        """Return what is bound now, to be copied before the next request; None if some of it cannot be read."""
        feed = {}
        for name, value in self._qcompiler_inputs.items():
            found = value.array() if isinstance(value, _Memory) else value
            if found is None:
                return None
            feed[name] = found
        return feed


class _Memory:
    """An input that was bound by address."""

    def __init__(self, device: str, element_type: Any, shape: tuple[int, ...], address: int) -> None:
        self._device, self._type, self._shape, self._address = device, element_type, shape, address

    def array(self) -> Any:
        """Return a view of the memory, None if it is on a device or of a type that NumPy has no equal of."""
        if self._device != "cpu" or isinstance(self._type, int):
            return None
        dtype = np.dtype(self._type)
        size = math.prod(self._shape) * dtype.itemsize
        if size == 0 or dtype.hasobject:
            return None if dtype.hasobject else np.zeros(self._shape, dtype)
        memory = (ctypes.c_char * size).from_address(self._address)
        return np.frombuffer(memory, dtype).reshape(self._shape)
