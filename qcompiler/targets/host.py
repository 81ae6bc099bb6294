"""Which target fits this processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Processor:
    """What the machine says of its processor.

    Attributes:
        machine: architecture, as `platform.machine` names it.
        model: marketing name, if known.
        features: instruction-set features that tables ask for.
    """

    machine: str
    model: str
    features: frozenset[str]


_VNNI_FLAGS = ("avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni", "amx_int8")


def detect(cpuinfo: str | None = None, machine: str | None = None) -> Processor:
    """Read the processor's features.

    Args:
        cpuinfo: contents of /proc/cpuinfo; read from the system if None.
        machine: architecture; read from the system if None.
    """
    machine = machine or platform.machine().lower().replace("amd64", "x86_64")
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    flags: set[str] = set()
    model = ""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
        elif key.strip() == "model name" and not model:
            model = value.strip()
    features = {"vnni"} if any(flag in flags for flag in _VNNI_FLAGS) else set()
    features |= flags & {"avx2", "avx512f", "amx_int8", "asimddp", "i8mm"}
    return Processor(machine, model or platform.processor(), frozenset(features))


def host_target_name(processor: Processor) -> tuple[str, str]:
    """Return (target, what to tell the user if the tables do not cover the processor, else empty)."""
    if processor.machine == "x86_64" and "vnni" in processor.features:
        return "ort-x86", ""
    note = (
        f"no table covers this processor ({processor.machine} {processor.model}); the safe form ort-generic is used: "
        "7-bit weights, which no instruction set saturates"
    )
    return "ort-generic", note
