"""Small installed packages, made in a folder: modules beside the metadata that an installer would write."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

PASS = """
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.clauses import replaceable
from qcompiler.patterns.language import Rule, op, rule, var
from qcompiler.pipeline.contract import Contract, Exact

NEG_OF_NEG = rule(
    "neg-of-neg", match=op("Neg", op("Neg", var("x"))), where=[replaceable("x")], build=lambda b, m: m.x,
    doc="Drop two negations in a row.",
)


@dataclass(frozen=True)
class CancelNegations(RewritePass):
    \"\"\"Drop negations that undo each other.\"\"\"

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (NEG_OF_NEG,)
"""

RULES = """
from qcompiler.patterns.clauses import replaceable
from qcompiler.patterns.language import op, rule, var

TWICE_ABS = rule(
    "abs-of-abs", match=op("Abs", op("Abs", var("x"), name="inner")), build=lambda b, m: m.inner, keeps=["inner"],
    doc="Take the absolute value once.",
)
"""


def install(
    folder: Path,
    distribution: str,
    files: Mapping[str, str],
    entry_points: Mapping[str, Mapping[str, str]],
    version: str = "1.0",
) -> Path:
    """Write a package and its metadata into a folder, and return the folder for the search path.

    Args:
        folder: where installed packages lie.
        distribution: the name that an installer knows.
        files: text by path below the folder.
        entry_points: object reference by name, by group.
        version: the distribution's.
    """
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [
        line
        for group, points in entry_points.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
