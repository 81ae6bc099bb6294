"""Where quantization goes: propose a form per group, and make any choice of forms a complete plan.

`propose` is the rule of thumb that needs no measurement; the search overrides its choices. `resolve` turns a choice
into a plan; `qcompiler.targets.points` derives what stands in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.graph import consumers
from qcompiler.quant.plan import Form, GroupChoice, QuantPlan
from qcompiler.quant.spec import QuantSource, RangeSource
from qcompiler.targets.groups import Group
from qcompiler.targets.points import INTEGER, Points
from qcompiler.targets.target import Target

NEVER_OBSERVED = "{} was never executed during calibration"
_KEPT_WITHOUT_READER = frozenset({"AveragePool", "GlobalAveragePool"})


@dataclass(frozen=True)
class Policy:
    """Which form each kind of weighted operator is proposed.

    Attributes:
        convolution: form of Conv groups.
        matmul: form of MatMul, Gemm and Gather groups with a constant weight.
        recurrent: form of LSTM groups.
        arithmetic: whether operators between them (Add, Concat, Sigmoid...) run on integers too.
    """

    convolution: Form = "static"
    matmul: Form = "dynamic"
    recurrent: Form = "dynamic"
    arithmetic: bool = True


def propose(groups: Sequence[Group], policy: Policy, frozen: Mapping[str, Form] | None = None) -> dict[str, Form]:
    """Choose a form for every group by rule.

    Args:
        groups: all groups of the model, in program order.
        policy: forms of the weighted groups.
        frozen: forms that are already decided (overrides); they are kept if legal.
    """
    frozen = frozen or {}
    forms: dict[str, Form] = {}
    for group in groups:
        forms[group.name] = _weighted_form(group, policy)
    for name, form in frozen.items():
        if name in forms:
            forms[name] = form
    if policy.arithmetic:
        propagate(groups, forms, frozen)
    return forms


def _weighted_form(group: Group, policy: Policy) -> Form:
    if group.row.kind == "recurrent":
        wanted = policy.recurrent
    elif group.row.kind != "weighted":
        return "float"
    else:
        wanted = policy.convolution if group.root.op_type == "Conv" else policy.matmul
    if wanted in group.legal:
        return wanted
    if wanted == "static" and "static-float" in group.legal:
        return "static-float"
    return "float"


def propagate(groups: Sequence[Group], forms: dict[str, Form], frozen: Mapping[str, Form] | None = None) -> None:
    """Extend integer forms from the weighted groups over what lies between them, in place.

    Forward: an operator whose data all arrives quantized stays on integers. Backward: an operator that only moves
    data towards integer readers moves integers. Then what no integer operator reads returns to float, except pools,
    which shrink what has to be dequantized.
    """
    frozen = frozen or {}
    owner = {node: g for g in groups for node in g.nodes}
    between = [g for g in groups if g.row.kind in ("arithmetic", "mover") and g.legal and g.name not in frozen]

    def stored(value: ir.Value) -> bool:
        group = owner.get(value.producer())  # type: ignore[arg-type]  # a graph input has no producer
        return group is not None and forms[group.name] == "static" and value in group.results

    for group in between:
        if group.data and all(stored(v) for v in group.data):
            forms[group.name] = "static"
    for group in reversed(between):
        if group.row.kind == "mover" and forms[group.name] == "float" and _all_read_integers(group, owner, forms):
            forms[group.name] = "static"
    changed = True
    while changed:
        changed = False
        for group in reversed(between):
            if forms[group.name] == "static" and _idle(group, owner, forms, stored):
                forms[group.name] = "float"
                changed = True


def _integer_readers(value: ir.Value, owner: Mapping[ir.Node, Group], forms: Mapping[str, Form]) -> list[bool]:
    readers = []
    for node in consumers(value):
        group = owner.get(node)
        readers.append(group is not None and forms[group.name] in INTEGER and value in group.data)
    return readers


def _all_read_integers(group: Group, owner: Mapping[ir.Node, Group], forms: Mapping[str, Form]) -> bool:
    for value in group.results:
        readers = _integer_readers(value, owner, forms)
        if value.is_graph_output() or (value.uses() and not (readers and all(readers))):
            return False
    return any(v.uses() for v in group.results)


def _idle(
    group: Group, owner: Mapping[ir.Node, Group], forms: Mapping[str, Form], stored: Callable[[ir.Value], bool]
) -> bool:
    """Return whether running the group on integers serves nothing: no integer operator computes with its result.

    An operator that only moves what is stored as integers anyway moves fewer bytes that way; it stays.
    """
    if group.row.kind == "mover":
        return not stored(group.data[0]) and not _all_read_integers(group, owner, forms)
    if group.root.op_type in _KEPT_WITHOUT_READER:
        return False
    return not any(_computed_with(v, owner, forms) for v in group.results)


def _computed_with(value: ir.Value, owner: Mapping[ir.Node, Group], forms: Mapping[str, Form]) -> bool:
    """Return whether an integer operator computes with the value, directly or behind operators that only move it."""
    for node, reads in zip(consumers(value), _integer_readers(value, owner, forms), strict=True):
        if not reads:
            continue
        group = owner[node]
        if group.row.kind != "mover" or any(_computed_with(v, owner, forms) for v in group.results):
            return True
    return False


@dataclass(frozen=True)
class Resolution:
    """A complete plan and what had to be changed on the way.

    Attributes:
        plan: every choice and point.
        refused: group, reason code and sentence where a group could not have the form it was given.
        replanned: value and sentence where the numbers of an imported model did not suit the target.
    """

    plan: QuantPlan
    refused: tuple[tuple[str, str, str], ...]
    replanned: tuple[tuple[str, str], ...] = ()


def resolve(
    groups: Sequence[Group],
    forms: Mapping[str, Form],
    target: Target,
    statistics: RangeSource | None,
    estimators: Mapping[str, str] | None = None,
    default_estimator: str = "min-max",
    why: Mapping[str, str] | None = None,
    imported: Mapping[str, QuantSource] | None = None,
) -> Resolution:
    """Derive all points from the forms.

    A group whose activations calibration never executed falls back to float with the reason ``never-observed``, one
    that cannot have its form with the reason why not.

    Args:
        groups: all groups of the model.
        forms: form per group name; unnamed ones are float.
        target: gives the storage formats.
        statistics: observed ranges; None if there was no calibration.
        estimators: estimator per group, where it is not the default.
        default_estimator: estimator of all others.
        why: reason per group, kept in the plan.
        imported: numbers of an imported quantized model by value name; they win over observed ranges.
    """
    refused: list[tuple[str, str, str]] = []
    final: dict[str, Form] = {}
    for group in groups:
        form = forms.get(group.name, "float")
        if form != "float" and form not in group.legal:
            refused.append((group.name, *_illegal(group, form, target)))
            form = "float"
        if _needs_ranges(form, target) and (bad := unobserved(group, form, statistics, imported or {})):
            code = "never-observed" if statistics is not None else "no-calibration"
            refused.append(
                (
                    group.name,
                    code,
                    NEVER_OBSERVED.format(bad)
                    if statistics
                    else "there is no calibration data, so only dynamic and weight-only forms are possible",
                )
            )
            form = "float"
        final[group.name] = form
    _write_floats(groups, final, imported or {})
    builder = Points(groups, final, target, estimators or {}, default_estimator, statistics, imported or {})
    choices = {g.name: GroupChoice(final[g.name], (why or {}).get(g.name, "")) for g in groups}
    plan = QuantPlan(choices, builder.build())
    return Resolution(plan, tuple(refused), tuple(sorted(builder.replanned.items())))


def _needs_ranges(form: Form, target: Target) -> bool:
    """Return whether a form takes numbers from calibration; scales under one outer scale do also at run time."""
    return form in INTEGER or (form == "dynamic" and bool(target.block) and target.weight_scale == "float8e4m3fn")


def _write_floats(groups: Sequence[Group], forms: dict[str, Form], imported: Mapping[str, QuantSource]) -> None:
    """Let a group write floats instead of integers that no integer operator reads, where the engine has that form too.

    A form that is emitted as an operator of its own is a choice of its own, and stays.
    """
    owner = {node: g for g in groups for node in g.nodes}
    for group in groups:
        if forms[group.name] != "static" or "static-float" not in group.legal or group.row.emit:
            continue
        kept = any(str(v.name) in imported or any(_integer_readers(v, owner, forms)) for v in group.results)
        if not kept:
            forms[group.name] = "static-float"


def _illegal(group: Group, form: Form, target: Target) -> tuple[str, str]:
    """Return the reason code and sentence for a form that the group cannot have."""
    for barred, code, text in group.refusals:
        if barred == form:
            return code, f"{form}: {text}"
    return "no-such-form", target.supports(group.root.op_type, form) or f"{group.name} has no form {form}"


def unobserved(
    group: Group, form: Form, statistics: RangeSource | None, imported: Mapping[str, QuantSource]
) -> str | None:
    """Return the name of a value whose range a form of the group needs and nobody knows, or None."""
    values = [*group.data, *(group.results if form == "static" and group.row.fixed_output is None else ())]
    for value in values:
        known = statistics is not None and statistics.observed(str(value.name))
        if not known and str(value.name) not in imported:
            return str(value.name)
    return None
