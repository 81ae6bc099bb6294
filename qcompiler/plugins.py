"""What other installed packages offer: passes, rules, targets and recipes, by entry points.

A package offers something by an entry point in one of four groups:

- ``qcompiler.passes``: NAME = the pass class of that name.
- ``qcompiler.rules``: NAME = rules (one, or a sequence) that the pass NAME tries behind its own.
- ``qcompiler.targets`` and ``qcompiler.recipes``: NAME = the package that holds NAME.toml, or the text of such a file.

Names are read from the installed metadata; nothing is imported until it is asked for, so that a broken package breaks
only what needs it. ``QCOMPILER_PLUGINS`` names the distributions to use, ``none`` uses none of them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from types import ModuleType
from typing import Any

from qcompiler.errors import PassError

PASSES = "qcompiler.passes"
RULES = "qcompiler.rules"
TARGETS = "qcompiler.targets"
RECIPES = "qcompiler.recipes"
GROUPS = (PASSES, RULES, TARGETS, RECIPES)

PLUGINS = "QCOMPILER_PLUGINS"
"""Environment variable: the distributions whose offers are used, joined by commas; ``none`` for none, unset for all."""


class PluginError(PassError):
    """Something that another package offers and that cannot be used; names the distribution and how to go on."""


@dataclass(frozen=True)
class Offer:
    """One entry point of an installed distribution.

    Attributes:
        group: one of `GROUPS`.
        name: what it is called; for rules the pass that tries them.
        value: ``module`` or ``module:object``.
        owner: the distribution's name.
        version: its version.
    """

    group: str
    name: str
    value: str
    owner: str
    version: str

    @property
    def source(self) -> str:
        """Return the distribution and its version."""
        return f"{self.owner} {self.version}".strip()

    def load(self) -> Any:
        """Import and return the object.

        Raises:
            PluginError: the import fails.
        """
        try:
            return metadata.EntryPoint(self.name, self.value, self.group).load()
        except Exception as error:  # another package's import can raise anything
            raise self.error(f"cannot be loaded: {type(error).__name__}: {error}") from error

    def text(self) -> str:
        """Return the TOML text of a target or a recipe.

        Raises:
            PluginError: there is no such file or text.
        """
        loaded = self.load()
        if isinstance(loaded, str):
            return loaded
        if not isinstance(loaded, ModuleType):
            raise self.error(f"is a {type(loaded).__name__}: expected a package with {self.name}.toml in it, or a text")
        try:
            return resources.files(loaded).joinpath(f"{self.name}.toml").read_text(encoding="utf-8")
        except (OSError, TypeError, ValueError) as error:
            raise self.error(f"has no {self.name}.toml in the package {self.value}: {error}") from error

    def error(self, reason: str) -> PluginError:
        """Return the error that says what is wrong with the offer, and how to go on without it."""
        return PluginError(
            f"entry point {self.name} of {self.source} ({self.group} = {self.value}) {reason}; mend, update or "
            f"uninstall {self.owner}, or go on without other packages: {PLUGINS}=none"
        )


def offers(group: str) -> tuple[Offer, ...]:
    """Return what installed packages offer in a group, by name and owner; only metadata is read."""
    return _scan(group, _search_path(), os.environ.get(PLUGINS, ""))


def _search_path() -> tuple[tuple[str, int], ...]:
    """Return the folders that packages are found in, each with the time of its last change."""
    found = []
    for entry in sys.path:
        try:
            found.append((entry, os.stat(entry or os.curdir).st_mtime_ns))
        except OSError:
            continue
    return tuple(found)


@lru_cache(maxsize=64)
def _scan(group: str, path: tuple[tuple[str, int], ...], wanted: str) -> tuple[Offer, ...]:
    """Read the metadata once for each search path: rules are asked for at every pass of every round."""
    used = {_normal(name) for name in wanted.split(",") if name.strip()}
    found = [o for o in _installed(path) if o.group == group and (not used or _normal(o.owner) in used)]
    return tuple(sorted(dict.fromkeys(found), key=lambda o: (o.name, _normal(o.owner))))


@lru_cache(maxsize=16)
def _installed(path: tuple[tuple[str, int], ...]) -> tuple[Offer, ...]:
    """Read the metadata of everything on the search path, which is only the cache's key."""
    found = []
    for point in (p for group in GROUPS for p in metadata.entry_points(group=group)):
        owner, version = ("an unknown package", "") if point.dist is None else (point.dist.name, point.dist.version)
        found.append(Offer(point.group, point.name, point.value, owner, version))
    return tuple(found)


def _normal(name: str) -> str:
    """Return a distribution's name as the index compares them (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def find_offer(group: str, name: str) -> Offer | None:
    """Return the offer of a name, or None.

    Raises:
        PluginError: two packages offer it.
    """
    found = [offer for offer in offers(group) if offer.name == name]
    if len(found) > 1:
        raise taken(found[1], found[0].source)
    return found[0] if found else None


def taken(offer: Offer, by: str) -> PluginError:
    """Return the error that another one has the name of an offer already."""
    return offer.error(f"has a name that {by} has already")


def conflicts(group: str, shipped: Collection[str]) -> tuple[PluginError, ...]:
    """Return an error for every offer whose name qcompiler itself or another package has already.

    What qcompiler ships keeps its name: such an offer is never used.
    """
    found: list[PluginError] = []
    seen: dict[str, Offer] = {}
    for offer in offers(group):
        if offer.name in shipped:
            found.append(taken(offer, "qcompiler itself"))
        elif offer.name in seen:
            found.append(taken(offer, seen[offer.name].source))
        seen.setdefault(offer.name, offer)
    return tuple(found)


def offered_names(group: str, shipped: Collection[str]) -> tuple[str, ...]:
    """Return the names that packages add to those shipped, in alphabetical order."""
    return tuple(sorted({offer.name for offer in offers(group)} - set(shipped)))


def plugin_versions() -> dict[str, str]:
    """Return version by name of every distribution that offers something, for records of what a build depends on."""
    return {o.owner: o.version for o in sorted((o for g in GROUPS for o in offers(g)), key=lambda o: o.owner)}


def plugins_text() -> str:
    """Return the distributions that offer something, with their versions, as one text; empty if there are none."""
    return ", ".join(f"{name} {version}".strip() for name, version in plugin_versions().items())
