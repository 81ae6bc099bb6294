"""Compile a call for an architecture without a GPU, and read instructions, registers and memory accesses.

Triton's wheel ships the assembler, ``cuobjdump`` and ``nvdisasm`` for Linux; nothing else is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call, Signature, signature
from qcompiler.kernels.config import arch_number

MATRIX = ("IMMA", "IGMMA", "HMMA", "HGMMA", "QMMA", "QGMMA", "UTCIMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "OMMA")
"""Matrix instructions of machine code: G is Hopper's warp group (wgmma), UTC Blackwell's tensor memory (tcgen05)."""

SHARED_LIMIT: Mapping[str, int] = {"sm80": 163 * 1024, "sm86": 99 * 1024, "sm89": 99 * 1024}
"""Bytes of shared memory that a program may have; 227 KB on sm90 and sm100, 99 KB from sm120 on."""

REGISTER_FILE = 65536
"""32-bit registers of one multiprocessor, the same on all architectures covered."""

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one call holds.

    Attributes:
        arch: such as ``sm90``.
        instructions: how often each opcode stands in the code (not how often it runs).
        registers: per thread.
        stack: bytes per thread; other than 0 means spills or indexed local arrays.
        spills: loads and stores of local memory in the code.
        shared: bytes of shared memory per program.
        scratch: bytes of global scratch memory; other than 0 cannot be run as a TensorRT plugin.
        loads: how many instructions load from global memory by their width in bits; TMA counts as 1024.
        stores: the same of stores.
        waits: the numbers that ``wgmma.wait_group`` carries, in order: 0 waits for all, 1 lets one stay in flight.
        warps: per program.
        ptx: its text.
        cubin: the machine code, an ELF file.
        entry: name of the function in it.
    """

    arch: str
    instructions: Mapping[str, int]
    registers: int
    stack: int
    spills: int
    shared: int
    scratch: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    waits: tuple[int, ...]
    warps: int
    ptx: str
    cubin: bytes
    entry: str

    @property
    def matrix(self) -> tuple[str, ...]:
        """Return the kinds of matrix instruction, most frequent first."""
        found = [name for name in MATRIX if self.instructions.get(name)]
        return tuple(sorted(found, key=lambda name: -self.instructions[name]))

    @property
    def programs_per_processor(self) -> int:
        """Return how many programs fit a multiprocessor at once, by registers, shared memory and 64 warps."""
        per_warp = -(-self.registers * 32 // 256) * 256  # allocated in units of 256 per warp
        by_registers = REGISTER_FILE // (per_warp * self.warps)
        by_shared = shared_limit(self.arch) // max(self.shared, 1024)
        return min(by_registers, by_shared, 64 // self.warps)

    def faults(self, instruction: str = "") -> list[str]:
        """Return what a shipped configuration must not have, in lower case; empty if it is fit to ship.

        Args:
            instruction: matrix instruction that must be there, empty for none.
        """
        found = []
        if instruction and instruction not in self.matrix:
            found.append(f"expected {instruction}; found {', '.join(self.matrix) or 'no matrix instruction'}")
        if self.stack or self.spills:
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} accesses to local memory")
        if self.shared > shared_limit(self.arch):
            found.append(f"{self.shared} bytes of shared memory; {self.arch} has {shared_limit(self.arch)}")
        return found


def shared_limit(arch: str) -> int:
    """Return the bytes of shared memory that one program may have."""
    return SHARED_LIMIT.get(arch, 99 * 1024 if arch_number(arch) >= 120 else 227 * 1024)


def compile_for(call: Call, arch: str) -> Compiled:
    """Compile a call for an architecture, as a launch there would, and read the result.

    Args:
        call: on stand-ins or tensors.
        arch: such as ``sm90``.

    Raises:
        TargetError: Triton interprets in this process, or refuses the kernel.
    """
    built = _build(call.function, signature(call), arch, call.settings)
    cubin: bytes = built.asm["cubin"]
    ptx: str = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _USAGE.search(_tool("cuobjdump", "-res-usage", str(path)))
        code = _tool("nvdisasm", "-c", str(path))
    assert usage is not None, "cuobjdump prints no resources"
    instructions, loads, stores = _count(code)
    return Compiled(
        arch=arch,
        instructions=instructions,
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=instructions.get("LDL", 0) + instructions.get("STL", 0),
        shared=int(built.metadata.shared),
        scratch=int(built.metadata.global_scratch_size),
        loads=loads,
        stores=stores,
        waits=tuple(int(n) for n in _WAIT.findall(ptx)),
        warps=int(built.metadata.num_warps),
        ptx=ptx,
        cubin=cubin,
        entry=str(built.metadata.name),
    )


def _build(function: Any, typed: Signature, arch: str, settings: Mapping[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(function, "cache_key"):
        raise TargetError("this process interprets Triton; compile in one without TRITON_INTERPRET=1")
    order = {name: i for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature=typed.types,
        constexprs={(order[name],): value for name, value in typed.constants.items()},
        attrs={(order[name],): [["tt.divisibility", 16]] for name in typed.divisible},
    )
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch_number(arch), 32), options=dict(settings))
    except Exception as error:
        if not type(error).__module__.startswith("triton") and not isinstance(error, RuntimeError | ValueError):
            raise
        raise TargetError(f"{function.__name__} does not compile for {arch}: {error}") from error


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise TargetError(f"Triton's wheel has no {name}; expected {path}")
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _count(code: str) -> tuple[dict[str, int], dict[int, int], dict[int, int]]:
    """Count opcodes, and global loads and stores by their width in bits."""
    instructions: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for opcode, modifiers in _OPCODE.findall(code):
        instructions[opcode] += 1
        if opcode in ("LDG", "LDGSTS"):
            loads[_width(modifiers)] += 1
        elif opcode in ("STG", "RED", "REDG"):
            stores[_width(modifiers)] += 1
        elif opcode == "UTMALDG":
            loads[1024] += 1
        elif opcode == "UTMASTG":
            stores[1024] += 1
    return dict(instructions), dict(loads), dict(stores)


def _width(modifiers: str) -> int:
    parts = modifiers.split(".")
    for bits in (128, 64):
        if str(bits) in parts:
            return bits
    if "U8" in parts or "S8" in parts:
        return 8
    return 16 if "U16" in parts or "S16" in parts else 32
