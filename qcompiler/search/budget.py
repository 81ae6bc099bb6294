"""Budgets: bounds that a user sets, as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.errors import BudgetError

_FORM = re.compile(r"^\s*(drop|sqnr)\s*(<=|>=)\s*(\d+(?:\.\d*)?|\.\d+)\s*(pt|%|db)?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """Bounds for the guards.

    Attributes:
        drop_points: largest fall of the metric, in the metric's own unit (``0.5pt`` is 0.005).
        drop_relative: largest fall as a share of the float metric (``0.5%`` is 0.005).
        sqnr_db: least SQNR per output in dB.
    """

    drop_points: float | None = None
    drop_relative: float | None = None
    sqnr_db: float | None = None

    def least_metric(self, reference: float) -> float | None:
        """Return the least metric that the budget allows, given the float model's."""
        bounds = []
        if self.drop_points is not None:
            bounds.append(reference - self.drop_points)
        if self.drop_relative is not None:
            bounds.append(reference - abs(reference) * self.drop_relative)
        return max(bounds, default=None)


def parse_budget(texts: str | Sequence[str] | None) -> Budget:
    """Read budgets such as ``drop<=0.5pt`` (points of a metric in 0..1), ``drop<=1%`` and ``sqnr>=30``.

    Raises:
        BudgetError: a text of another form.
    """
    found: dict[str, float] = {}
    for text in [texts] if isinstance(texts, str) else list(texts or ()):
        match = _FORM.match(text)
        if match is None:
            raise BudgetError(f"cannot read the budget {text!r}; expected like drop<=0.5pt, drop<=1% or sqnr>=30")
        kind, relation, number, unit = match.groups()
        kind, unit = kind.lower(), (unit or "").lower()
        if kind == "sqnr" and relation == ">=" and unit in ("", "db"):
            found["sqnr_db"] = float(number)
        elif kind == "drop" and relation == "<=" and unit in ("pt", "%"):
            found["drop_points" if unit == "pt" else "drop_relative"] = float(number) / 100.0
        else:
            raise BudgetError(f"cannot read the budget {text!r}; expected like drop<=0.5pt, drop<=1% or sqnr>=30")
    return Budget(**found)
