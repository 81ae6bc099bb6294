"""``qcompiler targets``, ``passes`` and ``patterns``: show what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.cli_show import stdout_console
from qcompiler.errors import PassError

if TYPE_CHECKING:
    from qcompiler.targets.target import Target

Name = Annotated[str | None, typer.Argument(help="Show this one in detail.", show_default=False)]


def targets_command(
    name: Name = None,
    scheme: Annotated[
        str | None, typer.Option(help="Formats to show the table for: int8, fp8, int4-weights...; the target's first.")
    ] = None,
) -> None:
    """List the targets, or show one's capability table with the engine's rule behind every row.

    \b
    Examples:
      qcompiler targets
      qcompiler targets ort-x86
      qcompiler targets tensorrt-sm89 --scheme fp8
    """
    from qcompiler.targets.host import detect, host_target_name
    from qcompiler.targets.target import load_target, target_names

    console = stdout_console()
    processor = detect()
    host, note = host_target_name(processor)
    if name is None:
        table = _table("target", "engine", "processor", "schemes", "what")
        for each in target_names():
            target = load_target(each)
            runs_on = f"sm{target.sm}" if target.sm else target.processor or "any"
            needs = " ".join((runs_on, *target.requires))
            schemes = " ".join(target.schemes)
            table.add_row(each + (" (host)" if each == host else ""), target.engine, needs, schemes, target.doc)
        console.print(table)
        console.print(Text(f"host: {processor.model or processor.machine} -> {host}" + (f"; {note}" if note else "")))
        return
    whole = load_target(host if name == "host" else name)
    target = whole if scheme is None else whole.with_scheme(scheme)
    console.print(Text(f"{target.name}: {target.doc}"))
    for other in whole.schemes:
        console.print(Text(_formats(whole.with_scheme(other))))
    for other, why in whole.unavailable.items():
        console.print(Text(f"no {other}: {why}"))
    table = _table("operators", "kind", "forms", "why")
    for row in target.rows:
        table.add_row(" ".join(row.type), row.kind, " ".join(row.forms), row.why)
    console.print(table)
    for trap, why in target.traps.items():
        console.print(Text(f"{trap}: {why}"))


def _formats(target: Target) -> str:
    """Return what a scheme stores, in one line."""
    blocks = f" in blocks of {target.block}" if target.block else ""
    bits = f" ({target.weight_bits} bits)" if target.weight_bits != 8 else ""
    activations = f"activations {target.activation}" + (f" or {target.signed}" if target.signed else "")
    floats = "" if target.float_type == "float32" else f", floats {target.float_type}"
    return f"{target.scheme}: {activations}, weights {target.weight}{bits}{blocks}{floats}"


def passes_command(name: Name = None) -> None:
    """List the passes, or show one's options.

    \b
    Examples:
      qcompiler passes
      qcompiler passes plan-quantization
    """
    from qcompiler.passes.catalog import DEFAULT_PIPELINE, shipped_passes
    from qcompiler.pipeline.registry import pass_info

    registry = shipped_passes().with_entry_points()
    console = stdout_console()
    if name is not None:
        _show_pass(name, console)
        return
    table = _table("pass", "needs", "gives", "contract", "what")
    for cls in registry:
        info = pass_info(cls)
        needs = " ".join(p.name for p in info.needs)
        options = f" Options: {', '.join(o.name for o in info.options)}." if info.options else ""
        gives = "" if info.gives is None else info.gives.name
        table.add_row(info.name, needs, gives, str(info.numerics), info.doc + options)
    console.print(table)
    console.print(Text(f"compile runs: {DEFAULT_PIPELINE}"), soft_wrap=True)


def _show_pass(name: str, console: Console) -> None:
    import inspect

    from qcompiler.passes.catalog import shipped_passes
    from qcompiler.pipeline.registry import pass_info

    cls = shipped_passes().with_entry_points().get(name)
    info = pass_info(cls)
    console.print(Text(f"{info.name}: {inspect.getdoc(cls) or info.doc}"))
    gives = "the same phase" if info.gives is None else info.gives.name
    console.print(Text(f"needs {' or '.join(p.name for p in info.needs)}, gives {gives}, contract {info.numerics}"))
    for option in info.options:
        console.print(Text(f"  {option.name} ({option.type}), default {option.default}"))


def patterns_command(name: Name = None) -> None:
    """List the rewriting rules, or show one's pattern and conditions.

    \b
    Examples:
      qcompiler patterns
      qcompiler patterns recognize-silu
    """
    from qcompiler.patterns.catalog import all_rules
    from qcompiler.pipeline.parse import near

    console = stdout_console()
    rules = all_rules()
    if name is not None:
        found = [rule for rule in rules if rule.name == name]
        if not found:
            raise PassError(f"unknown pattern {name!r}{near(name, {rule.name for rule in rules})}")
        for text in dict.fromkeys(map(str, found)):
            console.print(Text(text), soft_wrap=True)
        return
    table = _table("pattern", "starts at", "what")
    for rule in rules:
        roots = " ".join(f"{domain}.{op}" if domain else op for domain, op in rule.roots())
        table.add_row(rule.name, roots, rule.doc or str(rule.match))
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
