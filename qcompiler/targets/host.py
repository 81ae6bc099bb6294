"""Which target fits this processor."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qcompiler.targets.target import load_target

NO_VNNI = "no-vnni"
"""Feature of an x86 processor whose 8-bit products are added in 16 bits: it has AVX2, but no VNNI."""
_TABLES = ("ort-x86", "ort-x86-avx2", "ort-arm")
"""Tables of ONNX Runtime on CPU, best first; the first whose processor and features are here is the host's."""
_SAFE = "ort-generic"
_VNNI_FLAGS = ("avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni", "amx_int8")
_ASKED = frozenset({"avx2", "avx512f", "amx_int8", "asimddp", "i8mm"})
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Other names that operating systems give to an architecture."""
_APPLE_FEATURES = {"hw.optional.arm.FEAT_DotProd": "asimddp", "hw.optional.arm.FEAT_I8MM": "i8mm"}


@dataclass(frozen=True)
class Processor:
    """What the machine says of its processor.

    Attributes:
        machine: architecture, as Linux names it.
        model: marketing name, if known.
        features: instruction-set features that tables ask for; `NO_VNNI` where an x86 has AVX2 without VNNI.
    """

    machine: str
    model: str
    features: frozenset[str]


def detect(cpuinfo: str | None = None, machine: str | None = None) -> Processor:
    """Read the processor's features.

    Args:
        cpuinfo: contents of /proc/cpuinfo, or what ``sysctl -a`` prints on macOS; read from the system if None.
        machine: architecture; read from the system if None.
    """
    machine = (machine or platform.machine()).lower()
    machine = _MACHINES.get(machine, machine)
    flags: set[str] = set()
    model = ""
    for line in (_described() if cpuinfo is None else cpuinfo).splitlines():
        key, _, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if key in ("flags", "Features", "machdep.cpu.leaf7_features"):
            flags.update(value.lower().split())
        elif key in ("model name", "machdep.cpu.brand_string") and not model:
            model = value
        elif key in _APPLE_FEATURES and value == "1":
            flags.add(_APPLE_FEATURES[key])
    features = flags & _ASKED
    if any(flag in flags for flag in _VNNI_FLAGS):
        features.add("vnni")
    elif machine == "x86_64" and "avx2" in flags:
        features.add(NO_VNNI)
    return Processor(machine, model or platform.processor(), frozenset(features))


def _described() -> str:
    """Return what the system says of its processor, or nothing where it has no text of it (Windows)."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        return path.read_text(encoding="utf-8", errors="replace")
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-a"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def host_target_name(processor: Processor) -> tuple[str, str]:
    """Return (target, what to tell the user if the tables do not cover the processor, else empty)."""
    for name in _TABLES:
        table = load_target(name)
        if table.processor == processor.machine and set(table.requires) <= processor.features:
            return name, _price(name, processor)
    note = (
        f"no table covers this processor ({_called(processor)}); the safe form {_SAFE} is used: "
        "7-bit weights, which no instruction set saturates"
    )
    return _SAFE, note


def _price(name: str, processor: Processor) -> str:
    """Return what the table costs on this processor against the best of its family, if anything."""
    if NO_VNNI not in processor.features:
        return ""
    return (
        f"this processor ({_called(processor)}) has no VNNI: {name} narrows the weights, because its "
        "8-bit products are added in 16 bits that saturate"
    )


def _called(processor: Processor) -> str:
    return f"{processor.machine} {processor.model}".strip()
