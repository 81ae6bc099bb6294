"""What is known of a build, from the build itself or from its dump: graph, groups, plan, remarks, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel
from qcompiler.errors import QCompilerError
from qcompiler.ir.graph import all_nodes, origins
from qcompiler.ir.reader import read_model
from qcompiler.options import ModelSource, Options
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.instruments.numbers import point_numbers
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import Change, ChangeLog, CompileState
from qcompiler.recipes.recipe import Recipe, load_recipe
from qcompiler.report.dumps import Dump, load_dump
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.target import Target, load_target


class ExplainError(QCompilerError):
    """Something that cannot be explained: an unknown node, or files that do not say enough."""


@dataclass
class Evidence:
    """Everything an explanation draws on.

    Attributes:
        model: the canonical FLOAT graph.
        target: the capability table.
        groups: its fusion groups.
        forms: form per group.
        why: reason per group, as the build says.
        points: the plan's points with their numbers.
        remarks: as `Remark` has them, in order.
        changes: rule applications up to the canonical graph, with the imported nodes they touched.
        kernels: the engine's kernel per fused group.
        missed: (group, reason code, sentence) of planned fusions that the engine did not make.
        refused: groups that the engine was seen not to fuse in any way, with the reason.
        imported: names of the nodes of the given model, with their operator.
        times: microseconds per group in its form; empty if nothing was timed.
        total_time: microseconds of the whole; 0 if nothing was timed.
        about: target, recipe, engine, for the headline.
        proven: whether the engine's graph was read.
        arithmetic: whether the recipe quantizes what lies between quantized operators.
        calibrated: whether there were observed ranges.
        told: whether the reasons of the build are known; a dump alone does not hold them.
    """

    model: ir.Model
    target: Target
    groups: tuple[Group, ...]
    forms: Mapping[str, str]
    why: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    remarks: Sequence[Mapping[str, Any]] = ()
    changes: Sequence[Change] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)
    missed: Sequence[tuple[str, str, str]] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    imported: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    total_time: float = 0.0
    about: str = ""
    proven: bool = False
    arithmetic: bool = True
    calibrated: bool = True
    told: bool = True

    def __post_init__(self) -> None:
        self.nodes = {str(n.name): n for n in all_nodes(self.model)}
        self.owner = {str(n.name): g for g in self.groups for n in g.nodes}
        self.writers = {str(v.name): n for n in self.nodes.values() for v in n.outputs if v.name}


@dataclass
class Built:
    """A build, and what is known of it."""

    compilation: Compilation
    compiled: CompiledModel
    evidence: Evidence


def build_evidence(source: ModelSource, options: Options) -> Built:
    """Compile a model and keep what a compilation knows.

    Raises:
        QCompilerError: as `qcompiler.compile`.
    """
    if options.target == "cpu":
        options = replace(options, target="host")
    compilation = Compilation(source, options)
    compiled = compilation.run()
    workshop, decider = compilation.workshop, compilation.decider
    forms = {g.group: g.form for g in compiled.report.groups}
    build = workshop.build({g.name: compiled.decisions.forms.get(g.name, "float") for g in workshop.groups})
    changes, imported = _history(compilation.given, compilation.settings.target)
    times, total = _times(compilation, forms)
    proof = compiled.report.proof
    evidence = Evidence(
        model=workshop.base.model,
        target=workshop.base.target,
        groups=workshop.groups,
        forms=forms,
        why={**_pinned(compilation), **decider.why},
        points=point_numbers(build.state),
        remarks=[vars(r) for r in compiled.remarks],
        changes=changes,
        kernels=proof.fused,
        missed=[(m.group, m.reason, m.text) for m in proof.missed],
        refused=dict(workshop.refused),
        imported=imported,
        times=times,
        total_time=total,
        about=_about(compiled.report.context),
        proven=bool(proof.fused or proof.missed),
        arithmetic=compilation.settings.recipe.arithmetic,
        calibrated=workshop.base.statistics is not None,
    )
    return Built(compilation, compiled, evidence)


def _pinned(compilation: Compilation) -> dict[str, str]:
    """Return the reason of groups that the user pinned, which a build by rule alone does not note."""
    if compilation.settings.decisions is not None:
        return {}
    legal = {g.name: g.legal for g in compilation.workshop.groups}
    forms, _ = compilation.settings.recipe.pinned(legal)
    return {name: f"{form}: by override" for name, form in forms.items()}


def _about(context: Mapping[str, str]) -> str:
    recipe = context.get("recipe", "")
    parts = (context.get("target", ""), f"recipe {recipe}" if recipe else "", context.get("engine", ""))
    return ", ".join(part for part in parts if part)


def _history(given: ir.Model, target: Target) -> tuple[tuple[Change, ...], dict[str, str]]:
    """Return the rule applications of canonicalization, and the nodes of the imported model."""
    log = ChangeLog()
    state = CompileState(given.clone(), target, changes=log)
    Pipeline(front_passes()).run(state)
    return tuple(log.applied), {str(n.name): n.op_type for n in all_nodes(given)}


def _times(compilation: Compilation, forms: Mapping[str, str]) -> tuple[dict[str, float], float]:
    """Return microseconds per group in the form that it has, as the search profiled them, and their sum."""
    costs = compilation.decider.costs
    if costs is None:
        return {}, 0.0
    found = {name: us for name, form in forms.items() if (us := costs.groups.get(name, {}).get(form)) is not None}
    return found, sum(found.values()) + costs.fixed


# ---- from files -----------------------------------------------------------------------------------------------------


def dump_evidence(folder: str | Path, report: str | Path | None = None) -> Evidence:
    """Read a dump, and the report of the same build where there is one.

    Raises:
        ExplainError: the dump has no plan, or lacks the graph in front of it.
        QCompilerError: a file is damaged.
    """
    dump = load_dump(folder)
    told = {} if report is None else read_report(report)
    number = _plan_stage(dump)
    plan = dump.plan(number)
    path = dump.model_path(number)
    if plan is None or not path.is_file():
        raise ExplainError(
            f"{dump.folder} has no plan with its graph; explain needs a dump of a compilation: qcompiler compile --dump"
        )
    model = read_model(path)
    target = _target_of(dump, told)
    groups = find_groups(model, target)
    remarks = [r for n in range(len(dump.stages)) for r in dump.remarks(n)]
    rules = [
        Change(r["rule"], r["node"], tuple(r["origins"]))
        for n in range(number)
        for r in dump.rules(n)
    ]  # fmt: skip
    first = read_model(dump.model_path(0)) if dump.model_path(0).is_file() else model
    proof = told.get("proof", {})
    return Evidence(
        model=model,
        target=target,
        groups=groups,
        forms={g.name: plan.form(g.name) for g in groups},
        why=_told_why(told),
        points=dump.points(number),
        remarks=remarks,
        changes=rules,
        kernels=proof.get("kernels", {}),
        missed=[(m["group"], m["reason"], m["text"]) for m in proof.get("missed", [])],
        imported={str(n.name): n.op_type for n in all_nodes(first)},
        about=_about(told.get("context", {"target": dump.target})) or dump.target,
        proven=bool(proof),
        told=bool(told),
    )


def _plan_stage(dump: Dump) -> int:
    """Return the last stage that made a plan."""
    found = [s.number for s in dump.stages if (dump.folder / f"{s.name}.plan.json").is_file()]
    made = [n for n in found if dump.stage(n).phase == "PLANNED"]
    if not made:
        raise ExplainError(f"{dump.folder} has no plan: was it written by qcompiler compile --dump?")
    return made[-1]


def _target_of(dump: Dump, report: Mapping[str, Any]) -> Target:
    target = load_target(dump.target)
    name = report.get("context", {}).get("recipe", "")
    try:
        recipe: Recipe = load_recipe(name) if name else Recipe("")
        return recipe.on(target)
    except QCompilerError:
        return target  # a recipe of the user's own that is not here: the table's own scheme


def read_report(path: str | Path) -> dict[str, Any]:
    """Read what ``--report FILE.json`` wrote.

    Raises:
        ExplainError: the file cannot be read, or is no report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExplainError(f"cannot read the report {path}: {error}") from error
    if not isinstance(data, dict) or "groups" not in data or "proof" not in data:
        raise ExplainError(f"{path} is no report; qcompiler compile --report FILE.json writes one")
    return data


def _told_why(report: Mapping[str, Any]) -> dict[str, str]:
    return {g["group"]: g["why"] for g in report.get("groups", [])}


def origins_of(evidence: Evidence, group: Group) -> tuple[str, ...]:
    """Return the imported nodes behind a group, in order."""
    return tuple(dict.fromkeys(o for n in group.nodes for o in origins(n)))
