"""Where quantization goes: propose a form per group, then derive every point that the forms need.

`propose` is the rule of thumb that needs no measurement; the search overrides its choices. `resolve` turns any choice
of forms into a complete plan: activation points, weights, biases, and which points share or derive their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.ir.graph import consumers, is_const
from qcompiler.quant.plan import Form, GroupChoice, Point, QuantPlan, use_point
from qcompiler.quant.spec import QuantSource, QuantSpec, RangeSource
from qcompiler.targets.following import activation_bounds as activation_bounds  # noqa: PLC0414  passes ask here
from qcompiler.targets.following import function_behind
from qcompiler.targets.groups import Group
from qcompiler.targets.target import Target

DYNAMIC_SUFFIX = "@dynamic"
NEVER_OBSERVED = "{} was never executed during calibration"
_KEPT_WITHOUT_READER = frozenset({"AveragePool", "GlobalAveragePool"})
_SIGNED_FROM = 0.25
"""Share of the largest value that the negative ones must reach for a signed format without zero point: its steps are
then at most 1.6 times as wide as those of an unsigned format with one."""
_INTEGER: frozenset[Form] = frozenset({"static", "static-float"})


@dataclass(frozen=True)
class Policy:
    """Which form each kind of weighted operator is proposed.

    Attributes:
        convolution: form of Conv groups.
        matmul: form of MatMul and Gemm groups with a constant weight.
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
        readers.append(group is not None and forms[group.name] in _INTEGER and value in group.data)
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
    """A complete plan and the groups that could not have the form they were given."""

    plan: QuantPlan
    refused: tuple[tuple[str, str, str], ...]


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
        if form in _INTEGER and (bad := unobserved(group, form, statistics, imported or {})):
            code = "never-observed" if statistics is not None else "no-calibration"
            refused.append(
                (
                    group.name,
                    code,
                    NEVER_OBSERVED.format(bad)
                    if statistics
                    else "there is no calibration data, so only dynamic forms are possible",
                )
            )
            form = "float"
        final[group.name] = form
    _write_floats(groups, final, imported or {})
    builder = _Points(groups, final, target, estimators or {}, default_estimator, statistics, imported or {})
    choices = {g.name: GroupChoice(final[g.name], (why or {}).get(g.name, "")) for g in groups}
    return Resolution(QuantPlan(choices, builder.build()), tuple(refused))


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


class _Points:
    """Derive points for one choice of forms."""

    def __init__(
        self,
        groups: Sequence[Group],
        forms: Mapping[str, Form],
        target: Target,
        estimators: Mapping[str, str],
        default_estimator: str,
        statistics: RangeSource | None,
        imported: Mapping[str, QuantSource],
    ) -> None:
        self.imported = imported
        self.groups, self.forms, self.target = groups, forms, target
        self.estimators, self.default = estimators, default_estimator
        self.statistics = statistics
        self.owner = {node: g for g in groups for node in g.nodes}
        self.points: dict[str, Point] = {}
        self.activation = QuantSpec(target.activation, symmetric=target.activation.startswith("int"))
        self.signed = QuantSpec(target.signed, symmetric=True) if target.signed else self.activation
        bits = target.weight_bits if target.weight_bits != 8 else 0
        self.weight = QuantSpec(target.weight, symmetric=True, narrow=target.narrow_weights, bits=bits)

    def build(self) -> dict[str, Point]:
        for group in self.groups:
            form = self.forms[group.name]
            if form == "dynamic":
                self._dynamic(group)
            elif form in _INTEGER:
                self._static(group, form)
        for group in self.groups:
            if self.forms[group.name] == "static" and group.root.op_type == "Concat":
                self._share_concat(group)
        return self.points

    def _observed(self, value: ir.Value, group: Group) -> None:
        name = str(value.name)
        if name in self.imported:
            self.points[name] = Point(self.activation, self.imported[name])
        elif name not in self.points:
            estimator = self.estimators.get(group.name, self.default)
            if estimator.partition(":")[0] == "auto":
                estimator = estimator_for(value, estimator.partition(":")[2])
            self.points[name] = Point(self._format(name), QuantSource("observed", estimator=estimator))

    def _format(self, name: str) -> QuantSpec:
        """Return the format of an activation: that of values of both signs, where the target has one and they occur."""
        if self.signed is self.activation or self.statistics is None or not self.statistics.observed(name):
            return self.activation
        low, high = self.statistics.range(name, "min-max")
        return self.signed if -low > _SIGNED_FROM * high else self.activation

    def _static(self, group: Group, form: Form) -> None:
        for value in group.data:
            self._observed(value, group)
        if group.row.kind == "weighted":
            self._weight(group, form)
        else:
            self._constants(group)
        if form != "static":
            return
        for value in group.results:
            name = str(value.name)
            if name in self.imported:
                self._observed(value, group)
            elif group.row.kind == "mover":
                self.points[name] = Point(self.activation, QuantSource("shared", (str(group.data[0].name),)))
            elif group.row.fixed_output is not None:
                scale, zero = group.row.fixed_output
                self.points[name] = Point(
                    self.activation, QuantSource("fixed", scale=(float(scale),), zero_point=(int(zero),))
                )
            else:
                self._observed(value, group)

    def _weight(self, group: Group, form: Form) -> None:
        row, root = group.row, group.root
        weight = root.inputs[row.weight]
        rank = len(weight.shape) if weight is not None and weight.shape is not None else 0
        axis = None if row.weight_axis is None else row.weight_axis % max(rank, 1)
        spec = replace(self.weight, axis=axis)
        key = use_point(group.name, row.weight)
        # Imported scales span 8 bits: under a target's narrower range they would clip.
        fixed = self.imported.get(str(weight.name)) if weight is not None and not self.weight.bits else None
        if fixed is not None and len(fixed.scale) == 1:
            spec = QuantSpec(self.weight.format, None, symmetric=True)
        self.points[key] = Point(spec, QuantSource("weight") if fixed is None else fixed)
        has_bias = 0 < row.bias < len(root.inputs) and root.inputs[row.bias] is not None
        if form == "static" and has_bias:
            source = QuantSource("derived", (str(group.data[0].name), key))
            bias_spec = QuantSpec("int32", None if axis is None else 0, symmetric=True)
            self.points[use_point(group.name, row.bias)] = Point(bias_spec, source)

    def _constants(self, group: Group) -> None:
        for index in group.data_indices:
            if is_const(group.root.inputs[index]):
                fixed = self.imported.get(str(group.root.inputs[index].name))  # type: ignore[union-attr]
                self.points[use_point(group.name, index)] = Point(self.activation, fixed or QuantSource("weight"))

    def _dynamic(self, group: Group) -> None:
        if group.row.kind == "recurrent":
            for index in (1, 2):
                self.points[use_point(group.name, index)] = Point(self.weight, QuantSource("weight"))
            return
        spec = QuantSpec("uint8", dynamic=True)
        self.points[str(group.data[0].name) + DYNAMIC_SUFFIX] = Point(spec, QuantSource("observed"))
        self._weight(group, "dynamic")

    def _share_concat(self, group: Group) -> None:
        """Let inputs that only this Concat reads take its output's parameters, so that it copies bytes."""
        out = str(group.results[0].name)
        for value in group.data:
            members = self._family(value)
            if members is None or not self._only_read_by(members, group):
                continue
            if not self._activation_stays_redundant(members, out):
                continue
            for name in members:
                if self.points[name].source.kind == "observed":
                    self.points[name] = Point(self.activation, QuantSource("shared", (out,)))

    def _family(self, value: ir.Value) -> dict[str, ir.Value] | None:
        """Return the value and all that share its parameters through movers, or None if its numbers are fixed."""
        root = value
        while (group := self.owner.get(root.producer())) is not None and (  # type: ignore[arg-type]
            group.row.kind == "mover" and self.forms[group.name] == "static"
        ):
            root = group.data[0]
        producer = self.owner.get(root.producer())  # type: ignore[arg-type]
        if producer is None or self.forms[producer.name] != "static" or producer.row.fixed_output is not None:
            return None
        members, work = {str(root.name): root}, [root]
        while work:
            for node in consumers(work.pop()):
                group = self.owner.get(node)
                if group is not None and group.row.kind == "mover" and self.forms[group.name] == "static":
                    for result in group.results:
                        if str(result.name) not in members:
                            members[str(result.name)] = result
                            work.append(result)
        if any(name not in self.points for name in members):
            return None
        return members

    def _activation_stays_redundant(self, members: Mapping[str, ir.Value], out: str) -> bool:
        """Return whether the wider range of the Concat still saturates where a producer's Relu or Clip does."""
        if self.statistics is None or not self.statistics.observed(out):
            return False
        point = self.points[out]
        low, high = self.statistics.range(out, point.source.estimator or "min-max", point.spec)
        for group in self.groups:
            if group.activation is None or self.forms[group.name] != "static":
                continue
            # Also one that a Concat in front shared already: it follows its Concat.
            if self._holder(str(group.results[0].name)) in members:
                least, most = activation_bounds(group.activation)
                if low < least or high > most:
                    return False
        return True

    def _holder(self, name: str) -> str:
        """Follow shared sources to the point that holds the numbers so far."""
        while (point := self.points.get(name)) is not None and point.source.kind == "shared":
            name = point.source.points[0]
        return name

    def _only_read_by(self, members: Mapping[str, ir.Value], concat: Group) -> bool:
        for value in members.values():
            if value.is_graph_output():
                return False
            for node in consumers(value):
                reader = self.owner.get(node)
                inside = reader is not None and (
                    reader is concat
                    or (
                        reader.row.kind == "mover"
                        and self.forms[reader.name] == "static"
                        and all(str(v.name) in members for v in reader.results)
                    )
                )
                if not inside:
                    return False
        return True


def estimator_for(value: ir.Value, otherwise: str = "") -> str:
    """Choose the estimator whose error counts where it matters: behind the function that alone reads the value.

    Args:
        value: a quantized activation.
        otherwise: estimator where there is no such function; by default the least squared error of the value itself.
    """
    through = function_behind(value)
    return f"mse::{through}" if through else otherwise or "mse"


def root_point(plan: QuantPlan, name: str) -> str:
    """Follow ``shared`` sources to the point that holds the numbers."""
    seen: set[str] = set()
    while plan.points[name].source.kind == "shared" and name not in seen:
        seen.add(name)
        name = plan.points[name].source.points[0]
    return name
