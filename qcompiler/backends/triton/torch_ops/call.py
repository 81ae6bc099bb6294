"""What a torch function of an ONNX operator is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One execution of an operator.

    Attributes:
        op_type: ONNX operator.
        inputs: tensors; None where an optional input is absent.
        attributes: attributes that are given; enumerations and types as ONNX has them.
        outputs: number of outputs that are asked for.
        opset: version of the ONNX operator set.
    """

    op_type: str
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21

    def get(self, index: int) -> Tensor | None:
        """Return an optional input."""
        return self.inputs[index] if index < len(self.inputs) else None

    def __getitem__(self, index: int) -> Tensor:
        """Return an input that must be there."""
        value = self.get(index)
        if value is None:
            raise ValueError(f"{self.op_type} lacks input {index}")
        return value

    def numbers(self, index: int) -> list[int] | None:
        """Return an optional input of integers (axes, a shape) as a list."""
        value = self.get(index)
        return None if value is None else [int(v) for v in value.reshape(-1).tolist()]

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or its default."""
        return self.attributes.get(name, default)

    def axes(self, index: int = 1) -> list[int] | None:
        """Return axes, an input since opset 13 or 18, an attribute before."""
        found = self.numbers(index)
        return found if found is not None else self.attr("axes")


Function = Callable[[Call], tuple[Tensor, ...]]

# Element types by the number that ONNX gives them (TensorProto.DataType).
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
    17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz, 19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz,
}  # fmt: skip


def one(function: Callable[[Call], Tensor]) -> Function:
    """Wrap a function of one output."""
    return lambda call: (function(call),)
