"""``qcompiler kernels``: the static proof of the shipped kernels as a table."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from qcompiler.cli_show import stdout_console
from qcompiler.errors import TargetError

if TYPE_CHECKING:
    from qcompiler.kernels.proof.table import Row

NEEDS_TRITON = "needs triton (Linux): pip install 'qcompiler[triton]'"

_COLUMNS = (
    "kernel", "arch", "case", "config", "matrix", "regs", "stack", "shared", "per SM", "128-bit", "waits", "MB",
    "ops/B",
)  # fmt: skip


def kernels_command(
    kernel: Annotated[str | None, typer.Argument(help="Only this one; all by default.", show_default=False)] = None,
    arch: Annotated[str, typer.Option(help="sm80, sm89, sm90 or sm100; all.")] = "sm90",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    compile_anew: Annotated[
        bool, typer.Option("--compile", help="Compile with the installed Triton and say what differs; needs no GPU.")
    ] = False,
    full: Annotated[bool, typer.Option(help="With --compile: all cases (minutes), not the main ones only.")] = False,
) -> None:
    """Show what the shipped kernels compile to: instructions, registers, memory, bytes moved; no GPU is needed.

    \b
    Examples:
      qcompiler kernels
      qcompiler kernels int8_matmul --arch all
      qcompiler kernels fp8_matmul --compile
      qcompiler kernels --json > kernels.json

    config is the tile's numbers in order of name, then warps and stages. shared is bytes per program, per SM how many
    programs fit one multiprocessor, 128-bit the share of loads and stores of that width, waits what wgmma.wait_group
    carries (1: one product stays in flight), MB the least traffic of the case, ops/B its multiply-adds per byte.
    """
    from qcompiler.kernels.catalog import kernel_names
    from qcompiler.kernels.config import ARCHS
    from qcompiler.kernels.proof.table import shipped_rows

    if kernel is not None and kernel not in kernel_names():
        raise TargetError(f"unknown kernel {kernel!r}; expected one of {', '.join(kernel_names())}")
    if arch not in (*ARCHS, "all"):
        raise TargetError(f"no proof for {arch!r}; expected one of {', '.join(ARCHS)}, all")
    archs = ARCHS if arch == "all" else (arch,)
    shipped = [r for r in shipped_rows() if r.arch in archs and kernel in (None, r.kernel)]
    rows, differing = shipped, None
    if compile_anew:
        rows = _compile(kernel, archs, full=full)
        differing = differences(rows, shipped, full=full)
    if as_json:
        found: dict[str, Any] = {"rows": [asdict(r) | {"macs_per_byte": _ratio(r)} for r in rows]}
        print(json.dumps(found | ({} if differing is None else {"differing": differing}), indent=1))
    else:
        _print(rows, kernel)
        for line in differing or ():
            stdout_console().print(Text(line), soft_wrap=True)
        if differing == []:
            stdout_console().print(Text("nothing differs from the shipped table"))


def require_triton() -> None:
    """Raise unless Triton is installed and compiles in this process.

    Raises:
        TargetError: it is not there.
    """
    if importlib.util.find_spec("triton") is None:
        raise TargetError(f"compiling kernels {NEEDS_TRITON}")


def _compile(kernel: str | None, archs: Sequence[str], *, full: bool) -> list[Row]:
    require_triton()
    from qcompiler.kernels.proof.table import compile_rows

    return [row for arch in archs for row in compile_rows(arch, None if kernel is None else [kernel], full=full)]


def differences(rows: Sequence[Row], shipped: Sequence[Row], *, full: bool) -> list[str]:
    """Return a line for each row that differs from the shipped one, is new, or is gone."""
    known = {r.key: r for r in shipped}
    lines = []
    for row in rows:
        name = " ".join(row.key)
        before = known.pop(row.key, None)
        if before is None:
            lines.append(f"{name}: not in the shipped table")
        elif before != row:
            old, new = asdict(before), asdict(row)
            parts = [f"{field} {old[field]} -> {new[field]}" for field in old if old[field] != new[field]]
            lines.append(f"{name}: {', '.join(parts)}")
    if full:
        lines += [f"{' '.join(key)}: in the shipped table, but no longer compiled" for key in known]
    return lines


def _ratio(row: Row) -> float:
    """Return multiply-adds per byte of least traffic."""
    return round(row.macs / max(row.read + row.written, 1), 2)


def _print(rows: Sequence[Row], kernel: str | None) -> None:
    from qcompiler.kernels.catalog import kernel_names

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column in ("kernel", "config"))
    for row in rows:
        moved = (f"{(row.read + row.written) / 1e6:.1f}", f"{_ratio(row):g}") if row.shape else ("", "")
        numbers = (row.registers, row.stack, row.shared, row.programs, f"{row.wide}%")
        waits = ",".join(map(str, row.waits))
        cells = (row.kernel, row.arch, row.case, row.config, row.instruction, *map(str, numbers), waits, *moved)
        table.add_row(*map(Text, cells))
    console = stdout_console()
    if rows:
        console.print(table)
    missing = [k for k in kernel_names() if kernel in (None, k) and all(r.kernel != k for r in rows)]
    if missing:
        console.print(Text(f"no rows yet for {', '.join(missing)}; --compile makes them"), soft_wrap=True)
