"""The forms that a recipe's rules give, without measuring anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.recipes.recipe import Recipe
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.placement import Policy, propose


def recipe_forms(recipe: Recipe, state: CompileState) -> tuple[dict[str, Form], dict[str, str]]:
    """Return (form, estimator) per group of a canonical graph, as ``compile(guard=False)`` chooses them.

    Args:
        recipe: its rules, and what it pins.
        state: the graph, its target and statistics; forms in it win over the recipe's.
    """
    groups = find_groups(state.model, state.target)
    pinned, estimators = recipe.pinned({g.name: g.legal for g in groups})
    known = {g.name for g in groups}
    decided = {**pinned, **{name: form for name, form in state.forms.items() if name in known}}
    forms = propose(groups, recipe_policy(recipe, groups, observed=state.statistics is not None), decided)
    return forms, {**estimators, **state.estimators}


def recipe_policy(recipe: Recipe, groups: Sequence[Group], *, observed: bool) -> Policy:
    """Return a recipe's rules, fitted to what a target can do.

    Args:
        recipe: names the wanted forms.
        groups: with the forms they can have on the target.
        observed: whether there are statistics; without them only forms that need none are possible.
    """
    policy = Policy(
        recipe.convolution if observed else "float",
        recipe.matmul if observed else "dynamic",
        recipe.recurrent,
        recipe.arithmetic and observed,
    )
    legal = {form for g in groups if g.root.op_type in ("MatMul", "Gemm") for form in g.legal}
    if policy.matmul in (*legal, "float"):
        return policy
    order: tuple[Form, ...] = ("static-float", "static", "weight-only", "dynamic")
    possible = [f for f in order if f in legal and (observed or not f.startswith("static"))]
    return replace(policy, matmul=possible[0] if possible else "float")
