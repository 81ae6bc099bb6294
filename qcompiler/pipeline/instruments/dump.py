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

from qcompiler.ir.graph import all_nodes
from qcompiler.ir.serialize import weight_bytes
from qcompiler.ir.text import print_model
from qcompiler.pipeline.instruments.numerics import NumericsInstrument, PassNumerics
from qcompiler.pipeline.instruments.timing import TimeInstrument
from qcompiler.pipeline.instruments.weights import WEIGHTS_FILE, WeightStore, versions, write_texts
from qcompiler.pipeline.pipeline import Step
from qcompiler.pipeline.state import CompileState

DUMP_FORMAT = 1
INDEX_FILE = "pipeline.json"
TIMES_FILE = "times.json"


@dataclass
class DumpInstrument:
    """Write ``pipeline.json`` and, per pass that changed the graph, its text, its diff and an ONNX file.

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
        write_texts(folder, {INDEX_FILE: "{}\n"})
        for path in folder.iterdir():
            # Only what a dump writes: the folder may be a place people keep other things in.
            if path.name[:3].isdigit() and path.name[3:4] == "-" and path.is_file():
                path.unlink()
        (folder / TIMES_FILE).unlink(missing_ok=True)
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

    def _add_figures(self, stage: str) -> None:
        if self.numerics is not None and len(self.numerics.results) > self._figures:
            self._entries[-1]["numerics"] = _numerics(self.numerics.results[-1])
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
