"""The table of what every shipped configuration compiles to: kept beside this file, printed, and compared by a test.

``python -m qcompiler.kernels.proof.table FILE`` compiles everything and writes it (some minutes).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from qcompiler.errors import TargetError
from qcompiler.kernels.catalog import kernel_names
from qcompiler.kernels.config import ARCHS
from qcompiler.kernels.launching import Compilation, compilations
from qcompiler.kernels.proof.compiling import Compiled, compile_for
from qcompiler.kernels.tuning.ranking import least_traffic
from qcompiler.kernels.tuning.work import make_work


@dataclass(frozen=True)
class Row:
    """What one call of one case compiles to.

    Attributes:
        kernel: its name.
        arch: such as ``sm90``.
        case: label of the case; of its second call and later ones, with `` #2``.
        config: as `Config` prints.
        instruction: the most frequent matrix instruction, empty for none.
        registers: per thread.
        stack: bytes per thread.
        shared: bytes per program.
        programs: how many fit a multiprocessor at once.
        wide: share of the loads and stores that are 128 bits wide, in percent of the instructions.
        waits: numbers that ``wgmma.wait_group`` carries, without repetition.
        shape: lengths of the case's axes, as text.
        read: least bytes that the whole case reads, by its contract.
        written: the same of what it writes.
        macs: its multiply-adds.
    """

    kernel: str
    arch: str
    case: str
    config: str
    instruction: str
    registers: int
    stack: int
    shared: int
    programs: int
    wide: int
    waits: tuple[int, ...]
    shape: str = ""
    read: int = 0
    written: int = 0
    macs: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what tells rows apart: kernel, architecture and case."""
        return self.kernel, self.arch, self.case


def row_of(compilation: Compilation, step: int, compiled: Compiled) -> Row:
    """Return the row of one call of a compilation; ``step`` counts its calls from 0."""
    accesses = sum(compiled.loads.values()) + sum(compiled.stores.values())
    wide = sum(n for found in (compiled.loads, compiled.stores) for bits, n in found.items() if bits >= 128)
    work = make_work(compilation.kernel, compiled.arch, compilation.case)
    least = least_traffic(work)
    return Row(
        kernel=compilation.kernel,
        arch=compiled.arch,
        case=compilation.case.label + (f" #{step + 1}" if step else ""),
        config=str(compilation.entry.config),
        instruction=compiled.matrix[0] if compiled.matrix else "",
        registers=compiled.registers,
        stack=compiled.stack,
        shared=compiled.shared,
        programs=compiled.programs_per_processor,
        wide=round(100 * wide / max(accesses, 1)),
        waits=tuple(sorted(set(compiled.waits), reverse=True)),
        shape=work.shape,
        read=least.read,
        written=least.written,
        macs=least.macs,
    )


def compile_rows(arch: str, kernels: Iterable[str] | None = None, *, full: bool = True) -> list[Row]:
    """Compile the cases of kernels (all by default) for an architecture; return a row for each call.

    Args:
        arch: such as ``sm90``.
        kernels: their names.
        full: with the cases that only the full sweep has.

    Raises:
        TargetError: a kernel does not compile, or Triton is missing or interprets.
    """
    return [
        row_of(found, step, compile_for(call, arch))
        for kernel in kernels or kernel_names()
        for found in compilations(kernel, arch, full=full)
        for step, call in enumerate(found.calls)
    ]


def shipped_rows() -> list[Row]:
    """Return the table as it is shipped; needs no Triton."""
    text = resources.files("qcompiler.kernels.proof").joinpath("table.json").read_text(encoding="utf-8")
    return [Row(**(row | {"waits": tuple(row["waits"])})) for row in json.loads(text)]


def print_rows(rows: Iterable[Row]) -> str:
    """Return rows as aligned text."""
    titles = ("kernel", "case", "tile", "matrix", "regs", "stack", "shared", "per SM", "128-bit", "waits")
    cells: list[tuple[str, ...]] = [titles]
    for row in rows:
        waits = ",".join(map(str, row.waits)) or "-"
        numbers = (row.registers, row.stack, row.shared, row.programs, f"{row.wide}%", waits)
        cells.append((row.kernel, row.case, row.config, row.instruction or "-", *map(str, numbers)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write a table, one row per line, so that a change shows which."""
    path.write_text("[\n" + ",\n".join("  " + json.dumps(asdict(row)) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise TargetError("expected the file to write; found none")
    write_rows([row for arch in ARCHS for row in compile_rows(arch)], Path(sys.argv[1]))
