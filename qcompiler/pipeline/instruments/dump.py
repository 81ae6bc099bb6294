"""Write what every pass made of the graph into a folder."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, all_nodes
from qcompiler.ir.serialize import weight_bytes
from qcompiler.ir.text import print_model
from qcompiler.pipeline.instruments.numbers import point_numbers, sketches, statistics_summary
from qcompiler.pipeline.instruments.numerics import NumericsInstrument, PassNumerics
from qcompiler.pipeline.instruments.timing import TimeInstrument
from qcompiler.pipeline.instruments.weights import WEIGHTS_FILE, WeightStore, versions, write_texts
from qcompiler.pipeline.pipeline import Step
from qcompiler.pipeline.state import ChangeLog, CompileState

DUMP_FORMAT = 1
INDEX_FILE = "pipeline.json"
TIMES_FILE = "times.json"
STATISTICS_FILE = "statistics.json"


@dataclass
class DumpInstrument:
    """Write ``pipeline.json`` and, per pass that changed the graph, its text, its diff and an ONNX file.

    Beside them, where there is something to tell: the pass's remarks, the rules it applied, its error figures, the plan
    with the numbers of its points, and once ``statistics.json``, what calibration saw. docs/dumps.md has the fields.

    All ONNX files point into one weights file. Nothing written depends on the clock, on paths or on identities, except
    ``times.json``. One instrument may watch several pipelines in turn; their passes are numbered through, and a graph
    that was changed in between is written as a stage ``input``.

    Attributes:
        folder: made if need be; an older dump in it is replaced.
        times: the instrument whose times are shown in the dump; it comes later in the list of instruments.
        numerics: the instrument whose figures are shown; it comes later in the list, too.
        models: write the ONNX files as well.
    """

    folder: str | Path
    times: TimeInstrument | None = None
    numerics: NumericsInstrument | None = None
    models: bool = True
    _store: WeightStore | None = None
    _entries: list[dict[str, Any]] = field(default_factory=list)
    _text: str = ""
    _stage: str = ""
    _plan: str = ""
    _remarks: int = 0
    _figures: int = 0
    _seconds: dict[str, float] = field(default_factory=dict)
    _running: bool = False
    _log: ChangeLog | None = None
    _own_log: bool = False
    _applied: int = 0
    _observed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Write the graph that the first pass is given."""
        if self._store is None:
            self._open()
        if (text := print_model(state.model)) != self._text:
            self._add(state, "input", None, 0, text)
            self._write_index(state)
        self._remarks = len(state.remarks)
        self._figures = len(self.numerics.results) if self.numerics is not None else 0
        self._running = True
        self._own_log = state.changes is None
        if state.changes is None:
            state.changes = ChangeLog()
        self._log = state.changes
        self._applied = len(self._log.applied)

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Write the graph if its text changed, and the index."""
        self._add(state, step.name, step.text, changes, print_model(state.model))
        self._write_index(state)

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Write the graph as the failed pass left it, and the error into the index."""
        if self._store is None:
            return
        if self._running:
            self._add(state, step.name, step.text, 0, _text_of(state.model))
        self._entries[-1]["error"] = str(error)
        self._write_index(state)

    def _open(self) -> None:
        folder = Path(self.folder)
        self._observed = {}
        write_texts(folder, {INDEX_FILE: "{}\n"})
        for path in folder.iterdir():
            # Only what a dump writes: the folder may be a place people keep other things in.
            if path.name[:3].isdigit() and path.name[3:4] == "-" and path.is_file():
                path.unlink()
        for name in (TIMES_FILE, STATISTICS_FILE):
            (folder / name).unlink(missing_ok=True)
        self._store = WeightStore(folder)

    def _add(self, state: CompileState, name: str, text: str | None, changes: int, graph: str) -> None:
        self._running = False
        stage = f"{len(self._entries):03d}-{name}"
        changed = graph != self._text
        files: dict[str, str] = {}
        if changed:
            files[f"{stage}.ir"] = graph
            if self._stage:
                files[f"{stage}.diff"] = _diff(self._text, graph, self._stage, stage)
        if remarks := state.remarks[self._remarks :] if text is not None else []:
            files[f"{stage}.remarks.json"] = _json([asdict(r) for r in remarks])
        if (plan := state.plan.to_json()) != self._plan and (state.plan.choices or self._plan):
            files[f"{stage}.plan.json"] = plan + "\n"
            files[f"{stage}.points.json"] = _json(point_numbers(state))
        if rules := self._rules(state):
            files[f"{stage}.rules.json"] = _json(rules)
        files |= self._statistics(state)
        self._plan = plan
        self._remarks = len(state.remarks)
        write_texts(Path(self.folder), files)
        if changed and self.models:
            assert self._store is not None
            self._store.save(state.model, f"{stage}.onnx")
        counts = {"changes": changes, "changed": changed, "remarks": len(remarks)}
        self._entries.append({"stage": stage, "text": text, **counts, **_graph_entry(state)})
        if text is not None:
            self._add_figures(stage)
        if changed:
            self._text, self._stage = graph, stage

    def _rules(self, state: CompileState) -> list[dict[str, Any]]:
        """Return the rule applications of the pass that ends here, and take the log away if it was put there."""
        if self._log is None:
            return []
        made = [asdict(change) for change in self._log.applied[self._applied :]]
        if self._own_log:
            state.changes = None
        self._log = None
        return made

    def _statistics(self, state: CompileState) -> dict[str, str]:
        """Return the file of what was observed, if the graph has values that it did not hold yet."""
        known = sketches(state.statistics)
        if not known:
            return {}
        names = {str(v.name) for g in all_graphs(state.model) for v in g.inputs}
        names.update(str(v.name) for n in all_nodes(state.model) for v in n.outputs)
        added = statistics_summary(state.statistics, (names & set(known)) - set(self._observed))
        if not added:
            return {}
        self._observed |= added
        return {STATISTICS_FILE: json.dumps(self._observed, sort_keys=True) + "\n"}

    def _add_figures(self, stage: str) -> None:
        if self.numerics is not None and len(self.numerics.results) > self._figures:
            result = self.numerics.results[-1]
            self._entries[-1]["numerics"] = _numerics(result)
            if result.figures:
                figures = {f.value: _finite({"error": f.error, "sqnr_db": f.sqnr_db}) for f in result.figures}
                write_texts(Path(self.folder), {f"{stage}.figures.json": _json(figures)})
        if self.times is not None and self.times.times:
            self._seconds[stage] = self.times.times[-1].seconds

    def _write_index(self, state: CompileState) -> None:
        index = {
            "format": DUMP_FORMAT,
            "pipeline": ",".join(e["text"] for e in self._entries if e["text"] is not None),
            "target": state.target.name,
            "versions": versions(),
            "weights": WEIGHTS_FILE,
            "stages": self._entries,
        }
        files = {INDEX_FILE: _json(index)}
        if self.times is not None:
            files[TIMES_FILE] = _json(self._seconds)
        write_texts(Path(self.folder), files)


def _graph_entry(state: CompileState) -> dict[str, Any]:
    ops = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in all_nodes(state.model))
    return {
        "phase": state.phase.name,
        "nodes": ops.total(),
        "ops": dict(sorted(ops.items())),
        "weight_bytes": weight_bytes(state.model),
    }


def _text_of(model: ir.Model) -> str:
    """Return the text of a graph that a failed pass may have left broken."""
    try:
        return print_model(model)
    except Exception as error:  # whatever a broken graph makes the printer raise, the dump goes on
        return f"# the graph cannot be printed: {error}\n"


def _diff(old: str, new: str, old_name: str, new_name: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), old_name, new_name, lineterm="", n=2)
    return "\n".join(lines) + "\n"


def _numerics(result: PassNumerics) -> dict[str, Any]:
    worst = result.worst
    return {
        "contract": str(result.contract),
        "compared": len(result.figures),
        "violations": [_finite(asdict(f)) for f in result.violations],
        "worst": None if worst is None else _finite(asdict(worst)),
        "sqnr_db": _finite(result.sqnr_db),
        "unchecked": result.unchecked,
    }


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with infinities as text, which JSON has no number for."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def _json(data: object) -> str:
    return json.dumps(data, indent=1, sort_keys=True, default=str) + "\n"
