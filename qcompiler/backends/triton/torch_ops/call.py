"""What a torch function of an ONNX operator is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Memo:
    """What a step of a plan keeps from run to run, so that later ones need nothing of the host.

    Attributes:
        constant: indices of the inputs that never change.
        listed: contents of such inputs, by index.
        tables: tensors on the device that depend on shapes alone, by name.
        waits: whether a run reads data of the device on the host that may change.
    """

    constant: frozenset[int] = frozenset()
    listed: dict[int, list[Any]] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    waits: bool = False


@dataclass(frozen=True)
class Call:
    """One execution of an operator.

    Attributes:
        op_type: ONNX operator.
        inputs: tensors; None where an optional input is absent.
        attributes: attributes that are given; enumerations and types as ONNX has them.
        outputs: number of outputs that are asked for.
        opset: version of the ONNX operator set.
        memo: of the step.
    """

    op_type: str
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    memo: Memo = field(default_factory=Memo)

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
        found = self.contents(index)
        return None if found is None else [int(v) for v in found]

    def contents(self, index: int) -> list[Any] | None:
        """Return the elements of an optional input, flat, on the host; those of a constant are fetched once."""
        value = self.get(index)
        if value is None:
            return None
        if index in self.memo.listed:
            return self.memo.listed[index]
        found: list[Any] = value.reshape(-1).tolist()
        if index in self.memo.constant:
            self.memo.listed[index] = found
        else:
            self.memo.waits = True
        return found

    def scalar(self, index: int) -> Any:
        """Return the first element of an input that must be there, on the host."""
        self[index]
        return (self.contents(index) or [0])[0]

    def table(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that depends on shapes and constants alone, on the device of the first input; made once."""
        if name not in self.memo.tables:
            self.memo.tables[name] = make().to(self[0].device)
        return self.memo.tables[name]

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
