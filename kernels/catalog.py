"""All kernels: every folder here that has a table of configurations."""

from __future__ import annotations

import importlib
from importlib import resources
from types import ModuleType

from qcompiler.errors import TargetError
from qcompiler.kernels.contract import Contract


def kernel_names() -> tuple[str, ...]:
    """Return the names of all kernels, in alphabetical order."""
    folders = resources.files("qcompiler.kernels").iterdir()
    return tuple(sorted(f.name for f in folders if f.joinpath("configs.json").is_file()))


def contract_of(kernel: str) -> Contract:
    """Return the contract of a kernel.

    Raises:
        TargetError: there is no such kernel.
    """
    found: Contract = _module(kernel, "contract").CONTRACT
    return found


def reference_of(kernel: str) -> ModuleType:
    """Return the module with the function ``reference`` of a kernel (NumPy only).

    Raises:
        TargetError: there is no such kernel.
    """
    return _module(kernel, "reference")


def implementation_of(kernel: str) -> ModuleType:
    """Return the module with ``calls`` and ``cases`` of a kernel; loads triton.

    Raises:
        TargetError: there is no such kernel.
    """
    return _module(kernel, "triton_kernel")


def _module(kernel: str, name: str) -> ModuleType:
    if kernel not in kernel_names():
        raise TargetError(f"unknown kernel {kernel!r}; expected one of {', '.join(kernel_names())}")
    return importlib.import_module(f"qcompiler.kernels.{kernel}.{name}")
