"""The passes there are, by name: those shipped, and those other packages offer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qcompiler.errors import PassError
from qcompiler.ir.phase import Phase
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract
from qcompiler.pipeline.parse import OptionInfo, PassText, build_pass, near, option_infos
from qcompiler.plugins import PASSES, Offer, PluginError, conflicts, offers, taken


@dataclass(frozen=True)
class PassInfo:
    """What ``qcompiler passes`` shows of a pass.

    Attributes:
        name: as written in a pipeline.
        doc: first line of its docstring.
        options: names, types and defaults.
        needs: phases the graph may be in.
        gives: phase afterwards; None leaves it.
        numerics: how far the numbers may move.
        owner: the distribution that offers it, empty for one that is shipped.
    """

    name: str
    doc: str
    options: tuple[OptionInfo, ...]
    needs: tuple[Phase, ...]
    gives: Phase | None
    numerics: Contract
    owner: str = ""


def needed_phases(step: Pass | type[Pass]) -> tuple[Phase, ...]:
    """Return the phases that a pass accepts."""
    return step.needs if isinstance(step.needs, tuple) else (step.needs,)


class PassRegistry:
    """Pass classes by name; a value, made once from an explicit list.

    What other packages offer is loaded when it is asked for: a broken package breaks nothing else.
    """

    def __init__(self, passes: Iterable[type[Pass]], offered: Iterable[Offer] = ()) -> None:
        """Index the classes by name.

        Args:
            passes: the classes.
            offered: entry points of other packages; one whose name is taken by a class is never used.

        Raises:
            PassError: two classes have the same name.
        """
        self._classes: dict[str, type[Pass]] = {}
        self._offers: dict[str, list[Offer]] = {}
        for cls in passes:
            other = self._classes.setdefault(cls.name(), cls)
            if other is not cls:
                raise PassError(
                    f"two passes are named {cls.name()}: {other.__module__}.{other.__qualname__} "
                    f"and {cls.__module__}.{cls.__qualname__}; rename one (pass_name)"
                )
        for offer in offered:
            if offer.name not in self._classes:
                self._offers.setdefault(offer.name, []).append(offer)

    def with_entry_points(self) -> PassRegistry:
        """Return a registry that also knows the passes offered by installed packages; none of them is loaded yet."""
        return PassRegistry(self._classes.values(), offers(PASSES))

    def with_passes(self, passes: Iterable[type[Pass]]) -> PassRegistry:
        """Return a registry that has more classes.

        Raises:
            PassError: a name is taken.
        """
        more = tuple(passes)
        for cls in more:
            if cls.name() in self._offers:
                owner = self._offers[cls.name()][0].source
                raise PassError(
                    f"two passes are named {cls.name()}: one is offered by {owner}; rename yours (pass_name)"
                )
        return PassRegistry((*self._classes.values(), *more), (o for found in self._offers.values() for o in found))

    def __iter__(self) -> Iterator[type[Pass]]:
        """Yield the classes that are at hand, then those offered that can be loaded."""
        yield from self._classes.values()
        for name in sorted(self._offers):
            try:
                yield self.get(name)
            except PluginError:
                continue

    def __contains__(self, name: str) -> bool:
        return name in self._classes or name in self._offers

    def names(self) -> tuple[str, ...]:
        """Return the names in alphabetical order."""
        return tuple(sorted({*self._classes, *self._offers}))

    def get(self, name: str) -> type[Pass]:
        """Return a pass class by name.

        Raises:
            PassError: there is none; the text lists near names.
            PluginError: a package offers it, but it cannot be loaded, is no pass of this name, or two packages do.
        """
        if name in self._classes:
            return self._classes[name]
        if name not in self._offers:
            raise PassError(f"unknown pass {name!r}{near(name, self.names())}")
        first, *others = self._offers[name]
        if others:
            raise taken(others[0], first.source)
        loaded = first.load()
        if not (inspect.isclass(loaded) and issubclass(loaded, Pass)):
            raise first.error("is not a pass class: expected one derived from qcompiler.pipeline.base.Pass")
        if loaded.name() != name:
            raise first.error(f"offers the pass {loaded.name()}: the two names must be the same")
        return loaded

    def owner(self, name: str) -> str:
        """Return the distribution (with its version) that offers a pass, empty for one that is at hand."""
        return "" if name in self._classes or name not in self._offers else self._offers[name][0].source

    def errors(self) -> tuple[PluginError, ...]:
        """Load everything that is offered and return what is wrong with it."""
        found = list(conflicts(PASSES, self._classes))
        for name, of in self._offers.items():
            if len(of) == 1:
                try:
                    self.get(name)
                except PluginError as error:
                    found.append(error)
        return tuple(found)

    def build(self, text: PassText) -> Pass:
        """Return the pass that a piece of a pipeline string asks for.

        Raises:
            PassError: the pass or an option is unknown or malformed.
        """
        return build_pass(self.get(text.name), text.options)

    def infos(self) -> tuple[PassInfo, ...]:
        """Describe every pass that can be loaded, in alphabetical order."""
        return tuple(sorted((pass_info(cls, self.owner(cls.name())) for cls in self), key=lambda info: info.name))


def pass_info(cls: type[Pass], owner: str = "") -> PassInfo:
    """Describe one pass class."""
    doc = (inspect.getdoc(cls) or "").strip().splitlines()
    first = doc[0] if doc else ""
    return PassInfo(cls.name(), first, option_infos(cls), needed_phases(cls), cls.gives, cls.numerics, owner)
