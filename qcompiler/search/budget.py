"""Budgets: bounds that a user sets, as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.errors import BudgetError
from qcompiler.search.problem import Limits

_FORM = re.compile(
    r"^\s*(drop|sqnr|bytes|bits|latency)\s*(<=|>=)\s*(\d+(?:\.\d*)?|\.\d+)\s*(pt|%|db|[km]i?b|b|us|µs|μs|ms|s)?\s*$",
    re.IGNORECASE,
)
_BYTES = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}
_MICROSECONDS = {"us": 1.0, "µs": 1.0, "μs": 1.0, "ms": 1e3, "s": 1e6}
_EXAMPLES = "drop<=0.5pt, drop<=1%, sqnr>=30, bytes<=4MB, bits<=4.65, latency<=3ms or latency<=60%"


@dataclass(frozen=True)
class Budget:
    """Bounds for the planner and the guards.

    Attributes:
        drop_points: largest fall of the metric, in the metric's own unit (``0.5pt`` is 0.005).
        drop_relative: largest fall as a share of the float metric (``0.5%`` is 0.005).
        sqnr_db: least SQNR per output in dB.
        bytes: largest size in bytes.
        bits: largest average of stored bits per weight.
        latency_us: largest time per run in microseconds.
        latency_share: largest time per run as a share of float's (``60%`` is 0.6).
    """

    drop_points: float | None = None
    drop_relative: float | None = None
    sqnr_db: float | None = None
    bytes: int | None = None
    bits: float | None = None
    latency_us: float | None = None
    latency_share: float | None = None

    def limits(self) -> Limits:
        """Return the bounds on size and time, without those on accuracy."""
        return Limits(bytes=self.bytes, bits=self.bits, latency_us=self.latency_us, latency_share=self.latency_share)

    def least_metric(self, reference: float) -> float | None:
        """Return the least metric that the budget allows, given the float model's."""
        bounds = []
        if self.drop_points is not None:
            bounds.append(reference - self.drop_points)
        if self.drop_relative is not None:
            bounds.append(reference - abs(reference) * self.drop_relative)
        return max(bounds, default=None)


def parse_budget(texts: str | Sequence[str] | None) -> Budget:
    """Read budgets; of several of one kind the tightest holds.

    Args:
        texts: such as ``drop<=0.5pt`` (points of a metric in 0..1), ``drop<=1%``, ``sqnr>=30`` (dB), ``bytes<=4MB``
            (also kB, KiB, MiB, or plain bytes), ``bits<=4.65`` (per weight), ``latency<=3ms`` (also us, s) and
            ``latency<=60%`` (of float's).

    Raises:
        BudgetError: a text of another form, or a size, width or time of zero.
    """
    found = Budget()
    for text in [texts] if isinstance(texts, str) else list(texts or ()):
        found = _tighter(found, _one(text))
    return found


def _one(text: str) -> Budget:
    """Read one bound."""
    match = _FORM.match(text)
    problem = BudgetError(f"cannot read the budget {text!r}; expected like {_EXAMPLES}")
    if match is None:
        raise problem
    kind, relation, digits, unit = match.groups()
    kind, unit, number = kind.lower(), (unit or "").lower(), float(digits)
    if not math.isfinite(number):
        raise problem
    if kind == "sqnr" and relation == ">=" and unit in ("", "db"):
        return Budget(sqnr_db=number)
    if relation == ">=":
        raise problem
    if kind == "drop" and unit == "pt":
        return Budget(drop_points=number / 100.0)
    if kind == "drop" and unit == "%":
        return Budget(drop_relative=number / 100.0)
    if kind == "bytes" and unit in _BYTES and number * _BYTES[unit] >= 1:
        return Budget(bytes=math.floor(number * _BYTES[unit]))
    if kind == "bits" and not unit and number > 0:
        return Budget(bits=number)
    if kind == "latency" and unit in _MICROSECONDS and number > 0:
        return Budget(latency_us=number * _MICROSECONDS[unit])
    if kind == "latency" and unit == "%" and number > 0:
        return Budget(latency_share=number / 100.0)
    raise problem


def _tighter(a: Budget, b: Budget) -> Budget:
    """Return the tighter bound of each kind."""
    floor = [db for db in (a.sqnr_db, b.sqnr_db) if db is not None]
    return Budget(
        drop_points=_least(a.drop_points, b.drop_points),
        drop_relative=_least(a.drop_relative, b.drop_relative),
        sqnr_db=max(floor, default=None),
        bytes=a.bytes if b.bytes is None else b.bytes if a.bytes is None else min(a.bytes, b.bytes),
        bits=_least(a.bits, b.bits),
        latency_us=_least(a.latency_us, b.latency_us),
        latency_share=_least(a.latency_share, b.latency_share),
    )


def _least(*bounds: float | None) -> float | None:
    return min((b for b in bounds if b is not None), default=None)
