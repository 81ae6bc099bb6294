"""Between NumPy, DLPack and torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from qcompiler.engine import Array

TYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.uint16, "int32": torch.int32,
    "uint32": torch.uint32, "int64": torch.int64, "uint64": torch.uint64, "bool": torch.bool,
    "float8e4m3fn": torch.float8_e4m3fn, "float8e5m2": torch.float8_e5m2, "float8e4m3fnuz": torch.float8_e4m3fnuz,
    "float8e5m2fnuz": torch.float8_e5m2fnuz, "int4": torch.int8, "uint4": torch.uint8,
}  # fmt: skip
"""torch's type of each element type; numbers of 4 bits take a byte each."""
_NARROW = {
    torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2, torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
    torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
_BITS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16)}


def to_torch(array: Any) -> Tensor:
    """Return a torch tensor of a NumPy array, of a torch tensor, or of what speaks DLPack; memory may be shared."""
    if isinstance(array, Tensor):
        return array
    if not isinstance(array, np.ndarray | np.generic):
        if hasattr(array, "__dlpack__"):
            taken: Tensor = torch.utils.dlpack.from_dlpack(array)
            return taken
        array = np.asarray(array)
    array = np.asarray(array)
    if array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        array = array.astype(np.uint8 if array.dtype.name.startswith("u") else np.int8)
    for dtype, narrow in _NARROW.items():
        if array.dtype == narrow:
            bits, carrier = _BITS[array.dtype.itemsize]
            return torch.from_numpy(np.array(array).view(bits)).to(carrier).view(dtype)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> Array:
    """Return a NumPy array of a tensor on the CPU; memory may be shared."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _NARROW:
        bits, carrier = _BITS[tensor.element_size()]
        return np.asarray(tensor.view(carrier).numpy().view(bits)).view(_NARROW[tensor.dtype])
    return np.asarray(tensor.numpy())
