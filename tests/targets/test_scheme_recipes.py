"""Recipes that ask for a scheme: what each shipped one says, and that the targets it is for have it."""

from __future__ import annotations

import pytest

from qcompiler.errors import PassError
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.recipes.recipe import load_recipe, parse_recipe, recipe_names
from qcompiler.targets.target import load_target, target_names

SCHEMES = {
    # recipe: scheme, form of products, of convolutions
    "fp8": ("fp8", "static-float", "static"),
    "int8": ("int8", "dynamic", "static"),
    "int8-weights": ("int8-weights", "weight-only", "weight-only"),
    "int4-weights": ("int4-weights", "weight-only", "float"),
    "mxfp8": ("mxfp8", "dynamic", "float"),
    "nvfp4": ("nvfp4", "dynamic", "float"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_recipe_names_its_scheme_and_forms(name):
    recipe = load_recipe(name)
    assert (recipe.scheme, recipe.matmul, recipe.convolution) == SCHEMES[name]
    assert recipe.doc
    assert recipe.block == 0


def test_every_recipe_is_one_that_planning_takes():
    for name in recipe_names():
        recipe = load_recipe(name)
        made = PlanQuantization(convolution=recipe.convolution, matmul=recipe.matmul, recurrent=recipe.recurrent)
        assert made.matmul == recipe.matmul


@pytest.mark.parametrize("name", target_names())
def test_every_scheme_of_a_target_resolves_to_rows_with_reasons(name):
    target = load_target(name)
    for scheme in target.schemes:
        table = target.with_scheme(scheme)
        assert table.scheme == scheme
        assert all(row.why for row in table.rows)
        assert not table.blocks or table.block
        assert not set(target.unavailable) & set(target.schemes)


def test_a_block_size_is_a_power_of_two():
    assert parse_recipe('scheme = "int4-weights"\nblock = 64\n', "mine").block == 64
    with pytest.raises(PassError, match="recipe mine: block is 48; expected a power of two"):
        parse_recipe("block = 48\n", "mine")
    with pytest.raises(PassError, match="scheme is 4; expected a str"):
        parse_recipe("scheme = 4\n", "mine")
