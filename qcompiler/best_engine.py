"""Target ``cpu``: compile for every engine that runs on this processor, measure them against each other, keep one."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace

from qcompiler.backends.openvino import INSTALL
from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Runner
from qcompiler.errors import ModelError
from qcompiler.options import ModelSource, Options, read_decisions, runs_here
from qcompiler.search.timing import interleave
from qcompiler.targets.host import detect, host_target_name
from qcompiler.targets.target import load_target
from qcompiler.workshop import AS_GIVEN

CPU = "cpu"
"""Name of the target that stands for all engines on this processor."""
_FLOAT = "float"


def compile_for_cpu(source: ModelSource, options: Options) -> CompiledModel:
    """Compile for ONNX Runtime and OpenVINO from one calibration, and keep the fastest that holds the bounds.

    The model as given on OpenVINO is a candidate, too; on ONNX Runtime it is what compiling falls back to.

    The report's speed-up is against the model as given on ONNX Runtime in float32. Without measuring (``guard`` off, no
    feed to time with) the result is ONNX Runtime's. A decisions record is repeated for the engine that it is of.
    """
    record = read_decisions(options.decisions)
    if record is not None and (made_for := record.context.get("target")) is not None:
        return Compilation(source, replace(options, target=made_for, decisions=record)).run()
    names, notes = _candidates()
    first = Compilation(source, replace(options, target=names[0]))
    compilations, compiled = {names[0]: first}, {names[0]: first.run()}
    feed = first.decider.timing_feed if options.guard and first.here else None
    if feed is None:
        return _noted(compiled[names[0]], notes)
    for name in names[1:]:
        # The dump shows one build: that of the first engine.
        other = Compilation(source, replace(options, target=name, dump=None), shared=first.data)
        try:
            compiled[name] = other.run()
            compilations[name] = other
            if (
                compiled[name].decisions.engine_forms.get(AS_GIVEN) != "keep"
                and (given := other.as_given()) is not None
            ):
                compiled[f"{name} {_FLOAT}"] = given
                compilations[f"{name} {_FLOAT}"] = other
        except ModelError as error:
            notes.append(f"not compiled for {name}: {error}")
    runners: dict[str, Runner] = {_FLOAT: first.truth.load(first.reference, first.engine_options)}
    for name, result in compiled.items():
        runners[name] = compilations[name].engine.load(result.model, first.engine_options)
    times = interleave(runners, feed, rounds=30, seconds=1.0)
    speed = {n: (times[_FLOAT].minimum / t.minimum, times[_FLOAT].median / t.median) for n, t in times.items()}
    held = [n for n in compiled if n.endswith(_FLOAT) or compilations[n].met] or names[:1]
    chosen = max(held, key=lambda n: speed[n][0])
    tried = {f"on {n}": _figures(compiled[n], speed[n][0]) for n in compiled}
    result = compiled[chosen]
    report = replace(
        result.report,
        speedup=round(speed[chosen][0], 4),
        speedup_median=round(speed[chosen][1], 4),
        forms_tried={**result.report.forms_tried, **tried},
    )
    return _noted(replace(result, report=report), notes)


def _candidates() -> tuple[list[str], list[str]]:
    """Return the targets whose engine is installed and whose table is for this processor, and what to know."""
    processor = detect()
    name, note = host_target_name(processor)
    names, notes = [name], [note] if note else []
    openvino = load_target("openvino")
    if not runs_here(openvino, processor):
        notes.append(
            f"OpenVINO was not tried: its table is for {openvino.processor} with {', '.join(openvino.requires)}"
        )
    elif importlib.util.find_spec("openvino") is None:
        notes.append(f"only ONNX Runtime was tried; {INSTALL}")
    else:
        names.append(openvino.name)
    return names, notes


def _figures(compiled: CompiledModel, speedup: float) -> Mapping[str, float]:
    figures = {"speedup": round(speedup, 3)}
    if compiled.report.quality is not None:
        figures["sqnr_db"] = round(compiled.report.quality.worst, 2)
    return figures


def _noted(compiled: CompiledModel, notes: list[str]) -> CompiledModel:
    report = replace(compiled.report, warnings=(*compiled.report.warnings, *notes))
    return replace(compiled, report=report)
