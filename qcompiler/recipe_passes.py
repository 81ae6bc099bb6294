"""The passes that a recipe adds to every build."""

from __future__ import annotations

from qcompiler.errors import PassError
from qcompiler.ir.phase import Phase
from qcompiler.passes.catalog import shipped_passes
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.registry import needed_phases
from qcompiler.recipes.recipe import Recipe


def recipe_passes(recipe: Recipe) -> tuple[Pass, ...]:
    """Return the passes that a recipe runs on the canonical graph, in front of calibration.

    Raises:
        PassError: a pass is unknown, malformed, or does not go from FLOAT to FLOAT.
    """
    try:
        passes = Pipeline.parse(recipe.passes, shipped_passes().with_entry_points()).passes
    except PassError as error:
        raise type(error)(f"recipe {recipe.name}: {error}") from error
    for step in passes:
        needs = needed_phases(step)
        if Phase.FLOAT not in needs or step.gives not in (None, Phase.FLOAT):
            wanted, given = " or ".join(p.name for p in needs), "the same" if step.gives is None else step.gives.name
            raise PassError(
                f"recipe {recipe.name}: pass {step.name()} needs phase {wanted} and gives {given}; a recipe's passes "
                "run on the canonical FLOAT graph"
            )
    return passes
