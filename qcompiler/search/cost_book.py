"""The numbers of a cost table on their way: recalled from the cache, then measured, at last fitted."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qcompiler.quant.plan import FORMS, Form
from qcompiler.search.borders import Border, Kind, form_of, reads, stores
from qcompiler.search.cost_cache import CostCache
from qcompiler.search.costs import Conversion, CostTable, Origin, fit_lines
from qcompiler.search.observations import Observation
from qcompiler.search.signatures import Signer
from qcompiler.targets.groups import Group

FLOAT = "float"
_FORMS: Mapping[str, Form] = {form: form for form in FORMS}
_NOISE = 0.05
"""Share of a group's time that two measurements of it may differ by."""
Entry = tuple[str, str]
"""(group, option)."""
Key = tuple[str, Kind]
"""(value, conversion)."""


class Book:
    """Collect costs by group and option, and by value and conversion.

    Attributes:
        costs: microseconds by entry.
        conversions: microseconds by key.
        fixed: nodes outside groups; None if not known yet.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        borders: Mapping[str, Border],
        signer: Signer,
        lone: Sequence[ir.Node],
        plans: Mapping[str, Mapping[str, str]],
        cache: CostCache | None,
    ) -> None:
        """Take the variants that there are, as options of every group by name, and recall what the cache has."""
        self.groups, self.borders, self.signer, self.plans, self.cache = groups, borders, signer, plans, cache
        self.signatures: dict[Entry, str] = {}
        self.variant: dict[Entry, str] = {}
        self.costs: dict[Entry, float] = {}
        self.origin: dict[Entry, Origin] = {}
        self.conversions: dict[Key, list[float]] = defaultdict(list)
        self.conversion_origin: dict[Key, Origin] = {}
        self._crossed: set[Key] = set()
        self.fixed: float | None = None
        self.fixed_origin: Origin = "measured"
        self.fixed_signature = signer.lone(lone)
        self.options: dict[str, list[str]] = defaultdict(list)
        for name, forms in plans.items():
            for group in groups:
                entry = (group.name, forms[group.name])
                if (name == FLOAT or entry[1] != FLOAT) and entry not in self.signatures:
                    self.signatures[entry] = signer.signature(group, entry[1], forms)
                    self.variant[entry] = name
                    self.options[group.name].append(entry[1])
        self.possible = [(n, k) for n, border in borders.items() for k in border.possible(self.options)]
        self.conversion_signatures = {key: signer.conversion(key[1], key[0], borders[key[0]]) for key in self.possible}
        if cache is not None:
            self._recall(cache)

    def _recall(self, cache: CostCache) -> None:
        for entry, signature in self.signatures.items():
            if (known := cache.get(signature)) is not None:
                self.costs[entry], self.origin[entry] = known.us, "cached"
        for key in self.possible:
            if (known := cache.get(self.conversion_signatures[key])) is not None:
                self.conversions[key].append(known.us)
                self.conversion_origin[key] = "cached"
        if (known := cache.get(self.fixed_signature)) is not None:
            self.fixed, self.fixed_origin = known.us, "cached"

    def missing(self) -> list[str]:
        """Return the variants that must be measured, float first if there are any."""
        needed = {self.variant[entry] for entry in self.signatures if entry not in self.costs}
        if self.fixed is None or needed:
            needed.add(FLOAT)  # what lone nodes cost in other variants is told from it
        return [name for name in self.plans if name in needed]

    def integer_options(self) -> dict[str, Form]:
        """Return, per group that can read or write integers with fixed scales, an option that does."""
        found: dict[str, Form] = {}
        for name, options in self.options.items():
            fixed = [form for option in options if reads(option) == "quantize" and (form := _FORMS.get(option))]
            if fixed:
                found[name] = max(fixed, key=stores)
        return found

    def lacks_crossings(self) -> bool:
        """Return whether some conversion between groups was in no variant, and is not in the cache."""
        linked = (b for b in self.borders.values() if b.producer and b.readers)
        able = any(any(map(stores, self.options[b.producer])) for b in linked)
        return able and any(key not in self.conversions for key in self.possible)

    def enter(self, name: str, seen: Observation) -> None:
        """Take in one measured variant; all that the choice pays for and that was not seen costs nothing there."""
        if name == FLOAT:
            self._bring_to(seen)
            self.fixed, self.fixed_origin = sum(seen.others.values()), "measured"
        for entry, where in self.variant.items():
            group, option = entry
            if where == name and seen.forms.get(group, FLOAT) == option:
                self.costs[entry], self.origin[entry] = seen.groups.get(group, 0.0), "measured"
        for key in self._charged(seen):
            self._note(key, seen.conversions.get(key, 0.0))

    def _bring_to(self, seen: Observation) -> None:
        """Scale what was recalled by how fast the machine is now: by the float costs that are known from both."""
        pairs = [
            (us, seen.groups.get(group, 0.0))
            for (group, option), us in self.costs.items()
            if option == FLOAT and self.origin[group, option] == "cached"
        ]
        before, now = sum(us for us, _ in pairs), sum(us for _, us in pairs)
        if before <= 0 or now <= 0:
            return
        for entry, origin in self.origin.items():
            if origin == "cached":
                self.costs[entry] *= now / before
        for key, origin in self.conversion_origin.items():
            if origin == "cached":
                self.conversions[key] = [us * now / before for us in self.conversions[key]]

    def enter_crossings(self, seen: Observation) -> None:
        """Take in a measured choice for its conversions, with all that groups cost more beside other forms.

        A group that pays for a layout change, or that the engine can no longer fuse into its neighbour, is so because
        of what crosses its border: half of it belongs to each of two such values.
        """
        self.share()
        charged = self._charged(seen)
        touching = _touching(self.groups, charged)
        spent = {key: seen.conversions.get(key, 0.0) for key in charged}
        for group in self.groups:
            base = self.costs.get((group.name, seen.forms.get(group.name, FLOAT)))
            around = touching[group.name]
            if base is None or not around:
                continue
            excess = seen.groups.get(group.name, 0.0) - base
            if abs(excess) > _NOISE * base + 1.0:
                for key in around:
                    spent[key] += excess / len(around)
        for key, us in spent.items():
            if self.conversion_origin.get(key) != "measured" or key in self._crossed:
                self._note(key, max(us, 0.0))
                self._crossed.add(key)

    def _charged(self, seen: Observation) -> list[Key]:
        charges = ((name, kind) for name, border in self.borders.items() for kind in border.charges(seen.forms))
        return [key for key in charges if key in self.conversion_signatures]

    def _note(self, key: Key, us: float) -> None:
        if self.conversion_origin.get(key) != "measured":
            self.conversions[key].clear()
        self.conversions[key].append(us)
        self.conversion_origin[key] = "measured"

    def share(self) -> None:
        """Give layers of one signature, measured in one variant, the median of theirs.

        One that took twice as long or half as long as the others has a reason that the signature does not hold.
        """
        alike: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry in self.costs:
            if self.origin[entry] == "measured":
                alike[self.signatures[entry], self.variant[entry]].append(entry)
        for entries in alike.values():
            middle = statistics.median(self.costs[e] for e in entries)
            if all(middle <= 2.0 * self.costs[e] <= 4.0 * middle for e in entries):
                self.costs |= dict.fromkeys(entries, middle)

    def close(self, keep: bool) -> CostTable:
        """Share equal layers' costs, fit what no variant converted, and return the table.

        Args:
            keep: whether to store what was measured in the cache: not what something else disturbed.
        """
        self.share()
        single = {key: statistics.median(found) for key, found in self.conversions.items() if found}
        lines = {
            plain: fit_lines(
                (k, self.borders[n].elements, us) for (n, k), us in single.items() if self._plain(n) is plain
            )
            for plain in (True, False)
        }
        every = fit_lines((k, self.borders[n].elements, us) for (n, k), us in single.items())
        conversions: dict[str, Conversion] = defaultdict(Conversion)
        for key in self.possible:
            name, kind = key
            if key not in single:
                near = lines[self._plain(name)]
                self.conversion_origin[key] = "fitted"
                single[key] = (near if kind in near.terms else every).us(kind, self.borders[name].elements)
            conversions[name] = conversions[name].with_cost(kind, single[key], self.conversion_origin[key])
        groups: dict[str, dict[str, float]] = {g.name: {FLOAT: 0.0} for g in self.groups}
        origin: dict[str, dict[str, Origin]] = {g.name: {} for g in self.groups}
        for (group, option), us in self.costs.items():
            groups[group][option] = us
            origin[group][option] = self.origin[group, option]
        if keep and self.cache is not None:
            self._keep(self.cache, single)
        return CostTable(groups, dict(conversions), self.fixed or 0.0, self.borders, origin, self.fixed_origin)

    def _plain(self, name: str) -> bool:
        return self.signer.plain(name)

    def _keep(self, cache: CostCache, conversions: Mapping[Key, float]) -> None:
        new: dict[str, float] = {}
        what: dict[str, str] = {}
        kinds = {g.name: g.root.op_type for g in self.groups}
        ambiguous: set[str] = set()  # alike by signature, not by time: no one number serves them
        for entry, us in self.costs.items():
            if self.origin[entry] == "measured":
                if new.get(self.signatures[entry], us) != us:
                    ambiguous.add(self.signatures[entry])
                new[self.signatures[entry]], what[self.signatures[entry]] = us, f"{kinds[entry[0]]} {form_of(entry[1])}"
        for key, us in conversions.items():
            if (origin := self.conversion_origin[key]) != "cached":
                signature = self.conversion_signatures[key]
                new[signature], what[signature] = us, key[1] if origin == "measured" else f"{key[1]} ({origin})"
        if self.fixed is not None and self.fixed_origin == "measured":
            new[self.fixed_signature], what[self.fixed_signature] = self.fixed, "nodes outside groups"
        cache.store({signature: us for signature, us in new.items() if signature not in ambiguous}, what)


def _touching(groups: Sequence[Group], keys: Sequence[Key]) -> dict[str, list[Key]]:
    """Return the conversions of values that a group reads or writes, by group."""
    found = {}
    for group in groups:
        names = {str(v.name) for v in (*group.data, *group.results)}
        found[group.name] = [key for key in keys if key[0] in names]
    return found
