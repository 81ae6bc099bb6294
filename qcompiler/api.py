"""The public functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from qcompiler.backends.catalog import engine_backend, engine_of
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Parts, Statistics
from qcompiler.compiled import CompiledModel
from qcompiler.compiled_set import CompiledSet
from qcompiler.compiler import compile_model
from qcompiler.decisions import Decisions, SetDecisions
from qcompiler.engine import EngineOptions, Runner, ShapeRange
from qcompiler.options import Calibration, ModelSource, Objective, Options, Progress
from qcompiler.per_graph import check_graphs, one_of, option_of
from qcompiler.recipes.recipe import Recipe
from qcompiler.search.quality import Metric


def compile(
    model: ModelSource,
    *,
    target: str = "host",
    recipe: str | Recipe = "int8",
    calibration: Calibration | None = None,
    overrides: str | Path | None = None,
    budget: str | Sequence[str] | None = None,
    metric: Metric | None = None,
    evaluation: Calibration | None = None,
    shapes: Mapping[str, Sequence[int] | ShapeRange] | None = None,
    decisions: Decisions | str | Path | None = None,
    dump: str | Path | None = None,
    threads: int | None = None,
    guard: bool = True,
    emit: str = "auto",
    min_sqnr: float | None = None,
    random_calibration: int = 0,
    opset: int | None = None,
    progress: Progress | None = None,
    synthetic_calibration: int = 0,
    sources: SourceOptions | None = None,
    calibration_memory: int | None = None,
    executor: Executor | str | None = None,
    scheduler: str | None = None,
    objective: Objective = "latency",
    measure: bool = True,
) -> CompiledModel:
    """Compile a float or QDQ model into a quantized one that is measured to be faster and close enough.

    Args:
        model: a path, serialized bytes, ``onnx.ModelProto`` or ``onnx_ir.Model``; it is not modified.
        target: name of a capability table, or ``host`` for this processor.
        recipe: a recipe's name, the path of a .toml, or a `Recipe`.
        calibration: feeds as a re-iterable of ``{input: array}``, a callable that returns an iterator, a plain
            iterator, or a path (.npz, folder of arrays, images or text, ``file.py:function``). A fifth of the feeds is
            set aside for checking. Or what `calibrate` returned, or a path of such statistics (.qcal): accuracy is then
            measured on ``evaluation`` only.
        overrides: path of a .toml with ``[[override]]`` rows: match (glob), form, estimator.
        budget: bounds such as ``"drop<=0.5pt"``, ``"drop<=1%"``, ``"sqnr>=30"``, ``"bytes<=4MB"``, ``"bits<=4.65"``
            (per weight), ``"latency<=3ms"`` and ``"latency<=60%"`` (of float's); what cannot hold raises `BudgetError`
            with the nearest feasible point.
        metric: function (outputs per feed, feeds) -> float, more is better; for drop budgets.
        evaluation: feeds for the metric.
        shapes: input name to lengths, or to a `ShapeRange`, where axes are open.
        decisions: a record of an earlier build; it is repeated without timing.
        dump: folder for the dumps of every pass.
        threads: threads inside one operator while measuring; 1 by default.
        guard: measure speed and accuracy and return to float what loses (off: forms follow the recipe's rules, and the
            same inputs always give the same bytes).
        emit: ``auto``, or ``qdq`` / ``qoperator`` to force one form of the output.
        min_sqnr: least SQNR per output in dB; the recipe's by default.
        random_calibration: calibrate with this many random feeds instead of data (the report warns).
        opset: ONNX operator set of the result; by default the one it was compiled in.
        progress: called with one line per step; silent by default.
        synthetic_calibration: calibrate with this many feeds made up from the graph instead of data (the report warns).
        sources: how images, text and arrays become feeds.
        calibration_memory: bytes that observed values may take at a time; default a quarter of what is free.
        executor: where calibration runs: a ``concurrent.futures.Executor``, or a text as for `calibrate`.
        scheduler: address of a Dask scheduler.
        objective: what to make small within the budgets: ``latency``, or ``bytes`` (no slower than float is predicted).
        measure: time every form on the engine (off: a table of costs that ships; the result may then be slower than
            float, and the report warns).

    Returns:
        The compiled model with its decisions, remarks and report.

    Raises:
        QCompilerError: bad input, with what to do about it.
    """
    options = Options(
        target=target, recipe=recipe, calibration=calibration, overrides=overrides, budget=budget, metric=metric,
        evaluation=evaluation, shapes=shapes, decisions=decisions, dump=dump, threads=threads, guard=guard, emit=emit,
        min_sqnr=min_sqnr, random_calibration=random_calibration, progress=progress, opset=opset,
        synthetic_calibration=synthetic_calibration, sources=sources or SourceOptions(),
        calibration_memory=calibration_memory, executor=executor, scheduler=scheduler, objective=objective,
        measure=measure,
    )  # fmt: skip
    return compile_model(model, options)


def compile_together(
    models: Mapping[str, ModelSource],
    *,
    target: str = "host",
    recipe: str | Recipe = "int8",
    calibration: Mapping[str, Calibration] | None = None,
    overrides: str | Path | Mapping[str, str | Path] | None = None,
    budget: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    metric: Metric | Mapping[str, Metric] | None = None,
    evaluation: Mapping[str, Calibration] | None = None,
    shapes: Mapping[str, Mapping[str, Sequence[int] | ShapeRange]] | None = None,
    links: Mapping[str, str] | None = None,
    decisions: SetDecisions | str | Path | None = None,
    dump: str | Path | None = None,
    threads: int | None = None,
    guard: bool = True,
    emit: str = "auto",
    min_sqnr: float | Mapping[str, float] | None = None,
    random_calibration: int = 0,
    opset: int | None = None,
    progress: Progress | None = None,
    synthetic_calibration: int = 0,
    sources: SourceOptions | None = None,
    calibration_memory: int | None = None,
    executor: Executor | str | None = None,
    scheduler: str | None = None,
    objective: Objective = "latency",
    measure: bool = True,
) -> CompiledSet:
    """Compile several graphs in one build; weights that they share are quantized alike and stored once.

    What is said of one graph is given by its name: ``calibration={"decoder": feeds}``. The other arguments are as for
    `compile`, and hold for all graphs. Guards hold for every graph by itself: none is slower than its float model or
    below its accuracy bound. A graph that could not bear a shared weight as the others have it stores it in a form of
    its own; ``report.deviations`` has the reasons and the bytes. Weights that several graphs have are not smoothed.

    For the target ``cpu`` each graph is compiled by itself, for the engine that is fastest for it: its weights may be
    smoothed and take forms of their own, and only those that come out equal are stored once.

    Args:
        models: the graphs by name; they are not modified.
        target: as for `compile`.
        recipe: as for `compile`.
        calibration: feeds by graph.
        overrides: path of a .toml for all graphs, or one by graph.
        budget: bounds for all graphs, or by graph.
        metric: for all graphs that have evaluation feeds, or by graph.
        evaluation: feeds for the metric by graph.
        shapes: lengths by input name, by graph.
        links: feeds that come out of another graph: ``{"decoder.encoder_hidden_states": "encoder.last_hidden_state"}``;
            ``*`` stands for any text, the same at both ends (``{"next.past_*": "first.present_*"}``). Such an input may
            be left out of the consumer's feeds: the producer's float model runs on its own feeds, sample by sample.
        decisions: the record of an earlier build of the same graphs; it is repeated without timing.
        dump: folder for the dumps; each graph has a folder in it.
        threads: as for `compile`.
        guard: as for `compile`.
        emit: as for `compile`.
        min_sqnr: for all graphs, or by graph.
        random_calibration: calibrate with this many random feeds each, where a graph has no feeds.
        opset: as for `compile`.
        progress: called with one line per step, ``[graph] step``.
        synthetic_calibration: calibrate with this many made-up feeds each, where a graph has no feeds.
        sources: as for `compile`.
        calibration_memory: as for `compile`.
        executor: as for `compile`.
        scheduler: as for `compile`.

    Returns:
        The compiled graphs by name; ``save(folder)`` writes them with one weights file.

    Raises:
        QCompilerError: bad input; the text names the graph.
    """
    from qcompiler.together import compile_set

    check_graphs(
        tuple(models),
        {
            "calibration": calibration, "overrides": overrides, "budget": budget, "metric": metric,
            "evaluation": evaluation, "shapes": shapes, "min_sqnr": min_sqnr,
        },
    )  # fmt: skip
    options = {}
    for name in models:
        data, judged = one_of(calibration, name), one_of(evaluation, name)
        # A metric for all is for those that there is something to measure on.
        score = option_of(metric, name) if judged is not None or not evaluation or isinstance(metric, Mapping) else None
        rows = overrides.get(name) if isinstance(overrides, Mapping) else overrides
        options[name] = Options(
            target=target, recipe=recipe, calibration=data, overrides=rows, budget=option_of(budget, name),
            metric=score, evaluation=judged, shapes=one_of(shapes, name), dump=dump, threads=threads, guard=guard,
            emit=emit, min_sqnr=option_of(min_sqnr, name),
            random_calibration=random_calibration if data is None else 0, progress=progress, opset=opset,
            synthetic_calibration=synthetic_calibration if data is None else 0, sources=sources or SourceOptions(),
            calibration_memory=calibration_memory, executor=executor, scheduler=scheduler, objective=objective,
            measure=measure,
        )  # fmt: skip
    return compile_set(models, options, links=links, decisions=decisions)


def calibrate(
    model: ModelSource,
    feeds: Calibration | None,
    *,
    estimators: Sequence[str] | None = None,
    memory: int | None = None,
    executor: Executor | str | None = None,
    scheduler: str | None = None,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    sources: SourceOptions | None = None,
    synthetic: int = 0,
    parts: Mapping[str, Parts] | None = None,
    until_stable: float | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Statistics:
    """Gather statistics of every value that some target could quantize, in one pass of bounded memory.

    The statistics serve any target, recipe and estimator: ``compile(calibration=statistics)``. They are the same bit
    for bit whatever the executor, the memory and the order in which workers finish.

    Args:
        model: as for `compile`.
        feeds: as for `compile`; a plain iterator is read once and never stored.
        estimators: range estimators whose ranges are written beside the statistics, such as ``percentile:99.99``.
        memory: bytes that observed values may take at a time; default a quarter of what is free.
        executor: a ``concurrent.futures.Executor``, such as Dask's ``client.get_executor()``, or ``inline``,
            ``threads`` (the default), ``threads:N``, ``processes``, ``processes:N``, ``dask``.
        scheduler: address of the Dask scheduler for ``dask``.
        threads: threads inside one operator, which results may depend on.
        shapes: input name to lengths, where axes are open.
        sources: how images, text and arrays become feeds.
        synthetic: make this many feeds up from the graph; ``feeds`` is then None.
        parts: values that are wanted per channel or block as well: ``{"x": Parts(axis=1)}``; see `Statistics.ranges`.
        until_stable: stop as soon as half as many feeds again moved 95 % of the ranges by no more than this share.
        output: a .qcal file to write. If it exists and is of the same model, data and engine, nothing runs.
        resume: go on from where an interrupted run with the same ``output`` stopped.
        progress: called with feeds done and, where known, their number.

    Raises:
        CalibrationError: no feed, a feed that does not fit the model, or NaN in a tensor (names sample and tensor).
    """
    from qcompiler.calibrator import DEFAULT_ESTIMATORS, CalibrationOptions, calibrate_model

    options = CalibrationOptions(
        tuple(estimators) if estimators is not None else DEFAULT_ESTIMATORS, memory, executor, scheduler, threads,
        shapes, sources or SourceOptions(), synthetic, parts or {}, until_stable,
        None if output is None else Path(output), resume, progress,
    )  # fmt: skip
    return calibrate_model(model, feeds, options).statistics


def load(path: str | Path, *, threads: int = 0) -> Runner:
    """Load a compiled (or any) model behind one call: ``run({name: array}) -> {name: array}``.

    Args:
        path: an ONNX model, run by the engine that it was compiled for (ONNX Runtime, if it does not say), or an .xml
            of OpenVINO.
        threads: threads inside one operator; 0 leaves it to the engine.

    Raises:
        ModelError: the file cannot be loaded.
        TargetError: the engine that it was compiled for is not installed.
    """
    return engine_backend(engine_of(Path(path))).engine.load(path, EngineOptions(threads=threads))
