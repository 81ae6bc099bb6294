"""Explain a model, a node of it, or an earlier build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.backends.catalog import open_backend
from qcompiler.compilation import Compilation
from qcompiler.engine import EngineOptions
from qcompiler.errors import ModelError, QCompilerError
from qcompiler.explaining.accounts import account_for, group_accounts
from qcompiler.explaining.causes import NodeAccount, cause
from qcompiler.explaining.evidence import Built, Evidence, ExplainError, build_evidence, dump_evidence, read_report
from qcompiler.explaining.finding import unknown_node
from qcompiler.explaining.given import Unit, causes_in_graph, is_conversion, units
from qcompiler.explaining.given_places import given_places
from qcompiler.explaining.given_proof import kernels
from qcompiler.explaining.shares import error_shares
from qcompiler.ir.graph import all_nodes, origins
from qcompiler.ir.importer import check_supported, finish, prepare
from qcompiler.ir.reader import read_model
from qcompiler.options import ModelSource, Options, settle
from qcompiler.quant.plan import Form
from qcompiler.targets.placement import Policy, propose


@dataclass(frozen=True)
class Explanation:
    """Accounts of one node or of all groups.

    Attributes:
        about: target, recipe and engine.
        accounts: one per node or group.
        single: whether one node was asked for.
        given: whether the Q/DQ of the model as it came is explained, and not a build.
    """

    about: str
    accounts: tuple[NodeAccount, ...]
    single: bool = False
    given: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"about": self.about, "given": self.given, "accounts": [asdict(a) for a in self.accounts]}


def is_quantized(source: ModelSource) -> bool:
    """Return whether a model has QuantizeLinear or DequantizeLinear already."""
    return any(is_conversion(n) for n in all_nodes(read_model(source)))


# ---- builds ---------------------------------------------------------------------------------------------------------


def explain_build(source: ModelSource, options: Options, node: str = "", *, errors: bool | None = None) -> Explanation:
    """Compile a model and explain the build.

    Args:
        source: the model.
        options: as for `qcompiler.compile`; with ``decisions`` nothing is measured anew.
        node: a node's name, origin or value; empty for all groups.
        errors: measure error shares, one build and run per group; None measures that of a single node only.

    Raises:
        ExplainError: nothing has the name.
        QCompilerError: as `qcompiler.compile`.
    """
    built = build_evidence(source, options)
    accounts = _accounts(built.evidence, node)
    if errors or (errors is None and node):
        accounts = _with_errors(built, accounts)
    return Explanation(built.evidence.about, accounts, bool(node))


def explain_dump(folder: str | Path, node: str = "", report: str | Path | None = None) -> Explanation:
    """Explain an earlier build from its dump, and from its report where there is one.

    Raises:
        ExplainError: the files do not say enough, or nothing has the name.
    """
    evidence = dump_evidence(folder, report)
    return Explanation(evidence.about, _accounts(evidence, node), bool(node))


def explain_report(path: str | Path, node: str = "") -> Explanation:
    """Explain an earlier build from its report alone: form, reason and kernel of each group.

    Raises:
        ExplainError: the file is no report, or has no group of that name.
    """
    from qcompiler.explaining.accounts import said_causes

    data = read_report(path)
    proof, context = data["proof"], data.get("context", {})
    missed = {m["group"]: cause(m["reason"], m["text"], "engine") for m in proof.get("missed", [])}
    total = sum(g.get("macs", 0) for g in data["groups"])
    made = []
    for group in data["groups"]:
        name, form = group["group"], group["form"]
        causes = said_causes(group["why"]) if form == "float" else ((missed[name],) if name in missed else ())
        share = group.get("macs", 0) / total if total else None
        kernel = proof.get("kernels", {}).get(name, "")
        made.append(
            NodeAccount(name, group["operator"], name, form=form, why=group["why"], causes=causes, kernel=kernel,
                        macs_share=share)
        )  # fmt: skip
    if node:
        found = [a for a in made if a.node == node]
        if not found:
            raise unknown_node(node, [a.node for a in made])
        made = found
    about = f"{context.get('target', '')}, recipe {context.get('recipe', '')}, {context.get('engine', '')}"
    return Explanation(about.strip(", "), tuple(made), bool(node))


def _accounts(evidence: Evidence, node: str) -> tuple[NodeAccount, ...]:
    return (account_for(evidence, node),) if node else group_accounts(evidence)


def _with_errors(built: Built, accounts: tuple[NodeAccount, ...]) -> tuple[NodeAccount, ...]:
    wanted = [a.group for a in accounts if a.group and a.form not in ("float", "gone")]
    shares: Mapping[str, float] = error_shares(built, wanted)
    return tuple(replace(a, error_share=shares.get(a.group)) for a in accounts)


# ---- given Q/DQ -----------------------------------------------------------------------------------------------------


def explain_given(source: ModelSource, options: Options, node: str = "") -> Explanation:
    """Explain why the target's engine fuses the Q/DQ of a model as it came, or does not, operator by operator.

    Args:
        source: a model with QuantizeLinear and DequantizeLinear.
        options: the target, and what its import needs.
        node: name of an operator, or of a value that one writes; empty for all.

    Raises:
        ExplainError: nothing has the name, or it stands in no Q/DQ.
    """
    settings = settle(options)
    model = read_model(source)
    check_supported(model)
    prepare(model)
    finish(model)
    found = units(model, settings.target)
    chosen = _chosen(model, found, node) if node else found
    verdicts: Mapping[str, tuple[str, bool]] = {}
    refusal = ""
    backend = open_backend(settings.target)
    try:
        executed = backend.engine.optimized_graph(model, EngineOptions(threads=1, optimize=True))
        verdicts = kernels(found, executed)
    except (ModelError, NotImplementedError) as error:
        refusal = str(error)
    mended = _mended(source, options)
    accounts = tuple(_given_account(u, verdicts, refusal, mended) for u in chosen)
    about = f"the Q/DQ as given, on {settings.target.name} ({settings.target.engine} {backend.version})"
    return Explanation(about, accounts, bool(node), given=True)


def _chosen(model: ir.Model, found: list[Unit], node: str) -> list[Unit]:
    for unit in found:
        names = {str(unit.node.name), *(str(v.name) for v in unit.node.outputs), *origins(unit.node)}
        if node in names:
            return [unit]
    by_name = {str(n.name): n for n in all_nodes(model)}
    if node in by_name:
        raise ExplainError(
            f"{node} ({by_name[node].op_type}) stands in no Q/DQ: nothing in the model asks for integers there; "
            "give calibration data to explain what a compilation does with it"
        )
    raise unknown_node(node, [*(str(u.node.name) for u in found), *by_name])


def _given_account(
    unit: Unit, verdicts: Mapping[str, tuple[str, bool]], refusal: str, mended: Mapping[str, str]
) -> NodeAccount:
    name = str(unit.node.name)
    kernel, integer = verdicts.get(name, ("", False))
    causes = () if integer else causes_in_graph(unit)
    if refusal and not causes:
        causes = (cause("engine-kept-float", refusal, "engine", where="given"),)
    gone = not refusal and name not in verdicts
    if not causes and not integer and not gone:
        text = f"the engine executes {kernel} on floats, for a reason that no rule here knows"
        causes = (cause("engine-kept-float", text, "engine", where="given"),)
    notes = [refusal] if refusal else []
    if gone and not causes:
        notes.append("the engine fused it into another operator")
    if not integer and name in mended:
        notes.append(f"qcompiler compile mends it: {mended[name]}")
    elif not integer and not gone:
        notes.append("qcompiler compile takes the pairs out and leaves it in float")
    form = "fused" if integer or (gone and not causes) else "given"
    return NodeAccount(
        name, unit.node.op_type, origins=origins(unit.node), form=form, causes=causes,
        places=given_places(unit), kernel=kernel, notes=tuple(notes),
    )  # fmt: skip


def _mended(source: ModelSource, options: Options) -> dict[str, str]:
    """Return, by imported node, the integer kernel that it has if its numbers are kept and its pairs are placed anew.

    Empty if that fails: this is advice, and the model may be beyond it.
    """
    try:
        compilation = Compilation(source, replace(options, guard=False, progress=None))
        compilation.run()
        workshop = compilation.workshop
        numbers = workshop.base.imported
        own: dict[str, Form] = {
            g.name: "static"
            for g in workshop.groups
            if "static" in g.legal and all(str(v.name) in numbers for v in (*g.data, *g.results))
        }
        proof = workshop.learn_emission(propose(workshop.groups, Policy(matmul="static-float"), own))
    except QCompilerError:
        return {}
    members = {g.name: g.nodes for g in workshop.groups}
    return {o: kernel for name, kernel in proof.fused.items() for node in members.get(name, ()) for o in origins(node)}
