"""What is tuned: one kernel on one architecture, for one shape with its options and dtypes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Case
from qcompiler.kernels.catalog import contract_of
from qcompiler.kernels.contract import Contract
from qcompiler.kernels.operand import Operand

ROWS = "M"
"""Axis whose length varies from call to call: an entry holds for a bucket of it, for one length of all others."""

BUCKETS = (1, 4, 16, 64)
"""Last lengths of the first buckets of `ROWS`; powers of two follow."""


@dataclass(frozen=True)
class Work:
    """A call to tune.

    Attributes:
        kernel: its name.
        arch: such as ``sm90``.
        dims: length of each axis.
        options: complete.
        dtypes: of arguments that leave a choice.
    """

    kernel: str
    arch: str
    dims: Mapping[str, int]
    options: Mapping[str, str]
    dtypes: Mapping[str, str]

    @property
    def contract(self) -> Contract:
        """Return the kernel's contract."""
        return contract_of(self.kernel)

    @property
    def shape(self) -> str:
        """Return the lengths as text, such as ``B=1 M=64``."""
        return " ".join(f"{name}={length}" for name, length in self.dims.items())

    @property
    def name(self) -> str:
        """Return a name for files: kernel, architecture and lengths, and a digest of options and dtypes."""
        chosen = json.dumps([dict(self.options), dict(self.dtypes)], sort_keys=True)
        digest = hashlib.sha256(chosen.encode()).hexdigest()[:8]
        lengths = "-".join(f"{name}{length}" for name, length in self.dims.items())
        return f"{self.kernel}.{self.arch}.{lengths}.{digest}"

    @property
    def when(self) -> dict[str, tuple[int, int]]:
        """Return the lengths that a measured entry is for: the bucket of rows, the other axes as they are."""
        named = {d for a in self.contract.tensors(self.options) for d in a.axes(self.options)}
        named = {d for d in named if d.isidentifier()}
        return {n: bucket(length) if n == ROWS else (length, length) for n, length in self.dims.items() if n in named}

    def operands(self) -> dict[str, Operand]:
        """Return the tensors of the call as stand-ins."""
        return self.contract.operands(self.dims, self.options, self.dtypes)

    def arguments(self) -> dict[str, Any]:
        """Return stand-ins and example numbers, checked.

        Raises:
            TargetError: the contract does not allow the call.
        """
        given = {**self.operands(), **self.contract.example_scalars(self.options)}
        self.contract.check(given, self.options)
        return given

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        own = {"dims": dict(self.dims), "options": dict(self.options), "dtypes": dict(self.dtypes)}
        return {"kernel": self.kernel, "arch": self.arch, **own}


def from_json(found: Mapping[str, Any]) -> Work:
    """Return a work from its JSON form."""
    return Work(found["kernel"], found["arch"], found["dims"], found["options"], found["dtypes"])


def bucket(length: int) -> tuple[int, int]:
    """Return the first and last length of a bucket: 1, 2-4, 5-16, 17-64, then up to each power of two."""
    least = 0
    for most in BUCKETS:
        if length <= most:
            return least + 1, most
        least = most
    most = 1 << (length - 1).bit_length()
    return most // 2 + 1, most


def make_work(kernel: str, arch: str, case: Case, shape: str = "", options: Mapping[str, str] | None = None) -> Work:
    """Return a call: those of a case, with other lengths and options.

    Args:
        kernel: its name.
        arch: such as ``sm90``.
        case: its lengths, options and dtypes are the defaults.
        shape: as `parse_shape` reads; empty for the case's own.
        options: instead of the case's.

    Raises:
        TargetError: the contract does not allow the call, or the shape cannot be read.
    """
    contract = contract_of(kernel)
    chosen = contract.options({**case.options, **(options or {})})
    work = Work(kernel, arch, parse_shape(contract, case.dims, shape), chosen, dict(case.dtypes))
    work.arguments()
    return work


def parse_shape(contract: Contract, base: Mapping[str, int], text: str) -> dict[str, int]:
    """Read ``4096x4096x4096`` (M, N and K, those that the kernel has) or ``B=16xS=8192`` (axes by name).

    Axes that are not named keep their length in ``base``; those of another operand follow the axis that ends their name
    where they were equal (BM follows M).

    Raises:
        TargetError: an axis is unknown, or the text has another form.
    """
    if not text:
        return dict(base)
    parts = text.split("x")
    given: dict[str, int] = {}
    if all(p.isdigit() for p in parts):
        axes = [a for a in "MNK" if a in base]
        if len(parts) != len(axes):
            raise TargetError(f"{contract.name} takes a shape {'x'.join(axes) or 'with names'}; found {text!r}")
        given = {axis: int(p) for axis, p in zip(axes, parts, strict=True)}
    else:
        for part in parts:
            match = re.fullmatch(r"([A-Za-z]\w*)=(\d+)", part)
            if match is None or match[1] not in base:
                expected = "x".join(f"{a}={n}" for a, n in base.items())
                raise TargetError(f"cannot read {part!r} of the shape {text!r}; expected such as {expected}")
            given[match[1]] = int(match[2])
    if any(length < 1 for length in given.values()):
        raise TargetError(f"lengths must be at least 1; found {text!r}")
    followers = {a: given[a[-1]] for a in base if len(a) == 2 and a[-1] in given and base[a] == base[a[-1]]}
    return {**base, **followers, **given}


def choose_case(cases: Sequence[Case], label: str) -> Case:
    """Return the case of that label, the first one for an empty label.

    Raises:
        TargetError: there is none.
    """
    for case in cases:
        if label in ("", case.label):
            return case
    raise TargetError(f"unknown case {label!r}; expected one of {', '.join(repr(c.label) for c in cases)}")
