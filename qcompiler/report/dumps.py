"""Read a dump folder and show it in a terminal."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.errors import QCompilerError
from qcompiler.pipeline.contract import Lossy
from qcompiler.pipeline.instruments.dump import DUMP_FORMAT, INDEX_FILE, TIMES_FILE

_MAX_OPS = 6


class DumpError(QCompilerError):
    """A folder that is not a dump, or a stage that a dump does not have."""


@dataclass(frozen=True)
class StageNumerics:
    """Error figures of one pass as dumped.

    Attributes:
        contract: what the pass declares.
        compared: number of values compared.
        violations: names of the values over the bound.
        worst_value: the value nearest to its bound, empty if none was compared.
        worst_error: its error in the contract's unit.
        worst_sqnr_db: its SQNR.
        sqnr_db: SQNR of each model output against the first graph.
        unchecked: why nothing was measured, if so.
    """

    contract: str
    compared: int
    violations: tuple[str, ...]
    worst_value: str
    worst_error: float
    worst_sqnr_db: float
    sqnr_db: dict[str, float]
    unchecked: str = ""

    @property
    def least_sqnr_db(self) -> float | None:
        """Return the SQNR of the worst output."""
        return min(self.sqnr_db.values(), default=None)


@dataclass(frozen=True)
class Stage:
    """One entry of a dump: the graph behind a pass (or an input graph).

    Attributes:
        number: place in the dump, from 0.
        name: file name stem, ``003-fuse-qdq``.
        text: the pass as a pipeline string; None for an input graph.
        phase: phase of the graph.
        changes: what the pass counted.
        changed: whether the graph's text changed (else there are no files).
        ops: number of nodes per operator.
        weight_bytes: bytes of all initializers.
        remarks: number of remarks the pass made.
        error: what the pass failed with, empty if it did not.
        seconds: wall time, None if it was not measured.
        numerics: error figures, None if they were not measured.
    """

    number: int
    name: str
    text: str | None
    phase: str
    changes: int
    changed: bool
    ops: dict[str, int]
    weight_bytes: int
    remarks: int
    error: str = ""
    seconds: float | None = None
    numerics: StageNumerics | None = None

    @property
    def nodes(self) -> int:
        """Return the number of nodes, subgraphs included."""
        return sum(self.ops.values())


@dataclass(frozen=True)
class Dump:
    """A dump folder.

    Attributes:
        folder: where it is.
        pipeline: the passes that ran, as one pipeline string.
        target: name of the target.
        versions: compiler and libraries that wrote it.
        stages: the input graph and the passes, in order.
    """

    folder: Path
    pipeline: str
    target: str
    versions: dict[str, str]
    stages: tuple[Stage, ...] = field(default_factory=tuple)

    def stage(self, number: int) -> Stage:
        """Return a stage by number.

        Raises:
            DumpError: there is none.
        """
        if not 0 <= number < len(self.stages):
            raise DumpError(f"{self.folder} has stages 0 to {len(self.stages) - 1}, found {number}")
        return self.stages[number]

    def before(self, stage: Stage) -> Stage | None:
        """Return the stage in front, or None for the first and for an input graph."""
        return self.stages[stage.number - 1] if stage.number and stage.text is not None else None

    def ops_changed(self, stage: Stage) -> dict[str, int]:
        """Return by how much the count of each operator changed, the largest changes first."""
        before = self.before(stage)
        if before is None:
            return {}
        change = {op: stage.ops.get(op, 0) - before.ops.get(op, 0) for op in {*stage.ops, *before.ops}}
        return {op: change[op] for op in sorted(change, key=lambda op: (-abs(change[op]), op)) if change[op]}

    def text(self, number: int) -> str:
        """Return the graph of a stage as text; that of an unchanged stage is the last one that changed.

        Raises:
            DumpError: there is no such stage, or its file is missing.
        """
        stage = self.stage(number)
        while not stage.changed and stage.number:
            stage = self.stages[stage.number - 1]
        return self._file(stage, ".ir")

    def diff(self, number: int) -> str:
        """Return what a pass changed as a unified diff; empty if it changed nothing.

        Raises:
            DumpError: there is no such stage, or its file is missing.
        """
        stage = self.stage(number)
        return self._file(stage, ".diff") if stage.changed and stage.number else ""

    def remarks(self, number: int) -> list[dict[str, Any]]:
        """Return the remarks that a pass made, as dictionaries with the fields of `Remark`."""
        stage = self.stage(number)
        if not stage.remarks:
            return []
        made = json.loads(self._file(stage, ".remarks.json"))
        return made if isinstance(made, list) else []

    def model_path(self, number: int) -> Path:
        """Return the ONNX file of a stage, which Netron opens; that of an unchanged stage is the last that changed."""
        stage = self.stage(number)
        while not stage.changed and stage.number:
            stage = self.stages[stage.number - 1]
        return self.folder / f"{stage.name}.onnx"

    @cached_property
    def failed(self) -> Stage | None:
        """Return the stage that failed, if one did."""
        return next((s for s in self.stages if s.error), None)

    def _file(self, stage: Stage, suffix: str) -> str:
        path = self.folder / (stage.name + suffix)
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise DumpError(f"the dump is incomplete: cannot read {path}: {error.strerror or error}") from error


# ---- reading ------------------------------------------------------------------------------------------------------


def load_dump(folder: str | Path) -> Dump:
    """Read the index of a dump folder.

    Raises:
        DumpError: the folder is not a dump, is damaged, or was written by another format version.
    """
    root = Path(folder)
    path = root / INDEX_FILE
    if not path.is_file():
        raise DumpError(f"{root} is not a dump: expected {INDEX_FILE} in it; --dump DIR writes one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "format" not in data:
            raise DumpError(f"{root} holds no finished stage; run with --dump again")
        if data["format"] != DUMP_FORMAT:
            raise DumpError(f"{root} has dump format {data['format']}, this qcompiler reads {DUMP_FORMAT}")
        times_path = root / TIMES_FILE
        times = json.loads(times_path.read_text(encoding="utf-8")) if times_path.is_file() else {}
        stages = tuple(_stage(number, entry, times) for number, entry in enumerate(data["stages"]))
        return Dump(root, str(data["pipeline"]), str(data["target"]), dict(data["versions"]), stages)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DumpError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _stage(number: int, entry: dict[str, Any], times: dict[str, float]) -> Stage:
    numerics = entry.get("numerics")
    return Stage(
        number,
        entry["stage"],
        entry["text"],
        entry["phase"],
        entry["changes"],
        entry["changed"],
        dict(entry["ops"]),
        entry["weight_bytes"],
        entry["remarks"],
        entry.get("error", ""),
        times.get(entry["stage"]),
        None if numerics is None else _numerics(numerics),
    )


def _numerics(data: dict[str, Any]) -> StageNumerics:
    worst = data["worst"]
    return StageNumerics(
        data["contract"],
        data["compared"],
        tuple(v["value"] for v in data["violations"]),
        "" if worst is None else worst["value"],
        0.0 if worst is None else float(worst["error"]),
        math.inf if worst is None else float(worst["sqnr_db"]),
        {name: float(db) for name, db in data["sqnr_db"].items()},
        data["unchecked"],
    )


# ---- showing ------------------------------------------------------------------------------------------------------


def render(dump: Dump, console: Console) -> None:
    """Print the table of passes: time, changes, nodes, operator counts, error."""
    console.print(Text(f"target {dump.target}   " + "   ".join(f"{k} {v}" for k, v in sorted(dump.versions.items()))))
    console.print(Text(f"pipeline {dump.pipeline}", overflow="fold"))
    timed = any(s.seconds is not None for s in dump.stages)
    measured = any(s.numerics is not None for s in dump.stages)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("pass", overflow="fold")
    table.add_column("phase")
    if timed:
        table.add_column("ms", justify="right")
    table.add_column("changes", justify="right")
    table.add_column("nodes", justify="right")
    table.add_column("weights", justify="right")
    if measured:
        table.add_column("SQNR dB", justify="right")
        table.add_column("contract")
    table.add_column("operators")
    for stage in dump.stages:
        row = [Text(str(stage.number)), _name(stage), Text(stage.phase)]
        if timed:
            row.append(Text("" if stage.seconds is None else f"{stage.seconds * 1000:.1f}"))
        row += [Text(str(stage.changes) if stage.text is not None else ""), _nodes(dump, stage), _bytes(stage)]
        if measured:
            row += _error(stage)
        table.add_row(*row, _ops(dump, stage), style="" if stage.changed else "dim")
    console.print(table)
    if dump.failed is not None:
        console.print(Text(f"failed: {dump.failed.error}", style="red"))


def render_diff(dump: Dump, number: int, console: Console) -> None:
    """Print what one pass changed, coloured.

    Raises:
        DumpError: there is no such stage.
    """
    diff = dump.diff(number)
    if not diff:
        console.print(Text(f"stage {dump.stage(number).name} changed nothing"))
        return
    for line in diff.splitlines():
        console.print(Text(line, style=_diff_style(line)), soft_wrap=True)


def render_stage(dump: Dump, number: int, console: Console) -> None:
    """Print the graph of one stage.

    Raises:
        DumpError: there is no such stage.
    """
    console.print(Text(dump.text(number).rstrip("\n")), soft_wrap=True)


def render_remarks(dump: Dump, number: int, console: Console) -> None:
    """Print the remarks of one pass, one line each.

    Raises:
        DumpError: there is no such stage.
    """
    for remark in dump.remarks(number):
        mark = Text("done " if remark["done"] else "left ", style="green" if remark["done"] else "yellow")
        rule = f" [{remark['rule']}]" if remark["rule"] else ""
        console.print(mark + Text(f"{remark['node']}{rule} {remark['reason']}: {remark['text']}"), soft_wrap=True)


def _diff_style(line: str) -> str:
    if line.startswith(("---", "+++")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")


def _name(stage: Stage) -> Text:
    if stage.text is None:
        return Text("(input)")
    return Text(stage.text + (" FAILED" if stage.error else ""), style="red" if stage.error else "")


def _nodes(dump: Dump, stage: Stage) -> Text:
    before = dump.before(stage)
    if before is None or before.nodes == stage.nodes:
        return Text(str(stage.nodes))
    return Text(f"{before.nodes} -> {stage.nodes}")


def _bytes(stage: Stage) -> Text:
    size = stage.weight_bytes
    return Text(f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} B")


def _error(stage: Stage) -> list[Text]:
    figures = stage.numerics
    if figures is None:
        return [Text(""), Text("")]
    if figures.unchecked:
        return [Text(""), Text(f"not checked: {figures.unchecked}", style="yellow")]
    least = figures.least_sqnr_db
    if figures.violations:
        return [_db(least), Text(f"{figures.contract} broken at {', '.join(figures.violations)}", style="red")]
    return [_db(least), Text(figures.contract + _worst(figures))]


def _worst(figures: StageNumerics) -> str:
    if figures.worst_error == 0:
        return ""
    if figures.contract == str(Lossy()):  # without a bound the error only counts elements
        return f", worst {figures.worst_sqnr_db:.1f} dB at {figures.worst_value}"
    return f", worst {figures.worst_error:.2g} at {figures.worst_value}"


def _db(value: float | None) -> Text:
    return Text("" if value is None else "equal" if value == math.inf else f"{value:.1f}")


def _ops(dump: Dump, stage: Stage) -> Text:
    if stage.text is None:
        most = sorted(stage.ops, key=lambda op: (-stage.ops[op], op))
        shown = [f"{op} {stage.ops[op]}" for op in most]
    else:
        shown = [f"{op} {count:+d}" for op, count in dump.ops_changed(stage).items()]
    more = f" ... {len(shown) - _MAX_OPS} more" if len(shown) > _MAX_OPS else ""
    return Text("  ".join(shown[:_MAX_OPS]) + more)
