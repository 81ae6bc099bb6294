"""What a kernel takes and gives: arguments, options, the check of both, and the bytes that a call must move."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config
from qcompiler.kernels.operand import ITEMSIZE, Operand, describe, strides

Dims = Mapping[str, int]
"""Length of each named axis of one call."""

Options = Mapping[str, str]
"""The chosen value of each option of one call."""

Role = Literal["input", "output", "inout", "scratch", "scalar"]

_DIM = re.compile(r"(?P<name>[A-Za-z]\w*|\d+)(?:/(?P<divisor>\w+))?")


@dataclass(frozen=True)
class Choice:
    """One option of a kernel, such as its activation.

    Attributes:
        name: as in ``options``.
        values: what it may be; the first is the default.
        why: what it changes.
    """

    name: str
    values: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    Attributes:
        name: key of the mapping that reference and kernel take.
        dtypes: legal dtypes; for a ``scalar`` one of ``int32`` and ``float32``.
        dims: named axes, outermost first: a name, a number, or ``K/128`` (rounded up; the divisor may be an option).
        dims_when: option, one of its values, and the axes that the argument has with it in place of ``dims``.
        role: a scalar is a Python number, all others are tensors with a contiguous last axis.
        when: option and those of its values for which the argument must be given; for all others it must be absent.
        dtype_of: option whose value is the dtype, for outputs.
        dtype_like: argument whose dtype it must have.
        packed: whether all axes must be contiguous, not only the last one.
        align: bytes that the start and every row are a multiple of in the fast variant; others run, but slower.
        why: what it holds, with its unit.
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[str, ...] = ()
    role: Role = "input"
    when: tuple[str, tuple[str, ...]] | None = None
    dtype_of: str = ""
    dtype_like: str = ""
    packed: bool = False
    align: int = 16
    why: str = ""
    dims_when: tuple[str, str, tuple[str, ...]] | None = None

    def wanted(self, options: Options) -> bool:
        """Return whether a call with these options has the argument."""
        return self.when is None or options[self.when[0]] in self.when[1]

    def axes(self, options: Options) -> tuple[str, ...]:
        """Return the named axes of a call with these options."""
        if self.dims_when is not None and options[self.dims_when[0]] == self.dims_when[1]:
            return self.dims_when[2]
        return self.dims


@dataclass(frozen=True)
class Traffic:
    """Bytes read from and written to global memory, and multiply-adds, of one call."""

    read: int
    written: int
    macs: int = 0

    @property
    def total(self) -> int:
        """Return bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Contract:
    """What a kernel demands and promises.

    Attributes:
        name: the kernel's folder.
        purpose: one line.
        arguments: in the order in which they are printed; names are unique.
        choices: its options.
        macs_rule: multiply-adds of a call from its dims.
        requests_rule: bytes that the programs of a launch ask for, and multiply-adds that they issue, with padding,
            from the operands, the options and the configuration; exact, the interpreter's counters are compared to it.
        rules: further demands; each returns None or what is wrong, in lower case.
        least_arch: number of the least architecture that has the instructions (89 for 8-bit floats).
        scratch_rule: memory that a launch needs besides its arguments, by the names of ``scratch`` arguments.
    """

    name: str
    purpose: str
    arguments: tuple[Argument, ...]
    choices: tuple[Choice, ...]
    macs_rule: Callable[[Dims, Options], int]
    requests_rule: Callable[[Contract, Dims, Mapping[str, Operand], Options, Config], Traffic]
    rules: tuple[Callable[[Dims, Options], str | None], ...] = field(default=())
    least_arch: int = 80
    scratch_rule: Callable[[Dims, Options, Config], dict[str, Operand]] | None = None

    def argument(self, name: str) -> Argument:
        """Return an argument by its name."""
        return next(a for a in self.arguments if a.name == name)

    def options(self, given: Options) -> dict[str, str]:
        """Return all options, the missing ones by their defaults.

        Raises:
            TargetError: an option or a value is unknown.
        """
        known = {c.name: c for c in self.choices}
        for name, value in given.items():
            if name not in known:
                raise TargetError(f"{self.name} has no option {name!r}; expected one of {', '.join(sorted(known))}")
            if value not in known[name].values:
                expected = ", ".join(known[name].values)
                raise TargetError(f"{self.name}: {name} cannot be {value!r}; expected one of {expected}")
        return {c.name: given.get(c.name, c.values[0]) for c in self.choices}

    def tensors(self, options: Options) -> tuple[Argument, ...]:
        """Return the tensor arguments (not scratch) of a call with these complete options."""
        return tuple(a for a in self.arguments if a.role not in ("scalar", "scratch") and a.wanted(options))

    def check(self, given: Mapping[str, Any], options: Options) -> dict[str, int]:
        """Check all arguments of a call; return the length of each named axis.

        Args:
            given: tensors (torch, NumPy or `Operand`) and numbers by name; outputs may be left out.
            options: as `options` completes them.

        Raises:
            TargetError: an argument is missing, unknown or superfluous, or has a wrong dtype, shape or layout.
        """
        for name in given:
            if all(a.name != name for a in self.arguments):
                expected = ", ".join(a.name for a in self.arguments)
                raise TargetError(f"{self.name} has no argument {name!r}; expected some of {expected}")
        dims: dict[str, int] = {}
        for argument in self.arguments:
            self._check_presence(argument, given, options)
            if argument.name in given and argument.role != "scalar":
                self._check_tensor(argument, given[argument.name], options, dims)
                self._check_likeness(argument, given)
            elif argument.name in given:
                self._check_number(argument, given[argument.name])
        for argument in self.arguments:  # once more: a quotient may stand before the axis it is of
            if argument.name in given and argument.role != "scalar":
                self._check_tensor(argument, given[argument.name], options, dims)
        for rule in self.rules:
            problem = rule(dims, options)
            if problem:
                raise TargetError(f"{self.name}: {problem}")
        return dims

    def _check_presence(self, argument: Argument, given: Mapping[str, Any], options: Options) -> None:
        present, wanted = argument.name in given, argument.wanted(options)
        if wanted and not present and argument.role in ("input", "inout", "scalar"):
            raise TargetError(f"{self.name} needs {argument.name} ({argument.why}); found none")
        if present and not wanted:
            assert argument.when is not None
            option, values = argument.when
            raise TargetError(
                f"{self.name} takes {argument.name} only with {option} {' or '.join(values)}; "
                f"found {option} {options[option]}"
            )

    def _check_number(self, argument: Argument, number: Any) -> None:
        """Hold a scalar to its dtype: no fraction is cut off, nothing wraps around."""
        kind = np.dtype(argument.dtypes[0])
        fits = isinstance(number, numbers.Real) and not isinstance(number, bool)
        if fits and kind.kind == "i":
            ends = np.iinfo(kind)
            fits = float(number) == int(number) and ends.min <= int(number) <= ends.max
        if not fits:
            raise TargetError(
                f"{self.name}: {argument.name} ({argument.why}) must be one {kind} number; found {number!r}"
            )

    def _check_likeness(self, argument: Argument, given: Mapping[str, Any]) -> None:
        if not argument.dtype_like:
            return
        expected, found = (describe(given[name]).dtype for name in (argument.dtype_like, argument.name))
        if found != expected:
            raise TargetError(f"{self.name}: {argument.name} must have dtype {expected}; found {found}")

    def _check_tensor(self, argument: Argument, tensor: Any, options: Options, dims: dict[str, int]) -> None:
        found = describe(tensor)
        where = f"{self.name}: {argument.name}"
        legal = (options[argument.dtype_of],) if argument.dtype_of else argument.dtypes
        if found.dtype not in legal:
            raise TargetError(f"{where} must have dtype {' or '.join(legal)}; found {found.dtype}")
        axes = argument.axes(options)
        if len(found.shape) != len(axes):
            raise TargetError(f"{where} must have axes [{', '.join(axes)}]; found shape {found.shape}")
        for dim, length in zip(axes, found.shape, strict=True):
            if dim.isidentifier():
                dims.setdefault(dim, length)
            wanted = resolve(dim, dims, options)
            if wanted is not None and wanted != length:
                raise TargetError(f"{where} must have {dim} = {wanted} in [{', '.join(axes)}]; found {length}")
        if found.shape and found.shape[-1] > 1 and strides(tensor)[-1] != 1:
            raise TargetError(f"{where} must be contiguous along its last axis; found strides {strides(tensor)}")
        pairs = zip(found.shape, strides(found), strides(tensor), strict=True)
        if argument.packed and any(expected != step for length, expected, step in pairs if length > 1):
            raise TargetError(f"{where} must be contiguous; found strides {strides(tensor)} for shape {found.shape}")

    def operands(self, dims: Dims, options: Options, dtypes: Mapping[str, str]) -> dict[str, Operand]:
        """Return the tensors of a call that has these dims, as stand-ins.

        Args:
            dims: every axis that is named by an argument of the call.
            options: complete.
            dtypes: for arguments that leave a choice; others, and missing ones, take the first legal dtype.
        """
        found = {}
        for argument in self.tensors(options):
            dtype = self._dtype(argument, options, dtypes)
            axes = argument.axes(options)
            shape = tuple(resolve(d, dims, options) for d in axes)
            if None in shape:
                raise TargetError(f"{self.name}: {argument.name} needs the lengths of {axes}; found {dims}")
            found[argument.name] = Operand(dtype, tuple(n for n in shape if n is not None))
        return found

    def _dtype(self, argument: Argument, options: Options, dtypes: Mapping[str, str]) -> str:
        if argument.dtype_of:
            return options[argument.dtype_of]
        if argument.dtype_like:
            return self._dtype(self.argument(argument.dtype_like), options, dtypes)
        return dtypes.get(argument.name, argument.dtypes[0])

    def scratch(self, dims: Dims, options: Options, config: Config) -> dict[str, Operand]:
        """Return the scratch tensors that a launch needs besides its arguments."""
        return {} if self.scratch_rule is None else self.scratch_rule(dims, options, config)

    def example_scalars(self, options: Options) -> dict[str, int | float]:
        """Return a number for each scalar, for calls that are only compiled: no special case of the compiler."""
        scalars = [a for a in self.arguments if a.role == "scalar" and a.wanted(options)]
        return {a.name: 7 if a.dtypes[0] == "int32" else 0.37 for a in scalars}

    def traffic(self, operands: Mapping[str, Any], options: Options) -> Traffic:
        """Return the least bytes that a call must move, every tensor once, and its multiply-adds.

        Args:
            operands: all tensors of the call, outputs too.
            options: complete.
        """
        read = written = 0
        for argument in self.tensors(options):
            nbytes = describe(operands[argument.name]).nbytes
            read += nbytes if argument.role != "output" else 0
            written += nbytes if argument.role != "input" else 0
        return Traffic(read, written, self.macs(self.dims(operands_only(operands), options), options))

    def macs(self, dims: Dims, options: Options) -> int:
        """Return the multiply-adds that the call's definition holds."""
        return self.macs_rule(dims, options)

    def requests(self, operands: Mapping[str, Any], options: Options, config: Config) -> Traffic:
        """Return the exact bytes that a launch asks for and the multiply-adds it issues (padded tiles count whole)."""
        known = {name: describe(t) for name, t in operands_only(operands).items()}
        return self.requests_rule(self, self.dims(known, options), known, options, config)

    def dims(self, operands: Mapping[str, Any], options: Options) -> dict[str, int]:
        """Return the length of each named axis of tensors that are known to be right."""
        dims: dict[str, int] = {}
        for argument in self.tensors(options):
            if argument.name in operands:
                shape = describe(operands[argument.name]).shape
                axes = argument.axes(options)
                dims |= {d: n for d, n in zip(axes, shape, strict=True) if d.isidentifier()}
        return dims


def operands_only(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors among the arguments of a call: all that is no plain number."""
    return {name: value for name, value in given.items() if not isinstance(value, int | float)}


def resolve(dim: str, dims: Dims, options: Options) -> int | None:
    """Return the length that ``K``, ``128`` or ``K/128`` stands for (quotients rounded up), None if not yet known."""
    found = _DIM.fullmatch(dim)
    assert found is not None, dim
    length = _number(found["name"], dims, options)
    if found["divisor"] is None or length is None:
        return length
    divisor = _number(found["divisor"], dims, options)
    return None if divisor is None else -(-length // divisor)


def _number(name: str, dims: Dims, options: Options) -> int | None:
    if name.isdigit():
        return int(name)
    return int(options[name]) if name in options else dims.get(name)


def nbytes(dtype: str, *lengths: int) -> int:
    """Return the bytes of a tensor of a dtype with these lengths."""
    total = ITEMSIZE[dtype]
    for length in lengths:
        total *= length
    return total
