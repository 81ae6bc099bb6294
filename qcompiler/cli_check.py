"""``qcompiler check``: what a target's engine would refuse in a model, or compute otherwise."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from qcompiler.cli_show import stdout_console
from qcompiler.errors import ModelError, TargetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcompiler.targets.legality import Diagnostic, Legality

DEFAULT_SM = 89
"""Compute capability that is checked where neither the target's name nor ``--sm`` says one."""

_SUFFIX = re.compile(r"(?P<engine>.+?)(?:-sm(?P<sm>\d{2,3}))?")
_MOST = 60
"""Diagnostics of one code that are shown; --json has all."""


def check_command(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="An ONNX model.", show_default=False)] = None,
    target: Annotated[
        str, typer.Option(metavar="ENGINE[-smNN]", help="Engine, and its compute capability: 89 for 8.9.")
    ] = f"tensorrt-sm{DEFAULT_SM}",
    sm: Annotated[int | None, typer.Option(min=10, max=199, help="Compute capability instead of the target's.")] = None,
    version: Annotated[
        str, typer.Option("--engine-version", help="The engine's version; empty: the one checked.")
    ] = "",
    flavour: Annotated[str, typer.Option(help="Library of the engine: tensorrt or tensorrt-rtx.")] = "",
    rules: Annotated[bool, typer.Option("--rules", help="List the rules with their evidence; no MODEL.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: all diagnostics, nothing cut.")] = False,
) -> None:
    """Check a quantized model against a target engine's rules, without the engine.

    An error is what the engine refuses, or computes with other numbers; a loss is what it builds but runs in float.
    The exit code is 0 without errors, 1 with some, and 2 where the model or target cannot be read.

    \b
    Examples:
      qcompiler check model.int8.onnx --target tensorrt-sm89
      qcompiler check model.int8.onnx --target tensorrt --sm 120 --flavour tensorrt-rtx --json
      qcompiler check --target openvino --rules
    """
    from qcompiler.ir.reader import read_model
    from qcompiler.targets.legality import load_legality

    engine, capability = parse_target_name(target)
    legality = load_legality(engine)
    capability = capability if sm is None else sm
    if rules:
        _show_rules(legality, capability, as_json)
        return
    if model is None:
        raise ModelError("no model to check: name an ONNX file (or list the rules with --rules)")
    found = legality.check(read_model(model), capability, version, flavour)
    errors = sum(d.severity == "error" for d in found)
    if as_json:
        head = {
            "model": str(model),
            "engine": engine,
            "sm": capability,
            "errors": errors,
            "losses": len(found) - errors,
        }
        print(json.dumps({**head, "diagnostics": [asdict(d) for d in found]}, indent=2))
    else:
        _show(found, errors, f"{model} on {engine}" + (f" sm{capability}" if engine == "tensorrt" else ""))
    if errors:
        raise typer.Exit(1)


def parse_target_name(name: str) -> tuple[str, int]:
    """Split ``tensorrt-sm89`` into engine and compute capability (89 where the name says none).

    Raises:
        TargetError: a name of another form.
    """
    match = _SUFFIX.fullmatch(name)
    if match is None:
        raise TargetError(f"target is {name!r}; expected an engine such as tensorrt-sm{DEFAULT_SM} or openvino")
    return match["engine"], int(match["sm"] or DEFAULT_SM)


def _show(found: Sequence[Diagnostic], errors: int, title: str) -> None:
    console = stdout_console()
    if found:
        table = _table("", "rule", "node", "found")
        shown: dict[str, int] = {}
        for d in found:
            shown[d.code] = shown.get(d.code, 0) + 1
            if shown[d.code] <= _MOST:
                style = "red" if d.severity == "error" else "yellow"
                table.add_row(Text(d.severity, style=style), d.code, Text(_place(d)), Text(d.text))
        console.print(table)
        for code, count in shown.items():
            advice = next(d.advice for d in found if d.code == code)
            console.print(Text(f"{code} ({count}): {advice}"), soft_wrap=True)
    losses = len(found) - errors
    counts = ", ".join(_count(n, what) for n, what in ((errors, "error"), (losses, "loss")))
    console.print(Text(f"{title}: {counts}"), soft_wrap=True)


def _count(number: int, what: str) -> str:
    plural = {"error": "errors", "loss": "losses"}[what]
    return f"{number or 'no'} {what if number == 1 else plural}"


def _place(d: Diagnostic) -> str:
    if not d.node:
        return "(the model)"
    return d.node + (f" ({d.origin})" if d.origin not in ("", d.node) else "")


def _show_rules(legality: Legality, sm: int, as_json: bool) -> None:
    if as_json:
        rows = [{k: v for k, v in asdict(row).items() if k != "check"} for row in legality.rows]
        print(json.dumps({"engine": legality.engine, "versions": legality.versions, "rules": rows}, indent=2))
        return
    console = stdout_console()
    table = _table("rule", "", "why", "stricter than the engine, because")
    for row in legality.rows:
        if not row.sm_below or sm < row.sm_below:
            table.add_row(row.code, row.severity, row.why, row.stricter)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
