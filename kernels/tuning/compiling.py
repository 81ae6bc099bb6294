"""The half of tuning that needs no GPU: compile candidates, drop what is unfit, keep the most promising ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call
from qcompiler.kernels.catalog import implementation_of
from qcompiler.kernels.config import Config, config, load_table
from qcompiler.kernels.tuning.ranking import estimate_us, machine_of
from qcompiler.kernels.tuning.space import candidates, expected_instruction
from qcompiler.kernels.tuning.work import Work, from_json

T = TypeVar("T")

PER_TILE = 3
"""Variants of one tile (warps and stages) that come before those of worse tiles."""

Say = Callable[[int, int, str], None]
"""Is told candidates done, candidates in all, and what is at hand."""


class Code(Protocol):
    """What a compiler says of one launch (`qcompiler.kernels.proof.compiling.Compiled`)."""

    @property
    def registers(self) -> int:
        """Return registers per thread."""
        ...

    @property
    def shared(self) -> int:
        """Return bytes of shared memory per program."""
        ...

    @property
    def programs_per_processor(self) -> int:
        """Return how many programs fit a multiprocessor at once."""
        ...

    def faults(self, instruction: str = "") -> list[str]:
        """Return what makes it unfit."""
        ...


Compile = Callable[[Call, str], Code]


@dataclass(frozen=True)
class Candidate:
    """A configuration that was compiled.

    Attributes:
        config: what it is.
        fault: why it is unfit; empty if it is fit.
        estimate: microseconds by the model; for ranking only.
        registers: per thread of the first launch.
        shared: bytes per program of the first launch.
        programs: how many fit a multiprocessor at once.
    """

    config: Config
    fault: str = ""
    estimate: float = 0.0
    registers: int = 0
    shared: int = 0
    programs: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what `candidate_from` reads."""
        return asdict(self) | {"config": {"tile": dict(self.config.tile), "warps": self.config.warps}
                               | {"stages": self.config.stages}}  # fmt: skip


def candidate_from(found: dict[str, Any]) -> Candidate:
    """Return a candidate from its JSON form."""
    own = found["config"]
    return Candidate(**{**found, "config": config(own["tile"], own["warps"], own["stages"])})


@dataclass(frozen=True)
class CandidateSet:
    """The survivors of one call, the most promising first.

    Attributes:
        work: the call.
        shipped: the configuration that the table has for it; it is among the survivors if it is fit.
        kept: survivors.
        dropped: how many were unfit, by the kind of fault.
        triton: version that compiled them.
    """

    work: Work
    shipped: Config
    kept: tuple[Candidate, ...]
    dropped: dict[str, int]
    triton: str


def select(work: Work, compiled: Sequence[Candidate], keep: int, triton: str) -> CandidateSet:
    """Return the best survivors, the shipped configuration always among them if it is fit."""
    shipped = load_table(work.kernel).choose(work.arch, work.dims, work.options)
    fit = varied(sorted((c for c in compiled if not c.fault), key=_rank), lambda c: c.config)
    kept = fit[:keep]
    own = next((c for c in fit if c.config == shipped), None)
    if own is not None and own not in kept:
        kept = [*kept[: keep - 1], own]
    dropped: dict[str, int] = {}
    for each in compiled:
        if each.fault:
            kind = "wrong instruction" if each.fault.startswith("expected") else each.fault.split(":")[0]
            kind = "shared memory" if "shared memory" in kind else kind
            dropped[kind] = dropped.get(kind, 0) + 1
    return CandidateSet(work, shipped, tuple(kept), dropped, triton)


def promising(work: Work, most: int) -> list[Config]:
    """Return the candidates to compile: the best by the model before compiling, the shipped one first."""
    found = []
    configs = candidates(work)
    for each in configs:
        try:
            calls = _calls(work, each)
        except (TargetError, AssertionError, KeyError, ValueError):
            continue  # the kernel itself refuses it
        found.append((estimate_us(work, each, calls, 1, machine_of(work.arch)), each))
    ranked = varied([each for _, each in sorted(found, key=lambda pair: (pair[0], -pair[1].stages))], lambda c: c)
    return [configs[0], *(c for c in ranked if c != configs[0])][:most]


def varied(ranked: Sequence[T], config_of: Callable[[T], Config]) -> list[T]:
    """Return ranked things so that no tile fills the list: the first `PER_TILE` of each come before all others."""
    first: list[T] = []
    later: list[T] = []
    counts: dict[object, int] = {}
    for each in ranked:
        tile = config_of(each).tile
        counts[tile] = counts.get(tile, 0) + 1
        (first if counts[tile] <= PER_TILE else later).append(each)
    return first + later


def _rank(candidate: Candidate) -> tuple[float, int]:
    """Return what to sort by; of equal ones the deeper pipeline comes first."""
    return candidate.estimate, -candidate.config.stages


def judge(work: Work, each: Config, compile_call: Compile) -> Candidate:
    """Compile all launches of a candidate and say whether it is fit."""
    try:
        calls = _calls(work, each)
        codes = [compile_call(call, work.arch) for call in calls]
    except (TargetError, AssertionError, KeyError, ValueError) as error:
        return Candidate(each, fault=f"does not compile: {' '.join(str(error).split())[:200]}")
    faults = [f for i, code in enumerate(codes) for f in code.faults("" if i else expected_instruction(work, each))]
    first = codes[0]
    if first.programs_per_processor < 1:
        faults.append("registers: no program fits a multiprocessor")
    estimate = estimate_us(work, each, calls, first.programs_per_processor, machine_of(work.arch))
    found = (first.registers, first.shared, first.programs_per_processor)
    return Candidate(each, faults[0] if faults else "", round(estimate, 3), *found)


def _calls(work: Work, each: Config) -> list[Call]:
    tensors = work.arguments() | work.contract.scratch(work.dims, work.options, each)
    calls: list[Call] = implementation_of(work.kernel).calls(tensors, work.options, each)
    return calls


def compile_work(
    work: Work,
    folder: Path,
    compile_call: Compile,
    triton: str,
    *,
    keep: int = 20,
    most: int = 64,
    say: Say | None = None,
) -> CandidateSet:
    """Compile the candidates of a call and write the survivors to ``folder/NAME.json``.

    What an interrupted run compiled is kept in ``NAME.partial`` and not compiled again; a call that is done is read.

    Args:
        work: the call.
        folder: of candidates.
        compile_call: such as `qcompiler.kernels.proof.compiling.compile_for`.
        triton: its version; what another version made is compiled anew.
        keep: most survivors.
        most: most candidates to compile.
        say: is told the progress.
    """
    path = folder / f"{work.name}.json"
    if path.is_file() and (found := read_candidates(path)).triton == triton:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    done = {c.config: c for c in _read_partial(partial, triton)}
    configs = promising(work, most)
    with partial.open("a", encoding="utf-8") as log:
        for index, each in enumerate(configs):
            if say is not None:
                say(index, len(configs), str(each))
            if each not in done:
                done[each] = judge(work, each, compile_call)
                log.write(json.dumps({"triton": triton, **done[each].to_json()}) + "\n")
                log.flush()
    if say is not None:
        say(len(configs), len(configs), "done")
    selected = select(work, [done[c] for c in configs], keep, triton)
    write_candidates(selected, path)
    partial.unlink()
    return selected


def _read_partial(path: Path, triton: str) -> list[Candidate]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off when the run was interrupted
        if row.pop("triton") == triton:
            found.append(candidate_from(row))
    return found


def write_candidates(found: CandidateSet, path: Path) -> None:
    """Write the survivors of a call, under a temporary name first."""
    shipped = Candidate(found.shipped).to_json()["config"]
    data = found.work.to_json() | {"triton": found.triton, "shipped": shipped, "dropped": found.dropped}
    data["kept"] = [c.to_json() for c in found.kept]
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_candidates(path: Path) -> CandidateSet:
    """Read the survivors of a call.

    Raises:
        TargetError: the file is malformed.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        own = found["shipped"]
        shipped = config(own["tile"], own["warps"], own["stages"])
        kept = tuple(candidate_from(c) for c in found["kept"])
        return CandidateSet(from_json(found), shipped, kept, found["dropped"], found["triton"])
    except (KeyError, TypeError, ValueError) as error:
        raise TargetError(f"candidates of {path} are malformed: {error!r}; compile them again") from error


def read_folder(folder: Path) -> list[CandidateSet]:
    """Read all candidates of a folder, in order of name.

    Raises:
        TargetError: there are none, or one is malformed.
    """
    found = [read_candidates(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    if not found:
        raise TargetError(f"no candidates in {folder}; write some with: qcompiler tune compile KERNEL -o {folder}")
    return found
