"""What a compilation is asked for (`Options`), and what that means on this machine (`Settings`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from qcompiler.backends.tensorrt.cuda import device_sms, load_driver
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Statistics
from qcompiler.dataset import DataOptions
from qcompiler.decisions import Decisions
from qcompiler.engine import EngineOptions, Feeds, ShapeRange
from qcompiler.errors import BudgetError, PassError, TargetError
from qcompiler.ir import reader
from qcompiler.ir.schemas import LEAST_LOWERED
from qcompiler.recipes.recipe import Recipe, load_recipe, parse_recipe
from qcompiler.search.budget import Budget, parse_budget
from qcompiler.search.quality import Metric
from qcompiler.search.timing import Stopwatch
from qcompiler.targets.host import Processor, detect, host_target_name
from qcompiler.targets.target import Target, load_target, target_names

ModelSource = reader.ModelSource
Calibration = str | Path | Iterable[Feeds] | Callable[[], Iterable[Feeds]] | Statistics
Progress = Callable[[str], None]
Objective = Literal["latency", "bytes"]
"""What a build makes small, within its budgets."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything about a compilation but the model; see `compile`."""

    target: str = "host"
    recipe: str | Recipe = "int8"
    calibration: Calibration | None = None
    overrides: str | Path | None = None
    budget: str | Sequence[str] | None = None
    metric: Metric | None = None
    evaluation: Calibration | None = None
    shapes: Mapping[str, Sequence[int] | ShapeRange] | None = None
    decisions: Decisions | str | Path | None = None
    dump: str | Path | None = None
    threads: int | None = None
    guard: bool = True
    emit: str = "auto"
    min_sqnr: float | None = None
    random_calibration: int = 0
    progress: Progress | None = None
    opset: int | None = None
    stopwatch: Stopwatch | None = None
    synthetic_calibration: int = 0
    sources: SourceOptions = field(default_factory=SourceOptions)
    calibration_memory: int | None = None
    executor: Executor | str | None = None
    scheduler: str | None = None
    objective: Objective = "latency"
    measure: bool = True

    @property
    def fixed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return lengths per input as `import_model` takes them; an axis that has a range of lengths stays open."""
        return {
            name: shape.fixed if isinstance(shape, ShapeRange) else tuple(shape)
            for name, shape in (self.shapes or {}).items()
        }

    @property
    def profiles(self) -> dict[str, ShapeRange]:
        """Return the inputs whose shape was given as a range."""
        return {name: shape for name, shape in (self.shapes or {}).items() if isinstance(shape, ShapeRange)}

    @property
    def data(self) -> DataOptions:
        """Return what is said about data."""
        return DataOptions(
            self.calibration, self.evaluation, self.random_calibration, self.synthetic_calibration, self.sources,
            self.calibration_memory, self.executor, self.scheduler,
        )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Options resolved for one target.

    Attributes:
        target: the capability table, in the recipe's scheme.
        processor: this machine's.
        here: whether timing on this machine says anything about the target.
        recipe: default forms and bounds, with the user's overrides.
        engine: threads.
        budget: bounds.
        decisions: the record to repeat, if any.
        notes: what the user should know.
    """

    target: Target
    processor: Processor
    here: bool
    recipe: Recipe
    engine: EngineOptions
    budget: Budget
    decisions: Decisions | None
    notes: tuple[str, ...] = ()


def settle(options: Options) -> Settings:
    """Read the files that options name, check what can be checked without a model, and look at this machine.

    Raises:
        QCompilerError: an unknown target or recipe, or options that contradict each other.
    """
    processor = detect()
    name, note = _target_name(options.target, processor)
    notes = [note] if note else []
    recipe = _recipe(options)
    target = recipe.on(load_target(name))
    here = runs_here(target, processor)
    if here:
        target = target.on(processor.features)
    budget = parse_budget(options.budget)
    if (budget.drop_points is not None or budget.drop_relative is not None) and options.metric is None:
        raise BudgetError("a drop budget needs a metric: give --metric file.py:function and --evaluation SRC")
    if options.metric is not None and options.evaluation is None:
        raise BudgetError("a metric needs evaluation data: give --evaluation SRC")
    if options.emit not in ("auto", "qdq", "qoperator"):
        raise PassError(f"emit is {options.emit!r}; expected auto, qdq or qoperator")
    if options.opset is not None and not LEAST_LOWERED <= options.opset <= target.max_opset:
        raise TargetError(f"opset is {options.opset}; expected {LEAST_LOWERED} to {target.max_opset} for {target.name}")
    if options.objective not in get_args(Objective):
        raise BudgetError(f"cannot minimise {options.objective!r}; expected {' or '.join(get_args(Objective))}")
    engine = EngineOptions(threads=options.threads if options.threads is not None else 1)
    return Settings(target, processor, here, recipe, engine, budget, read_decisions(options.decisions), tuple(notes))


TENSORRT = "tensorrt"
"""Target that stands for the table of this machine's GPU."""
_USUAL_SM = 89


def _target_name(name: str, processor: Processor) -> tuple[str, str]:
    """Return (the table that a target's name stands for on this machine, what to tell the user, or empty)."""
    if name == "host":
        return host_target_name(processor)
    if name != TENSORRT:
        return name, ""
    tables = {load_target(n).sm: n for n in target_names() if n.startswith(f"{TENSORRT}-")}
    sms = device_sms(load_driver())
    fitting = [sm for sm in tables if sms and sm <= sms[0]]
    if fitting:
        return tables[max(fitting)], ""
    known = ", ".join(sorted(tables.values()))
    note = f"no GPU that TensorRT supports answers here: compiled for {tables[_USUAL_SM]}; there are {known}"
    return tables[_USUAL_SM], note


def _recipe(options: Options) -> Recipe:
    """Return the recipe with the user's overrides behind its own."""
    recipe = options.recipe if isinstance(options.recipe, Recipe) else load_recipe(options.recipe)
    if options.overrides is None:
        return recipe
    path = Path(options.overrides)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PassError(f"cannot read the overrides {path}: {error.strerror or error}") from error
    return replace(recipe, overrides=(*recipe.overrides, *parse_recipe(text, path.stem).overrides))


def runs_here(target: Target, processor: Processor) -> bool:
    """Return whether timing on this machine says anything about the target."""
    if target.processor and target.processor != processor.machine:
        return False
    return all(feature in processor.features for feature in target.requires)


def read_decisions(source: Decisions | str | Path | None) -> Decisions | None:
    """Return a decisions record, read from its file where a path is given.

    Raises:
        PassError: the file cannot be read or is no record.
    """
    if source is None or isinstance(source, Decisions):
        return source
    path = Path(source)
    try:
        return Decisions.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except PassError as error:
        raise PassError(f"{path}: {error}") from error
    except OSError as error:
        raise PassError(f"cannot read the decisions record {path}: {error.strerror or error}") from error
