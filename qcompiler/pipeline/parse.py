"""The text form of passes and pipelines: ``fold-constants,fuse-qdq-mat-mul{per-channel=false}``.

::

    pipeline = [ pass { "," pass } ]
    pass     = name [ "{" option { "," option } "}" ]
    option   = name "=" value
    value    = "[" [ value { ";" value } ] "]" | JSON string | word

A word is read by the type of the option: ``true``, ``false``, ``none``, a number or text. Text that could be read as
something else is written as a JSON string.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, NoReturn

from qcompiler.errors import PassError
from qcompiler.pipeline.base import Pass

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_WORD = re.compile(r"[^\s\[\]{},;=\"]+")
_PLAIN_TEXT = re.compile(r"[A-Za-z_*/][\w.*/:?@#+-]*", re.ASCII)
_KEYWORDS = frozenset({"none", "true", "false", "inf", "infinity", "nan"})
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class _Word:
    """An unquoted or a quoted value."""

    text: str
    quoted: bool = False


_Raw = _Word | list[Any]


@dataclass(frozen=True)
class PassText:
    """One pass as written: its name and its options, not yet read by type."""

    name: str
    options: tuple[tuple[str, _Raw], ...] = ()


@dataclass(frozen=True)
class OptionInfo:
    """One option of a pass: its name in text, its type in words, and its default in text (None if it has none)."""

    name: str
    type: str
    default: str | None


def near(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean ...`` with the known names nearest to ``name``, or the known names themselves."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(names) or 'none'}"


# ---- reading ------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, expected: str) -> NoReturn:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        raise PassError(f"pipeline {self.text!r}: expected {expected} at position {self.at}, found {found}")

    def skip(self) -> None:
        found = _SPACE.match(self.text, self.at)
        assert found is not None
        self.at = found.end()

    def take(self, mark: str) -> bool:
        """Consume ``mark`` if it is next."""
        self.skip()
        if self.text.startswith(mark, self.at):
            self.at += len(mark)
            return True
        return False

    def name(self, what: str) -> str:
        self.skip()
        found = _NAME.match(self.text, self.at)
        if found is None:
            self.fail(what)
        self.at = found.end()
        return found[0]

    def passes(self) -> Iterator[PassText]:
        self.skip()
        if self.at == len(self.text):
            return
        while True:
            name = self.name("the name of a pass")
            yield PassText(name, tuple(self.options(name)) if self.take("{") else ())
            self.skip()
            if self.at == len(self.text):
                return
            if not self.take(","):
                self.fail("',' or '{'" if self.text[self.at - 1] != "}" else "','")

    def options(self, of: str) -> Iterator[tuple[str, _Raw]]:
        while True:
            option = self.name(f"an option of {of}")
            if not self.take("="):
                self.fail(f"'=' after option {option}")
            yield option, self.value()
            if self.take("}"):
                return
            if not self.take(","):
                self.fail("',' or '}'")

    def value(self) -> _Raw:
        self.skip()
        if self.take("["):
            return self.items()
        if self.text.startswith('"', self.at):
            try:
                value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
            except ValueError:
                self.fail("a complete JSON string")
            return _Word(str(value), quoted=True)
        found = _WORD.match(self.text, self.at)
        if found is None:
            self.fail("a value")
        self.at = found.end()
        return _Word(found[0])

    def items(self) -> list[Any]:
        made: list[Any] = []
        if self.take("]"):
            return made
        while True:
            made.append(self.value())
            if self.take("]"):
                return made
            if not self.take(";"):
                self.fail("';' or ']'")


def read_passes(text: str) -> tuple[PassText, ...]:
    """Split a pipeline string into passes and options.

    Raises:
        PassError: the text does not follow the grammar; names the position.
    """
    return tuple(_Reader(text).passes())


# ---- options by type ----------------------------------------------------------------------------------------------


def option_name(field: str) -> str:
    """Return the name of a field in text: ``per_channel`` is ``per-channel``."""
    return field.replace("_", "-")


def _options(cls: type[Pass]) -> dict[str, tuple[Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {option_name(f.name): (f, hints[f.name]) for f in fields(cls) if f.init}


def _union(kind: Any) -> tuple[Any, ...] | None:
    """Return the members of a union in the order in which a value is tried against them."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return None
    order = [types.NoneType, bool, int, float]
    rank = {member: i for i, member in enumerate(order)}
    return tuple(sorted(typing.get_args(kind), key=lambda m: rank.get(m, len(order) + (m is str))))


def type_text(kind: Any) -> str:
    """Return an option's type in words: ``int or none``, ``list of text``, ``min-max or percentile``."""
    if (members := _union(kind)) is not None:
        return " or ".join(type_text(m) for m in sorted(members, key=lambda m: m is types.NoneType))
    if typing.get_origin(kind) is Literal:
        return " or ".join(print_value(v) for v in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"list of {type_text(typing.get_args(kind)[0])}"
    words = {bool: "true or false", int: "int", float: "float", str: "text", types.NoneType: "none"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _read(raw: _Raw, kind: Any) -> Any:
    """Read a value by type; ValueError if it does not fit."""
    if (members := _union(kind)) is not None:
        for member in members:
            try:
                return _read(raw, member)
            except ValueError:
                continue
        raise ValueError
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(raw, list):
            raise ValueError
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_read(item, arguments[0]) for item in raw)
        return tuple(_read(item, member) for item, member in zip(raw, arguments, strict=True))
    if not isinstance(raw, _Word):
        raise ValueError
    if origin is Literal:
        fitting = [value for value in arguments if _literal(raw, value)]
        if not fitting:
            raise ValueError
        return fitting[0]
    return _read_word(raw, kind)


def _literal(raw: _Word, value: Any) -> bool:
    try:
        return bool(_read_word(raw, type(value)) == value)
    except ValueError:
        return False


def _read_word(raw: _Word, kind: Any) -> Any:
    if kind is str:
        return raw.text
    if raw.quoted:
        raise ValueError
    if kind is types.NoneType or kind is bool:
        words = {"none": None} if kind is types.NoneType else {"true": True, "false": False}
        if raw.text not in words:
            raise ValueError
        return words[raw.text]
    if kind is int or kind is float:
        return kind(raw.text)
    raise ValueError


def build_pass(cls: type[Pass], options: Iterable[tuple[str, _Raw]]) -> Pass:
    """Make a pass from its options as written.

    Raises:
        PassError: an option is unknown, given twice, missing, or of another type.
    """
    name, known = cls.name(), _options(cls)
    values: dict[str, Any] = {}
    for option, raw in options:
        if option not in known:
            if not known:
                raise PassError(f"pass {name} has no options, found {option!r}")
            raise PassError(f"pass {name} has no option {option!r}{near(option, known)}")
        field, kind = known[option]
        if field.name in values:
            raise PassError(f"pass {name}: option {option} is given twice")
        try:
            values[field.name] = _read(raw, kind)
        except ValueError:
            raise PassError(f"pass {name}: option {option} expects {type_text(kind)}, found {_raw_text(raw)}") from None
    for option, (field, _) in known.items():
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise PassError(f"pass {name} needs option {option}; write {name}{{{option}=...}}")
    try:
        return cls(**values)
    except ValueError as error:
        raise PassError(f"pass {name}: {error}") from error


def _raw_text(raw: _Raw) -> str:
    if isinstance(raw, list):
        return f"[{';'.join(_raw_text(r) for r in raw)}]"
    return json.dumps(raw.text) if raw.quoted else raw.text


# ---- printing -----------------------------------------------------------------------------------------------------


def print_value(value: object) -> str:
    """Return an option's value as text that reads back to an equal value.

    Raises:
        PassError: the value is of a type that has no text form.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        plain = _PLAIN_TEXT.fullmatch(value) is not None and value.lower() not in _KEYWORDS
        return value if plain else json.dumps(value)
    if isinstance(value, tuple):
        return f"[{';'.join(print_value(item) for item in value)}]"
    raise PassError(f"an option of type {type(value).__name__} has no text form; use bool, int, float, str or a tuple")


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


def _same(value: object, default: object) -> bool:
    """Return whether a value need not be printed (0 and False are equal, but not the same)."""
    return type(value) is type(default) and value == default


def print_pass(step: Pass) -> str:
    """Return a pass as text; only options that differ from their default are written."""
    shown = [
        f"{option}={print_value(getattr(step, field.name))}"
        for option, (field, _) in _options(type(step)).items()
        if not _same(getattr(step, field.name), _default(field))
    ]
    return step.name() + (f"{{{','.join(shown)}}}" if shown else "")


def option_infos(cls: type[Pass]) -> tuple[OptionInfo, ...]:
    """Return the options of a pass, in the order of its fields."""
    made = []
    for option, (field, kind) in _options(cls).items():
        default = _default(field)
        made.append(OptionInfo(option, type_text(kind), None if default is MISSING else print_value(default)))
    return tuple(made)
