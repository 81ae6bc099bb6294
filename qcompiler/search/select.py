"""Choose a form per group from measured costs.

Which groups run on integers is a two-label problem: each group costs what it was measured to cost in either form, and
a value that crosses from one label to the other pays for its conversion once. That is a minimum cut, solved exactly.
MatMul-like groups with float output do not couple through their outputs; their forms are chosen per shared input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.graph import consumers
from qcompiler.ir.networks import nx
from qcompiler.quant.plan import Form
from qcompiler.search.attribution import Costs
from qcompiler.targets.groups import Group

_SOURCE, _SINK = "source:integer", "sink:float"
STATIC_MUST_WIN = 0.85
"""Share of the dynamic form's time below which fixed activation scales, which fit no unusual input, are worth it."""
DEFAULT_NANOSECONDS = 0.2
"""Cost of converting one element where no conversion was measured (one core of a current server processor)."""


@dataclass(frozen=True)
class Measured:
    """Costs of whole-model variants.

    Attributes:
        float_: all groups in float.
        static: every group that can in its static form.
        dynamic: MatMul-like groups dynamic, the rest as in ``float_``; None if not built.
        elements: elements per value in the measured feed.
        static_forms: the forms of the static variant.
        dynamic_forms: the forms of the dynamic variant.
    """

    float_: Costs
    static: Costs | None
    dynamic: Costs | None
    elements: Mapping[str, int]
    static_forms: Mapping[str, Form]
    dynamic_forms: Mapping[str, Form]


def conversion_rate(measured: Measured) -> float:
    """Return microseconds per converted element, from the conversions that were measured."""
    time = count = 0.0
    for costs in (measured.static, measured.dynamic):
        for name, spent in costs.conversions.items() if costs is not None else ():
            if name in measured.elements and measured.elements[name] >= 4096:
                time += spent
                count += measured.elements[name]
    return time / count if count else DEFAULT_NANOSECONDS * 1e-3


def choose_forms(groups: Sequence[Group], measured: Measured, frozen: Mapping[str, Form]) -> dict[str, Form]:
    """Return the form per group with the least predicted time.

    Args:
        groups: all groups, in program order.
        measured: costs of the variants.
        frozen: forms that are already decided.
    """
    rate = conversion_rate(measured)
    forms: dict[str, Form] = {g.name: "float" for g in groups}
    if measured.static is not None:
        for name in _minimum_cut(groups, measured, rate, frozen):
            forms[name] = measured.static_forms[name]
    for name, form in frozen.items():
        if name in forms:
            forms[name] = form
    _choose_matmuls(groups, measured, rate, forms, frozen)
    return forms


def _minimum_cut(groups: Sequence[Group], measured: Measured, rate: float, frozen: Mapping[str, Form]) -> set[str]:
    """Return the names of the groups on the integer side."""
    assert measured.static is not None
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))
    owner = {node: g for g in groups for node in g.nodes}
    for group in groups:
        integer = measured.static_forms.get(group.name, "float") != "float"
        key = ("group", group.name)
        if not integer or frozen.get(group.name) == "float":
            graph.add_edge(key, _SINK)  # no capacity: cannot be cut
            continue
        if frozen.get(group.name, "float") != "float":
            graph.add_edge(_SOURCE, key)
            continue
        graph.add_edge(_SOURCE, key, capacity=measured.float_.groups.get(group.name, 0.0))
        graph.add_edge(key, _SINK, capacity=measured.static.groups.get(group.name, 0.0) + 1e-3)
    for value in dict.fromkeys(v for g in groups for v in (*g.data, *g.results)):
        _crossings(graph, value, owner, measured, rate)
    integer_side, _ = nx.minimum_cut(graph, _SOURCE, _SINK)[1]
    return {key[1] for key in integer_side if isinstance(key, tuple) and key[0] == "group"}


def _crossings(
    graph: nx.DiGraph, value: ir.Value, owner: Mapping[ir.Node, Group], measured: Measured, rate: float
) -> None:
    """Price the conversions of one value: Q if its producer is float, DQ if any reader is."""
    cost = max(measured.elements.get(str(value.name), 0) * rate, 0.5)
    producer = owner.get(value.producer())  # type: ignore[arg-type]  # a graph input has no producer
    stores = producer is not None and (
        value in producer.results and measured.static_forms.get(producer.name) == "static"
    )
    readers = [owner.get(node) for node in consumers(value)]
    q_key, dq_key = ("quantize", str(value.name)), ("dequantize", str(value.name))
    integer_readers = [g for g in readers if g is not None and value in g.data and g is not producer]
    if integer_readers:
        graph.add_edge(q_key, ("group", producer.name) if stores and producer is not None else _SINK, capacity=cost)
        for group in integer_readers:
            graph.add_edge(("group", group.name), q_key)
    if stores and producer is not None:
        graph.add_edge(("group", producer.name), dq_key, capacity=cost)
        for reader in readers:
            if reader is producer:
                continue
            graph.add_edge(dq_key, ("group", reader.name) if reader is not None and value in reader.data else _SINK)
        if value.is_graph_output():
            graph.add_edge(dq_key, _SINK)


def _choose_matmuls(
    groups: Sequence[Group], measured: Measured, rate: float, forms: dict[str, Form], frozen: Mapping[str, Form]
) -> None:
    """Choose float, static-float or dynamic together for all groups that read the same value."""
    stored = {str(v.name) for g in groups if forms[g.name] == "static" for v in g.results}
    families: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.row.kind in ("weighted", "recurrent") and "dynamic" in group.legal and group.name not in frozen:
            families[str(group.data[0].name)].append(group)
    for value, family in families.items():
        if any(forms[g.name] == "static" for g in family):
            continue
        convert = measured.elements.get(value, 0) * rate
        options: dict[Form, float] = {"float": sum(measured.float_.groups.get(g.name, 0.0) for g in family)}
        if measured.dynamic is not None and all(measured.dynamic_forms.get(g.name) == "dynamic" for g in family):
            shared = measured.dynamic.conversions.get(value, 0.0)
            options["dynamic"] = shared + sum(measured.dynamic.groups.get(g.name, 0.0) for g in family)
        if measured.static is not None and all(measured.static_forms.get(g.name) == "static-float" for g in family):
            spent = sum(measured.static.groups.get(g.name, 0.0) for g in family)
            options["static-float"] = spent + (0.0 if value in stored else convert)
        # Dynamic scales fit every input; fixed ones must buy their loss of accuracy with time.
        if "dynamic" in options and options.get("static-float", 0.0) > STATIC_MUST_WIN * options["dynamic"]:
            options.pop("static-float", None)
        best = min(options, key=lambda form: options[form])
        for group in family:
            forms[group.name] = best


def predict(groups: Sequence[Group], measured: Measured, forms: Mapping[str, Form]) -> float:
    """Return the predicted microseconds per run of a choice of forms: groups in their form, and every conversion."""
    rate = conversion_rate(measured)
    books = {"static": measured.static, "static-float": measured.static, "dynamic": measured.dynamic}
    total = sum(measured.float_.others.values())
    for group in groups:
        book = books.get(forms.get(group.name, "float")) or measured.float_
        total += book.groups.get(group.name, 0.0)
    owner = {node: g for g in groups for node in g.nodes}
    for value in dict.fromkeys(v for g in groups for v in (*g.data, *g.results)):
        producer = value.producer()
        source = owner.get(producer) if producer is not None else None
        stored = source is not None and forms.get(source.name) == "static" and value in source.results
        readers = [owner.get(node) for node in consumers(value)]
        integer = [g is not None and value in g.data and forms.get(g.name, "float") != "float" for g in readers]
        crossings = int(stored and (value.is_graph_output() or not all(integer))) + int(not stored and any(integer))
        total += crossings * measured.elements.get(str(value.name), 0) * rate
    return total
