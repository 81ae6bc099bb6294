"""What an engine refuses, or computes otherwise than ONNX says, as data: one row per rule, one name per diagnostic."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, get_args

import onnx_ir as ir

from qcompiler.errors import TargetError
from qcompiler.ir.graph import origins
from qcompiler.targets.legality_checks import CHECKS, Check
from qcompiler.targets.quantized_view import QuantizedView

Severity = Literal["error", "loss"]

_CODE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_VERSION = re.compile(r"\d+(\.\d+)*")


@dataclass(frozen=True)
class Diagnostic:
    """One breach of a rule.

    Attributes:
        code: the rule's name.
        severity: ``error`` (the engine refuses the graph, or computes other numbers) or ``loss`` (it runs in float).
        node: name of the node, empty where the rule is about the whole model.
        origin: names of the imported nodes it comes from, joined by ``;``; empty if unknown.
        text: what was found against what is expected.
        advice: what to do next.
    """

    code: str
    severity: Severity
    node: str
    origin: str
    text: str
    advice: str

    def __str__(self) -> str:
        """Return one line."""
        place = f"{self.node or 'the model'}" + (f" ({self.origin})" if self.origin not in ("", self.node) else "")
        return f"{self.severity} {self.code}: {place}: {self.text}; {self.advice}"


@dataclass(frozen=True)
class LegalityRow:
    """One rule.

    Attributes:
        code: name of its diagnostic, kebab-case, unique in the table.
        check: the predicate with its parameters.
        severity: see `Diagnostic`.
        why: the evidence.
        advice: what a user does about it.
        flavours: libraries the rule is for; empty for all.
        since: by flavour, the version from which on the rule holds.
        until: by flavour, the first version for which it no longer holds.
        sm_below: the rule holds for compute capabilities below this one (89 is 8.9); 0 for all.
        stricter: why we refuse what the engine's parser and builder take; empty where they refuse it, too.
    """

    code: str
    check: Check
    severity: Severity
    why: str
    advice: str
    flavours: tuple[str, ...] = ()
    since: dict[str, str] = field(default_factory=dict)
    until: dict[str, str] = field(default_factory=dict)
    sm_below: int = 0
    stricter: str = ""

    def holds(self, sm: int, version: str, flavour: str) -> bool:
        """Return whether the rule is about a library of this version on this compute capability."""
        if self.flavours and flavour not in self.flavours:
            return False
        if flavour in self.since and _number(version) < _number(self.since[flavour]):
            return False
        if flavour in self.until and _number(version) >= _number(self.until[flavour]):
            return False
        return not self.sm_below or sm < self.sm_below


@dataclass(frozen=True)
class Legality:
    """The rules of one engine.

    Attributes:
        engine: name of the table.
        flavours: libraries that the table knows; the first is the default.
        versions: by flavour, the version that was checked, taken where none is given.
        rows: the rules, in the order of their diagnostics.
    """

    engine: str
    flavours: tuple[str, ...]
    versions: dict[str, str]
    rows: tuple[LegalityRow, ...]

    def row(self, code: str) -> LegalityRow:
        """Return the rule behind a diagnostic.

        Raises:
            TargetError: there is no such rule.
        """
        for row in self.rows:
            if row.code == code:
                return row
        raise TargetError(f"legality {self.engine}: no rule {code!r}; known: {', '.join(r.code for r in self.rows)}")

    def check(self, model: ir.Model, sm: int = 0, version: str = "", flavour: str = "") -> tuple[Diagnostic, ...]:
        """Return what breaks a rule, errors first; the model is not modified.

        Args:
            model: any ONNX model: subgraphs are read, local functions are looked through.
            sm: compute capability, 89 for 8.9; ignored by engines without one.
            version: the library's, such as ``11.4``; empty for the one in the table.
            flavour: which library; empty for the first in the table.

        Raises:
            TargetError: an unknown flavour, or a malformed version.
            ModelError: the model's functions cannot be inlined.
        """
        flavour = flavour or self.flavours[0]
        if flavour not in self.flavours:
            raise TargetError(f"legality {self.engine}: unknown flavour {flavour!r}; known: {', '.join(self.flavours)}")
        version = version or self.versions[flavour]
        if not _VERSION.match(version):
            raise TargetError(
                f"legality {self.engine}: version is {version!r}; expected one like {self.versions[flavour]}"
            )
        view = QuantizedView(model)
        found = [
            _diagnostic(row, node, text)
            for row in self.rows
            if row.holds(sm, version, flavour)
            for node, text in row.check.find(view)
        ]
        return tuple(sorted(dict.fromkeys(found), key=lambda d: get_args(Severity).index(d.severity)))


def _diagnostic(row: LegalityRow, node: ir.Node | None, text: str) -> Diagnostic:
    name = "" if node is None else node.name or ""
    origin = "" if node is None else ";".join(origins(node))
    return Diagnostic(row.code, row.severity, name, origin, text, row.advice)


def _number(version: str) -> tuple[int, ...]:
    match = _VERSION.match(version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def legality_names() -> tuple[str, ...]:
    """Return the engines that have a table."""
    folder = resources.files("qcompiler.targets").joinpath("legality")
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def load_legality(engine: str) -> Legality:
    """Return the shipped rules of an engine.

    Raises:
        TargetError: the engine has none; the text lists those that have.
    """
    if engine not in legality_names():
        raise TargetError(f"no legality rules for engine {engine!r}; known: {', '.join(legality_names())}")
    file = resources.files("qcompiler.targets").joinpath("legality", f"{engine}.toml")
    return parse_legality(file.read_text(encoding="utf-8"), engine)


def parse_legality(text: str, engine: str) -> Legality:
    """Read a legality table from TOML text.

    Raises:
        TargetError: the text is not TOML, a key or check is unknown, or a row lacks its evidence.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"legality {engine}: {error}") from error
    versions = dict(data.get("legality", {}).get("versions", {}))
    if not versions:
        raise TargetError(f"legality {engine}: [legality] lacks 'versions', the flavours with the version checked")
    rows = tuple(_row(dict(table), engine, tuple(versions)) for table in data.get("rule", []))
    codes = [row.code for row in rows]
    if twice := {code for code in codes if codes.count(code) > 1}:
        raise TargetError(f"legality {engine}: the code {sorted(twice)[0]!r} is given twice")
    return Legality(engine, tuple(versions), versions, rows)


def _row(table: dict[str, Any], engine: str, flavours: tuple[str, ...]) -> LegalityRow:
    code = table.get("code", "")
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        raise TargetError(f"legality {engine}: code is {code!r}; expected a kebab-case name")
    place = f"legality {engine}: {code}"
    for key in ("check", "severity", "why", "advice"):
        if not table.get(key):
            raise TargetError(f"{place} lacks {key!r}")
    if table["severity"] not in get_args(Severity):
        raise TargetError(f"{place}: severity is {table['severity']!r}; expected {' or '.join(get_args(Severity))}")
    if table["check"] not in CHECKS:
        raise TargetError(f"{place}: unknown check {table['check']!r}; known: {', '.join(CHECKS)}")
    own = {f.name for f in dataclasses.fields(LegalityRow)}
    parts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    named = {*parts.get("flavours", ()), *parts.get("since", {}), *parts.get("until", {})}
    if unknown := named - set(flavours):
        raise TargetError(f"{place}: unknown flavour {sorted(unknown)[0]!r}; known: {', '.join(flavours)}")
    check = _check(parts["check"], {k: v for k, v in parts.items() if k not in own}, place)
    given: dict[str, Any] = {**{k: v for k, v in parts.items() if k in own}, "check": check}
    return LegalityRow(**given)


def _check(name: str, parameters: dict[str, Any], place: str) -> Check:
    made = CHECKS[name]
    known = {f.name: f for f in dataclasses.fields(made)}  # type: ignore[arg-type]
    if unknown := set(parameters) - set(known):
        expected = ", ".join(known) or "none"
        raise TargetError(f"{place}: check {name} has no parameter {sorted(unknown)[0]!r}; it has: {expected}")
    needed = {n for n, f in known.items() if f.default is dataclasses.MISSING}
    if missing := needed - set(parameters):
        raise TargetError(f"{place}: check {name} lacks its parameter {sorted(missing)[0]!r}")
    for key, value in parameters.items():
        if not _is_of(value, str(known[key].type)):
            raise TargetError(f"{place}: {key} is {value!r}; expected {known[key].type}")
    return made(**parameters)


def _is_of(value: object, annotation: str) -> bool:
    """Return whether a value read from TOML is of a parameter's type: str, int, bool, or a tuple of such."""
    if isinstance(value, tuple):
        return annotation.startswith("tuple") and all(f"[{type(v).__name__}," in annotation for v in value)
    return annotation == type(value).__name__
