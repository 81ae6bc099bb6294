"""Put the choice of forms as the planner's problem: groups and their options, and what is paid once on their edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qcompiler.quant.plan import Form
from qcompiler.search.borders import Border, Kind, reads, stores
from qcompiler.search.costs import CostTable
from qcompiler.search.file_sizes import Crossing, FileSizes
from qcompiler.search.noise import NoiseTable
from qcompiler.search.problem import Cause, Charge, Key, Option, Problem
from qcompiler.targets.groups import Group

Allowed = Mapping[str, Sequence[Form]]
"""Forms besides float that a group may take, by its name."""


@dataclass(frozen=True)
class Sizes:
    """Stored bytes, and stored bits of weights.

    Attributes:
        groups: bytes by group and form, of what no other group reads.
        shared: by name of a weight that several groups read: bytes by form.
        readers: groups that read each of those.
        fixed: everything else in the file.
        weights: elements of weights in groups, which bits per weight are counted over.
        bits: stored bits of weights that no other group reads, by group and form.
        conversions: bytes of converting a value at a border, paid as the conversion is.
    """

    groups: Mapping[str, Mapping[str, int]]
    shared: Mapping[str, Mapping[str, int]]
    readers: Mapping[str, tuple[str, ...]]
    fixed: int
    weights: int
    bits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    conversions: Mapping[Crossing, int] = field(default_factory=dict)

    def corrected(self, seen: FileSizes) -> Sizes:
        """Return the sizes with what a file was seen to store; they then predict that file to the byte.

        Args:
            seen: the file of a build.
        """
        groups = {name: dict(found) for name, found in self.groups.items()}
        for name, found in groups.items():
            found[seen.forms.get(name, "float")] = seen.groups.get(name, 0)
        conversions = {**self.conversions, **seen.conversions}
        told = sum(found[seen.forms.get(name, "float")] for name, found in groups.items())
        told += sum(seen.conversions.values()) + self.shared_bytes(seen.forms)
        return replace(self, groups=groups, conversions=conversions, fixed=max(0, seen.total - told))

    def shared_bytes(self, forms: Mapping[str, str]) -> int:
        """Return the bytes of the weights that several groups read, in a choice of forms."""
        return sum(
            count
            for name, by_form in self.shared.items()
            for form, count in by_form.items()
            if any(forms.get(group, "float") == form for group in self.readers[name])
        )


def forms_problem(
    groups: Sequence[Group],
    allowed: Allowed,
    costs: CostTable,
    noise: NoiseTable | None = None,
    sizes: Sizes | None = None,
) -> Problem:
    """Return the problem of choosing a form for every group.

    Args:
        groups: all groups of a model, in program order.
        allowed: forms besides float by group; a group that is not named stays float.
        costs: microseconds per group and form, and per conversion.
        noise: relative noise power per point; None where nothing bounds it.
        sizes: bytes; None where nothing bounds them.
    """
    barred = noise.barred() if noise is not None else frozenset()
    usable = {name: [f for f in forms if (name, f) not in barred] for name, forms in allowed.items()}
    options = {}
    for group in groups:
        stored = sizes.groups.get(group.name, {}) if sizes is not None else {}
        bits = sizes.bits.get(group.name, {}) if sizes is not None else {}
        options[group.name] = tuple(
            Option(form, costs.cost(group.name, form), stored.get(form, 0), bits=float(bits.get(form, 0)))
            for form in ("float", *usable.get(group.name, ()))
        )
    charges = _conversions(costs, usable, {} if sizes is None else sizes.conversions)
    if noise is not None:
        charges += noise.charges(usable)
    if sizes is not None:
        charges += _shared(sizes, usable)
    return Problem(
        options=options,
        charges=tuple(charges),
        outputs=noise.outputs if noise is not None else (),
        fixed_cost=costs.fixed,
        fixed_bytes=sizes.fixed if sizes is not None else 0,
        weights=sizes.weights if sizes is not None else 0,
    )


def _conversions(costs: CostTable, allowed: Allowed, stored: Mapping[Crossing, int]) -> list[Charge]:
    """Return what each value costs to quantize and to dequantize, paid once however many groups ask for it."""
    charges: list[Charge] = []
    for name, border in costs.borders.items():
        price = costs.conversions.get(name)
        if price is None:
            continue
        for kind, causes in _crossings(border, allowed).items():
            if causes:
                us, count = max(0.0, price.us(kind)), stored.get((name, kind), 0)
                charges.append(Charge(f"{kind}:{name}", tuple(causes), cost=us, bytes=count))
    return charges


def _crossings(border: Border, allowed: Allowed) -> dict[Kind, list[Cause]]:
    """Return why each conversion of a value may be asked for."""
    stored: tuple[Key, ...] = tuple(
        (border.producer, form) for form in allowed.get(border.producer, ()) if border.producer and stores(form)
    )
    causes: dict[Kind, list[Cause]] = {"quantize": [], "dequantize": [], "dynamic": []}
    for reader in border.readers:
        forms = allowed.get(reader, ())
        fixed = tuple((reader, form) for form in forms if reads(form) == "quantize")
        moving = tuple((reader, form) for form in forms if reads(form) == "dynamic")
        if fixed:
            causes["quantize"].append(Cause(fixed, stored))
        if moving:
            causes["dynamic"].append(Cause(moving))
        if stored:
            causes["dequantize"].append(Cause(stored, fixed))
    if stored and border.outside:
        causes["dequantize"].append(Cause(stored))
    return causes


def _shared(sizes: Sizes, allowed: Allowed) -> list[Charge]:
    """Return what weights that several groups read cost in each form that one of them stores them in."""
    charges = []
    for name, by_form in sizes.shared.items():
        for form, count in by_form.items():
            causes = [
                Cause(((group, form),))
                for group in sizes.readers[name]
                if form == "float" or form in allowed.get(group, ())
            ]
            if causes:
                charges.append(Charge(f"stored:{name}:{form}", tuple(causes), bytes=count, bits=8.0 * count))
    return charges
