"""The report of one build: what was planned, fused and missed, how close, how small, how fast, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompiler.backends.readback import Proof
from qcompiler.search.quality import Quality


@dataclass(frozen=True)
class GroupReport:
    """One fusion group: its form and why."""

    group: str
    operator: str
    form: str
    why: str
    macs: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"group": self.group, "operator": self.operator, "form": self.form, "why": self.why, "macs": self.macs}


@dataclass(frozen=True)
class Report:
    """Everything a build says of itself.

    Attributes:
        proof: planned against fused, read from the engine's graph.
        quality: closeness to float on set-aside feeds; None without data.
        bytes_before: size of the model as given.
        bytes_after: size of the compiled model.
        speedup: float / compiled latency, minima of interleaved rounds; None if nothing was timed.
        speedup_median: the same from medians.
        integer_share: share of multiply-adds that run on integers.
        passes: the pipeline, pass by pass, with the number of changes.
        groups: every fusion group with its form and why.
        forms_tried: measured whole-model variants: microseconds and SQNR.
        warnings: what a user should know before deploying.
        context: target, engine, processor, threads, recipe.
        returned: steps of the accuracy guard.
        plan: what the chosen plan promised and what was measured, its optimality gap, and the prices of its budgets.
    """

    proof: Proof
    quality: Quality | None
    bytes_before: int
    bytes_after: int
    speedup: float | None
    speedup_median: float | None
    integer_share: float
    passes: tuple[tuple[str, int], ...]
    groups: tuple[GroupReport, ...] = ()
    forms_tried: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    context: Mapping[str, str] = field(default_factory=dict)
    returned: tuple[Mapping[str, Any], ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        quality = self.quality
        return {
            "proof": self.proof.to_dict(),
            "sqnr_db": {} if quality is None else dict(quality.sqnr_db),
            "agreement": {} if quality is None else dict(quality.agreement),
            "expected_agreement": {} if quality is None else dict(quality.likely),
            "differing": {} if quality is None else dict(quality.differing),
            "metric": None if quality is None else quality.metric,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "speedup": self.speedup,
            "speedup_median": self.speedup_median,
            "integer_share": self.integer_share,
            "passes": [{"pass": text, "changes": count} for text, count in self.passes],
            "groups": [g.to_dict() for g in self.groups],
            "forms_tried": {name: dict(figures) for name, figures in self.forms_tried.items()},
            "accuracy_guard": [dict(step) for step in self.returned],
            "plan": dict(self.plan),
            "warnings": list(self.warnings),
            "context": dict(self.context),
        }
