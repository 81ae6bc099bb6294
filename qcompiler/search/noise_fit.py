"""Fit a table of noise to the plans that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qcompiler.search.problem import Problem
from qcompiler.search.solution import evaluate, noise_power

_LEAST_CORRECTION, _MOST_CORRECTION = 0.02, 5.0
"""Factors on the noise of a point. What a plan has beyond is an interaction of some of its points: were it laid to all
of them, those that are innocent would never be tried again."""
_SWEEPS = 40


def fitted(
    problem: Problem, seen: Sequence[tuple[Mapping[str, str], Mapping[str, float]]]
) -> dict[str, dict[str, float]]:
    """Return factors on the noise of charges with which the table tells what was measured, by charge and output.

    What a plan was mispredicted by is laid to the points that it quantizes, all alike; a point of several plans gets
    what agrees with all of them. That is the multiplicative algebraic reconstruction of Gordon, Bender and Herman
    (Journal of Theoretical Biology 29, 1970): of all factors that fit, it finds those that change the table least.

    Args:
        problem: with noise as it was tabled.
        seen: (option per group, SQNR in dB per output) of every plan that was measured.
    """
    tabled = {charge.name: charge.noise for charge in problem.charges if charge.noise}
    paid = [[name for name in evaluate(problem, forms).paid if name in tabled] for forms, _ in seen]
    factors: dict[str, dict[str, float]] = {}
    for output in problem.outputs:
        rows = [
            ([name for name in names if tabled[name].get(output, 0.0) > 0], noise_power(db[output]))
            for names, (_, db) in zip(paid, seen, strict=True)
            if output in db
        ]
        powers = {name: tabled[name][output] for names, _ in rows for name in names}
        for _ in range(_SWEEPS):
            for names, wanted in rows:
                told = sum(powers[name] for name in names)
                for name in names if told > 0 else ():
                    least, most = (tabled[name][output] * f for f in (_LEAST_CORRECTION, _MOST_CORRECTION))
                    powers[name] = min(max(powers[name] * wanted / told, least), most)
        for name, power in powers.items():
            factors.setdefault(name, {})[output] = power / tabled[name][output]
    return factors


def corrected(problem: Problem, correction: Mapping[str, Mapping[str, float]]) -> Problem:
    """Return a problem in which the noise of charges is multiplied by their factors."""
    if not correction:
        return problem
    return replace(
        problem,
        charges=tuple(
            replace(c, noise={n: power * factors.get(n, 1.0) for n, power in c.noise.items()})
            if (factors := correction.get(c.name))
            else c
            for c in problem.charges
        ),
    )
