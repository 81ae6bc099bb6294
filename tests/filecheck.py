"""A small FileCheck: lines of expectations, matched in order against printed text.

Expectations are comment lines in the manner of LLVM's FileCheck:

- ``CHECK: text`` matches the first line at or behind the last match that contains the text.
- ``CHECK-NEXT: text`` must match on the line right behind the last match.
- ``CHECK-NOT: text`` must match nowhere between the matches around it.
- ``CHECK-DAG: text`` lines in a row match in any order, each on a line of its own.

In the text ``{{...}}`` is a regular expression, ``[[NAME:regex]]`` captures and ``[[NAME]]`` is what was captured. Runs
of blanks match any run of blanks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.engine import Engine, Feeds
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import parse_text, print_model
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Instrument, Pipeline
from qcompiler.pipeline.registry import PassRegistry
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import Target

_DIRECTIVE = re.compile(r"^\s*(?:#|//)?\s*CHECK(?P<kind>-[A-Z]+)?:(?P<text>.*)$")
_PIECE = re.compile(r"\{\{(?P<regex>.+?)\}\}|\[\[(?P<name>\w+)(?::(?P<pattern>.+?))?\]\]")
_KINDS = ("", "NEXT", "NOT", "DAG")
_AROUND = 6


class CheckError(AssertionError):
    """Text that does not meet an expectation, or an expectation that is malformed."""


@dataclass(frozen=True)
class Check:
    """One expectation: its kind (empty for plain CHECK), its text, and its line number among the expectations."""

    kind: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"CHECK{'-' + self.kind if self.kind else ''}: {self.text} (line {self.line})"


def parse_checks(source: str) -> tuple[Check, ...]:
    """Return the expectations in a text; other lines are ignored.

    Raises:
        CheckError: there are none, or one is of an unknown kind or empty.
    """
    made = []
    for number, line in enumerate(source.splitlines(), 1):
        found = _DIRECTIVE.match(line)
        if found is None:
            continue
        kind = (found["kind"] or "").removeprefix("-")
        if kind not in _KINDS:
            raise CheckError(f"line {number}: unknown expectation CHECK-{kind}; known: CHECK, -NEXT, -NOT, -DAG")
        if not found["text"].strip():
            raise CheckError(f"line {number}: CHECK{found['kind'] or ''} has no text")
        made.append(Check(kind, found["text"].strip(), number))
    if not made:
        raise CheckError("there is no CHECK line in the expectations")
    if made[0].kind == "NEXT":
        raise CheckError(f"{made[0]} has no match in front of it")
    return tuple(made)


def file_check(text: str, expectations: str) -> None:
    """Match text against expectations.

    Raises:
        CheckError: an expectation is not met; shows the text around the place and the captures.
    """
    _Matcher(text.splitlines()).run(parse_checks(expectations))


class _Matcher:
    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines
        self.at = -1
        """Line of the last match."""
        self.captures: dict[str, str] = {}

    def run(self, checks: Sequence[Check]) -> None:
        forbidden: list[Check] = []
        index = 0
        while index < len(checks):
            check = checks[index]
            if check.kind == "NOT":
                forbidden.append(check)
                index += 1
                continue
            group = [check]
            while check.kind == "DAG" and index + len(group) < len(checks) and checks[index + len(group)].kind == "DAG":
                group.append(checks[index + len(group)])
            start, before = self.at + 1, dict(self.captures)
            first = self.match_group(group) if check.kind == "DAG" else self.match_one(check)
            self.forbid(forbidden, start, first, before)
            forbidden = []
            index += len(group)
        self.forbid(forbidden, self.at + 1, len(self.lines), self.captures)

    def match_one(self, check: Check) -> int:
        """Match a plain or a NEXT expectation; return the line."""
        if check.kind == "NEXT":
            if self.at + 1 >= len(self.lines) or not self.try_line(check, self.at + 1):
                self.fail(check, "the next line does not match", self.at + 1)
            self.at += 1
            return self.at
        for number in range(self.at + 1, len(self.lines)):
            if self.try_line(check, number):
                self.at = number
                return number
        return self.fail(check, "no line matches", self.at + 1)

    def match_group(self, checks: Sequence[Check]) -> int:
        """Match a run of DAG expectations in any order; return the first line among them."""
        taken: set[int] = set()
        for check in checks:
            free = (n for n in range(self.at + 1, len(self.lines)) if n not in taken)
            found = next((n for n in free if self.try_line(check, n)), None)
            if found is None:
                return self.fail(check, "no line left matches", self.at + 1)
            taken.add(found)
        self.at = max(taken)
        return min(taken)

    def forbid(self, checks: Sequence[Check], start: int, stop: int, captures: dict[str, str]) -> None:
        for check in checks:
            pattern = self.pattern(check, captures)
            for number in range(start, stop):
                if pattern.search(self.lines[number]):
                    self.fail(check, f"line {number + 1} matches", number)

    def try_line(self, check: Check, number: int) -> bool:
        found = self.pattern(check, self.captures).search(self.lines[number])
        if found is None:
            return False
        self.captures.update(found.groupdict())
        return True

    def pattern(self, check: Check, captures: dict[str, str]) -> re.Pattern[str]:
        """Return the regular expression of an expectation, captured names filled in."""
        parts, end = [], 0
        inside: set[str] = set()
        for piece in _PIECE.finditer(check.text):
            parts.append(_literal(check.text[end : piece.start()]))
            end = piece.end()
            if piece["regex"] is not None:
                parts.append(f"(?:{piece['regex']})")
            elif piece["pattern"] is not None:
                parts.append(f"(?P<{piece['name']}>{piece['pattern']})")
                inside.add(piece["name"])
            elif piece["name"] in inside:
                parts.append(f"(?P={piece['name']})")
            elif piece["name"] in captures:
                parts.append(re.escape(captures[piece["name"]]))
            else:
                raise CheckError(f"{check}: [[{piece['name']}]] is used before it is captured")
        parts.append(_literal(check.text[end:]))
        try:
            return re.compile("".join(parts))
        except re.error as error:
            raise CheckError(f"{check}: {error}") from error

    def fail(self, check: Check, why: str, place: int) -> int:
        shown = [f"{check}: {why}"]
        if self.captures:
            shown.append("captured: " + ", ".join(f"{k} = {v!r}" for k, v in sorted(self.captures.items())))
        shown.append("text:")
        low, high = max(0, place - _AROUND // 2), min(len(self.lines), place + _AROUND)
        if check.kind in ("", "DAG"):
            high = len(self.lines)
        for number in range(low, high):
            mark = "=" if number == self.at else ">" if number == place else " "
            shown.append(f"{mark}{number + 1:4d} {self.lines[number]}")
        raise CheckError("\n".join(shown))


def _literal(text: str) -> str:
    return r"\s+".join(re.escape(part) for part in re.split(r"\s+", text))


def run_pass_test(
    text: str,
    pipeline: str | Pipeline | Pass,
    expected: str,
    *,
    registry: PassRegistry | None = None,
    target: Target | None = None,
    phase: Phase = Phase.FLOAT,
    engine: Engine | None = None,
    feeds: Sequence[Feeds] = (),
    state: CompileState | None = None,
) -> CompileState:
    """Run passes on a model given as ONNX text, verified after each, and match the printed result.

    Args:
        text: the model in ONNX's text syntax, read by `parse_text`.
        pipeline: passes as text (read with ``registry``), a pipeline, or one pass.
        expected: ``# CHECK`` lines for the printed graph.
        registry: knows the passes; not needed if ``pipeline`` is a value.
        target: the capability table; an empty one by default.
        phase: phase of the given model.
        engine: if given, every pass is held to its numeric contract on ``feeds``.
        feeds: inputs for that.
        state: a prepared state (plan, statistics) instead of ``text``, ``target`` and ``phase``.

    Returns:
        The state behind the last pass, for further assertions on its remarks or numbers.

    Raises:
        CheckError: the result is not as expected.
        PassError: a pass fails, breaks the verifier's rules or its contract.
    """
    if isinstance(pipeline, str):
        assert registry is not None, "a pipeline given as text needs a registry"
        pipeline = Pipeline.parse(pipeline, registry)
    elif isinstance(pipeline, Pass):
        pipeline = Pipeline((pipeline,))
    made = state or CompileState(parse_text(text), target or Target("test", "onnxruntime"), phase)
    instruments: list[Instrument] = [NumericsInstrument(engine, feeds)] if engine is not None else []
    pipeline.run(made, [*instruments, VerifyInstrument()])
    file_check(print_model(made.model), expected)
    return made
