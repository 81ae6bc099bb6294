"""Read a dump folder: its passes, their graphs, and what they said."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qcompiler.errors import QCompilerError
from qcompiler.pipeline.instruments.dump import DUMP_FORMAT, INDEX_FILE, STATISTICS_FILE, TIMES_FILE
from qcompiler.quant.plan import QuantPlan


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
        return self._file(self.last_changed(number), ".ir")

    def last_changed(self, number: int) -> Stage:
        """Return the stage whose files hold the graph of this one.

        Raises:
            DumpError: there is no such stage.
        """
        stage = self.stage(number)
        while not stage.changed and stage.number:
            stage = self.stages[stage.number - 1]
        return stage

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
        made = self._data(stage, ".remarks.json") if stage.remarks else []
        return made if isinstance(made, list) else []

    def rules(self, number: int) -> list[dict[str, Any]]:
        """Return the rule applications of a pass: ``rule``, ``node``, ``origins``; none in dumps of old."""
        made = self._data(self.stage(number), ".rules.json", optional=True)
        return made if isinstance(made, list) else []

    def figures(self, number: int) -> dict[str, dict[str, Any]]:
        """Return ``error`` and ``sqnr_db`` by value that a pass computes differently; empty if nothing was measured."""
        made = self._data(self.stage(number), ".figures.json", optional=True)
        return made if isinstance(made, dict) else {}

    def plan(self, number: int) -> QuantPlan | None:
        """Return the plan that a pass made or changed, None if it did not touch it.

        Raises:
            DumpError: the plan's file is damaged.
        """
        path = self.folder / f"{self.stage(number).name}.plan.json"
        if not path.is_file():
            return None
        try:
            return QuantPlan.from_json(path.read_text(encoding="utf-8"))
        except (QCompilerError, OSError, ValueError) as error:
            raise DumpError(f"{path} is damaged: {error}") from error

    def points(self, number: int) -> dict[str, dict[str, Any]]:
        """Return the points of the plan with scale, zero point and provenance, where a pass changed the plan."""
        made = self._data(self.stage(number), ".points.json", optional=True)
        return made if isinstance(made, dict) else {}

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Return what calibration saw, by value name; empty if the dump has none."""
        path = self.folder / STATISTICS_FILE
        made = _read_json(path) if path.is_file() else {}
        return made if isinstance(made, dict) else {}

    def model_path(self, number: int) -> Path:
        """Return the ONNX file of a stage, which Netron opens; that of an unchanged stage is the last that changed."""
        return self.folder / f"{self.last_changed(number).name}.onnx"

    @cached_property
    def failed(self) -> Stage | None:
        """Return the stage that failed, if one did."""
        return next((s for s in self.stages if s.error), None)

    def _data(self, stage: Stage, suffix: str, *, optional: bool = False) -> Any:
        path = self.folder / (stage.name + suffix)
        return None if optional and not path.is_file() else _read_json(path)

    def _file(self, stage: Stage, suffix: str) -> str:
        path = self.folder / (stage.name + suffix)
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise DumpError(f"the dump is incomplete: cannot read {path}: {error.strerror or error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DumpError(f"the dump is incomplete: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DumpError(f"{path} is damaged: {error}") from error


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
