"""What the decisions of one compilation depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.calibration.readers import FeedSource
from qcompiler.engine import Engine, EngineOptions, Feeds, TensorInfo
from qcompiler.quant.plan import Form
from qcompiler.recipes.recipe import Recipe
from qcompiler.search.budget import Budget
from qcompiler.search.cost_cache import CostCache
from qcompiler.search.problem import Limits
from qcompiler.search.quality import Judge
from qcompiler.search.timing import Stopwatch
from qcompiler.targets.host import Processor

Say = Callable[[str], None]
_NO_LIMITS = Limits()


@dataclass(frozen=True)
class Setting:
    """What decisions depend on and do not change.

    Attributes:
        given: the model as imported: the reference in every comparison.
        inputs: what a feed gives.
        engine: runs and profiles.
        engine_options: threads.
        recipe: default forms and bounds.
        budget: bounds that the user set.
        min_sqnr: least SQNR per output that the user set, in dB.
        pinned: forms that the user pinned, by group.
        guard: whether to measure at all.
        timed: whether to time: not where the target's engine or processor is another than this machine's.
        ranges: feeds for range-finding, if there is calibration data.
        held_out: feeds set aside for checking and timing.
        judge: compares candidates with the reference; None without data.
        stopwatch: measures instead of the engine, in tests.
        say: takes one line per step.
        shared: groups whose weights other graphs of the build have, too: they must not be changed for this one.
        cost_cache: measured costs of earlier compilations on this machine; None to measure everything.
        limits: bytes, bits and latency that the user set.
        objective: what to make small within them: ``latency`` or ``bytes``.
        measure: whether costs are measured; else they come from the table that ships.
        processor: this machine's.
    """

    given: ir.Model
    inputs: tuple[TensorInfo, ...]
    engine: Engine
    engine_options: EngineOptions
    recipe: Recipe
    budget: Budget
    min_sqnr: float | None
    pinned: Mapping[str, Form]
    guard: bool
    timed: bool
    ranges: FeedSource | None
    held_out: Sequence[Feeds]
    judge: Judge | None
    stopwatch: Stopwatch | None
    say: Say
    shared: frozenset[str] = frozenset()
    cost_cache: CostCache | None = None
    limits: Limits = _NO_LIMITS
    objective: str = "latency"
    measure: bool = True
    processor: Processor | None = None
