"""Small graphs with known node names, and their groups."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.engine import NodeCost, Profile
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


def profile_of(times: Mapping[str, float]) -> Profile:
    return Profile(tuple(NodeCost(name, "Any", us) for name, us in times.items()))
