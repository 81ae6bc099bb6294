"""Plan the forms of all groups together, prove each plan on the engine, and correct the tables where they erred."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qcompiler.quant.plan import Form
from qcompiler.search.accuracy import Bound, Terms
from qcompiler.search.costs import CostTable
from qcompiler.search.demand import Demand
from qcompiler.search.file_sizes import FileSizes
from qcompiler.search.forms_problem import Allowed, Sizes, forms_problem
from qcompiler.search.front import all_float, choose_knee, front
from qcompiler.search.noise import NoiseTable
from qcompiler.search.noise_fit import corrected, fitted
from qcompiler.search.observations import Observation
from qcompiler.search.problem import Limits, Problem
from qcompiler.search.program import solve
from qcompiler.search.quality import Quality
from qcompiler.search.solution import NOISE, InfeasibleError, Point, Solution, bounds_of, evaluate, noise_power
from qcompiler.targets.groups import Group

ROUNDS = 6
"""Plans that are built and measured at most."""
SEARCH_ROUNDS = 10
"""Plans at most where a bound that no table knows (a metric, the agreement) was missed and is searched for."""
_BUILDS = 8
"""Files that are built at most until a plan's bytes are predicted exactly."""
_WORTH = 0.01
"""Share of the time below which a faster plan is not searched for."""
_MOST_PRICED = 6
"""Limits at most of which each is solved for once more, for its price."""
_NEAR_DB = 1.0
"""A plan whose SQNR was predicted so well is not corrected any further."""
_NEAR_TIME = 0.03
"""Share of the time by which a plan may be mispredicted before it is made anew."""
_CAUTION, _MOST_CAUTION_DB = 0.7, 6.0
"""Share of what a plan that missed the SQNR was mispredicted by that the next one must have to spare."""

_TERMS, _NO_LIMITS = Terms(), Limits()

Forms = Mapping[str, Form]


@dataclass
class Tables:
    """What a plan is made from; proofs correct it.

    Attributes:
        groups: all groups, in program order.
        allowed: forms besides float by group.
        costs: microseconds per group and form, and per conversion.
        noise: noise power per point; None as long as nothing asked for it.
        sizes: stored bytes; None where nothing bounds them.
        correction: factor on the noise of a charge, by its name and output; what proofs made of the table.
    """

    groups: Sequence[Group]
    allowed: Allowed
    costs: CostTable
    noise: NoiseTable | None = None
    sizes: Sizes | None = None
    correction: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def problem(self) -> Problem:
        """Return the planner's problem as it is known by now."""
        return corrected(self.plain(), self.correction)

    def plain(self) -> Problem:
        """Return the problem with the noise as it was tabled."""
        return forms_problem(self.groups, self.allowed, self.costs, self.noise, self.sizes)


@dataclass(frozen=True)
class Proof:
    """One plan that was built and measured.

    Attributes:
        forms: form per group.
        quality: measured closeness to float; None without data.
        predicted_db: SQNR per output that the tables promised, where they know noise.
        predicted_us: time per run that the tables promised.
        measured_us: time per run, taken when the plan was proven; 0 if nothing is timed here.
        shortfall: by how much the bounds on accuracy are missed; 0 if they are met.
        gap: optimality gap of the plan.
        prices: what relaxing each limit would buy, as text.
        bytes: size of the build, where something bounds it; else 0.
        excess: largest share by which a limit on bytes, bits or latency is exceeded; 0 if all hold.
        predicted_bytes: size that the tables promised.
        bits: stored bits per weight of the build, where something bounds sizes; else 0.
    """

    forms: dict[str, Form]
    quality: Quality | None
    predicted_db: Mapping[str, float]
    predicted_us: float
    measured_us: float
    shortfall: float
    gap: float = 0.0
    prices: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    excess: float = 0.0
    predicted_bytes: int = 0
    bits: float = 0.0

    @property
    def held(self) -> bool:
        """Return whether all bounds and limits hold."""
        return self.shortfall <= 0 and self.excess <= 0

    @property
    def worst_db(self) -> float:
        """Return the least measured SQNR over the outputs in dB, 0 if nothing was measured."""
        return 0.0 if self.quality is None else self.quality.worst

    def figures(self) -> dict[str, Any]:
        """Return what the decisions record keeps of it."""
        made: dict[str, Any] = {"predicted_us": round(self.predicted_us, 1), "held": self.held}
        if self.bytes:
            made |= {"bytes": self.bytes, "predicted_bytes": self.predicted_bytes, "bits": round(self.bits, 4)}
        if self.measured_us > 0:
            made["measured_us"] = round(self.measured_us, 1)
        if self.quality is not None:
            made["predicted_db"] = {n: round(db, 2) for n, db in self.predicted_db.items()}
            made["measured_db"] = {n: round(db, 2) for n, db in self.quality.sqnr_db.items()}
            if self.quality.metric is not None:
                made["metric"] = self.quality.metric
        if self.gap > 0:
            made["gap"] = self.gap
        return made | ({"prices": dict(self.prices)} if self.prices else {})


@dataclass
class Planner:
    """Choose forms by the integer program, and prove them.

    The tables say what every form costs and how much noise every quantized point adds. Noise adds up only nearly, and a
    group's time depends on its neighbours: so each plan is built and measured, what it was mispredicted by corrects the
    tables, and the next plan is made with those. Noise is measured only if the fastest plan is not close enough.

    Attributes:
        tables: costs, and noise once it was asked for; corrected by every proof.
        evaluate: builds and measures the accuracy of a choice; None without data.
        observe: builds and profiles a choice; None where nothing is timed.
        measure_noise: fills the table of noise; None where it cannot be measured.
        bound: accuracy that is demanded.
        limits: bytes, bits and latency that are demanded; noise in it is ignored.
        terms: how accuracy beyond the bound is traded for time.
        pinned: options that the user chose.
        say: takes one line per step.
        objective: ``latency`` or ``bytes``.
        size: builds a choice and tells what its file is made of; None where nothing bounds sizes.
        reference: the float model's metric, if there is one.
        proofs: all plans that were measured, in order.
    """

    tables: Tables
    evaluate: Callable[[Forms], Quality] | None
    observe: Callable[[Forms], Observation] | None
    measure_noise: Callable[[], NoiseTable | None] | None
    bound: Bound
    limits: Limits = _NO_LIMITS
    terms: Terms = _TERMS
    pinned: Mapping[str, str] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    objective: str = "latency"
    size: Callable[[Forms], FileSizes] | None = None
    reference: float | None = None
    proofs: list[Proof] = field(default_factory=list)

    def run(self) -> list[Proof]:
        """Plan and prove, and return all plans that were measured; the first is the fastest without regard to noise.

        Raises:
            BudgetError: the limits on bytes, bits or latency cannot hold.
        """
        demand, caution = Demand(), 0.0
        for _ in range(2 * SEARCH_ROUNDS):
            if len(self.proofs) >= (SEARCH_ROUNDS if demand.active else ROUNDS):
                break
            try:
                planned = self._sized(demand.level + caution)
            except InfeasibleError:
                if any(proof.held for proof in self.proofs):
                    break  # what was measured holds, though the tables came to doubt it
                raise
            forms: dict[str, Form] = dict(planned.choice)  # type: ignore[arg-type]  # options are forms here
            known = next((proof for proof in self.proofs if proof.forms == forms), None)
            proof = self._prove(forms, planned) if known is None else known
            if known is None:
                self.proofs.append(proof)
            settled = self._correct(proof, planned)
            spared, caution = caution, self._caution(proof, planned)
            if self.tables.noise is None and self._wants_accuracy(proof):
                self.say("measure the noise of every quantized point")
                self.tables.noise = self.measure_noise() if self.measure_noise is not None else None
                if self.tables.noise is None:
                    break
            elif not self._goes_on(demand, proof, known is None, settled and spared <= 0):
                break
        return self.proofs

    def _goes_on(self, demand: Demand, proof: Proof, fresh: bool, settled: bool) -> bool:
        """Take in what a plan proved, and return whether to plan once more."""
        margin = self._margin(proof)
        fall, allowed = self._fall(proof)
        if proof.shortfall > 0:
            if self._sqnr_holds(proof) and fresh:
                demand.missed(margin, fall, allowed)
            elif not fresh and (self.tables.noise is None or proof.excess > 0):
                return False
            elif not fresh and demand.active:
                demand.repeated(allowed)
            elif not fresh:  # the tables promise again what was refuted: more is asked than is wanted
                demand.missed(max(margin, 0.0), None, allowed)
            return True
        if proof.excess > 0:
            return fresh
        if not demand.active:
            return fresh and not settled
        if fresh:
            demand.held(margin, fall, allowed)
        else:
            demand.repeated(allowed)
        return not demand.closed and self._could_win()

    def _caution(self, proof: Proof, planned: Solution) -> float:
        """Return the dB that the next plan must have to spare: those that this one was promised and does not have."""
        if proof.quality is None or self._sqnr_holds(proof) or not proof.predicted_db:
            return 0.0
        off = [planned.sqnr_db[n] - db for n, db in proof.quality.sqnr_db.items() if planned.noise.get(n, 0.0) > 0]
        return min(max(0.0, _CAUTION * max(off, default=0.0)), _MOST_CAUTION_DB)

    def _margin(self, proof: Proof) -> float:
        """Return the measured SQNR above what is demanded of it in dB, at the output where that is least."""
        if proof.quality is None:
            return 0.0
        return min((db - self.bound.sqnr_db.get(n, 0.0) for n, db in proof.quality.sqnr_db.items()), default=0.0)

    def _fall(self, proof: Proof) -> tuple[float | None, float]:
        """Return (by how much the metric or the agreement fell, by how much it may), of the one that is worse off."""
        found: list[tuple[float, float]] = []
        quality = proof.quality
        if quality is not None and quality.metric is not None and None not in (self.bound.metric, self.reference):
            assert self.bound.metric is not None
            assert self.reference is not None
            found.append((self.reference - quality.metric, self.reference - self.bound.metric))
        if quality is not None and quality.agreement and self.bound.agreement > 0:
            found.append((1.0 - quality.least_agreement, 1.0 - self.bound.agreement))
        if not found:
            return None, 0.0
        return max(found, key=lambda pair: pair[0] / pair[1] if pair[1] > 0 else pair[0] * 1e9)

    def _could_win(self) -> bool:
        """Return whether a plan between the fastest that was measured and the fastest that held could be worth it."""
        held = min(proof.predicted_us for proof in self.proofs if proof.held)
        return held > (1.0 + _WORTH) * min(proof.predicted_us for proof in self.proofs)

    def _sized(self, demand: float) -> Solution:
        """Return a plan whose bytes are those of its file: files are built and sizes corrected until they agree."""
        for attempt in range(_BUILDS):
            try:
                planned = self._plan(demand)
            except InfeasibleError as error:
                # A limit may fail by a header that was told wrongly: the nearest choice's own file decides.
                if not self._correct_size(error.nearest) or attempt == _BUILDS - 1:
                    raise
                continue
            if not self._correct_size(planned):
                break
        return self._with_size(planned)

    def _correct_size(self, point: Point) -> bool:
        """Bring the tabled sizes to what a choice's file has; return whether that was told wrongly."""
        if self.size is None or self.tables.sizes is None:
            return False
        seen = self.size(dict(point.choice))  # type: ignore[arg-type]  # options are forms here
        wrong = seen.total != point.bytes
        if wrong:
            self.tables.sizes = self.tables.sizes.corrected(seen)
        return wrong

    def _with_size(self, planned: Solution) -> Solution:
        if self.size is None or self.tables.sizes is None:
            return planned
        return replace(planned, bytes=self.size(dict(planned.choice)).total)  # type: ignore[arg-type]  # as above

    def prices(self) -> Solution | None:
        """Return the best choice by the tables as they are by now, with what relaxing each limit would buy.

        None where nothing is limited, or where no choice holds all limits by now.
        """
        problem = self.tables.problem()
        limits = replace(self._limits(problem), noise=self._noise_limits(problem, 0.0))
        if not 0 < len(bounds_of(limits)) <= _MOST_PRICED:
            return None
        try:
            return solve(problem, limits, self.objective, self.pinned)
        except InfeasibleError:
            return None

    def _wants_accuracy(self, proof: Proof) -> bool:
        if proof.quality is None:
            return False
        buys = self.objective == "latency" and proof.worst_db < self.terms.comfort_db
        return buys or proof.shortfall > 0

    def _plan(self, demand: float) -> Solution:
        problem = self.tables.problem()
        limits = self._limits(problem)
        if self.tables.noise is None:
            return solve(problem, limits, self.objective, self.pinned)
        bounded = replace(limits, noise=self._noise_limits(problem, demand))
        try:
            if self.objective != "latency":
                return solve(problem, bounded, self.objective, self.pinned)
            swept = front(problem, bounded, pinned=self.pinned, top_db=self.terms.comfort_db + demand)
        except InfeasibleError as error:
            if demand <= 0 and any(not name.startswith(NOISE) for name in error.limits):
                raise
            # More was asked than the user wants: the least noise within the limits is what can be tried at most.
            wanted = self._noise_limits(problem, 0.0)
            return solve(problem, limits, "noise", self.pinned, reference=wanted, prices=False)
        return choose_knee(swept, self.terms.db_per_percent, self.terms.comfort_db + demand, self.terms.share)

    def _noise_limits(self, problem: Problem, demand: float) -> dict[str, float]:
        if self.tables.noise is None:
            return {}
        return {
            name: noise_power(db + demand)
            for name, db in self.bound.sqnr_db.items()
            if name in problem.outputs and db + demand > 0
        }

    def _limits(self, problem: Problem) -> Limits:
        """Return the limits but for noise; what is made small must not become slower than float for it."""
        if self.objective == "latency":
            return self.limits
        plain = evaluate(problem, all_float(problem, self.pinned)).cost_us
        return replace(self.limits, latency_us=min(plain, self.limits.latency_us or plain))

    def _prove(self, forms: dict[str, Form], planned: Solution) -> Proof:
        quality = self.evaluate(forms) if self.evaluate is not None else None
        seen = self.observe(forms) if self.observe is not None else None
        stored = self.size(forms) if self.size is not None else None
        told = {n: db for n, db in planned.sqnr_db.items() if quality is not None and n in quality.sqnr_db}
        weights = self.tables.sizes.weights if self.tables.sizes is not None else 0
        bits = stored.bits / weights if stored is not None and weights else 0.0
        most = self._limits(self.tables.problem()).latency_us
        proof = Proof(
            forms, quality, told, planned.cost_us, 0.0 if seen is None else seen.whole_us,
            0.0 if quality is None else self.bound.shortfall(quality), planned.gap,
            {name: str(price) for name, price in planned.prices.items() if price.per_unit > 0},
            0 if stored is None else stored.total, self._excess(stored, bits, seen, most), planned.bytes, bits,
        )  # fmt: skip
        if seen is not None and seen.steady:  # what something else slowed down would mislead the next plan
            self.tables.costs = self.tables.costs.corrected(seen)
        self.say(f"plan {len(self.proofs) + 1}: {_told(proof)}")
        return proof

    def _excess(self, stored: FileSizes | None, bits: float, seen: Observation | None, most: float | None) -> float:
        """Return the largest share by which a build exceeds a limit on bytes, bits or latency."""
        over = [0.0]
        if self.limits.bytes is not None and stored is not None:
            over.append(stored.total / self.limits.bytes - 1.0)
        if self.limits.bits is not None:
            over.append(bits / self.limits.bits - 1.0)
        if most is not None and most > 0 and seen is not None:
            over.append(seen.whole_us / most - 1.0 - _NEAR_TIME)
        return max(over)

    def _correct(self, proof: Proof, planned: Solution) -> bool:
        """Fit the tabled noise to what all proofs measured; return whether noise and time were told rightly."""
        near = proof.measured_us <= 0 or abs(planned.cost_us / proof.measured_us - 1.0) <= _NEAR_TIME
        measured = proof.quality.sqnr_db if proof.quality is not None else {}
        for name, db in planned.sqnr_db.items():
            if name in measured and planned.noise.get(name, 0.0) > 0:
                near &= abs(db - measured[name]) <= _NEAR_DB
        if self.tables.noise is not None:
            plain = self.tables.plain()
            # The first plan was made before noise barred some forms.
            known = {group: {o.name for o in options} for group, options in plain.options.items()}
            proofs = [p for p in self.proofs if all(form in known[group] for group, form in p.forms.items())]
            seen = [(p.forms, p.quality.sqnr_db) for p in proofs if p.quality is not None]
            self.tables.correction = fitted(plain, seen)
        return near

    def _sqnr_holds(self, proof: Proof) -> bool:
        return proof.quality is not None and Bound(self.bound.sqnr_db).shortfall(proof.quality) <= 0


def best_proof(
    proofs: Mapping[str, Proof], times: Mapping[str, float], terms: Terms, objective: str = "latency"
) -> str:
    """Return the name of the plan that misses limits, then bounds, the least; of those that hold all the best bargain.

    Args:
        proofs: plans that were measured, by name.
        times: time per run by name, all taken in turn; the predicted one counts where none is given.
        terms: how accuracy is traded for time.
        objective: of plans made for ``bytes`` the smallest is taken.
    """
    least = min((proof.excess, proof.shortfall) for proof in proofs.values())
    fitting = {name: p for name, p in proofs.items() if (p.excess, p.shortfall) <= least}
    spent = {name: times.get(name, p.predicted_us) for name, p in fitting.items()}
    fastest = min(spent.values())

    def worth(name: str) -> tuple[float, float]:
        if objective == "bytes":
            return -float(fitting[name].bytes), -spent[name]
        percent = 100.0 * (spent[name] / fastest - 1.0) if fastest > 0 else 0.0
        closeness = min(fitting[name].worst_db, terms.comfort_db)
        return closeness - terms.db_per_percent * percent, -spent[name]

    return max(fitting, key=worth)


def _told(proof: Proof) -> str:
    parts = []
    if proof.measured_us > 0:
        parts.append(f"{proof.measured_us:.0f} us ({proof.predicted_us:.0f} predicted)")
    if proof.quality is not None:
        predicted = min(proof.predicted_db.values(), default=0.0)
        parts.append(f"{proof.worst_db:.1f} dB" + (f" ({predicted:.1f} predicted)" if 0 < predicted < 200 else ""))
        parts.append("bounds held" if proof.shortfall <= 0 else "bounds missed")
    return ", ".join(parts)
