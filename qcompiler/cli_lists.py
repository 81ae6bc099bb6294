"""``qcompiler targets``, ``recipes``, ``passes`` and ``patterns``: show what there is, and whose it is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.cli_show import stdout_console
from qcompiler.errors import PassError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qcompiler.patterns.catalog import OfferedRules
    from qcompiler.pipeline.registry import PassRegistry
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
    from qcompiler.targets.target import load_target, target_owner

    console = stdout_console()
    processor = detect()
    host, note = host_target_name(processor)
    if name is None:
        _list_targets(console, host)
        console.print(Text(f"host: {processor.model or processor.machine} -> {host}" + (f"; {note}" if note else "")))
        return
    whole = load_target(host if name == "host" else name)
    target = whole if scheme is None else whole.with_scheme(scheme)
    console.print(Text(f"{target.name}: {target.doc}"))
    _show_owner(console, target_owner(host if name == "host" else name))
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


def _list_targets(console: Console, host: str) -> None:
    from qcompiler.errors import QCompilerError
    from qcompiler.targets.target import known_targets, load_target, target_errors, target_owner

    rows = []
    for each in known_targets():
        try:
            target, owner = load_target(each), target_owner(each)
        except QCompilerError:
            continue  # told below
        runs_on = f"sm{target.sm}" if target.sm else target.processor or "any"
        needs, schemes = " ".join((runs_on, *target.requires)), " ".join(target.schemes)
        rows.append((each + (" (host)" if each == host else ""), target.engine, needs, schemes, target.doc, owner))
    console.print(_owned_table(("target", "engine", "processor", "schemes", "what"), rows))
    _tell(target_errors())


def _formats(target: Target) -> str:
    """Return what a scheme stores, in one line."""
    blocks = f" in blocks of {target.block}" if target.block else ""
    bits = f" ({target.weight_bits} bits)" if target.weight_bits != 8 else ""
    activations = f"activations {target.activation}" + (f" or {target.signed}" if target.signed else "")
    floats = "" if target.float_type == "float32" else f", floats {target.float_type}"
    return f"{target.scheme}: {activations}, weights {target.weight}{bits}{blocks}{floats}"


def recipes_command(name: Name = None) -> None:
    """List the recipes, or show one's settings.

    \b
    Examples:
      qcompiler recipes
      qcompiler recipes int4-weights
    """
    from dataclasses import fields

    from qcompiler.errors import QCompilerError
    from qcompiler.recipes.recipe import Recipe, known_recipes, load_recipe, recipe_errors, recipe_owner

    console = stdout_console()
    if name is not None:
        recipe, plain = load_recipe(name), Recipe("")
        console.print(Text(f"{recipe.name}: {recipe.doc}"))
        _show_owner(console, recipe_owner(name))
        for key in (f.name for f in fields(Recipe) if f.name not in ("name", "doc")):
            value = getattr(recipe, key)
            console.print(Text(f"  {key} = {value}" + (" (default)" if value == getattr(plain, key) else "")))
        return
    rows = []
    for each in known_recipes():
        try:
            recipe, owner = load_recipe(each), recipe_owner(each)
        except QCompilerError:
            continue  # told below
        rows.append((each, recipe.scheme, "measurement" if recipe.choose else "rule", recipe.doc, owner))
    console.print(_owned_table(("recipe", "scheme", "forms by", "what"), rows))
    _tell(recipe_errors())


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
        _show_pass(name, registry, console)
        return
    rows = []
    for cls in registry:
        info = pass_info(cls, registry.owner(cls.name()))
        needs = " ".join(p.name for p in info.needs)
        options = f" Options: {', '.join(o.name for o in info.options)}." if info.options else ""
        gives = "" if info.gives is None else info.gives.name
        rows.append((info.name, needs, gives, str(info.numerics), info.doc + options, info.owner))
    console.print(_owned_table(("pass", "needs", "gives", "contract", "what"), rows))
    console.print(Text(f"compile runs: {DEFAULT_PIPELINE}"), soft_wrap=True)
    _tell(registry.errors())


def _show_pass(name: str, registry: PassRegistry, console: Console) -> None:
    import inspect

    from qcompiler.patterns.catalog import load_rules
    from qcompiler.pipeline.registry import pass_info
    from qcompiler.plugins import RULES, offers

    cls = registry.get(name)
    info = pass_info(cls)
    console.print(Text(f"{info.name}: {inspect.getdoc(cls) or info.doc}"))
    _show_owner(console, registry.owner(name))
    gives = "the same phase" if info.gives is None else info.gives.name
    console.print(Text(f"needs {' or '.join(p.name for p in info.needs)}, gives {gives}, contract {info.numerics}"))
    for option in info.options:
        console.print(Text(f"  {option.name} ({option.type}), default {option.default}"))
    for offer in (o for o in offers(RULES) if o.name == name):
        names = ", ".join(r.name for r in load_rules(offer).rules)
        console.print(Text(f"rules from {offer.source}: {names}"))


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
    offered, errors = _offered_rules()
    rules = [(rule, "") for rule in all_rules()]
    rules += [(r, f"{each.offer.source} for {each.pass_name}") for each in offered for r in each.rules]
    if name is not None:
        found = [(rule, owner) for rule, owner in rules if rule.name == name]
        if not found:
            raise PassError(f"unknown pattern {name!r}{near(name, {rule.name for rule, _ in rules})}")
        for text, owner in dict.fromkeys((str(rule), owner) for rule, owner in found):
            console.print(Text(text), soft_wrap=True)
            _show_owner(console, owner)
        return
    rows = []
    for rule, owner in rules:
        roots = " ".join(f"{domain}.{op}" if domain else op for domain, op in rule.roots())
        rows.append((rule.name, roots, rule.doc or str(rule.match), owner))
    console.print(_owned_table(("pattern", "starts at", "what"), rows))
    _tell(errors)


def _offered_rules() -> tuple[list[OfferedRules], list[PassError]]:
    """Return the rules of other packages that some pass tries, and what is wrong with the others."""
    from qcompiler.passes.catalog import shipped_passes
    from qcompiler.passes.rewrite import RewritePass
    from qcompiler.patterns.catalog import load_rules, offered_rules
    from qcompiler.pipeline.parse import near
    from qcompiler.plugins import RULES, PluginError, offers, unreadable

    registry = shipped_passes().with_entry_points()
    takes = {cls.name() for cls in registry if issubclass(cls, RewritePass)} | {"canonicalize"}
    found: list[OfferedRules] = []
    errors: list[PassError] = [*unreadable()]
    for offer in offers(RULES):
        try:
            if offer.name not in takes:
                raise offer.error(f"is for no pass that tries rules{near(offer.name, takes)}")
            offered_rules(offer.name)
            found.append(load_rules(offer))
        except PluginError as error:
            if str(error) not in map(str, errors):
                errors.append(error)
    return found, errors


def _show_owner(console: Console, owner: str) -> None:
    if owner:
        console.print(Text(f"from {owner}"))


def _tell(errors: Iterable[PassError]) -> None:
    """Say what other packages offer in vain; the list itself does not depend on it."""
    for error in errors:
        print(f"warning: {' '.join(str(error).split())}", file=sys.stderr)


def _owned_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """Return a table whose last column, the owner, is there only if other packages own something."""
    kept = list(rows)
    owned = any(row[-1] for row in kept)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in (*columns, *(("from",) if owned else ())):
        table.add_column(column, overflow="fold")
    for row in kept:
        table.add_row(*map(Text, row if owned else row[:-1]))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
