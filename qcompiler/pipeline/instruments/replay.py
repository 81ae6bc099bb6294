"""Keep what is needed to run a failed pass again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qcompiler.errors import CalibrationError
from qcompiler.pipeline.instruments.weights import WeightStore, versions, write_texts
from qcompiler.pipeline.pipeline import Step
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.spec import QuantSpec, RangeSource

CASE_FORMAT = 1
CASE_FILE = "case.json"
MODEL_FILE = "model.onnx"
PLAN_FILE = "plan.json"
TARGET_FILE = "target.json"
STATISTICS_FILE = "statistics.json"
ERROR_FILE = "error.txt"


@dataclass
class RecordedRanges:
    """Ranges that remember what was asked, so that the answers can be given again without the data.

    Attributes:
        source: who answers; None to answer from the record alone.
        seen: whether a value was observed, by name.
        ranges: (min, max), or the error text, by value name, estimator and format joined by newlines.
    """

    source: RangeSource | None = None
    seen: dict[str, bool] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float] | str] = field(default_factory=dict)

    def observed(self, name: str) -> bool:
        """Return whether calibration ever executed the value."""
        if name not in self.seen:
            self.seen[name] = self._ask(name).observed(name)
        return self.seen[name]

    def range(self, name: str, estimator: str = "min-max", spec: QuantSpec | None = None) -> tuple[float, float]:
        """Return (min, max) of the value by an estimator, for a format.

        Raises:
            CalibrationError: the value was never observed, or the record does not know it.
        """
        key = f"{name}\n{estimator}\n{spec}"
        if key not in self.ranges:
            self.ranges[key] = _answer(lambda: self._ask(name).range(name, estimator, spec))
        answer = self.ranges[key]
        if isinstance(answer, str):
            raise CalibrationError(answer)
        return answer

    def mean_square(self, name: str) -> float:
        """Return E[x^2] of a value; passes do not ask for it, so it is not recorded."""
        return self._ask(name).mean_square(name)

    def elements_per_feed(self, name: str) -> int:
        """Return the elements of a value per feed; passes do not ask for it, so it is not recorded."""
        return self._ask(name).elements_per_feed(name)

    def _ask(self, name: str) -> RangeSource:
        if self.source is None:
            raise CalibrationError(f"the recorded run never asked for the range of {name}; compile again to record it")
        return self.source


def _answer(ask: Callable[[], tuple[float, float]]) -> tuple[float, float] | str:
    try:
        low, high = ask()
    except CalibrationError as error:
        return str(error)
    return float(low), float(high)


@dataclass
class ReplayInstrument:
    """On failure, leave a folder from which `qcompiler.pipeline.replay.replay` runs just the failed pass again.

    The folder holds the state in front of the pass (model, plan, target, phase, the calibrated ranges that the pass
    asked for), the pass as text, the error and the versions.

    Attributes:
        folder: made on failure only.
        written: whether a failure was recorded.
    """

    folder: str | Path
    written: bool = False
    _before: CompileState | None = None
    _recorder: RecordedRanges | None = None

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Keep the state, and listen to what the pass asks the statistics."""
        self._before = state.clone()
        self._recorder = None
        if state.statistics is not None:
            self._recorder = RecordedRanges(state.statistics)
            state.statistics = self._recorder

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Give the statistics back."""
        self._restore(state)

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Write the folder."""
        self._restore(state)
        before = self._before
        if before is None:
            return
        folder = Path(self.folder)
        case = {
            "format": CASE_FORMAT,
            "pass": step.text,
            "index": step.index,
            "phase": before.phase.name,
            "forms": before.forms,
            "engine_forms": before.engine_forms,
            "estimators": before.estimators,
            "imported": {name: asdict(source) for name, source in before.imported.items()},
            "error": str(error),
            "error_type": type(error).__name__,
            "versions": versions(),
        }
        files = {
            CASE_FILE: json.dumps(case, indent=1, sort_keys=True) + "\n",
            ERROR_FILE: f"{step.text}: {type(error).__name__}: {error}\n",
            PLAN_FILE: before.plan.to_json() + "\n",
            TARGET_FILE: json.dumps(asdict(before.target), indent=1, sort_keys=True) + "\n",
        }
        if self._recorder is not None:
            record = {"seen": self._recorder.seen, "ranges": self._recorder.ranges}
            files[STATISTICS_FILE] = json.dumps(record, indent=1, sort_keys=True) + "\n"
        write_texts(folder, files)
        WeightStore(folder).save(before.model, MODEL_FILE)
        self.written = True

    def _restore(self, state: CompileState) -> None:
        if self._recorder is not None and state.statistics is self._recorder:
            state.statistics = self._recorder.source
