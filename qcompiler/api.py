"""The public functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.compiler import Calibration, CompiledModel, ModelSource, Options, Progress, compile_model
from qcompiler.decisions import Decisions
from qcompiler.engine import EngineOptions, Runner
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
    shapes: Mapping[str, Sequence[int]] | None = None,
    decisions: Decisions | str | Path | None = None,
    dump: str | Path | None = None,
    threads: int | None = None,
    guard: bool = True,
    emit: str = "auto",
    min_sqnr: float | None = None,
    random_calibration: int = 0,
    opset: int | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile a float or QDQ model into a quantized one that is measured to be faster and close enough.

    Args:
        model: a path, serialized bytes, ``onnx.ModelProto`` or ``onnx_ir.Model``; it is not modified.
        target: name of a capability table, or ``host`` for this processor.
        recipe: a recipe's name, the path of a .toml, or a `Recipe`.
        calibration: feeds as a re-iterable of ``{input: array}``, a callable that returns an iterator, a plain
            iterator, or a path (.npz, folder, ``file.py:function``). A fifth of the feeds is set aside for checking.
        overrides: path of a .toml with ``[[override]]`` rows: match (glob), form, estimator.
        budget: bounds such as ``"drop<=0.5pt"``, ``"drop<=1%"``, ``"sqnr>=30"``.
        metric: function (outputs per feed, feeds) -> float, more is better; for drop budgets.
        evaluation: feeds for the metric.
        shapes: input name to lengths, where axes are open.
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

    Returns:
        The compiled model with its decisions, remarks and report.

    Raises:
        QCompilerError: bad input, with what to do about it.
    """
    options = Options(
        target, recipe, calibration, overrides, budget, metric, evaluation, shapes, decisions, dump, threads, guard,
        emit, min_sqnr, random_calibration, progress, opset,
    )  # fmt: skip
    return compile_model(model, options)


def load(path: str | Path, *, threads: int = 0) -> Runner:
    """Load a compiled (or any) ONNX model behind one call: ``run({name: array}) -> {name: array}``.

    Args:
        path: the model file.
        threads: threads inside one operator; 0 leaves it to the engine.

    Raises:
        ModelError: the file cannot be loaded.
    """
    return OrtEngine().load(path, EngineOptions(threads=threads))
