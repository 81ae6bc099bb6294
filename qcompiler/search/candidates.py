"""Which groups return to float together, in the order in which the accuracy guard tries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qcompiler.ir.graph import consumers
from qcompiler.quant.plan import Form
from qcompiler.quant.spec import QuantSpec, RangeSource, affine_params
from qcompiler.targets.groups import Group

_ENDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def candidate_sets(
    groups: Sequence[Group], forms: Mapping[str, Form], statistics: RangeSource | None
) -> list[tuple[str, ...]]:
    """List sets of groups that may return to float together.

    First both ends of the network, in growing lengths: errors made early are amplified by all that follows, and errors
    made last reach the output unfiltered; an end is one region, so its return costs one conversion. Then single
    weighted groups with the arithmetic that only they feed (a Sigmoid left on integers behind a float convolution keeps
    the noise and adds conversions), in the order of their expected relative noise, worst first.
    """
    owner = {node: g for g in groups for node in g.nodes}
    integer = [g for g in groups if forms.get(g.name, "float") != "float"]
    weighted = [i for i, g in enumerate(integer) if g.row.kind in ("weighted", "recurrent")]
    ends: list[tuple[str, ...]] = []
    for count in _ENDS:
        if count >= len(weighted):
            break
        ends.append(tuple(g.name for g in integer[: weighted[count]]))
        ends.append(tuple(g.name for g in integer[weighted[-count] :]))
    singles: dict[tuple[str, ...], float] = {}
    for group in integer:
        members = [group]
        if group.row.kind == "weighted":
            members += _tail(group, owner, forms)
        key = tuple(dict.fromkeys(g.name for g in members))
        singles[key] = max(_noise(g, forms, statistics) for g in members)
    ordered = sorted(singles, key=lambda key: (-singles[key], key))
    return list(dict.fromkeys([*ends, *ordered]))


def _tail(group: Group, owner: Mapping[ir.Node, Group], forms: Mapping[str, Form]) -> list[Group]:
    """Return the arithmetic behind a group that reads nothing but what the group computes."""
    known = {group.name}
    found: list[Group] = []
    work = [group]
    while work:
        for value in work.pop().results:
            for node in consumers(value):
                reader = owner.get(node)
                if reader is None or reader.name in known or reader.row.kind != "arithmetic":
                    continue
                producers = [owner.get(p) if (p := v.producer()) is not None else None for v in reader.data]
                inside = all(p is not None and p.name in known for p in producers)
                if inside and forms.get(reader.name, "float") != "float":
                    known.add(reader.name)
                    found.append(reader)
                    work.append(reader)
    return found


def _noise(group: Group, forms: Mapping[str, Form], statistics: RangeSource | None) -> float:
    """Return the largest expected noise-to-signal power among what the group quantizes: scale^2 / 12 over E[x^2]."""
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
