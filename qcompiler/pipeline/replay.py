"""Run a failed pass again from the folder that `ReplayInstrument` left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import PassError
from qcompiler.ir.phase import Phase
from qcompiler.ir.reader import read_model
from qcompiler.pipeline.instruments.replay import (
    CASE_FILE,
    CASE_FORMAT,
    MODEL_FILE,
    PLAN_FILE,
    STATISTICS_FILE,
    TARGET_FILE,
    RecordedRanges,
)
from qcompiler.pipeline.instruments.weights import versions
from qcompiler.pipeline.pipeline import Instrument, Pipeline
from qcompiler.pipeline.registry import PassRegistry
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import QuantPlan
from qcompiler.quant.spec import QuantSource
from qcompiler.targets.target import OpRow, Target


@dataclass(frozen=True)
class ReplayCase:
    """A recorded failure.

    Attributes:
        state: the state in front of the pass.
        text: the pass as a pipeline string.
        error: what it failed with.
        versions: compiler and libraries of the recorded run.
    """

    state: CompileState
    text: str
    error: str
    versions: dict[str, str]

    def version_changes(self) -> tuple[str, ...]:
        """Return ``name recorded -> present`` for each version that is another now."""
        now = versions()
        return tuple(f"{k} {v} -> {now.get(k, 'none')}" for k, v in self.versions.items() if now.get(k) != v)


def load_case(folder: str | Path) -> ReplayCase:
    """Read a folder that `ReplayInstrument` left.

    Raises:
        PassError: the folder is none, or was written by another format version.
        ModelError: the model in it cannot be read.
    """
    root = Path(folder)
    if not (root / CASE_FILE).is_file():
        raise PassError(f"{root} is not a replay folder: expected {CASE_FILE} in it; opt leaves one when a pass fails")
    try:
        case = _read(root / CASE_FILE)
        if case["format"] != CASE_FORMAT:
            raise PassError(f"{root} has replay format {case['format']}, this qcompiler reads {CASE_FORMAT}")
        target = _target(_read(root / TARGET_FILE))
        plan = QuantPlan.from_json((root / PLAN_FILE).read_text(encoding="utf-8"))
        statistics = _statistics(root / STATISTICS_FILE)
        phase = Phase[case["phase"]]
        forms, engine_forms, estimators = dict(case["forms"]), dict(case["engine_forms"]), dict(case["estimators"])
        imported = {name: QuantSource(**_tuples(source)) for name, source in case["imported"].items()}
        text, error, made_with = str(case["pass"]), str(case["error"]), dict(case["versions"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise PassError(f"{root} is a damaged replay folder: {type(fault).__name__}: {fault}") from fault
    model = read_model(root / MODEL_FILE)
    state = CompileState(model, target, phase, plan, statistics, forms, engine_forms, estimators, imported)
    return ReplayCase(state, text, error, made_with)


def replay(
    folder: str | Path, registry: PassRegistry, instruments: Sequence[Instrument] = ()
) -> tuple[CompileState, int]:
    """Run the recorded pass on the recorded state; return the state behind it and the number of changes.

    Args:
        folder: what `ReplayInstrument` left.
        registry: knows the pass.
        instruments: the same as in the recorded run, if one of them (verify, numerics) found the failure.

    Raises:
        PassError: the folder is none, or the pass fails again.
    """
    case = load_case(folder)
    (result,) = Pipeline.parse(case.text, registry).run(case.state, instruments)
    return case.state, result.changes


def _read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise TypeError(f"expected an object in {path.name}")
    return data


def _target(data: dict[str, Any]) -> Target:
    rows = tuple(OpRow(**_tuples(row)) for row in data["rows"])
    return Target(**{**_tuples(data), "rows": rows})


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _statistics(path: Path) -> RecordedRanges | None:
    if not path.is_file():
        return None
    data = _read(path)
    ranges = {k: v if isinstance(v, str) else (float(v[0]), float(v[1])) for k, v in data["ranges"].items()}
    return RecordedRanges(None, dict(data["seen"]), ranges)
