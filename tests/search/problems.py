"""Small planner problems for tests, random and by hand, and their answers by trying every choice."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from qcompiler.search.problem import Cause, Charge, Key, Option, Problem
from qcompiler.search.solution import Point, evaluate

FORMS = ("float", "static", "static-float", "dynamic")


def random_problem(seed: int, groups: int = 6, options: int = 4, outputs: int = 2, charges: int = 8) -> Problem:
    """Return a problem with noise over eight orders of magnitude and charges of one to three causes."""
    rng = random.Random(seed)
    names = tuple(f"y{i}" for i in range(outputs))
    made: dict[str, tuple[Option, ...]] = {}
    for number in range(groups):
        count = rng.randint(1, options)
        elements = rng.randint(10, 1000)
        slow, size = rng.uniform(1, 100), 4 * elements
        forms = [Option("float", slow, size, {}, 32.0 * elements)]
        for form in FORMS[1:count]:
            noise = {n: 10 ** rng.uniform(-8, -2) for n in names if rng.random() < 0.8}
            forms.append(Option(form, slow * rng.uniform(0.2, 1.1), size // 4, noise, 8.0 * elements))
        made[f"g{number}"] = tuple(forms)
    keys = [(g, o.name) for g, opts in made.items() for o in opts]
    shared = tuple(
        Charge(
            f"charge{number}",
            tuple(_cause(rng, keys) for _ in range(rng.randint(1, 3))),
            cost=rng.uniform(0, 30),
            noise={n: 10 ** rng.uniform(-7, -2) for n in names if rng.random() < 0.5},
            bytes=rng.randint(0, 50),
        )
        for number in range(charges)
    )
    weights = sum(int(opts[0].bits / 32) for opts in made.values())
    return Problem(made, shared, names, fixed_cost=rng.uniform(0, 20), fixed_bytes=rng.randint(0, 900), weights=weights)


def _cause(rng: random.Random, keys: list[Key]) -> Cause:
    asked = tuple(rng.sample(keys, min(len(keys), rng.randint(1, 4))))
    return Cause(asked, tuple(rng.sample(keys, min(len(keys), rng.randint(0, 2)))))


def every(problem: Problem) -> Iterator[Point]:
    """Yield the point of every choice."""
    for chosen in itertools.product(*problem.options.values()):
        yield evaluate(problem, {g: o.name for g, o in zip(problem.options, chosen, strict=True)})


def chain(links: int, **weights: float) -> Problem:
    """Return groups in a row, float or static, with a conversion of every value between and at both ends.

    Args:
        links: groups.
        **weights: gain of each group on integers by name (``g0``), 10 where none is given; a conversion costs 6.
    """
    options = {
        f"g{i}": (
            Option("float", 20.0, 400, {}, 3200.0),
            Option("static", 20.0 - weights.get(f"g{i}", 10.0), 100, {"y": 1e-4}, 800.0),
        )
        for i in range(links)
    }
    charges = []
    for i in range(links + 1):
        reads = ((f"g{i}", "static"),) if i < links else ()
        stores = ((f"g{i - 1}", "static"),) if i else ()
        charges.append(Charge(f"quantize:v{i}", (Cause(reads, stores),), cost=6.0))
        charges.append(Charge(f"dequantize:v{i}", (Cause(stores, reads),), cost=6.0))
        charges.append(Charge(f"value:v{i}", (Cause((*reads, *stores)),), noise={"y": 1e-5}))
    return Problem(options, tuple(charges), ("y",), fixed_cost=3.0, fixed_bytes=50, weights=100 * links)


def close(a: float, b: float) -> bool:
    """Return whether two sums are equal to 1e-9 of their size."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-15)
