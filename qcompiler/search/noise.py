"""The additive model of quantization noise: what every quantized point adds to the outputs, and what choices add up to.

Noise is relative noise power: error power over signal power at an output, so that its SQNR in dB is -10 log10 of it.
Rounding errors of different tensors are nearly uncorrelated (Widrow and Kollár, "Quantization Noise", 2008, chapter 4),
so their powers add at an output as far as the graph between is linear for small changes. Where it is not, measurements
of whole variants correct the sums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from qcompiler.errors import CalibrationError
from qcompiler.search.noise_terms import Noise, Shape, Term, asked_points, family, point_keys
from qcompiler.search.problem import Charge, Key

__all__ = ["Noise", "NoiseTable", "asked_points", "family", "point_keys"]


@dataclass(frozen=True)
class NoiseTable:
    """Measured noise per point, and what whole variants measured.

    Attributes:
        outputs: names of the outputs that noise is told at: the float outputs, or the floats nearest to others.
        points: point to output to relative noise power, uncorrected; infinity where a point cannot be used.
        asks: group to form to the points it switches on (`point_keys`).
        covered: point to the (group, form) keys under which it adds nothing, since what it reads has its scale already.
        needed: stored value to the keys of which one must be chosen, too: else it is written as floats.
        shared: point of several readers of a value at once to the points of each.
        joint: whole variant to output to measured relative noise.
        factors: family of forms to output to measured over predicted noise, which sums are multiplied by.
        reasons: point to why it could not be measured.
        evaluations: work done, in full evaluations of the given feeds.
        feeds: feeds that points were measured on.
    """

    outputs: tuple[str, ...]
    points: Mapping[str, Noise]
    asks: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    covered: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)
    needed: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joint: Mapping[str, Noise] = field(default_factory=dict)
    factors: Mapping[str, Noise] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    evaluations: float = 0.0
    feeds: int = 0

    def noise(self, point: str, form: str = "static") -> dict[str, float]:
        """Return the corrected noise of a point in a form; infinity at every output for a point nobody measured."""
        found, factors = self.points.get(point), self.factors.get(family(form), {})
        if found is None:
            return dict.fromkeys(self.outputs, math.inf)
        return {name: found.get(name, 0.0) * factors.get(name, 1.0) for name in self.outputs}

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Return what choices pay noise for, not corrected."""
        return tuple(Shape(self.asks, self.covered, self.needed, self.shared).terms(self.points, self.outputs))

    def paid(self, term: Term) -> dict[str, float]:
        """Return the corrected noise of a term."""
        factors = self.factors.get(term.kind, {})
        return {name: term.noise.get(name, 0.0) * factors.get(name, 1.0) for name in self.outputs}

    def of(self, choice: Mapping[str, str]) -> dict[str, float]:
        """Return the predicted relative noise power per output of a choice of forms; unnamed groups are float.

        A point counts once, however many groups ask for it, and not where what it reads has its scale already. A form
        that the table does not know makes it infinite.
        """
        unknown = any(form != "float" and form not in self.asks.get(group, {}) for group, form in choice.items())
        held = [self.paid(term) for term in self.terms if term.holds(choice)]
        return {name: math.inf if unknown else math.fsum(noise[name] for noise in held) for name in self.outputs}

    def barred(self) -> frozenset[Key]:
        """Return the (group, form) keys that cannot be used: a point of theirs could not be measured."""
        return frozenset(
            (group, form)
            for group, forms in self.asks.items()
            for form, points in forms.items()
            if any(not math.isfinite(power) for p in points for power in self.noise(p, form).values())
        )

    def charges(self, allowed: Mapping[str, Sequence[str]]) -> tuple[Charge, ...]:
        """Return the noise of every point as what the planner pays once, corrected.

        Args:
            allowed: the forms besides float that each group may take; those that are `barred` are passed over.
        """
        barred = self.barred()
        usable = {group: [f for f in forms if (group, f) not in barred] for group, forms in allowed.items()}
        made = []
        for term in self.terms:
            noise = {name: power for name, power in self.paid(term).items() if power > 0}
            charge = term.charge(usable, noise) if noise else None
            if charge is not None:
                made.append(charge)
        return tuple(made)

    def corrected(self, kind: str, measured: Noise, choice: Mapping[str, str], name: str = "") -> NoiseTable:
        """Return the table with the factors of one family of forms set so that a choice has its measured noise.

        Args:
            kind: the family (`family`) whose factors are set; the others stay.
            measured: relative noise power per output of the choice.
            choice: the forms that were measured.
            name: what to file the measurement under; nothing is filed without.
        """
        others = {g: f for g, f in choice.items() if family(f) != kind}
        plain = replace(self, factors={k: v for k, v in self.factors.items() if k != kind})
        rest, whole = plain.of(others), plain.of(choice)
        factors = {}
        for output in self.outputs:
            own, wanted = whole[output] - rest[output], measured.get(output, 0.0) - rest[output]
            usable = own > 0 and wanted > 0 and math.isfinite(own) and math.isfinite(wanted)
            factors[output] = wanted / own if usable else 1.0
        joint = {**self.joint, **({name: dict(measured)} if name else {})}
        return replace(self, factors={**self.factors, kind: factors}, joint=joint)

    def to_json(self) -> str:
        """Return the table as JSON text, keys sorted; infinity is written as the text ``inf``."""
        return json.dumps(_written(asdict(self)), sort_keys=True, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> NoiseTable:
        """Read what `to_json` wrote.

        Raises:
            CalibrationError: the text is not a noise table.
        """
        try:
            data = json.loads(text)
            return NoiseTable(
                tuple(data["outputs"]),
                {p: _powers(noise) for p, noise in data["points"].items()},
                {g: {f: tuple(keys) for f, keys in forms.items()} for g, forms in data["asks"].items()},
                {p: _keys(keys) for p, keys in data["covered"].items()},
                {p: _keys(keys) for p, keys in data["needed"].items()},
                {p: tuple(map(str, members)) for p, members in data["shared"].items()},
                {name: _powers(noise) for name, noise in data["joint"].items()},
                {kind: _powers(noise) for kind, noise in data["factors"].items()},
                {str(p): str(why) for p, why in data["reasons"].items()},
                float(data["evaluations"]),
                int(data["feeds"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"not a noise table: {error}; measure it anew with qcompiler sensitivity") from error


def _powers(noise: Mapping[str, object]) -> dict[str, float]:
    return {str(name): float(str(power)) for name, power in noise.items()}


def _keys(keys: Sequence[Sequence[object]]) -> tuple[Key, ...]:
    return tuple((str(group), str(form)) for group, form in keys)


def _written(data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _written(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_written(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "inf"
    return data
