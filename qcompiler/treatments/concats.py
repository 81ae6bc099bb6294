"""Separate scales for the branches of a Concat that mixes quantities, as a treatment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.calibration.statistics import Statistics
from qcompiler.ir.graph import consumers
from qcompiler.targets.groups import Group
from qcompiler.treatments.treatment import Case, Parameters, counted

LEAST_RATIO = 4.0
"""By how much the ranges of a Concat's inputs differ at least."""
MOST = 8


@dataclass(frozen=True)
class SeparateConcats:
    """Leave a Concat in float whose inputs have very different ranges, with what only moves its output.

    On integers its output has one scale, that of the widest input: in a detector's head, where boxes in pixels and
    probabilities meet, it leaves the narrow one a few steps. In float each input comes from a scale of its own, and
    each part that is read on integers behind it gets one of its own.

    Parameters: per Concat the groups that stay float with it. Each Concat is tried by itself.
    """

    name: str = "separate-concats"
    least_gain_db: float = 0.5
    costs_time: bool = True

    def choose(self, case: Case) -> Parameters:
        """Return the Concats whose inputs differ most, and the movers behind them."""
        owner = {node: g for g in case.workshop.groups for node in g.nodes}
        found: dict[str, float] = {}
        chosen: Parameters = {}
        for group in case.workshop.groups:
            if group.root.op_type != "Concat" or not any(
                forms.get(group.name) == "static" for forms in case.variants.values()
            ):
                continue
            ratio = range_ratio(group, case.statistics)
            if ratio >= LEAST_RATIO and group.name not in case.workshop.refused:
                found[group.name] = ratio
                chosen[group.name] = [group.name, *_moved(group, owner)]
        return {name: chosen[name] for name in sorted(found, key=lambda n: -found[n])[:MOST]}

    def parts(self, parameters: Parameters) -> list[Parameters]:
        """Return the parameters of one Concat each."""
        return [{name: groups} for name, groups in parameters.items()]

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        """Return how many places are touched."""
        return counted(parameters)

    def apply(self, case: Case, parameters: Parameters) -> Case:
        """Return the case in which those groups stay float."""
        reasons = {
            name: f"separate-scales: the inputs of {concat} differ in range; one scale would destroy the narrow ones"
            for concat, names in parameters.items()
            for name in names
        }
        workshop = replace(case.workshop, refused={**case.workshop.refused, **reasons})
        return replace(case, workshop=workshop)


def range_ratio(group: Group, statistics: Statistics) -> float:
    """Return the widest range of a group's inputs over the narrowest that is not empty; 1 where they are not known."""
    widths = []
    for value in group.data:
        if not statistics.observed(str(value.name)):
            return 1.0
        low, high = statistics.range(str(value.name))
        widths.append(max(high, 0.0) - min(low, 0.0))
    widths = [w for w in widths if w > 0]
    return max(widths) / min(widths) if widths else 1.0


def _moved(group: Group, owner: Mapping[ir.Node, Group]) -> list[str]:
    """Return the groups behind a group that only move its output: they share its scale."""
    found: dict[str, None] = {}
    work = list(group.results)
    while work:
        for node in consumers(work.pop()):
            reader = owner.get(node)
            if reader is not None and reader.row.kind == "mover" and reader.name not in found:
                found[reader.name] = None
                work += reader.results
    return list(found)
