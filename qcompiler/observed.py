"""Which values calibration looks at, and what statistics of them depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from qcompiler.calibration.qcal import Key, names_digest
from qcompiler.engine import Engine
from qcompiler.ir.graph import is_float
from qcompiler.ir.serialize import graph_digest
from qcompiler.passes.smooth_activations import const_rows, matmul_families
from qcompiler.plugins import PluginError
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.target import Target, known_targets, load_target


def observed_values(model: ir.Model) -> tuple[list[str], list[str]]:
    """Return (values that some target could quantize, those among them whose squares per channel smoothing needs).

    The canonical graph is the same for every target, so that one calibration serves all of them.
    """
    names: dict[str, None] = {}
    squares: dict[str, None] = {}
    for target in _usable_targets():
        groups = find_groups(model, target)
        names |= dict.fromkeys(wanted_values(model, groups))
        families = matmul_families(groups, model.graph)
        squares |= dict.fromkeys(n for n, family in families.items() if const_rows(family[0]) > 1)
    return list(names), [n for n in squares if n in names]


def _usable_targets() -> Iterator[Target]:
    """Yield every target there is; one of another package that is broken says so where it is asked for."""
    for name in known_targets():
        try:
            yield load_target(name)
        except PluginError:
            continue


def wanted_values(model: ir.Model, groups: Sequence[Group]) -> Iterator[str]:
    """Yield the float values whose ranges any form may need, and the scores of every Softmax."""
    for group in groups:
        for value in (*group.data, *group.results, group.float_result):
            if is_float(value):
                yield str(value.name)
    for node in model.graph.all_nodes():
        if node.op_type == "Softmax" and node.inputs[0] is not None:
            yield str(node.inputs[0].name)


def statistics_key(model: ir.Model, names: Sequence[str], engine: Engine, threads: int, data: str | None = None) -> Key:
    """Return what statistics of a canonical graph depend on."""
    return Key(graph_digest(model), data, names_digest(names), f"{engine.name} {engine.version}", threads)
