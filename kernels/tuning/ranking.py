"""How long a candidate should take, by a simple model: bytes, multiply-adds, and how evenly programs fill the GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from qcompiler.kernels.call import Call
from qcompiler.kernels.config import Config, table_arch
from qcompiler.kernels.contract import Traffic
from qcompiler.kernels.operand import ITEMSIZE
from qcompiler.kernels.tuning.work import Work

LATENCY_US = 1.0
"""Start and end of a launch."""

CACHE_FACTOR = 2.5
"""How much faster the second-level cache gives bytes than the memory."""


@dataclass(frozen=True)
class Machine:
    """Peaks of a GPU.

    Attributes:
        name: of the part.
        processors: multiprocessors.
        bandwidth: of the memory in bytes per second.
        byte_ops: multiply-adds of 8-bit numbers per second, dense.
        cache: bytes of the second-level cache.
    """

    name: str
    processors: int
    bandwidth: float
    byte_ops: float
    cache: int

    def ops(self, bits: int) -> float:
        """Return multiply-adds per second of matrix units on numbers of 8, 16 or 32 bits; the last ones as TF32."""
        return self.byte_ops * 8 / bits


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "sm80": Machine("A100 80 GB SXM", 108, 2.04e12, 312e12, 40 << 20),
        "sm89": Machine("L40S", 142, 0.864e12, 366e12, 96 << 20),
        "sm90": Machine("H200 SXM", 132, 4.8e12, 989.5e12, 60 << 20),
        "sm100": Machine("B200", 148, 8.0e12, 2250e12, 126 << 20),
    }
)
"""The part that candidates are ranked for, by architecture; figures of the makers' data sheets."""


def machine_of(arch: str) -> Machine:
    """Return the part that stands for an architecture."""
    return MACHINES[table_arch(arch, MACHINES)]


def operand_bits(work: Work) -> int:
    """Return the width of the numbers that matrix units multiply: that of the first input of the call."""
    first = next(a for a in work.contract.tensors(work.options) if a.role == "input")
    return 8 * ITEMSIZE[work.operands()[first.name].dtype]


def floor_us(work: Work, machine: Machine) -> float:
    """Return the roofline: the time that bytes or multiply-adds alone take at the machine's peaks."""
    least = least_traffic(work)
    return 1e6 * max(least.total / machine.bandwidth, least.macs / machine.ops(operand_bits(work)))


def least_traffic(work: Work) -> Traffic:
    """Return the bytes of all tensors of a call, each once, and its multiply-adds."""
    contract, operands = work.contract, work.operands()
    read = written = 0
    for argument in contract.tensors(work.options):
        nbytes = operands[argument.name].nbytes
        read += nbytes if argument.role != "output" else 0
        written += nbytes if argument.role != "input" else 0
    return Traffic(read, written, contract.macs(work.dims, work.options))


def estimate_us(work: Work, config: Config, calls: Sequence[Call], per_processor: int, machine: Machine) -> float:
    """Return microseconds that a candidate should take; for ranking, not for reporting.

    Args:
        work: the call.
        config: the candidate.
        calls: its launches; their grids count.
        per_processor: programs of the first launch that fit a multiprocessor at once (1 if not yet known).
        machine: where.
    """
    least = least_traffic(work)
    asked = work.contract.requests(work.arguments(), work.options, config)
    busy = machine.processors * max(per_processor, 1)
    programs = math.prod(calls[0].grid)
    waves = programs / busy
    # The last wave takes as long as a full one; below one wave part of the machine is idle.
    waste = math.ceil(waves) / waves
    memory = least.total / machine.bandwidth * max(1.0, min(waste, 4.0) ** 0.5)
    cache = asked.total / (machine.bandwidth * CACHE_FACTOR)
    products = asked.macs / machine.ops(operand_bits(work)) * waste
    steps = 1.0 if config.stages > 1 else 1.1
    return float(1e6 * max(memory, cache, products) * steps + LATENCY_US * len(calls))
