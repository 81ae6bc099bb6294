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
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
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
NONE = "none"


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
            f"uninstall {self.owner}, or go on without other packages: {PLUGINS}={NONE}"
        )


def offers(group: str) -> tuple[Offer, ...]:
    """Return what installed packages offer in a group, by name and owner; only metadata is read.

    Packages whose entry points cannot be read are left out; `unreadable` names them.

    Raises:
        PluginError: the environment variable names a distribution that is not installed, or that cannot be read.
    """
    wanted = os.environ.get(PLUGINS, "")
    if wanted.strip().lower() == NONE:
        return ()
    return _scan(group, wanted, *_installed_now())


def unreadable() -> tuple[PluginError, ...]:
    """Return an error for every installed distribution, of those in use, whose entry points cannot be read."""
    used = _used(os.environ.get(PLUGINS, ""))
    if used == {NONE}:
        return ()
    broken = _installed(*_installed_now()).broken
    return tuple(_unreadable(owner, why) for owner, why in broken.items() if not used or _normal(owner) in used)


def _unreadable(owner: str, reason: str) -> PluginError:
    return PluginError(
        f"the entry points of {owner} cannot be read: {reason}; mend, update or uninstall {owner}, or go on without "
        f"other packages: {PLUGINS}={NONE}"
    )


Times = tuple[tuple[str, int], ...]
"""Paths, each with the time of its last change in ns."""


def _installed_now() -> tuple[Times, Times]:
    """Return what tells whether anything was installed, removed or edited: folders that are searched, and metadata."""
    folders = _times(entry or os.curdir for entry in sys.path)
    return folders, _times(_records(folders))


def _times(paths: Iterable[str]) -> Times:
    found = []
    for path in paths:
        try:
            found.append((path, os.stat(path).st_mtime_ns))
        except OSError:
            continue
    return tuple(found)


@lru_cache(maxsize=16)
def _records(folders: Times) -> tuple[str, ...]:
    """Return the entry points of every installed distribution, or the metadata's folder where it has none.

    A file that is written into changes its own time only, one that is made or replaced the folder's.
    """
    found = []
    for folder, _ in folders:
        try:
            names = os.listdir(folder)
        except OSError:
            continue  # a zip file, or one that may not be read
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                points = os.path.join(folder, name, "entry_points.txt")
                found.append(points if os.path.exists(points) else os.path.dirname(points))
    return tuple(found)


@lru_cache(maxsize=64)
def _scan(group: str, wanted: str, folders: Times, records: Times) -> tuple[Offer, ...]:
    """Read the metadata once for each state of the search path: rules are asked for at every pass of every round."""
    used, there = _used(wanted), _installed(folders, records)
    for name in sorted(used - there.names):
        known = ", ".join(sorted({o.owner for o in there.offers})) or "nothing"
        raise PluginError(f"{PLUGINS} names {name!r}, which is not installed; installed and of use: {known}")
    for owner, why in there.broken.items():
        if _normal(owner) in used:
            raise _unreadable(owner, why)
    found = [o for o in there.offers if o.group == group and (not used or _normal(o.owner) in used)]
    return tuple(sorted(dict.fromkeys(found), key=lambda o: (o.name, _normal(o.owner))))


@dataclass(frozen=True)
class _Installed:
    """What is installed: offers, all distributions' names as `_normal` writes them, and why some cannot be read."""

    offers: tuple[Offer, ...]
    names: frozenset[str]
    broken: Mapping[str, str]


@lru_cache(maxsize=16)
def _installed(folders: Times, records: Times) -> _Installed:
    """Read the metadata of everything on the search path; the arguments are only the cache's key."""
    found: list[Offer] = []
    names: set[str] = set()
    broken: dict[str, str] = {}
    for dist in metadata.distributions():
        name, version = _folder_name(dist)
        if _normal(name) in names:
            continue  # what comes first on the search path is what is imported
        names.add(_normal(name))
        try:
            points = [p for p in dist.entry_points if p.group in GROUPS]
        except Exception as error:  # whatever another package's installer has written
            broken[name] = f"{type(error).__name__}: {error}"
            continue
        if points:
            name, version = _told_name(dist, name, version)
            names.add(_normal(name))
            found += [Offer(p.group, p.name, p.value, name, version) for p in points]
    return _Installed(tuple(found), frozenset(names), broken)


def _folder_name(dist: metadata.Distribution) -> tuple[str, str]:
    """Return (name, version) as the metadata's folder says them; reading the metadata of hundreds would take long."""
    path = getattr(dist, "_path", None)
    if path is None:
        return _told_name(dist, "an unknown package", "")
    name, _, rest = Path(str(path)).name.rpartition(".")[0].partition("-")
    return name or "an unknown package", rest.partition("-")[0]


def _told_name(dist: metadata.Distribution, name: str, version: str) -> tuple[str, str]:
    """Return (name, version) as the metadata says them, or those given where it does not."""
    try:
        return str(dist.metadata["Name"] or name), str(dist.metadata["Version"] or version)
    except Exception:  # no such file, or one that cannot be read: the kinds of errors differ by Python's version
        return name, version


def _used(wanted: str) -> set[str]:
    return {_normal(name) for name in wanted.split(",") if name.strip()}


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
    """Return an error for every offer whose name is taken, and for every package that cannot be read.

    What qcompiler ships keeps its name: such an offer is never used.
    """
    found = list(unreadable())
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
