"""``qcompiler cache``: what the drop-in for ONNX Runtime and the searches keep, how large it is, how it goes away."""

from __future__ import annotations

import datetime
import os
import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from qcompiler.cli_show import stdout_console
from qcompiler.errors import PassError

_ACTIONS = ("list", "size", "clear")
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def cache_command(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="list, size or clear.")] = "list",
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="The cache; default QCOMPILER_CACHE or the user's.")
    ] = None,
    unused: Annotated[
        str | None, typer.Option("--unused", metavar="SPAN", help="With clear: only what was not used for 30d, 12h ...")
    ] = None,
) -> None:
    """Show or clear the compiled models that qcompiler.ort keeps, and the measured costs that compilations share.

    \b
    Examples:
      qcompiler cache
      qcompiler cache size
      qcompiler cache clear --unused 30d
    """
    from qcompiler.dropin.settings import default_cache
    from qcompiler.dropin.store import Cache
    from qcompiler.search.cost_cache import clear_costs, list_costs

    if action not in _ACTIONS:
        raise PassError(f"unknown action {action!r}; expected {', '.join(_ACTIONS)}")
    if unused is not None and action != "clear":
        raise PassError("--unused says what clear removes: write qcompiler cache clear --unused SPAN")
    cache, console = Cache(folder or default_cache(os.environ)), stdout_console()
    costs = list_costs(cache.folder)
    if action == "size":
        size = cache.size() + sum(c.size for c in costs)
        console.print(Text(f"{_bytes(size)} in {cache.folder}"), soft_wrap=True)
    elif action == "clear":
        span = parse_span(unused) if unused is not None else 0.0
        count, files = cache.clear(span), clear_costs(cache.folder, _day(time.time() - span) if span else "")
        measured = f" and {files} files of measured costs" if files else ""
        console.print(Text(f"removed {count} entries{measured} from {cache.folder}"), soft_wrap=True)
    else:
        entries, now = cache.entries(), time.time()
        table = Table("entry", "model", "size", "made", "used", "state", box=None)
        for entry in entries:
            ages = (f"{_ago(now - entry.made)} ago", f"{_ago(now - entry.used)} ago")
            state = f"refused: {entry.refused}" if entry.refused else "compiled"
            table.add_row(*map(Text, (entry.key[:12], entry.name, _bytes(entry.size), *ages, state)))
        if entries:
            console.print(table)
        if costs:
            table = Table("measured costs of", "costs", "size", "last measured", box=None)
            for item in costs:
                table.add_row(*map(Text, (str(item.key), str(item.count), _bytes(item.size), item.date)))
            console.print(table)
        console.print(Text(f"{len(entries)} entries in {cache.folder}"), soft_wrap=True)


def parse_span(text: str) -> float:
    """Read a span of time such as ``30d`` into seconds.

    Raises:
        PassError: a text of another form.
    """
    match = re.fullmatch(r"(\d+)([smhdw])", text.strip().lower())
    if match is None:
        raise PassError(f"--unused is {text!r}; expected a span like 30d, 12h or 2w")
    return float(int(match[1]) * _SPANS[match[2]])


def _day(seconds: float) -> str:
    """Return the day of a time since 1970, as costs are dated (ISO 8601, UTC)."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _bytes(count: int) -> str:
    if count < 1_000_000:
        return f"{count / 1000:.1f} kB"
    return f"{count / 1_000_000:.1f} MB"


def _ago(seconds: float) -> str:
    unit = next((u for u in ("w", "d", "h", "m") if seconds >= _SPANS[u]), "s")
    return f"{int(max(0.0, seconds) // _SPANS[unit])}{unit}"
