"""The half of tuning that needs a GPU: time the survivors, and keep the fastest in the user's tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config
from qcompiler.kernels.tuning.compiling import CandidateSet
from qcompiler.kernels.tuning.space import expected_instruction
from qcompiler.kernels.tuning.work import Work

LEAST_RUNS = 3
"""Fewest runs of which a median is taken."""

FINALISTS = 4
"""Candidates that are timed again, interleaved, after one round of all."""

Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Place:
    """Where one times: what a measured entry records.

    Attributes:
        arch: such as ``sm90``.
        device: the GPU's name.
        driver: its version.
        triton: Triton's version.
        date: of today, ISO.
    """

    arch: str
    device: str
    driver: str
    triton: str
    date: str


class Timer(Protocol):
    """A GPU, or what stands for one."""

    @property
    def place(self) -> Place:
        """Return where it is."""
        ...

    def check(self, work: Work, config: Config, trusted: Config) -> str:
        """Return how a configuration's results differ from a trusted one's on the same data; empty if they agree."""
        ...

    def run(self, work: Work, config: Config) -> float:
        """Return microseconds of one call: from cold caches, on random data."""
        ...

    def seconds(self) -> float:
        """Return a clock, for the budget."""
        ...


@dataclass(frozen=True)
class Measured:
    """Runs of one configuration, microseconds each."""

    config: Config
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median."""
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """Return (greatest - least) / median; smaller differences are noise."""
        return (max(self.runs) - min(self.runs)) / self.median


@dataclass(frozen=True)
class Result:
    """What timing one call found.

    Attributes:
        work: the call.
        best: the configuration to use.
        shipped: the table's own one, None if it could not be timed.
        failed: why candidates were left out, by configuration.
        timed: how many were timed.
    """

    work: Work
    best: Measured
    shipped: Measured | None
    failed: Mapping[str, str]
    timed: int

    @property
    def gain(self) -> float:
        """Return how much faster the best is than the shipped one (1: not at all)."""
        return 1.0 if self.shipped is None else self.shipped.median / self.best.median


def time_set(found: CandidateSet, timer: Timer, budget: float) -> Result:
    """Time the survivors of one call.

    All run `LEAST_RUNS` times, the best of them again in turns with the shipped one until the budget is spent. The
    shipped configuration stays unless another is faster by more than half the spread, which noise could explain.

    Args:
        found: survivors.
        timer: the GPU.
        budget: seconds; the first `LEAST_RUNS` runs of the shipped one are made in any case.

    Raises:
        TargetError: none of them ran.
    """
    end = timer.seconds() + budget
    runs: dict[Config, list[float]] = {}
    failed: dict[str, str] = {}
    ordered = [found.shipped, *(c.config for c in found.kept if c.config != found.shipped)]
    for config in ordered:
        if runs and timer.seconds() >= end:
            break
        try:
            problem = "" if config == found.shipped else timer.check(found.work, config, found.shipped)
            if problem:
                failed[str(config)] = problem
                continue
            runs[config] = [timer.run(found.work, config) for _ in range(LEAST_RUNS)]
        except Exception as error:  # a launch may fail in any way; the others go on
            failed[str(config)] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if not runs:
        raise TargetError(f"no candidate of {found.work.kernel} {found.work.shape} ran: {failed}")
    timed = len(runs)
    finalists = sorted(runs, key=lambda c: statistics.median(runs[c]))[:FINALISTS]
    if found.shipped in runs and found.shipped not in finalists:
        finalists.append(found.shipped)
    for _ in range(7):
        if timer.seconds() >= end:
            break
        for config in finalists:
            runs[config].append(timer.run(found.work, config))
    measured = {c: Measured(c, tuple(runs[c])) for c in finalists}
    best = min(measured.values(), key=lambda m: m.median)
    shipped = measured.get(found.shipped)
    if shipped is not None and shipped.median - best.median <= max(shipped.spread, best.spread) * best.median / 2:
        best = shipped
    return Result(found.work, best, shipped, failed, timed)


def time_all(
    sets: Sequence[CandidateSet],
    timer: Timer,
    folder: Path,
    budget: float,
    *,
    again: bool = False,
    say: Say | None = None,
) -> list[Result]:
    """Time calls one after another and write each result to the user's tables at once.

    Args:
        sets: survivors by call.
        timer: the GPU.
        folder: of the user's tables.
        budget: seconds for each call.
        again: also what the tables have from this device and version of Triton.
        say: is told the progress.

    Raises:
        TargetError: candidates are for another architecture than that of the GPU.
    """
    results = []
    place = timer.place
    for each in sets:
        if each.work.arch != place.arch:
            raise TargetError(
                f"candidates of {each.work.kernel} are for {each.work.arch}; this GPU ({place.device}) is "
                f"{place.arch}: compile them with --arch {place.arch}"
            )
    for index, each in enumerate(sets):
        if say is not None:
            say(index, len(sets), f"{each.work.kernel} {each.work.shape}")
        if not again and known(folder, each.work, place):
            continue
        result = time_set(each, timer, budget)
        store(folder, result, place)
        results.append(result)
    if say is not None:
        say(len(sets), len(sets), "done")
    return results


def row_of(result: Result, place: Place) -> dict[str, Any]:
    """Return the entry of a user's table, with what is recorded besides."""
    work, best = result.work, result.best
    return {
        "arch": work.arch,
        "when": {name: list(bounds) for name, bounds in work.when.items()},
        "multiple": {},
        "options": {name: [value] for name, value in work.options.items()},
        "tile": dict(best.config.tile),
        "warps": best.config.warps,
        "stages": best.config.stages,
        "instruction": expected_instruction(work, best.config),
        "triton": place.triton,
        "device": place.device,
        "microseconds": round(best.median, 3),
        "spread": round(best.spread, 4),
        "runs": len(best.runs),
        "gain": round(result.gain, 4),
        "dims": dict(work.dims),
        "driver": place.driver,
        "date": place.date,
    }


def read_rows(folder: Path, kernel: str) -> list[dict[str, Any]]:
    """Return the rows of a user's table; none if there is no table.

    Raises:
        TargetError: the table is malformed.
    """
    path = folder / f"{kernel}.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["entries"]
        return [dict(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise TargetError(f"configurations of {path} are malformed: {error!r}; delete the file") from error


def known(folder: Path, work: Work, place: Place) -> bool:
    """Return whether the user's table has the call from this device and minor version of Triton."""
    wanted = _key(row_key(work))
    minor = place.triton.split(".")[:2]
    return any(
        _key(row) == wanted and row["device"] == place.device and row["triton"].split(".")[:2] == minor
        for row in read_rows(folder, work.kernel)
    )


def row_key(work: Work) -> dict[str, Any]:
    """Return the part of a row that says which calls it is for."""
    return {
        "arch": work.arch,
        "when": {name: list(bounds) for name, bounds in work.when.items()},
        "options": {name: [value] for name, value in work.options.items()},
    }


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row["arch"], row.get("when", {}), row.get("options", {})], sort_keys=True)


def store(folder: Path, result: Result, place: Place) -> Path:
    """Put a result into the user's table of its kernel, in place of an older one for the same calls."""
    row = row_of(result, place)
    kernel = result.work.kernel
    rows = [row, *(r for r in read_rows(folder, kernel) if _key(r) != _key(row))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kernel}.json"
    lines = ",\n".join("    " + json.dumps(r) for r in rows)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(f'{{\n  "kernel": "{kernel}",\n  "entries": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    temporary.replace(path)
    return path
