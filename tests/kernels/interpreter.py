"""Run one kernel in Triton's interpreter: outputs poisoned, every access checked, every byte counted.

Importing this needs torch, Triton and TRITON_INTERPRET=1; tests take it by the fixture ``interpreter``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from triton.runtime import interpreter

from qcompiler.kernels.catalog import contract_of
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options, Traffic
from qcompiler.kernels.launching import launch
from qcompiler.kernels.operand import Operand, dtype_name
from qcompiler.kernels.proof.interpreting import interpreted, repair_interpreter

repair_interpreter()

BITS = {
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16, np.int16),
    "float8e4m3fn": (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn, np.uint8),
    "float8e5m2": (ml_dtypes.float8_e5m2, torch.float8_e5m2, np.uint8),
}
"""Formats that torch and NumPy exchange as bits: NumPy dtype, torch dtype, integers of the same size."""


@dataclass(frozen=True)
class Run:
    """What one launch gave and did."""

    outputs: dict[str, np.ndarray]
    traffic: Traffic


def run_kernel(kernel: str, given: Mapping[str, Any], options: Options, config: Config) -> Run:
    """Launch a kernel on copies of NumPy arrays and numbers; return its outputs and what it moved.

    Args:
        kernel: its name.
        given: inputs, numbers and tensors that are read and written.
        options: the chosen ones.
        config: tile sizes; prefer few, large tiles: the interpreter's time goes by program and operation.
    """
    contract = contract_of(kernel)
    chosen = contract.options(options)
    dims = contract.check(given, chosen)
    tensors = {n: to_torch(v) if isinstance(v, np.ndarray) else v for n, v in given.items()}
    dtypes = {n: dtype_name(v) for n, v in given.items() if isinstance(v, np.ndarray)}
    written = [a.name for a in contract.arguments if a.role == "inout" and a.wanted(chosen)]
    for argument in contract.tensors(chosen):
        if argument.role == "output":
            tensors[argument.name] = poisoned(contract.operands(dims, chosen, dtypes)[argument.name])
            written.append(argument.name)
    for name, operand in contract.scratch(dims, chosen, config).items():
        tensors[name] = poisoned(operand)
        written.append(name)
    with watched(tensors, written) as watch, interpreted():
        launch(kernel, tensors, chosen, config)
    outputs = {a.name: to_numpy(tensors[a.name]) for a in contract.tensors(chosen) if a.role in ("output", "inout")}
    return Run(outputs, Traffic(watch.read, watch.written, watch.macs))


def check_traffic(kernel: str, run: Run, given: Mapping[str, Any], options: Options, config: Config) -> None:
    """Assert that a launch asked for exactly the bytes and multiply-adds of the contract's formula."""
    contract = contract_of(kernel)
    assert run.traffic == contract.requests({**given, **run.outputs}, contract.options(options), config)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Copy an array to a tensor of its own storage, with its strides kept (axes may be views of a wider array)."""
    for numpy_type, torch_type, bits in BITS.values():
        if array.dtype == numpy_type:
            return to_torch(array.view(bits)).view(torch_type)
    if array.flags.c_contiguous:
        return torch.from_numpy(array.copy())
    steps = [s // array.itemsize for s in array.strides]
    whole = torch.empty(1 + sum((n - 1) * s for n, s in zip(array.shape, steps, strict=True)), dtype=torch.uint8)
    whole = torch.full(whole.shape, 0x55, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype)
    view = whole.as_strided(array.shape, steps)
    once = tuple(slice(None) if s else slice(1) for s in steps)  # what is broadcast lies there once
    view[once].copy_(torch.from_numpy(array[once].copy()))
    return view


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to an array."""
    for numpy_type, torch_type, bits in BITS.values():
        if tensor.dtype == torch_type:
            integers = torch.int16 if bits is np.int16 else torch.uint8
            return tensor.view(integers).numpy().copy().view(numpy_type)
    return tensor.numpy().copy()


def poisoned(operand: Operand) -> torch.Tensor:
    """Make a tensor that no kernel would write: NaN for floats, 0x55 in every byte of integers."""
    if operand.dtype in BITS:
        numpy_type = BITS[operand.dtype][0]
        return to_torch(np.full(operand.shape, np.nan, numpy_type))
    dtype = np.dtype(operand.dtype)
    if dtype.kind == "f":
        return torch.from_numpy(np.full(operand.shape, np.nan, dtype))
    return torch.from_numpy(np.full(operand.nbytes, 0x55, np.uint8).view(dtype).reshape(operand.shape).copy())


class Watch:
    """Checks every access of a launch against the tensors' memory, and counts."""

    def __init__(self, tensors: Mapping[str, Any], written: list[str]) -> None:
        self.read = self.written = self.macs = 0
        known = sorted((extent(t), n in written, n) for n, t in tensors.items() if isinstance(t, torch.Tensor))
        known = [k for k in known if k[0][1] > k[0][0]]
        self.names = [name for _, _, name in known]
        self.starts = np.array([start for (start, _), _, _ in known], np.uint64)
        self.ends = np.array([end for (_, end), _, _ in known], np.uint64)
        self.writable = np.array([writable for _, writable, _ in known])

    def check(self, addresses: np.ndarray, itemsize: int, *, store: bool) -> None:
        """Fail if an address lies outside all tensors, or a store outside those that may be written."""
        if not addresses.size:
            return
        which = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = (which >= 0) & (addresses + np.uint64(itemsize) <= self.ends[np.maximum(which, 0)])
        if not inside.all():
            nearest = self.names[int(np.maximum(which, 0)[~inside].flat[0])]
            raise MemoryError(f"{int((~inside).sum())} accesses outside every tensor, the first one near {nearest}")
        if store and not self.writable[which].all():
            raise MemoryError(
                f"a store into {self.names[int(which[~self.writable[which]].flat[0])]}, which is read-only"
            )


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor and the one behind its last element."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def watched(tensors: Mapping[str, Any], written: list[str]) -> Iterator[Watch]:
    """Watch all loads, stores, atomics and matrix products of launches inside the block."""
    watch = Watch(tensors, written)
    builder = interpreter.InterpreterBuilder
    names = ("create_masked_load", "create_masked_store", "create_dot", "create_atomic_rmw")
    load, store, dot, atomic = (getattr(builder, name) for name in names)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        watch.check(addresses, size, store=False)
        watch.read += addresses.size * size
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        watch.check(addresses, size, store=True)
        watch.written += addresses.size * size
        return store(self, ptrs, value, mask, *rest)

    def atomic_rmw(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(ptr.data, mask.data.shape)[mask.data]
        watch.check(addresses, size, store=True)
        watch.read += addresses.size * size
        watch.written += addresses.size * size
        return atomic(self, operation, ptr, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        watch.macs += a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    for name, function in zip(names, (masked_load, masked_store, counted_dot, atomic_rmw), strict=True):
        setattr(builder, name, function)
    try:
        yield watch
    finally:
        for name, function in zip(names, (load, store, dot, atomic), strict=True):
            setattr(builder, name, function)
