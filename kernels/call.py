"""One launch of a Triton kernel, described once: launched on tensors, or compiled ahead of time from stand-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config
from qcompiler.kernels.operand import TRITON_TYPES, dtype_name


@dataclass(frozen=True)
class Call:
    """A launch.

    Attributes:
        function: the ``triton.jit`` function.
        grid: programs along the three axes.
        arguments: run-time arguments by the function's names: tensors (or `Operand`), numbers, or None for a pointer
            that the options leave out.
        constants: ``tl.constexpr`` arguments.
        config: its warps and stages are used here; tile sizes are among the constants.
        fuse: let the compiler contract a product and a sum to one instruction. Off where results must equal the
            reference bit for bit: a product that is added to before it is rounded rounds other ties.
    """

    function: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Config
    fuse: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """Return Triton's compile options."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": self.fuse}

    def launch(self) -> None:
        """Run it; all tensors must be torch tensors of one device."""
        if 0 not in self.grid:
            self.function[self.grid](**self.arguments, **self.constants, **self.settings)


@dataclass(frozen=True)
class Signature:
    """What ahead-of-time compiling needs of a call, as a launch on aligned tensors would specialise it.

    Attributes:
        types: Triton type of each argument, ``constexpr`` for constants, in the order of the function.
        constants: values of the constants.
        divisible: names of arguments that are multiples of 16.
    """

    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]


def signature(call: Call) -> Signature:
    """Return the types of a call: pointers are aligned, integers 1 are constants, as in Triton's own specialisation."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(call.constants)
    divisible = []
    fixed = {p.name for p in call.function.params if p.do_not_specialize}
    for name in call.function.arg_names:
        if name in call.constants:
            types[name] = "constexpr"
            continue
        if name not in call.arguments:
            raise TargetError(f"the call of {call.function.__name__} leaves out the argument {name}")
        value = call.arguments[name]
        if value is None or (isinstance(value, int) and value == 1 and name not in fixed):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            types[name] = "fp32"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [name] if value % 16 == 0 and name not in fixed else []
        else:
            types[name] = "*" + TRITON_TYPES[dtype_name(value)]
            divisible.append(name)
    return Signature(types, constants, tuple(divisible))


@dataclass(frozen=True)
class Case:
    """A call that is compiled ahead of time and must hold what its entry of the table promises.

    Attributes:
        label: distinguishes the cases of a kernel; ends up in tables.
        dims: lengths of the axes; they only matter by their divisibility and by the entry they choose.
        options: the chosen options (others by default).
        dtypes: of arguments that leave a choice.
        instruction: matrix instruction that must appear; empty for that of the table's entry.
        full: only compiled in the full sweep.
    """

    label: str
    dims: Mapping[str, int]
    options: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""
    full: bool = False
