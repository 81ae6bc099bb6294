"""TensorRT's Python module: `tensorrt` (11) or `tensorrt_rtx`, of which the same API is used here.

Enumerations are read by name, since their numbers moved between versions, and nothing touches plugins.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from qcompiler.backends.tensorrt.cuda import device_sms, load_driver
from qcompiler.errors import TargetError

TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
LEAST = {TENSORRT: (11, 0), RTX: (1, 5)}
"""Oldest version of each module whose API this is: TensorRT 10 has another typing model."""
RTX_SMS = (75, 80, 86, 89, 120, 121)
"""What TensorRT for RTX builds for, without a GPU (1.7)."""
INSTALL = "TensorRT is not installed: pip install 'qcompiler[trt-rtx]' (builds engines without a GPU)"
_DISTRIBUTIONS = {
    TENSORRT: ("tensorrt-cu13-bindings", "tensorrt-cu13", "tensorrt"),
    RTX: ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13", "tensorrt-rtx"),
}


@dataclass(frozen=True)
class Flavour:
    """One of the two modules, as far as can be told without importing it.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        version: of the installed distribution, empty if it has none.
        sms: compute capabilities that it builds for here: TensorRT builds for the GPUs of this machine.
    """

    name: str
    version: str
    sms: tuple[int, ...]

    def nearest(self, sm: int) -> int:
        """Return the compute capability to build for in place of ``sm``: itself, else the next lower one, else 0.

        Raises no error: 0 says that there is none.
        """
        return max((known for known in self.sms if known <= sm), default=0) if sm not in self.sms else sm


def find_flavours() -> tuple[Flavour, ...]:
    """List what is installed, best first, without importing any of it.

    TensorRT proper comes first, and only where a GPU answers: without one it cannot even parse.
    """
    found = []
    if importlib.util.find_spec(TENSORRT) is not None:
        sms = tuple(dict.fromkeys(device_sms(load_driver())))
        if sms:
            found.append(Flavour(TENSORRT, _version(TENSORRT), sms))
    if importlib.util.find_spec(RTX) is not None:
        found.append(Flavour(RTX, _version(RTX), RTX_SMS))
    return tuple(found)


def require_flavours() -> tuple[Flavour, ...]:
    """Return `find_flavours`.

    Raises:
        TargetError: there are none; says what to install.
    """
    found = find_flavours()
    if not found:
        if importlib.util.find_spec(TENSORRT) is not None:
            raise TargetError(
                "tensorrt is installed, but it parses and builds only where a CUDA device answers, and none does; "
                "pip install 'qcompiler[trt-rtx]' builds engines without one"
            )
        raise TargetError(INSTALL)
    return found


def _version(name: str) -> str:
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def import_flavour(names: Sequence[str]) -> ModuleType:
    """Import the first of some modules that loads and is new enough. Call it in a process that may die.

    Raises:
        TargetError: none does; says why for each.
    """
    reasons = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a missing shared library is an ImportError, a broken one raises anything
            reasons.append(f"{name} does not import: {(str(error) or repr(error)).splitlines()[0]}")
            continue
        version = str(getattr(module, "__version__", ""))
        if version_tuple(version) >= LEAST[name]:
            return module
        least = ".".join(map(str, LEAST[name]))
        reasons.append(f"{name} is version {version or 'unknown'}, expected {least} or newer")
    raise TargetError("; ".join(reasons) or INSTALL)


def version_tuple(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``11.4.0.106`` is (11, 4, 0, 106)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def enum_member(enum: Any, name: str) -> Any:
    """Return an enumeration's member by its name.

    Raises:
        TargetError: this version has no such member.
    """
    member = getattr(enum, name, None)
    if member is None:
        raise TargetError(f"this version of TensorRT has no {getattr(enum, '__name__', enum)}.{name}")
    return member
