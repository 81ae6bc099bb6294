"""Arguments that are given for all graphs of a build, or for each by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from qcompiler.errors import ModelError

T = TypeVar("T")
_NAME = re.compile(r"[^/\\<>:]+")


def one_of(given: Mapping[str, T] | None, name: str) -> T | None:
    """Return what is given for one graph."""
    return None if given is None else given.get(name)


def option_of(given: T | Mapping[str, T] | None, name: str) -> T | None:
    """Return what is given for one graph, or for all."""
    return given.get(name) if isinstance(given, Mapping) else given


def check_graphs(names: Sequence[str], given: Mapping[str, object]) -> None:
    """Check that tables have graphs as their keys.

    Args:
        names: the graphs.
        given: arguments by their name; what is no table is for all graphs.

    Raises:
        ModelError: names the argument and the key.
    """
    for argument, value in given.items():
        for key in value if isinstance(value, Mapping) else ():
            if key not in names:
                raise ModelError(
                    f"{argument} is given for {key!r}, which is no graph of this build: {', '.join(map(str, names))}"
                )


def split_texts(texts: Sequence[str] | None, names: Sequence[str], option: str) -> dict[str, list[str]]:
    """Sort an option's values by graph: ``NAME=VALUE`` is for one graph, a bare ``VALUE`` for all.

    Args:
        texts: the values as typed.
        names: the graphs.
        option: its name, for messages.

    Raises:
        ModelError: ``NAME=`` of a graph that there is not, or without a value.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if equals and name in found:
            if not value:
                raise ModelError(f"{option} {text}: expected NAME=VALUE")
            found[name].append(value)
        elif equals and _NAME.fullmatch(name) and not Path(text).exists():
            raise ModelError(f"{option} {text}: there is no graph {name!r}; the graphs are: {', '.join(names)}")
        else:
            for values in found.values():
                values.append(text)
    return found


def single_values(found: Mapping[str, Sequence[str]], option: str) -> dict[str, str]:
    """Return the one value of each graph that has one.

    Raises:
        ModelError: a graph has several.
    """
    for name, values in found.items():
        if len(values) > 1:
            raise ModelError(f"{option} is given more than once for {name}: {', '.join(values)}")
    return {name: values[0] for name, values in found.items() if values}
