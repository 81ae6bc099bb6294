"""The forms that a recipe's rules give, without measuring anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qcompiler.errors import PassError
from qcompiler.pipeline.parse import near
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

    Raises:
        PassError: a form in the state, or one that the recipe pins, is of no group, or none that the group can have.
    """
    groups = find_groups(state.model, state.target)
    check_forms(state.forms, groups)
    pinned, estimators = recipe.pinned({g.name: g.legal for g in groups})
    decided = {**pinned, **state.forms}
    forms = propose(groups, recipe_policy(recipe, groups, observed=state.statistics is not None), decided)
    return forms, {**estimators, **state.estimators}


def check_forms(forms: Mapping[str, Form], groups: Sequence[Group]) -> None:
    """Refuse forms of groups that do not exist, and forms that a group cannot have.

    Raises:
        PassError: names the group, and near names or the forms that it can have.
    """
    legal = {g.name: ("float", *g.legal) for g in groups}
    for name, form in forms.items():
        if name not in legal:
            raise PassError(f"a form is given for the group {name!r}, which the model does not have{near(name, legal)}")
        if form not in legal[name]:
            raise PassError(f"{name} cannot be {form}; it can be {', '.join(legal[name])}")


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
