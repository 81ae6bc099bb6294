"""Small graphs with known node names, their groups, and costs invented by hand."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.engine import NodeCost, Profile
from qcompiler.quant.plan import Form
from qcompiler.search.attribution import Costs
from qcompiler.search.select import Measured
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import import_exactly, model_of, normal

TARGET = load_target("ort-x86")
IMAGE, OUT = "float[1,4,8,8] x", "float[] y"
WEIGHTS = {"w": normal(1, 4, 4, 3, 3), "v": normal(2, 4, 4, 3, 3), "u": normal(3, 4, 4, 3, 3), "m": normal(4, 64, 64)}
SAME = "<pads=[1,1,1,1]>"


def net(body: str, inputs: str = IMAGE, outputs: str = OUT) -> tuple[ir.Model, dict[str, Group]]:
    """Return a model of named nodes (``[name] y = Op(x)``) and its groups by name."""
    model = import_exactly(model_of(inputs, outputs, body, WEIGHTS))
    return model, {g.name: g for g in find_groups(model, TARGET)}


def chain(*ops: str) -> str:
    """Return a chain of Conv (c0, c1...), Tanh (t2...) and others on values v0, v1...; the last one is y."""
    lines = []
    for index, op in enumerate(ops):
        source, result = "x" if index == 0 else f"v{index - 1}", "y" if index == len(ops) - 1 else f"v{index}"
        call = f"Conv{SAME}({source}, w)" if op == "Conv" else f"{op}({source})"
        lines.append(f"[{op[0].lower()}{index}] {result} = {call}")
    return " ".join(lines)


def costs(
    groups: Mapping[str, float],
    conversions: Mapping[str, float] | None = None,
    others: Mapping[str, float] | None = None,
) -> Costs:
    made = Costs()
    made.groups.update(groups)
    made.conversions.update(conversions or {})
    made.others.update(others or {})
    return made


def measured(
    groups: Mapping[str, Group],
    float_: Mapping[str, float],
    static: Mapping[str, float] | None = None,
    dynamic: Mapping[str, float] | None = None,
    *,
    elements: Mapping[str, int] | None = None,
    conversions: Mapping[str, float] | None = None,
    dynamic_conversions: Mapping[str, float] | None = None,
    others: Mapping[str, float] | None = None,
) -> Measured:
    """Return invented measurements; a group named in ``static`` or ``dynamic`` has that form in the variant."""

    def form_of(group: Group) -> Form:
        return "static" if "static" in group.legal else "static-float"

    return Measured(
        costs(float_, others=others),
        None if static is None else costs({**float_, **static}, conversions),
        None if dynamic is None else costs({**float_, **dynamic}, dynamic_conversions),
        dict(elements or {}),
        {n: form_of(g) if n in (static or {}) else "float" for n, g in groups.items()},
        {n: "dynamic" if n in (dynamic or {}) else "float" for n in groups},
    )


def profile_of(times: Mapping[str, float]) -> Profile:
    return Profile(tuple(NodeCost(name, "Any", us) for name, us in times.items()))
