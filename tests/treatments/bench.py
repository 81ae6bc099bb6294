"""A workshop over a small model, with real statistics, and the error of its variants on feeds that nothing has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from qcompiler.backends.catalog import open_backend
from qcompiler.calibration.observe import observe
from qcompiler.calibration.statistics import Statistics
from qcompiler.engine import Array, EngineOptions
from qcompiler.observed import observed_values
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.search.ranges import decibels
from qcompiler.search.scores import ScoreErrors
from qcompiler.targets.target import Target, load_target
from qcompiler.treatments.treatment import Case
from qcompiler.treatments.trying import likely_variants
from qcompiler.workshop import Workshop
from tests.passes.quantize.lab import ENGINE, OPTIMIZED, import_exactly

Feed = dict[str, Array]
F = np.float32


@dataclass
class Bench:
    """A case, and feeds that are set aside."""

    case: Case
    held_out: list[Feed]

    @property
    def workshop(self) -> Workshop:
        return self.case.workshop

    @property
    def statistics(self) -> Statistics:
        return self.case.statistics

    def decibels(self, case: Case | None = None, variant: str = "static") -> float:
        """Return the SQNR of a variant of a treated case against the untreated float model, on the feeds set aside."""
        treated = case or self.case
        errors = ScoreErrors(ENGINE, self.workshop.base.model, self.held_out, (), OPTIMIZED)
        forms = likely_variants(treated.workshop.groups)[variant]
        return decibels(errors(treated.workshop.draft(forms, {})))


def bench(
    proto: onnx.ModelProto,
    feeds: Sequence[Feed],
    held_out: Sequence[Feed],
    target: Target | None = None,
    variants: Mapping[str, Mapping[str, Form]] | None = None,
) -> Bench:
    table = target or load_target("ort-x86")
    state = CompileState(import_exactly(proto), table)
    names, squares = observed_values(state.model)
    statistics = observe(state.model, names, feeds, ENGINE, squares=squares)
    state.statistics = statistics
    workshop = Workshop(state, open_backend(table, None), EngineOptions(threads=1))
    found = likely_variants(workshop.groups) if variants is None else variants
    return Bench(Case(workshop, statistics, list(feeds), found), list(held_out))


def feeds_of(seed: int, count: int, **shapes: tuple[int, ...]) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape).astype(F) for name, shape in shapes.items()} for _ in range(count)]


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(F)
