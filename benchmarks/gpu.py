"""Check and time every kernel on this machine's GPU against what torch has for the same task, in one run.

On a bare machine with torch and Triton: ``python benchmarks/gpu.py``. Writes ``results/gpu.json`` and ``gpu.md``, anew
after each case, and stops at the budget; ``--dry`` walks through everything without a GPU, at tiny shapes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkout import ROOT, use_checkout

use_checkout()

from gpu_tables import CaseResult, RivalResult, read_results, write_results  # noqa: E402

if TYPE_CHECKING:
    from gpu_cases import Given, GpuCase, Launch
    from gpu_machines import Machine
    from torch import Tensor

ROUNDS = 5
"""Interleaved rounds of which medians are taken."""

MODELS_SECONDS = 120.0
"""What is left of the budget for whole models."""

Say = Callable[[str], None]


class DeviceLostError(Exception):
    """The device no longer answers this process; another one may go on."""


def run_cases(
    machine: Machine, cases: Sequence[GpuCase], budget: float, out: Path, say: Say, before: Sequence[CaseResult] = ()
) -> list[CaseResult]:
    """Check and time cases in order until the budget is spent; write the results after each.

    Args:
        machine: where.
        cases: the most valuable first.
        budget: seconds for all.
        out: folder of the results.
        say: is told each result in a line.
        before: results of an earlier process; these cases are not run again.

    Raises:
        DeviceLostError: a kernel broke the device's context.
    """
    end = machine.seconds() + budget
    environment = machine.environment()
    for key, value in environment.items():
        say(f"{key}: {value}")
    results = list(before)
    known = {r.name for r in before}
    for case in cases:
        if case.name in known:
            continue
        if machine.seconds() >= end:
            results.append(CaseResult(case.key, case.kernel, case.label, case.target, error="not run: out of time"))
            continue
        result = run_case(machine, case)
        result.clocks = machine.clocks()
        results.append(result)
        say(result.line())
        write_results(out, results, environment)
        if not machine.release():
            raise DeviceLostError(case.name)
    write_results(out, results, environment)
    return results


def run_case(machine: Machine, case: GpuCase) -> CaseResult:
    """Check one case and time it against its rivals; whatever fails is part of the result."""
    from gpu_machines import config_of

    from qcompiler.kernels.tuning.ranking import floor_us, least_traffic, machine_of

    result = CaseResult(case.key, case.kernel, case.label, case.target)
    try:
        work = machine.work(case)
        config = config_of(work, machine.arch)
        least = least_traffic(work)
        result.config, result.bytes, result.macs = str(config), least.total, least.macs
        result.floor_us = floor_us(work, machine_of(machine.arch))
        sets = machine.data(work, case)
        ours = [machine.launcher(work, given, config) for given in sets]
        ours[0]()
        result.error_size, result.wrong = compare(case, sets[0])
        contenders = {"ours": ours}
        contenders |= _rivals(machine, case, sets, result)
        _time(machine, contenders, result)
    except Exception as error:  # a kernel may fail in any way; the others go on
        result.error = _short(error)
    return result


def compare(case: GpuCase, given: Given) -> tuple[float, str]:
    """Return the greatest ||found - expected|| / ||expected|| of the outputs, and what is wrong, empty if nothing."""
    import torch

    from qcompiler.backends.triton.stopwatch import difference

    worst, wrong = 0.0, ""
    for name, expected in case.expected(given).items():
        found: Tensor = given[name]
        size = difference(found, expected)
        worst = max(worst, size)
        if size > case.tolerance:
            wrong = f"{name} differs by {size:.2e}, more than {case.tolerance:g}"
        if found.dtype in (torch.int8, torch.uint8):
            most = float((found.to(torch.float64) - expected.to(torch.float64)).abs().max())
            if most > 1:
                wrong = f"{name} differs by {most:g} steps"
    return worst, wrong


def _rivals(machine: Machine, case: GpuCase, sets: Sequence[Given], result: CaseResult) -> dict[str, list[Launch]]:
    """Return the rivals' launches on all sets; one that does not run is noted and left out."""
    found: dict[str, list[Launch]] = {}
    made = [case.rivals(given, machine.compiler) for given in sets]
    for name in made[0]:
        launches = [rivals[name] for rivals in made]
        try:
            launches[0]()
        except Exception as error:  # another version of torch may lack or refuse it
            result.rivals.append(RivalResult(name, error=_short(error)))
        else:
            found[name] = launches
    return found


def _time(machine: Machine, contenders: dict[str, list[Launch]], result: CaseResult) -> None:
    """Time all contenders in turns."""
    estimates = {name: machine.warm(launches) for name, launches in contenders.items()}
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, launches in contenders.items():
            runs[name].append(machine.measure(launches, estimates[name]))
    result.runs = runs.pop("ours")
    result.rivals += [RivalResult(name, found) for name, found in runs.items()]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _run_models_apart(seconds: float, out: Path, *, dry: bool) -> None:
    """Time whole models in a process of its own, which ends when the time is up whatever it does."""
    seconds = max(seconds, 20.0)
    command = [sys.executable, __file__, "--models-only", f"--budget={seconds:.0f}", f"--out={out}"]
    try:
        subprocess.run([*command, *(["--dry"] if dry else [])], timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        print("whole models: out of time", flush=True)


def main() -> int:
    """Run the command; exit with 1 if a kernel is wrong or failed, with 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--only", default="", help="keys, kernels or words of labels, separated by commas")
    parser.add_argument("--no-models", action="store_true", help="kernels only")
    parser.add_argument("--models-only", action="store_true", help="whole models only")
    parser.add_argument("--go-on", action="store_true", help="keep the results that are there, run what is missing")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on references; needs no GPU")
    chosen = parser.parse_args()
    try:
        import torch  # noqa: F401
        from gpu_machines import DryMachine, GpuMachine
        from gpu_more_cases import all_cases

        from qcompiler.errors import TargetError
    except ImportError as error:
        print(f"error: {error}; this benchmark needs torch, and Triton on a GPU", file=sys.stderr)
        return 2
    words = [w for w in chosen.only.split(",") if w]
    cases = [c for c in all_cases() if not words or any(w in c.name for w in words)]
    if not cases:
        print(f"error: no case has any of {', '.join(words)} in its name", file=sys.stderr)
        return 2
    try:
        machine = DryMachine() if chosen.dry else GpuMachine()
    except TargetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say: Say = lambda text: print(text, flush=True)  # noqa: E731
    if chosen.models_only:
        from gpu_models import run_models

        return 1 if any(r.error for r in run_models(machine, chosen.budget, chosen.out, say)) else 0
    start = machine.seconds()
    models = not chosen.no_models and not words
    budget = chosen.budget - (MODELS_SECONDS if models and chosen.budget > 3 * MODELS_SECONDS else 0)
    before = read_results(chosen.out) if chosen.go_on else []
    try:
        results = run_cases(machine, cases, budget, chosen.out, say, before)
    except DeviceLostError as lost:
        left = chosen.budget - (machine.seconds() - start)
        print(f"the device was lost at {lost}; a new process goes on", flush=True)
        kept = [a for a in sys.argv[1:] if a != "--go-on"]
        os.execv(sys.executable, [sys.executable, __file__, *kept, "--go-on", f"--budget={left:.0f}"])
    if models:
        _run_models_apart(chosen.budget - (machine.seconds() - start), chosen.out, dry=chosen.dry)
    bad = [r for r in results if r.wrong or (r.error and "out of time" not in r.error)]
    print(f"{len(results) - len(bad)} of {len(results)} cases are right; results in {chosen.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
