"""Run a kernel, or list what of it is compiled ahead of time; the only way in for executors, tests and proofs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.catalog import contract_of, implementation_of
from qcompiler.kernels.config import Config, Entry, Table, arch_number, load_table
from qcompiler.kernels.contract import Options


def launch(kernel: str, tensors: Mapping[str, Any], options: Options, config: Config) -> None:
    """Run a kernel on torch tensors: on a GPU, or interpreted on the CPU.

    Args:
        kernel: its name.
        tensors: every argument by name: inputs, outputs, scratch, and numbers.
        options: the chosen ones; missing ones take their defaults.
        config: as a table chose it.

    Raises:
        TargetError: the arguments break the contract.
    """
    contract = contract_of(kernel)
    chosen = contract.options(options)
    contract.check(tensors, chosen)
    calls: list[Call] = implementation_of(kernel).calls(tensors, chosen, config)
    for call in calls:
        call.launch()


@dataclass(frozen=True)
class Compilation:
    """One case of a kernel on one architecture, with the calls to compile (several where a launch has steps).

    Attributes:
        kernel: its name.
        case: what is compiled.
        entry: the table's row that the case chose.
        calls: on stand-ins.
    """

    kernel: str
    case: Case
    entry: Entry
    calls: tuple[Call, ...]

    @property
    def instruction(self) -> str:
        """Return the matrix instruction that must appear in the first call's code; empty for none."""
        return self.case.instruction or self.entry.instruction


def compilations(kernel: str, arch: str, *, full: bool = True, table: Table | None = None) -> list[Compilation]:
    """Return what of a kernel is compiled for an architecture: empty where it lacks the instructions.

    Args:
        kernel: its name.
        arch: such as ``sm90``.
        full: with the cases that only the full sweep has.
        table: instead of the shipped one.

    Raises:
        TargetError: a case breaks the contract, or no entry of the table fits it.
    """
    contract = contract_of(kernel)
    if arch_number(arch) < contract.least_arch:
        return []
    found = []
    known = table or load_table(kernel)
    for case in implementation_of(kernel).cases(arch):
        if case.full and not full:
            continue
        options = contract.options(case.options)
        tensors: dict[str, Any] = dict(contract.operands(case.dims, options, case.dtypes))
        entry = known.entry(arch, case.dims, options)
        tensors |= contract.scratch(case.dims, options, entry.config)
        tensors |= contract.example_scalars(options)
        contract.check(tensors, options)
        calls: list[Call] = implementation_of(kernel).calls(tensors, options, entry.config)
        found.append(Compilation(kernel, case, entry, tuple(calls)))
    return found
