"""What a choice of forms pays in noise: which points count, once or per reader, and what several readers share.

A value whose producer stores it quantized is rounded once, for all that read it. Where it stays float, every group that
reads it quantized adds noise of its own; but all of them round the same numbers in the same way, so that their errors
are correlated. Two readers together therefore add more or less than the sum of both: what was measured of all of them
at once says how much, and is split over pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler.ir.graph import is_const
from qcompiler.search.problem import Cause, Charge, Key
from qcompiler.targets.groups import Group

Noise = Mapping[str, float]
"""Relative noise power per output."""

FAMILIES = {"static": "static", "static-float": "static"}
"""Forms that ask for the same points, and share a correction."""
INTEGER = tuple(FAMILIES)
"""Forms that read under calibrated scales."""
MOST_PAIRED = 6
"""Readers of one value up to which what they add together is split over pairs."""


def family(form: str) -> str:
    """Return what a form's correction is filed under: ``static`` for both static forms, else the form itself."""
    return FAMILIES.get(form, form)


def point_keys(group: Group, form: str) -> tuple[str, ...]:
    """Return the points that a group switches on in a form; none in float.

    ``read:NAME@GROUP`` is an activation that the group reads under calibrated scales, ``value:NAME`` one that it stores
    under them for all readers, ``dynamic:NAME@GROUP`` one that it reads under scales found at run time,
    ``weight:GROUP`` its integer constants. A form that quantizes weights alone, or one not known here, has one point
    of its own, ``FORM:GROUP``.
    """
    if form == "float":
        return ()
    if form == "dynamic":
        # A recurrent operator quantizes its inputs inside: no graph shows it, so it is part of its weight's point.
        data = () if group.row.kind == "recurrent" else group.data
        return (*(f"dynamic:{v.name}@{group.name}" for v in data), f"weight:{group.name}")
    if family(form) != "static":
        return (f"{form}:{group.name}",)
    # A product of two activations has no weight.
    weighted = group.row.kind == "recurrent" or (group.row.kind == "weighted" and group.row.weight >= 0)
    constants = weighted or any(is_const(group.root.inputs[i]) for i in group.data_indices)
    keys = [f"read:{v.name}@{group.name}" for v in group.data]
    keys += [f"weight:{group.name}"] if constants else []
    keys += [f"value:{v.name}" for v in group.results] if form == "static" else []
    return tuple(dict.fromkeys(keys))


def asked_points(groups: Iterable[Group], more: Sequence[str] = ()) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return, per group and form it can have besides float, the points it switches on.

    Args:
        groups: fusion groups.
        more: further forms, which every weighted group may have.
    """
    return {g.name: {f: point_keys(g, f) for f in dict.fromkeys((*g.legal, *more))} for g in groups}


def stored_by(groups: Sequence[Group]) -> dict[str, tuple[Key, ...]]:
    """Return, per point of a read, the key under which what is read is rounded already: its producer stores it."""
    owner = {str(v.name): g.name for g in groups if "static" in g.legal for v in g.results}
    return {
        f"read:{v.name}@{g.name}": ((owner[str(v.name)], "static"),)
        for g in groups
        for v in g.data
        if str(v.name) in owner and set(INTEGER) & set(g.legal)
    }


def needed_readers(groups: Sequence[Group], imported: Iterable[str] = ()) -> dict[str, tuple[Key, ...]]:
    """Return, per stored value, the keys of which one is needed too: else its group writes floats instead.

    A value is not named where its group has no form with float output, or keeps the other for another reason
    (`qcompiler.targets.placement.resolve`).

    Args:
        groups: all groups of a model.
        imported: values with numbers of their own.
    """
    kept, made = set(imported), {}
    readers: dict[str, list[Key]] = {}
    for group in groups:
        for value in group.data:
            readers.setdefault(str(value.name), []).extend((group.name, f) for f in group.legal if f in INTEGER)
    for group in groups:
        names = [str(v.name) for v in group.results]
        if not {"static", "static-float"} <= set(group.legal) or group.row.emit or kept & set(names):
            continue
        asked = tuple(dict.fromkeys(key for name in names for key in readers.get(name, ())))
        made.update({f"value:{name}": asked for name in names})
    return made


@dataclass(frozen=True)
class Term:
    """Noise that is added once if any of some keys is chosen.

    Attributes:
        name: unique in a table.
        kind: family of forms, by whose factor it is corrected.
        asked: keys of which one suffices.
        noise: relative noise power per output, not corrected.
        points: group to the point that its part of the noise is told under.
        unless: keys that excuse it.
        needs: group to the forms of which it must have one besides.
    """

    name: str
    kind: str
    asked: tuple[Key, ...]
    noise: Noise
    points: Mapping[str, str]
    unless: tuple[Key, ...] = ()
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def holds(self, choice: Mapping[str, str]) -> bool:
        """Return whether a choice of forms pays it; unnamed groups are float."""
        return (
            any(choice.get(group, "float") == form for group, form in self.asked)
            and not any(choice.get(group, "float") == form for group, form in self.unless)
            and all(choice.get(group, "float") in forms for group, forms in self.needs.items())
        )

    def charge(self, allowed: Mapping[str, Sequence[str]], noise: Noise) -> Charge | None:
        """Return the term as the planner pays it, or None if no choice does.

        Args:
            allowed: the forms besides float that each group may take.
            noise: the term's noise, corrected.
        """
        asked = tuple(key for key in self.asked if key[1] in allowed.get(key[0], ()))
        needed = all(set(forms) & set(allowed.get(group, ())) for group, forms in self.needs.items())
        if not asked or not needed:
            return None
        unless = [key for key in self.unless if key[1] in allowed.get(key[0], ())]
        for group, forms in self.needs.items():
            unless += [(group, f) for f in ("float", *allowed[group]) if f not in forms]
        return Charge(self.name, (Cause(asked, tuple(dict.fromkeys(unless))),), noise=noise)


@dataclass(frozen=True)
class Shape:
    """What ties points to groups.

    Attributes:
        asks: group to form to the points it switches on.
        covered: point to the keys under which it adds nothing, since what it reads has its scale already.
        needed: stored value to the keys of which one must be chosen, too.
        shared: point of several readers at once to the points of each.
    """

    asks: Mapping[str, Mapping[str, tuple[str, ...]]]
    covered: Mapping[str, tuple[Key, ...]]
    needed: Mapping[str, tuple[Key, ...]]
    shared: Mapping[str, tuple[str, ...]]

    def terms(self, points: Mapping[str, Noise], outputs: Sequence[str]) -> Iterator[Term]:
        """Yield all terms, sorted by name; a point that nobody measured is infinite.

        Args:
            points: relative noise power per point and output.
            outputs: names of the outputs.
        """
        asked: dict[tuple[str, str], list[Key]] = {}
        for group, forms in self.asks.items():
            for form, keys in forms.items():
                for point in keys:
                    asked.setdefault((point, family(form)), []).append((group, form))
        power = {
            point: {o: points[point].get(o, 0.0) if point in points else math.inf for o in outputs}
            for point, _ in asked
        }
        made: list[Term] = []
        for joint, members in self.shared.items():
            kinds = {kind for point, kind in asked if point in members}
            found = [p for p in members if p in power]
            if joint in points and len(kinds) == 1 and len(found) == len(members):
                (kind,) = kinds
                by_point = {p: tuple(asked[p, kind]) for p in members}
                whole = {o: points[joint].get(o, 0.0) for o in outputs}
                made += _together(joint, kind, by_point, power, whole, self.covered.get(members[0], ()))
        made += [self._alone(point, kind, keys, power[point]) for (point, kind), keys in asked.items()]
        yield from sorted(made, key=lambda term: term.name)

    def _alone(self, point: str, kind: str, keys: Sequence[Key], noise: Noise) -> Term:
        labels = dict.fromkeys((group for group, _ in keys), point)
        covered, groups = self.covered.get(point, ()), dict.fromkeys(group for group, _ in keys)
        name = f"{point} {kind}"
        if point in self.needed and len(groups) == 1:
            needs = {group: tuple(f for g, f in keys if g == group) for group in groups}
            return Term(name, kind, self.needed[point], noise, labels, covered, needs)
        return Term(name, kind, tuple(sorted(keys)), noise, labels, covered)


def _together(
    joint: str,
    kind: str,
    keys: Mapping[str, tuple[Key, ...]],
    power: dict[str, dict[str, float]],
    whole: Noise,
    unless: tuple[Key, ...],
) -> Iterator[Term]:
    """Yield what readers of one value share, and take from their own noise what they pay together.

    Where they add more than the sum of each alone, the rest is paid per pair, in proportion to the amplitudes of both;
    where they add less, a part is paid once for any of them.

    Args:
        joint: name of the point with all of them.
        kind: family of forms.
        keys: reader's point to the keys that ask for it.
        power: noise per point; that of the readers is lowered in place by what is paid once.
        whole: noise of all of them at once.
        unless: keys under which none of them counts.
    """
    labels = {group: point for point, asked in keys.items() for group, _ in asked}
    once: dict[str, float] = {}
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    for output, together in whole.items():
        alone = {point: power[point][output] for point in keys}
        apart = math.fsum(alone.values())
        if not math.isfinite(apart + together):
            continue
        if together < apart:
            common = min((apart - together) / (len(keys) - 1), *alone.values())
            once[output] = common
            for point in keys:
                power[point][output] -= common
        elif len(keys) <= MOST_PAIRED:
            weight = {(a, b): math.sqrt(alone[a] * alone[b]) for a, b in itertools.combinations(keys, 2)}
            total = math.fsum(weight.values())
            for pair, part in weight.items() if total > 0 else ():
                pairs.setdefault(pair, {})[output] = (together - apart) * part / total
    asked = tuple(sorted(key for found in keys.values() for key in found))
    if any(once.values()):
        yield Term(f"{joint} {kind}", kind, asked, once, labels, unless)
    for (a, b), noise in pairs.items():
        needs: dict[str, tuple[str, ...]] = {}
        for group, form in keys[b]:
            needs[group] = (*needs.get(group, ()), form)
        both = {group: point for group, point in labels.items() if point in (a, b)}
        yield Term(f"{a}+{b} {kind}", kind, keys[a], noise, both, unless, needs)
