"""What every form of every fusion group costs, and every conversion between them: a table that predicts any choice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from qcompiler.errors import PassError
from qcompiler.search.borders import KINDS, Border, Kind, form_of
from qcompiler.search.observations import Observation

Origin = Literal["measured", "cached", "fitted", "analytic", "corrected"]
"""Where a number comes from: measured now, measured by an earlier compilation, a line through what was measured,
computed from work and bytes, or measured in the context of a built choice."""
_FLOOR_US = 0.5
_NANOSECONDS: Mapping[Kind, float] = {"quantize": 0.25, "dequantize": 0.15, "dynamic": 0.35}
"""Cost per element where no conversion was measured (one core of a current server processor)."""


@dataclass(frozen=True)
class Conversion:
    """Microseconds per run of converting one value, each paid at most once.

    Attributes:
        quantize: with scales known ahead of time.
        dequantize: back to float.
        dynamic: with scales found at run time.
        origin: where each comes from.
    """

    quantize: float = 0.0
    dequantize: float = 0.0
    dynamic: float = 0.0
    origin: Mapping[Kind, Origin] = field(default_factory=dict)

    def us(self, kind: Kind) -> float:
        """Return the cost of one kind."""
        return {"quantize": self.quantize, "dequantize": self.dequantize, "dynamic": self.dynamic}[kind]

    def scaled(self, factor: float) -> Conversion:
        """Return the costs, all times a factor."""
        return replace(
            self, quantize=self.quantize * factor, dequantize=self.dequantize * factor, dynamic=self.dynamic * factor
        )

    def with_cost(self, kind: Kind, us: float, origin: Origin) -> Conversion:
        """Return the costs with one kind replaced."""
        known = {k: self.us(k) for k in KINDS} | {kind: us}
        return Conversion(known["quantize"], known["dequantize"], known["dynamic"], {**self.origin, kind: origin})


@dataclass(frozen=True)
class CostTable:
    """Microseconds per run by group and option, by value and conversion, and of what no choice changes.

    Attributes:
        groups: cost per option, by group; every group has ``float``.
        conversions: by value name.
        fixed: nodes outside groups, and the run itself.
        borders: where each value comes from and who reads it, by name.
        origin: where each number of ``groups`` comes from.
        fixed_origin: where ``fixed`` comes from.
    """

    groups: Mapping[str, Mapping[str, float]]
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    fixed: float = 0.0
    borders: Mapping[str, Border] = field(default_factory=dict)
    origin: Mapping[str, Mapping[str, Origin]] = field(default_factory=dict)
    fixed_origin: Origin = "measured"

    def cost(self, group: str, option: str) -> float:
        """Return the cost of one group in one option; that of its form where the option itself has none.

        Raises:
            PassError: neither is known.
        """
        known = self.groups.get(group, {})
        for name in (option, form_of(option)):
            if name in known:
                return known[name]
        has = ", ".join(known) or "none"
        raise PassError(f"group {group} has no cost in form {option!r}, it has {has}; measure a variant with that form")

    def charges(self, choice: Mapping[str, str]) -> list[tuple[str, Kind]]:
        """Return the conversions that a choice pays, as (value, kind)."""
        return [(name, kind) for name, border in self.borders.items() for kind in border.charges(choice)]

    def total(self, choice: Mapping[str, str]) -> float:
        """Return the predicted microseconds per run of a choice of options; unnamed groups are float.

        Raises:
            PassError: the cost of an option is not known.
        """
        spent = self.fixed + sum(self.cost(name, choice.get(name, "float")) for name in self.groups)
        return spent + sum(self.conversions.get(name, Conversion()).us(kind) for name, kind in self.charges(choice))

    def counts(self) -> dict[str, int]:
        """Return how many numbers of ``groups`` and ``conversions`` come from where, most first."""
        found: dict[str, int] = {}
        for origin in (
            *(o for options in self.origin.values() for o in options.values()),
            *(o for conversion in self.conversions.values() for o in conversion.origin.values()),
        ):
            found[origin] = found.get(origin, 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def with_cost(self, group: str, option: str, us: float, origin: Origin) -> CostTable:
        """Return the table with one cost added or replaced."""
        groups = {**self.groups, group: {**self.groups.get(group, {}), option: us}}
        return replace(
            self, groups=groups, origin={**self.origin, group: {**self.origin.get(group, {}), option: origin}}
        )

    def scaled(self, factor: float) -> CostTable:
        """Return the table of a machine on which all takes ``factor`` times as long."""
        groups = {name: {option: us * factor for option, us in known.items()} for name, known in self.groups.items()}
        conversions = {name: known.scaled(factor) for name, known in self.conversions.items()}
        return replace(self, groups=groups, conversions=conversions, fixed=self.fixed * factor)

    def corrected(self, seen: Observation) -> CostTable:
        """Return the table with what a built choice was observed to cost: it then predicts that choice's time exactly.

        Groups and conversions of the choice get what they took beside the neighbours that they have in it; what lone
        nodes took more than before is shared by the groups that are not in float, in proportion to their time. Other
        options keep their costs.

        Args:
            seen: an observation of the built choice.
        """
        groups = {name: dict(options) for name, options in self.groups.items()}
        origin = {name: dict(options) for name, options in self.origin.items()}
        conversions = dict(self.conversions)
        for name, options in groups.items():
            option = seen.forms.get(name, "float")
            options[option] = seen.groups.get(name, 0.0)
            origin.setdefault(name, {})[option] = "corrected"
        charges = self.charges(seen.forms)
        for name, kind in charges:
            spent = seen.conversions.get((name, kind), 0.0)
            conversions[name] = conversions.get(name, Conversion()).with_cost(kind, spent, "corrected")
        made = replace(self, groups=groups, conversions=conversions, origin=origin)
        return made._scaled_to(seen.whole_us, seen.forms, charges)

    def _scaled_to(self, whole: float, forms: Mapping[str, str], charges: Iterable[tuple[str, Kind]]) -> CostTable:
        """Scale what a choice changes so that the whole is predicted; all of it where that would not suffice."""
        if whole <= 0:
            return self
        moved = {name for name, form in forms.items() if name in self.groups and form_of(form) != "float"}
        spent = self.total(forms) - self.fixed
        scaled = set(self.groups) if not moved or self._sum(moved, forms) <= 0 else moved
        changing = self._sum(scaled, forms)
        wanted = changing + whole - (spent + self.fixed)
        if changing <= 0 or wanted < 0.25 * changing:  # no group can answer for so large a gap: all of it was slower
            factor, fixed = (whole / (spent + self.fixed), None) if spent + self.fixed > 0 else (1.0, whole)
            scaled = set(self.groups)
        else:
            factor, fixed = wanted / changing, self.fixed
        groups = {name: dict(options) for name, options in self.groups.items()}
        for name in scaled:
            option = forms.get(name, "float")
            groups[name][option] = self.cost(name, option) * factor
        made = replace(self, groups=groups, fixed=self.fixed * factor if fixed is None else fixed)
        if fixed is not None:
            return made
        conversions = dict(self.conversions)
        for name, kind in charges:
            conversions[name] = conversions[name].with_cost(kind, conversions[name].us(kind) * factor, "corrected")
        return replace(made, conversions=conversions)

    def _sum(self, names: Iterable[str], forms: Mapping[str, str]) -> float:
        return sum(self.cost(name, forms.get(name, "float")) for name in names)

    def to_json(self) -> str:
        """Return the table as JSON text, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @staticmethod
    def from_json(text: str) -> CostTable:
        """Read what `to_json` wrote.

        Raises:
            PassError: the text is no cost table.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            conversions = {name: Conversion(**c) for name, c in data.pop("conversions").items()}
            borders = {n: Border(**{**b, "readers": tuple(b["readers"])}) for n, b in data.pop("borders").items()}
            return CostTable(**data, conversions=conversions, borders=borders)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PassError(f"not a cost table: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Lines:
    """Cost of a conversion by its elements, us = a + b * elements, per kind, through what was measured."""

    terms: Mapping[Kind, tuple[float, float]]

    def us(self, kind: Kind, elements: int) -> float:
        """Return the microseconds of converting so many elements."""
        base, rate = self.terms.get(kind, (_FLOOR_US, _NANOSECONDS[kind] * 1e-3))
        return base + rate * elements


def fit_lines(measured: Iterable[tuple[Kind, int, float]]) -> Lines:
    """Fit one line per kind by least squares of relative errors, neither term below zero.

    Args:
        measured: (kind, elements, microseconds); those of unknown size are left out.
    """
    points: dict[Kind, list[tuple[float, float]]] = {}
    for kind, elements, us in measured:
        if elements > 0 and us > 0:
            points.setdefault(kind, []).append((float(elements), us))
    return Lines({kind: _line(found) for kind, found in points.items()})


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Fit us = a + b * n, errors weighed by 1 / us; through the known floor where all sizes are alike."""
    sums = [0.0] * 5  # of 1, n, n^2, us, us * n, each times the weight
    for n, us in points:
        for index, term in enumerate((1.0, n, n * n, us, us * n)):
            sums[index] += term / us**2
    one, first, second, us_sum, cross = sums
    spread = one * second - first * first
    rate = (one * cross - first * us_sum) / spread if spread > 1e-9 * one * second else -1.0
    base = (us_sum - rate * first) / one
    if rate < 0 or base < 0:
        smallest = min(us for _, us in points)
        base = min(_FLOOR_US, smallest / 2)
        rate = max((cross - base * first) / second, 0.0)
    return base, rate
