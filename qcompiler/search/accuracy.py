"""The accuracy guard: while the outputs are too far from float, return to float the group that helps most, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler.quant.plan import Form
from qcompiler.search.quality import Quality

Evaluate = Callable[[Mapping[str, Form]], Quality]


@dataclass(frozen=True)
class Bound:
    """What the guard demands.

    Attributes:
        sqnr_db: least SQNR per output in dB.
        agreement: least share of rows with the same arg-max, for class-like outputs.
        rows: rows behind the agreement; a single differing row never breaks the bound.
        metric: least value of the user's metric, None if there is no such bound.
    """

    sqnr_db: float = 0.0
    agreement: float = 0.0
    metric: float | None = None

    def shortfall(self, quality: Quality) -> float:
        """Return by how much a quality misses the bound, in dB-like units; 0 if it is met."""
        miss = max(0.0, self.sqnr_db - quality.worst)
        miss += 100.0 * max(0.0, self.agreement - quality.least_agreement)
        if self.metric is not None and quality.metric is not None:
            miss += 1000.0 * max(0.0, self.metric - quality.metric)
        return miss


@dataclass(frozen=True)
class Returned:
    """One step of the guard: a group set back to float and what that gained."""

    groups: tuple[str, ...]
    before_db: float
    after_db: float


@dataclass
class AccuracyResult:
    """Outcome of the guard."""

    forms: dict[str, Form]
    quality: Quality
    steps: list[Returned] = field(default_factory=list)
    met: bool = True
    tried: int = 0


def accuracy_guard(
    forms: Mapping[str, Form],
    candidates: Sequence[tuple[str, ...]],
    evaluate: Evaluate,
    bound: Bound,
    *,
    frozen: frozenset[str] = frozenset(),
    width: int = 6,
    progress: Callable[[str], None] | None = None,
) -> AccuracyResult:
    """Return groups to float until the bound is met.

    Each round measures the ``width`` most promising sets (then half as many again from where the last gains were) and
    keeps the one whose return gains most; sets that gain nothing sink to the end of the list.

    Args:
        forms: the starting point.
        candidates: sets of groups that return together, most suspicious first.
        evaluate: builds and measures a choice of forms.
        bound: what is demanded.
        frozen: groups that a user pinned.
        width: sets measured per round.
        progress: called with one line per round.
    """
    current = dict(forms)
    quality = evaluate(current)
    result = AccuracyResult(current, quality, tried=1)
    queue = [tuple(g for g in c if g not in frozen) for c in candidates]
    while (shortfall := bound.shortfall(quality)) > 0:
        queue = [c for c in queue if any(current.get(g, "float") != "float" for g in c)]
        if not queue:
            break
        trials = []
        for candidate in queue[:width]:
            trial = {**current, **dict.fromkeys(candidate, _FLOAT)}
            got = evaluate(trial)
            result.tried += 1
            trials.append((bound.shortfall(got), -got.worst, candidate, trial, got))
        trials.sort(key=lambda t: t[:2])
        best = trials[0]
        result.steps.append(Returned(best[2], quality.worst, best[4].worst))
        if progress is not None:
            progress(f"accuracy guard: {best[2][0]} to float, {quality.worst:.1f} -> {best[4].worst:.1f} dB")
        gain = shortfall - best[0]
        helped = [t[2] for t in trials[1:] if shortfall - t[0] > 0.25 * max(gain, 1e-9)]
        idle = [t[2] for t in trials[1:] if t[2] not in helped]
        current, quality = best[3], best[4]
        queue = helped + queue[width:] + idle
    result.forms, result.quality = current, quality
    result.met = bound.shortfall(quality) <= 0
    return result


_FLOAT: Form = "float"
