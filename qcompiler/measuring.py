"""What decisions measure on a model: how close a choice of forms is to float, and what is demanded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from qcompiler.engine import Feeds
from qcompiler.errors import ModelError
from qcompiler.observed import wanted_values
from qcompiler.quant.plan import Form
from qcompiler.quant.spec import RangeSource
from qcompiler.search.accuracy import Bound
from qcompiler.search.quality import Quality
from qcompiler.setting import Setting
from qcompiler.workshop import Workshop


class Measure(Protocol):
    """Builds a choice of forms, under engine forms, and measures it."""

    def __call__(self, forms: Mapping[str, Form], engine_forms: Mapping[str, str] | None = None) -> Quality:
        """Return how close the choice is to float."""
        ...


def measure_quality(
    setting: Setting, workshop: Workshop, forms: Mapping[str, Form], engine_forms: Mapping[str, str] | None = None
) -> Quality:
    """Build and measure a choice of forms; there must be data to judge on."""
    assert setting.judge is not None
    return setting.judge(workshop.computable(workshop.build(forms, engine_forms)))


def quick_quality(setting: Setting, workshop: Workshop) -> Measure:
    """Return a measure for searching: on drafts, where the lowered model is slow to make and to run here."""

    def exact(forms: Mapping[str, Form], engine_forms: Mapping[str, str] | None = None) -> Quality:
        return measure_quality(setting, workshop, forms, engine_forms)

    if not workshop.backend.draft():
        return exact
    assert setting.judge is not None
    quick = setting.judge.on(workshop.truth, replace(setting.engine_options, optimize=True))

    def draft(forms: Mapping[str, Form], engine_forms: Mapping[str, str] | None = None) -> Quality:
        try:
            return quick(workshop.draft(forms, engine_forms or {}))
        except ModelError:  # an optimizer that does not bear the draft
            return exact(forms, engine_forms)

    return draft


def demanded(setting: Setting) -> Bound:
    """Return the accuracy that the recipe and the user demand of every output; there must be data to judge on."""
    judge, recipe, floor = setting.judge, setting.recipe, setting.min_sqnr
    assert judge is not None
    bounds = {}
    for name in judge.outputs:
        usual = recipe.min_sqnr_classes if name in judge.class_like else recipe.min_sqnr
        usual = recipe.min_sqnr_state if name in judge.carried else usual
        bounds[name] = max(usual if floor is None else floor, setting.budget.sqnr_db or 0.0)
    least = None
    if judge.reference_metric is not None:
        least = setting.budget.least_metric(judge.reference_metric)
    return Bound(bounds, recipe.min_agreement, least)


def count_elements(workshop: Workshop, statistics: RangeSource | None, feed: Feeds) -> dict[str, int]:
    """Return elements per value in one feed, as calibration counted them."""
    found = {name: int(array.size) for name, array in feed.items()}
    if statistics is not None:
        for name in wanted_values(workshop.base.model, workshop.groups):
            if statistics.observed(name):
                found[name] = statistics.elements_per_feed(name)
    return found
