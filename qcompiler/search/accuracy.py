"""The accuracy guard: while the outputs are too far from float, return to float the group that helps most, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler.quant.plan import Form
from qcompiler.search.quality import Quality

_MOST_CREDIT_DB = 20.0
"""Largest gain in SQNR that one step below the bound is credited with."""

Evaluate = Callable[[Mapping[str, Form]], Quality]


@dataclass(frozen=True)
class Bound:
    """What the guard demands.

    Attributes:
        sqnr_db: least SQNR in dB, per output.
        agreement: least share of rows with the same arg-max, for class-like outputs.
        metric: least value of the user's metric, None if there is no such bound.
    """

    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    agreement: float = 0.0
    metric: float | None = None

    def shortfall(self, quality: Quality) -> float:
        """Return by how much a quality misses the bound, in dB-like units; 0 if it is met."""
        miss = max((self.sqnr_db.get(name, 0.0) - db for name, db in quality.sqnr_db.items()), default=0.0)
        total = max(0.0, miss) + 100.0 * max(0.0, quality.disagreement(self.agreement))
        if self.metric is not None and quality.metric is not None:
            total += 1000.0 * max(0.0, self.metric - quality.metric)
        return total


@dataclass(frozen=True)
class Returned:
    """One step of the guard: groups set back to float, what that gained, and its predicted price."""

    groups: tuple[str, ...]
    before_db: float
    after_db: float
    percent: float
    demanded: bool


@dataclass
class AccuracyResult:
    """Outcome of the guard."""

    forms: dict[str, Form]
    quality: Quality
    steps: list[Returned] = field(default_factory=list)
    met: bool = True
    tried: int = 0


@dataclass(frozen=True)
class Terms:
    """When the guard stops.

    Attributes:
        comfort_db: above this SQNR nothing more is bought.
        db_per_percent: least gain in dB that one percent of latency must buy once the bound is met.
        share: largest share of the predicted gain in speed that is spent on accuracy beyond the bound.
        width: sets measured per round.
        trials: builds measured in all.
    """

    comfort_db: float = 30.0
    db_per_percent: float = 0.3
    share: float = 0.2
    width: int = 6
    trials: int = 80


class AccuracyGuard:
    """Return groups to float: first until the bound is met, then as long as accuracy is cheap.

    Each round measures the most promising sets of groups and keeps the best. What a set gained when it was last
    measured predicts what it gains next, so that later rounds measure few sets; sets never measured come in the order
    given. Gain is weighed against the predicted loss of speed.
    """

    def __init__(
        self,
        candidates: Sequence[tuple[str, ...]],
        evaluate: Evaluate,
        bound: Bound,
        predict: Callable[[Mapping[str, Form]], float],
        *,
        frozen: frozenset[str] = frozenset(),
        terms: Terms = Terms(),
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare a guard.

        Args:
            candidates: sets of groups that return together, most suspicious first.
            evaluate: builds and measures a choice of forms.
            bound: what is demanded.
            predict: predicted time of a choice of forms; 0 if unknown.
            frozen: groups that a user pinned.
            terms: when to stop.
            progress: called with one line per step.
        """
        self.candidates = [kept for c in candidates if (kept := tuple(g for g in c if g not in frozen))]
        self.evaluate, self.bound, self.predict, self.terms = evaluate, bound, predict, terms
        self.progress = progress
        self.known: dict[tuple[str, ...], float] = {}
        self.ceiling = 0.0

    def run(self, forms: Mapping[str, Form]) -> AccuracyResult:
        """Guard one choice of forms."""
        current = dict(forms)
        start, slowest = self.predict(forms), self.predict({})
        self.ceiling = start + self.terms.share * max(0.0, slowest - start)
        result = AccuracyResult(current, self.evaluate(current), tried=1)
        while True:
            demanded = self.bound.shortfall(result.quality) > 0
            if not demanded and result.quality.worst >= self.terms.comfort_db:
                break
            step = self._best_step(result, demanded)
            if step is None:
                break
            candidate, trial, quality = step
            before, price = result.quality.worst, self._price(candidate, result.forms)
            result.forms, result.quality = trial, quality
            result.steps.append(Returned(candidate, before, quality.worst, round(price, 2), demanded))
            if self.progress is not None:
                more = f" and {len(candidate) - 1} more" if len(candidate) > 1 else ""
                self.progress(
                    f"accuracy guard: {candidate[0]}{more} to float, {before:.1f} -> {quality.worst:.1f} dB "
                    f"for {price:.1f} % of the latency"
                )
        result.met = self.bound.shortfall(result.quality) <= 0
        return result

    def _price(self, candidate: tuple[str, ...], forms: Mapping[str, Form]) -> float:
        """Return the predicted loss of speed in percent if a set of groups returns to float."""
        before = self.predict(forms)
        after = self.predict({**forms, **dict.fromkeys(candidate, _FLOAT)})
        return 100.0 * (after - before) / before if before > 0 else 0.0

    def _gain(self, before: Quality, after: Quality, demanded: bool) -> float:
        if demanded:
            # Capped: a return that leaves nothing on integers reaches the ceiling, which would outweigh any price.
            closer = min(_MOST_CREDIT_DB, after.worst - before.worst)
            return self.bound.shortfall(before) - self.bound.shortfall(after) + 0.1 * closer
        return after.worst - before.worst if self.bound.shortfall(after) <= 0 else -1.0

    def _best_step(
        self, result: AccuracyResult, demanded: bool
    ) -> tuple[tuple[str, ...], dict[str, Form], Quality] | None:
        """Measure the most promising sets and return the best, or None if none is worth its price."""
        alive = [c for c in self.candidates if any(result.forms.get(g, "float") != "float" for g in c)]
        if not demanded and self.ceiling > 0:
            alive = [c for c in alive if self.predict({**result.forms, **dict.fromkeys(c, _FLOAT)}) <= self.ceiling]
        fresh = [c for c in alive if c not in self.known]
        seen = sorted((c for c in alive if c in self.known), key=lambda c: -self._score(c, self.known[c], result.forms))
        width = self.terms.width
        again, tried = seen[: width - 2], fresh[: max(width - len(seen), 2) if self.known else 4 * width]
        best = self._measure([*again, *tried], result, demanded)
        position = len(tried)
        while best is None and position < len(fresh) and result.tried < self.terms.trials:
            best = self._measure(fresh[position : position + width], result, demanded)
            position += width
        if best is None and demanded and alive:
            # Nothing measured helps by itself: take the largest set, so that the search cannot stall below the bound.
            largest = max(alive, key=len)
            trial = {**result.forms, **dict.fromkeys(largest, _FLOAT)}
            return largest, trial, self.evaluate(trial)
        return best

    def _measure(
        self, chosen: Sequence[tuple[str, ...]], result: AccuracyResult, demanded: bool
    ) -> tuple[tuple[str, ...], dict[str, Form], Quality] | None:
        """Measure some sets and return the best that is worth its price, if any."""
        best: tuple[float, tuple[str, ...], dict[str, Form], Quality] | None = None
        for candidate in chosen:
            if result.tried >= self.terms.trials:
                break
            trial = {**result.forms, **dict.fromkeys(candidate, _FLOAT)}
            quality = self.evaluate(trial)
            result.tried += 1
            gain = self._gain(result.quality, quality, demanded)
            self.known[candidate] = gain
            score = self._score(candidate, gain, result.forms)
            worth = gain > 0.02 if demanded else gain >= 0.05 and score >= self.terms.db_per_percent
            if worth and (best is None or score > best[0]):
                best = (score, candidate, trial, quality)
        return None if best is None else best[1:]

    def _score(self, candidate: tuple[str, ...], gain: float, forms: Mapping[str, Form]) -> float:
        """Return gain in dB per percent of latency; very cheap sets count as a fifth of a percent."""
        return gain / max(self._price(candidate, forms), 0.2)


_FLOAT: Form = "float"
