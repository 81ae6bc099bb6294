"""Choose the range estimators of one choice of forms by what they do to the model's scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qcompiler.engine import Feeds
from qcompiler.quant.plan import Form
from qcompiler.search.ranges import Errors, RangeChoice, RangeTerms, choose_ranges
from qcompiler.search.scores import ScoreErrors
from qcompiler.workshop import Workshop

ESTIMATOR_CHOICES = (
    "auto", "mse", "sqnr", "percentile:99.999", "percentile:99.99", "min-max", "entropy", "moving-average",
)  # fmt: skip
"""Range estimators that the recipe's ``auto`` compares; of equals the first wins. ``auto`` is ``mse`` per tensor, its
error counted behind the function that alone reads the tensor."""
_TERMS = RangeTerms()


def choose_estimators(
    workshop: Workshop,
    forms: Mapping[str, Form],
    engine_forms: Mapping[str, str],
    held_out: Sequence[Feeds],
    ranges: Iterable[Feeds],
    terms: RangeTerms = _TERMS,
) -> RangeChoice:
    """Measure range estimators on one choice of forms, and leave the best in force in the workshop.

    Candidates are compared by the SQNR of the scores in front of a final Softmax, on the set-aside feeds and some of
    those that ranges were found on: few feeds are set aside, and a choice by chance costs more than that the others
    were seen before. Estimators that groups have already (overrides) stay.

    Args:
        workshop: builds; its ``estimator`` and its base state's ``estimators`` are set.
        forms: form per group.
        engine_forms: engine-specific rewrites.
        held_out: feeds that ranges have not seen.
        ranges: feeds that ranges were found on.
        terms: how far to go.
    """
    base, pinned = workshop.base, dict(workshop.base.estimators)
    engine = workshop.truth if workshop.backend.draft() else workshop.engine
    # An engine that only stands in may rewrite the graph: ranges are compared with each other, not with a bound.
    options = replace(workshop.options, optimize=True)
    errors = ScoreErrors(engine, base.model, held_out, ranges, options, workshop.truth)

    def evaluate(estimator: str, estimators: Mapping[str, str]) -> Errors:
        workshop.estimator, base.estimators = estimator, {**estimators, **pinned}
        return errors(workshop.draft(forms, engine_forms))

    quantized = [g for g in workshop.groups if forms.get(g.name, "float") != "float"]
    free = [g.name for g in quantized if g.row.kind in ("weighted", "arithmetic") and g.name not in pinned]
    found = choose_ranges(ESTIMATOR_CHOICES, free, evaluate, terms)
    workshop.estimator, base.estimators = found.estimator, {**found.estimators, **pinned}
    return found
