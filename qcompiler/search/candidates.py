"""Which groups return to float together, and in which order the accuracy guard suspects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcompiler.calibration.statistics import Statistics
from qcompiler.ir.graph import consumers
from qcompiler.quant.plan import Form
from qcompiler.quant.spec import QuantSpec, affine_params
from qcompiler.targets.groups import Group


def candidate_sets(
    groups: Sequence[Group], forms: Mapping[str, Form], statistics: Statistics | None
) -> list[tuple[str, ...]]:
    """List sets of groups in the order of their expected relative noise, worst first.

    A weighted group returns together with the arithmetic that only it feeds or that only feeds it: a Sigmoid and a Mul
    left on integers behind a float convolution would keep the noise and add conversions.
    """
    owner = {node: g for g in groups for node in g.nodes}
    sets: dict[tuple[str, ...], float] = {}
    for group in groups:
        if forms.get(group.name, "float") == "float":
            continue
        members = [group]
        if group.row.kind == "weighted":
            members += _tail(group, owner, forms)
        key = tuple(dict.fromkeys(g.name for g in members))
        sets[key] = max(_noise(g, forms, statistics) for g in members)
    return sorted(sets, key=lambda key: (-sets[key], key))


def _tail(group: Group, owner: Mapping[object, Group], forms: Mapping[str, Form]) -> list[Group]:
    """Return the arithmetic behind a group that reads nothing but what the group computes."""
    known = {group.name}
    found: list[Group] = []
    work = [group]
    while work:
        current = work.pop()
        for value in current.results:
            for node in consumers(value):
                reader = owner.get(node)
                if reader is None or reader.name in known or reader.row.kind != "arithmetic":
                    continue
                producers = [owner.get(v.producer()) for v in reader.data]
                if forms.get(reader.name, "float") != "float" and all(p is not None and p.name in known for p in producers):
                    known.add(reader.name)
                    found.append(reader)
                    work.append(reader)
    return found


def _noise(group: Group, forms: Mapping[str, Form], statistics: Statistics | None) -> float:
    """Return the largest expected noise-to-signal power ratio among what the group quantizes: scale^2 / 12 over E[x^2]."""
    if statistics is None:
        return 0.0
    values = [*group.data, *(group.results if forms.get(group.name) == "static" else ())]
    worst = 0.0
    for value in values:
        name = str(value.name)
        if not statistics.observed(name):
            continue
        low, high = statistics.range(name, "min-max")
        scale = float(affine_params(QuantSpec("uint8"), low, high).scale)
        power = statistics.mean_square(name)
        if power > 0:
            worst = max(worst, scale * scale / 12.0 / power)
    return worst
