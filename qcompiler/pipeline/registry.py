"""The passes there are, by name: those shipped, and those other packages offer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

from qcompiler.errors import PassError
from qcompiler.ir.phase import Phase
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract
from qcompiler.pipeline.parse import OptionInfo, PassText, build_pass, near, option_infos

ENTRY_POINTS = "qcompiler.passes"
"""Entry point group under which a package offers its pass classes."""


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
    """

    name: str
    doc: str
    options: tuple[OptionInfo, ...]
    needs: tuple[Phase, ...]
    gives: Phase | None
    numerics: Contract


def needed_phases(step: Pass | type[Pass]) -> tuple[Phase, ...]:
    """Return the phases that a pass accepts."""
    return step.needs if isinstance(step.needs, tuple) else (step.needs,)


class PassRegistry:
    """Pass classes by name; a value, made once from an explicit list."""

    def __init__(self, passes: Iterable[type[Pass]]) -> None:
        """Index the classes by name.

        Raises:
            PassError: two classes have the same name.
        """
        self._classes: dict[str, type[Pass]] = {}
        for cls in passes:
            other = self._classes.setdefault(cls.name(), cls)
            if other is not cls:
                raise PassError(
                    f"two passes are named {cls.name()}: {other.__module__}.{other.__qualname__} "
                    f"and {cls.__module__}.{cls.__qualname__}; rename one (pass_name)"
                )

    def with_entry_points(self) -> PassRegistry:
        """Return a registry that also holds the passes offered by installed packages.

        Raises:
            PassError: an entry point cannot be loaded or is no pass; names the package.
        """
        found: list[type[Pass]] = []
        for point in metadata.entry_points(group=ENTRY_POINTS):
            owner = point.dist.name if point.dist is not None else "an unknown package"
            try:
                loaded = point.load()
            except Exception as error:  # another package's import can raise anything
                raise PassError(f"entry point {point.name} of {owner} cannot be loaded: {error}") from error
            if not (inspect.isclass(loaded) and issubclass(loaded, Pass)):
                raise PassError(f"entry point {point.name} of {owner} is not a pass class: {point.value}")
            found.append(loaded)
        return PassRegistry((*self._classes.values(), *found))

    def __iter__(self) -> Iterator[type[Pass]]:
        return iter(self._classes.values())

    def __contains__(self, name: str) -> bool:
        return name in self._classes

    def names(self) -> tuple[str, ...]:
        """Return the names in alphabetical order."""
        return tuple(sorted(self._classes))

    def get(self, name: str) -> type[Pass]:
        """Return a pass class by name.

        Raises:
            PassError: there is none; the text lists near names.
        """
        if name not in self._classes:
            raise PassError(f"unknown pass {name!r}{near(name, self._classes)}")
        return self._classes[name]

    def build(self, text: PassText) -> Pass:
        """Return the pass that a piece of a pipeline string asks for.

        Raises:
            PassError: the pass or an option is unknown or malformed.
        """
        return build_pass(self.get(text.name), text.options)

    def infos(self) -> tuple[PassInfo, ...]:
        """Describe every pass, in alphabetical order."""
        return tuple(pass_info(self._classes[name]) for name in self.names())


def pass_info(cls: type[Pass]) -> PassInfo:
    """Describe one pass class."""
    doc = (inspect.getdoc(cls) or "").strip().splitlines()
    return PassInfo(cls.name(), doc[0] if doc else "", option_infos(cls), needed_phases(cls), cls.gives, cls.numerics)
