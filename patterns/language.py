"""Patterns as values: what a rule looks for, under which conditions, and what it puts in place.

A pattern describes one *value* by the expression that computes it. The same variable twice means the same value;
commutative operators match both ways. Everything here is frozen and printable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.patterns.operators import AttributeValue

if TYPE_CHECKING:
    from qcompiler.patterns.builder import Builder
    from qcompiler.patterns.match import Match


@dataclass(frozen=True)
class Var:
    """Any value; the same name twice is the same value."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Const:
    """Any value whose contents are known at compile time."""

    name: str

    def __str__(self) -> str:
        return f"const {self.name}"


@dataclass(frozen=True)
class Number:
    """A constant of one element that equals ``value``.

    ``tol`` is relative (absolute where ``value`` is 0); it is widened to the resolution of the constant's own type. The
    constant may have axes of length 1 as long as they do not raise the rank of the result.
    """

    value: float
    tol: float = 1e-6
    name: str = ""

    def __str__(self) -> str:
        return f"{self.value:.6g}"


@dataclass(frozen=True)
class Maybe:
    """An optional input: absent, or matching ``inner``."""

    inner: Pattern

    def __str__(self) -> str:
        return f"[{self.inner}]"


@dataclass(frozen=True)
class Rest:
    """All remaining inputs, each matching ``each``; names inside are bound as ``name.index``.

    Without ``each`` absent inputs in the middle are let through and bind nothing.
    """

    name: str
    each: Pattern | None = None

    def __str__(self) -> str:
        return f"*{self.name}" if self.each is None else f"*{self.name}:{self.each}"


@dataclass(frozen=True)
class Op:
    """One operator (or one of several) reading the given inputs.

    Attributes:
        types: operator names.
        inputs: one pattern per input; absent trailing inputs are not listed. A node with more inputs does not match.
        domain: operator domain.
        attrs: required attribute values; the specification's default counts where the attribute is absent.
        name: the name under which the node and its output are bound.
        output: which output of the node the pattern stands for.
    """

    types: tuple[str, ...]
    inputs: tuple[Pattern | Maybe | Rest, ...]
    domain: str = ""
    attrs: tuple[tuple[str, AttributeValue], ...] = ()
    name: str = ""
    output: int = 0

    def __str__(self) -> str:
        head = "|".join(self.types)
        if self.domain:
            head = f"{self.domain}.{head}"
        if self.attrs:
            head += "{" + ", ".join(f"{k}={v}" for k, v in self.attrs) + "}"
        if self.output:
            head += f"#{self.output}"
        text = f"{head}({', '.join(map(str, self.inputs))})"
        return f"{self.name}={text}" if self.name else text


@dataclass(frozen=True)
class AnyOf:
    """The first of several patterns that matches (later ones are tried if a clause refuses)."""

    options: tuple[Pattern, ...]

    def __str__(self) -> str:
        return "(" + " | ".join(map(str, self.options)) + ")"


@dataclass(frozen=True)
class Opt:
    """An operator of one data input around ``inner``, present or not (an activation); further inputs are constants."""

    types: tuple[str, ...]
    inner: Pattern
    name: str = ""

    def __str__(self) -> str:
        label = f"{self.name}=" if self.name else ""
        return f"{label}{'|'.join(self.types)}?({self.inner})"


@dataclass(frozen=True)
class Repeat:
    """A chain of ``at_least`` to ``at_most`` operators, linked by their first input, that ends in ``inner``."""

    types: tuple[str, ...]
    inner: Pattern
    name: str
    at_least: int = 0
    at_most: int = 8

    def __str__(self) -> str:
        return f"{self.name}={'|'.join(self.types)}{{{self.at_least},{self.at_most}}}({self.inner})"


Pattern = Var | Const | Number | Op | AnyOf | Opt | Repeat


def var(name: str) -> Var:
    """Match any value and bind it."""
    return Var(name)


def const(name: str) -> Const:
    """Match any constant and bind it."""
    return Const(name)


def number(value: float, tol: float = 1e-6, name: str = "") -> Number:
    """Match a constant of one element by its value, ``tol`` relative."""
    return Number(value, tol, name)


def maybe(inner: Pattern) -> Maybe:
    """Match an input that may be absent."""
    return Maybe(inner)


def rest(name: str, each: Pattern | None = None) -> Rest:
    """Match all further inputs; ``Match.rest(name)`` returns them."""
    return Rest(name, each)


def _types(types: str | Sequence[str]) -> tuple[str, ...]:
    return (types,) if isinstance(types, str) else tuple(types)


def op(
    types: str | Sequence[str],
    *inputs: Pattern | Maybe | Rest,
    domain: str = "",
    attrs: Mapping[str, AttributeValue] | None = None,
    name: str = "",
    output: int = 0,
) -> Op:
    """Match the output of an operator, see `Op`."""
    return Op(_types(types), inputs, domain, tuple(sorted((attrs or {}).items())), name, output)


def any_of(*options: Pattern) -> AnyOf:
    """Match the first of several patterns."""
    return AnyOf(options)


def opt(types: str | Sequence[str], inner: Pattern, name: str = "") -> Opt:
    """Match ``inner`` with or without one of the operators around it."""
    return Opt(_types(types), inner, name)


def repeat(types: str | Sequence[str], inner: Pattern, name: str, at_least: int = 0, at_most: int = 8) -> Repeat:
    """Match a chain of operators around ``inner``; ``Match.chain(name)`` returns it, outermost first."""
    return Repeat(_types(types), inner, name, at_least, at_most)


@dataclass(frozen=True)
class Clause:
    """A named, pure condition on a match.

    ``check`` returns None, or why not: a kebab-case code, optionally followed by ``: `` and a sentence. A structural
    clause says what the pattern language cannot (an attribute's relation to a shape): its refusal is no near miss.
    """

    name: str
    check: Callable[[Match], str | None] = field(compare=False)
    structural: bool = False

    def __str__(self) -> str:
        return self.name


BuildResult = ir.Value | tuple[ir.Value, ...]


@dataclass(frozen=True)
class Rule:
    """One rewriting rule.

    Attributes:
        name: kebab-case, unique.
        match: the pattern of the value that is replaced; its root is an operator.
        where: conditions, tried in order.
        build: makes the replacement and returns it: one value, a tuple with one value per output of the root, or the
            root's own output where the root was edited in place.
        keeps: names of inner operators whose value may be used elsewhere too (they stay if it is).
        doc: one sentence.
    """

    name: str
    match: Pattern
    build: Callable[[Builder, Match], BuildResult] = field(compare=False)
    where: tuple[Clause, ...] = ()
    keeps: tuple[str, ...] = ()
    doc: str = ""

    def roots(self) -> tuple[tuple[str, str], ...]:
        """Return (domain, operator) of every node the rule can start from."""
        return tuple(dict.fromkeys(_roots(self.match)))

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.match}"]
        if self.where:
            lines.append("  where " + ", ".join(map(str, self.where)))
        if self.doc:
            lines.append(f"  {self.doc}")
        return "\n".join(lines)


def _roots(pattern: Pattern) -> list[tuple[str, str]]:
    if isinstance(pattern, Op):
        return [(pattern.domain, t) for t in pattern.types]
    if isinstance(pattern, AnyOf):
        return [root for option in pattern.options for root in _roots(option)]
    if isinstance(pattern, Opt):
        return [("", t) for t in pattern.types] + _roots(pattern.inner)
    if isinstance(pattern, Repeat):
        wrappers = [("", t) for t in pattern.types]
        return wrappers if pattern.at_least else wrappers + _roots(pattern.inner)
    raise ValueError(f"a rule starts at an operator, not at {pattern}")


def rule(
    name: str,
    *,
    match: Pattern,
    build: Callable[[Builder, Match], BuildResult],
    where: Sequence[Clause] = (),
    keeps: Sequence[str] = (),
    doc: str = "",
) -> Rule:
    """Make a rule, see `Rule`.

    Raises:
        ValueError: the pattern does not start at an operator.
    """
    made = Rule(name, match, build, tuple(where), tuple(keeps), doc)
    made.roots()
    return made
