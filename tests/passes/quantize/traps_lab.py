"""Run avoid-engine-traps on a model as text, and hold it to what it promises."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qcompiler.engine import Array
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.ir.verify import verify
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.pipeline.contract import Reassociates
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import QuantPlan
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import import_exactly, model_of, outputs, random_feeds


class Ranges:
    """Ranges of the named values; others were never observed."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.ranges = ranges

    def observed(self, name: str) -> bool:
        return name in self.ranges

    def range(self, name: str, estimator: str) -> tuple[float, float]:
        return self.ranges[name]


def avoid_in(
    body: str,
    traps: str,
    inputs: str,
    result: str,
    weights: Mapping[str, Array],
    *,
    opset: int = 21,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    feeds: list[dict[str, Array]] | None = None,
) -> CompileState:
    """Run the pass, hold it to its contract, and check that it settles."""
    model = import_exactly(model_of(inputs, result, body, weights, opset))
    if "com.microsoft" in body:
        model.graph.opset_imports["com.microsoft"] = 1
    given = feeds if feeds is not None else random_feeds(model, size=3)
    state = CompileState(model, load_target("ort-x86"), Phase.LOWERED)
    state.statistics = Ranges(ranges) if ranges is not None else None
    before = [outputs(model.clone(), f) for f in given]
    step = AvoidEngineTraps(traps=traps)
    changed = step.run(state)
    verify(state.model, Phase.LOWERED)
    contract = step.numerics
    assert isinstance(contract, Reassociates)
    for feed, wanted in zip(given, before, strict=True):
        for a, b in zip(wanted, outputs(state.model, feed), strict=True):
            assert np.isnan(a).tolist() == np.isnan(b).tolist()
            assert np.nanmax(np.abs(a - b), initial=0) <= contract.rel * max(np.nanmax(np.abs(a), initial=0), 1e-6)
    settled = print_model(state.model)
    assert step.run(state) == 0
    assert print_model(state.model) == settled
    state.plan = QuantPlan(engine_forms={"changed": str(changed)})
    return state


def changes(state: CompileState) -> int:
    return int(state.plan.engine_forms["changed"])


def why(state: CompileState, rule: str) -> list[str]:
    return [r.reason for r in state.remarks if r.rule == rule and not r.done]
