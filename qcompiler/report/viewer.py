"""Write a dump as one HTML page that needs nothing else: the passes, the laid-out graphs, each node's history.

Everything is computed here, once: the page only draws. What the page is given is JSON in ``script`` elements, one for
what is needed at once and one per graph, which the page reads when that graph is first shown. The same dump gives the
same bytes, but for the times of the passes.
"""

from __future__ import annotations

import html
import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

from qcompiler.errors import ModelError
from qcompiler.ir.reader import read_model
from qcompiler.quant.plan import QuantPlan
from qcompiler.report.dumps import Dump, Stage
from qcompiler.report.viewer_graph import PRECISIONS, ViewGraph, ViewNode, read_graph

COLUMNS = (
    "name", "op", "text", "inputs", "outputs", "types", "origins", "precision", "conversion", "numbers",
)  # fmt: skip
"""Fields of a node in the page's data, in order."""

_SCRIPTS = ("data.js", "draw.js", "panels.js", "main.js")


def write_page(dump: Dump, path: str | Path) -> Path:
    """Write the page of a dump and return where it is.

    Raises:
        DumpError: the dump is damaged or incomplete.
        ModelError: the file cannot be written.
    """
    file = Path(path)
    text = page(dump)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ModelError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def page(dump: Dump) -> str:
    """Return the page of a dump as HTML.

    Raises:
        DumpError: the dump is damaged or incomplete.
    """
    data = PageData(dump)
    core = data.core()
    graphs = "\n".join(
        f'<script type="application/json" id="data-graph-{number}">{embedded(graph)}</script>'
        for number, graph in enumerate(data.graphs)
    )
    parts = {
        "TITLE": html.escape(f"{core['title']} - qcompiler"),
        "STYLE": _asset("style.css"),
        "CORE": embedded(core),
        "GRAPHS": graphs,
        "SCRIPT": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    # In one go: what is put in may itself hold such marks.
    return re.sub("@(" + "|".join(parts) + ")@", lambda m: parts[m[1]], _asset("page.html"))


def embedded(data: object) -> str:
    """Return data as JSON that may stand inside an HTML ``script`` element, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (resources.files("qcompiler.report") / "viewer-page" / name).read_text(encoding="utf-8")


class PageData:
    """What the page is given.

    Attributes:
        nodes: every distinct version of a node over all stages, as lists in the order of `COLUMNS`.
        graphs: the distinct graphs: ``v`` indices into ``nodes``, ``p`` parents, ``f`` frames, ``e`` edges.
    """

    def __init__(self, dump: Dump) -> None:
        """Read and lay out all stages of a dump."""
        self.dump = dump
        self.nodes: list[list[Any]] = []
        self.graphs: list[dict[str, Any]] = []
        self._places: dict[str, int] = {}
        self._lines: list[dict[str, str]] = []
        self._latest: ViewGraph | None = None
        self.plans: dict[int, QuantPlan] = {}
        for stage in dump.stages:
            if (plan := dump.plan(stage.number)) is not None:
                self.plans[stage.number] = plan
        self.stages = self._stages()

    def core(self) -> dict[str, Any]:
        """Return everything but the graphs."""
        dump, numbers = self.dump, range(len(self.dump.stages))
        versions = "   ".join(f"{name} {version}" for name, version in sorted(dump.versions.items()))
        folder = dump.folder.resolve().name
        return {
            "title": folder.removesuffix(".dump") or folder,
            "target": dump.target,
            "pipeline": dump.pipeline,
            "versions": versions,
            "columns": COLUMNS,
            "precisions": PRECISIONS,
            "nodes": self.nodes,
            "stages": self.stages,
            "plans": {n: self._plan(n, plan) for n, plan in self.plans.items()},
            "statistics": finite(dump.statistics()),
            "figures": {n: figures for n in numbers if (figures := finite(dump.figures(n)))},
            "rules": {n: rules for n in numbers if (rules := dump.rules(n))},
            "remarks": {n: finite(remarks) for n in numbers if (remarks := dump.remarks(n))},
        }

    def _plan(self, number: int, plan: QuantPlan) -> dict[str, Any]:
        points = self.dump.points(number) or {
            # A dump of old has the plan only, without the numbers of its points.
            name: {"format": p.spec.format, "kind": p.source.kind, "points": list(p.source.points)}
            for name, p in sorted(plan.points.items())
        }
        choices = {name: [choice.form, choice.why] for name, choice in sorted(plan.choices.items())}
        return {"choices": choices, "points": finite(points)}

    def _stages(self) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        plan: QuantPlan | None = None
        planned = False
        for stage in self.dump.stages:
            before = made[-1]["graph"] if made else None
            graph, problem = before, ""
            planned = planned or stage.number in self.plans
            plan = self.plans.get(stage.number, plan)
            # What a node computes on follows the plan, so a new plan is a new picture of the same graph.
            if stage.changed or stage.number in self.plans:
                graph, problem = self._graph(stage, plan)
            entry = _stage_entry(stage)
            entry |= {"graph": graph, "problem": problem, "delta": self._delta(stage, before, graph)}
            made.append(entry)
        return made

    def _graph(self, stage: Stage, plan: QuantPlan | None) -> tuple[int | None, str]:
        """Return the index of a stage's graph, or why it cannot be drawn."""
        path = self.dump.model_path(stage.number)
        if not path.is_file():
            return None, f"the dump holds no {path.name}, so there is no graph to draw"
        try:
            graph = read_graph(read_model(path), self.dump.text(stage.number), plan, self._latest)
        except ModelError as error:  # what a failed pass left may be no model any more
            return None, f"the graph cannot be read: {error}"
        self._latest = graph
        self.graphs.append(self._graph_entry(graph))
        self._lines.append({node.name: node.text for node in graph.nodes})
        return len(self.graphs) - 1, ""

    def _graph_entry(self, graph: ViewGraph) -> dict[str, Any]:
        edges = []
        for number, ((source, target, _), route) in enumerate(zip(graph.edges, graph.routes, strict=True)):
            points = [round(c) for point in route for c in point]
            edges.append([source, target, int(number in graph.unrouted), *points])
        return {
            "v": [self._version(node) for node in graph.nodes],
            "p": [node.parent for node in graph.nodes],
            "f": [round(c) for frame in graph.frames for c in frame],
            "e": edges,
        }

    def _version(self, node: ViewNode) -> int:
        entry = [
            node.name, node.op, node.text, node.inputs, node.outputs, node.types, node.origins,
            PRECISIONS.index(node.precision), int(node.conversion), dict(node.numbers),
        ]  # fmt: skip
        key = json.dumps(entry)
        if key not in self._places:
            self._places[key] = len(self.nodes)
            self.nodes.append(entry)
        return self._places[key]

    def _delta(self, stage: Stage, before: int | None, now: int | None) -> list[int] | None:
        """Return how many nodes were added, changed and removed."""
        if stage.text is None or before is None or now is None or before == now:
            return None
        old, new = self._lines[before], self._lines[now]
        changed = sum(old[name] != new[name] for name in old.keys() & new.keys())
        return [len(new.keys() - old.keys()), changed, len(old.keys() - new.keys())]


def _stage_entry(stage: Stage) -> dict[str, Any]:
    numerics = None
    least: float | None = None
    if (figures := stage.numerics) is not None:
        least = figures.least_sqnr_db
        numerics = {
            "contract": figures.contract,
            "compared": figures.compared,
            "violations": list(figures.violations),
            "sqnr_db": finite(figures.sqnr_db),
            "unchecked": figures.unchecked,
        }
    return {
        "title": _short_title(stage),
        "pass": stage.text,
        "phase": stage.phase,
        "changes": stage.changes,
        "changed": stage.changed,
        "nodes": stage.nodes,
        "ops": stage.ops,
        "weights": stage.weight_bytes,
        "seconds": None if stage.seconds is None else float(f"{stage.seconds:.4g}"),
        "error": stage.error,
        "numerics": numerics,
        "least_db": finite(least),
        "broken": bool(figures and figures.violations),
    }


def _short_title(stage: Stage) -> str:
    """Return the pass's name; the file stem holds it behind the number."""
    return stage.name.partition("-")[2]


def finite(data: Any) -> Any:
    """Return data with infinite and undefined numbers as text, which JSON has no number for."""
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return data
