"""Recipes: named defaults, and overrides by glob on group names."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from qcompiler.errors import PassError
from qcompiler.plugins import RECIPES, PluginError, conflicts, find_offer, offered_names
from qcompiler.quant.plan import FORMS, Form
from qcompiler.targets.target import Target


@dataclass(frozen=True)
class Override:
    """What a user pins for all groups whose name matches a glob.

    Attributes:
        match: shell-style pattern on the group's name (``/encoder/*/MatMul``).
        form: float, static, static-float, dynamic or weight-only; None leaves the choice open.
        estimator: range estimator of the group's activations; None is the recipe's.
    """

    match: str
    form: Form | None = None
    estimator: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Named defaults.

    Attributes:
        name: as given to ``--recipe``.
        doc: one sentence.
        scheme: name of the target's scheme: the formats of activations and weights (int8, fp8, int4-weights...).
        block: elements of K that share one weight scale, where the scheme has blocks; 0 is the scheme's own size.
        choose: whether forms are chosen by measurement (otherwise by the forms below).
        convolution: form of convolutions.
        matmul: form of MatMul and Gemm with constant weights.
        recurrent: form of LSTM.
        arithmetic: whether operators between quantized ones run on integers too.
        estimator: range estimator of activations.
        min_sqnr: least SQNR per output in dB that the accuracy guard demands.
        min_sqnr_classes: the same for class-like outputs, which the arg-max agreement guards as well.
        min_sqnr_state: the same for outputs that are fed back as a state, where errors accumulate.
        min_agreement: least share of rows with the same arg-max, for class-like outputs.
        passes: pipeline of FLOAT passes that every build runs on the canonical graph, before it calibrates; statistics
            that were gathered without them are refused if they change the graph.
        overrides: pinned groups; later ones win.
    """

    name: str
    doc: str = ""
    scheme: str = "int8"
    block: int = 0
    choose: bool = False
    convolution: Form = "static"
    matmul: Form = "dynamic"
    recurrent: Form = "dynamic"
    arithmetic: bool = True
    estimator: str = "min-max"
    min_sqnr: float = 18.0
    min_sqnr_classes: float = 15.0
    min_sqnr_state: float = 30.0
    min_agreement: float = 0.97
    passes: str = ""
    overrides: tuple[Override, ...] = field(default_factory=tuple)

    def on(self, target: Target) -> Target:
        """Return a target's table in this recipe's scheme; one that the target names as the recipe itself goes first.

        Raises:
            TargetError: the target has no such scheme.
        """
        return target.with_scheme(self.name if self.name in target.scheme_tables else self.scheme, self.block)

    def pinned(self, groups: Mapping[str, tuple[Form, ...]]) -> tuple[dict[str, Form], dict[str, str]]:
        """Return (form, estimator) per pinned group.

        Args:
            groups: legal forms by group name.

        Raises:
            PassError: a pattern matches nothing, or pins a form that a matching group cannot have.
        """
        forms: dict[str, Form] = {}
        estimators: dict[str, str] = {}
        for override in self.overrides:
            names = [n for n in groups if fnmatch.fnmatchcase(n, override.match)]
            if not names:
                known = ", ".join(list(groups)[:5])
                raise PassError(f"override {override.match!r} matches no group; groups are named like: {known}")
            for name in names:
                if override.form is not None:
                    if override.form != "float" and override.form not in groups[name]:
                        legal = ", ".join(("float", *groups[name]))
                        raise PassError(
                            f"override {override.match!r}: {name} cannot be {override.form}; it can be {legal}"
                        )
                    forms[name] = override.form
                if override.estimator is not None:
                    estimators[name] = override.estimator
        return forms, estimators


def parse_recipe(text: str, name: str) -> Recipe:
    """Read a recipe, or a file of overrides, from TOML text.

    Raises:
        PassError: not TOML, or a key or form that does not exist.
    """
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PassError(f"recipe {name}: {error}") from error
    rows = data.pop("override", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PassError(f"recipe {name}: expected [[override]] tables, found override = {rows!r}")
    overrides = tuple(_override(row, name) for row in rows)
    known = {f.name for f in fields(Recipe)}
    if unknown := set(data) - known:
        raise PassError(f"recipe {name}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(sorted(known))}")
    for key, value in data.items():
        kind = type(getattr(Recipe(name), key))
        # bool is an int, but no number; a whole number is a fine float.
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise PassError(f"recipe {name}: {key} is {value!r}; expected a {kind.__name__}")
    if (block := data.get("block", 0)) < 0 or block & (block - 1):
        raise PassError(f"recipe {name}: block is {block}; expected a power of two, or 0 for the scheme's own size")
    for key in ("convolution", "matmul", "recurrent"):
        if data.get(key, "float") not in FORMS:
            raise PassError(f"recipe {name}: {key} is {data[key]!r}; expected one of {', '.join(FORMS)}")
    return Recipe(**{"name": name, **data, "overrides": overrides})


def _override(row: dict[str, Any], name: str) -> Override:
    known = {f.name for f in fields(Override)}
    if unknown := set(row) - known:
        raise PassError(f"recipe {name}: unknown key {sorted(unknown)[0]!r} in [[override]]; known: {', '.join(known)}")
    if "match" not in row:
        raise PassError(f"recipe {name}: an [[override]] lacks 'match'")
    if wrong := [key for key, value in row.items() if not isinstance(value, str)]:
        raise PassError(f"recipe {name}: {wrong[0]} is {row[wrong[0]]!r} in [[override]]; expected a text")
    if row.get("form", "float") not in FORMS:
        raise PassError(f"recipe {name}: form is {row['form']!r}; expected one of {', '.join(FORMS)}")
    return Override(**row)


def recipe_names() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    folder = resources.files("qcompiler.recipes")
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def known_recipes() -> tuple[str, ...]:
    """Return the names of the shipped recipes, then of those that installed packages offer; none is loaded."""
    shipped = recipe_names()
    return (*shipped, *offered_names(RECIPES, shipped))


def recipe_owner(name: str) -> str:
    """Return the distribution (with its version) that offers a recipe, empty for a shipped one.

    Raises:
        PluginError: two packages offer it.
    """
    offer = None if name in recipe_names() else find_offer(RECIPES, name)
    return "" if offer is None else offer.source


def recipe_errors() -> tuple[PluginError, ...]:
    """Load the recipes of all installed packages and return what is wrong with them."""
    shipped = recipe_names()
    found = list(conflicts(RECIPES, shipped))
    told = set(map(str, found))
    for name in offered_names(RECIPES, shipped):
        try:
            load_recipe(name)
        except PluginError as error:
            if str(error) not in told:
                found.append(error)
    return tuple(found)


def load_recipe(name: str) -> Recipe:
    """Return a recipe by name, shipped or of an installed package, or one from a TOML file by path.

    Raises:
        PassError: no such recipe; the text lists those there are.
        PluginError: a package offers the recipe, but it cannot be read; names the package.
    """
    if name in recipe_names():
        text = resources.files("qcompiler.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
        return parse_recipe(text, name)
    if (offer := find_offer(RECIPES, name)) is not None:
        text = offer.text()
        try:
            return parse_recipe(text, name)
        except PassError as error:
            raise offer.error(f"is no recipe: {error}") from error
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return parse_recipe(path.read_text(encoding="utf-8"), path.stem)
    raise PassError(f"unknown recipe {name!r}; known: {', '.join(known_recipes())}, or the path of a .toml file")
