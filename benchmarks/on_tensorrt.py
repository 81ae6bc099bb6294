"""Compile every model for TensorRT, count the layers that its builder runs quantized, and measure what accuracy stays.

Run ``python benchmarks/on_tensorrt.py``; no GPU is needed. TensorRT for RTX builds every model as it came and as it
was compiled, in a process of its own, and its layer log is the proof. Accuracy is that of the emitted ONNX on ONNX
Runtime's CPU provider, as it is written (its optimizations off), over the evaluation data; compilation sees the
calibration data alone, through the same guard that users get. Nothing is timed.

The figures of every case that is done stay in ``--work``: a run that is broken off, or narrowed by ``--only`` and
``--recipe``, goes on from there. Delete a model's folder there to have it measured anew.

(A file named ``tensorrt.py`` in this folder would stand in front of the library of that name.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer
from rich.console import Console
from scoring import SqnrMeter, holds
from subjects import RESULTS, Array, Outputs, Subject, list_subjects, load_subject, models_folder
from tensorrt_tables import Case, CaseResult, write_tensorrt

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.tensorrt.probe import Prober
from qcompiler.compilation import Compilation
from qcompiler.dataset import Dataset
from qcompiler.decisions import Decisions
from qcompiler.engine import Engine, EngineOptions, Runner
from qcompiler.errors import QCompilerError
from qcompiler.options import Options
from qcompiler.report.report import Report
from qcompiler.targets.target import load_target

CASES = (
    Case("tensorrt-sm80", "int8"),
    Case("tensorrt-sm89", "int8"),
    Case("tensorrt-sm89", "fp8"),
    Case("tensorrt-sm89", "int4-weights"),
    Case("tensorrt-sm120", "nvfp4"),
    Case("tensorrt-sm120", "mxfp8"),
)
PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
AS_WRITTEN = EngineOptions(threads=1, optimize=False)


@dataclass
class Reference:
    """A model as it came: its outputs and metrics, and the calibration that all its cases share."""

    subject: Subject
    names: list[str]
    outputs: list[Outputs]
    metrics: dict[str, float]
    size: int
    data: Dataset | None = None


def main(
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Name of a recipe; may be repeated.")] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps what was built and measured.")] = Path("build/tensorrt"),
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Compile and measure every case that is not done yet, and write the tables."""
    console = Console()
    folder = models_folder(models)
    try:
        subjects = list_subjects(folder)
    except FileNotFoundError as error:
        console.print(f"[red]error:[/red] {error.args[0]}")
        raise typer.Exit(2) from error
    if unknown := set(only or ()) - {name for _, name in subjects}:
        console.print(f"[red]error:[/red] no model {', '.join(sorted(unknown))}")
        raise typer.Exit(2)
    for group, name in subjects:
        if only and name not in only:
            continue
        wanted = [c for c in CASES if not recipe or c.recipe in recipe]
        todo = [c for c in wanted if not _file(work, name, c).exists()]
        if not todo:
            continue
        reference = _measure_reference(load_subject(group, name, folder))
        for case in todo:
            result = _measure_case(reference, case, work)
            _file(work, name, case).write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
            console.print(result.line(), style="dim" if result.holds else "yellow")
    missing = {
        f"{case.target} {case.recipe}": [n for _, n in subjects if not _file(work, n, case).exists()] for case in CASES
    }
    written = write_tensorrt(output, _finished(work, subjects), _context(missing))
    console.print("wrote " + ", ".join(str(path) for path in written))


def _file(work: Path, name: str, case: Case) -> Path:
    return work / name / f"{case.target}.{case.recipe}.json"


def _finished(work: Path, subjects: Sequence[tuple[str, str]]) -> list[CaseResult]:
    found = []
    for _, name in subjects:
        for case in CASES:
            if (path := _file(work, name, case)).exists():
                found.append(CaseResult(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def _measure_reference(subject: Subject) -> Reference:
    runner = OrtEngine().load(subject.path, AS_WRITTEN)
    names = [o.name for o in runner.outputs]
    outputs = _run(subject, runner, names)
    size = subject.path.stat().st_size
    beside = subject.path.with_suffix(".weights")
    size += beside.stat().st_size if beside.exists() else 0
    return Reference(subject, names, outputs, subject.metric(outputs), size)


def _run(subject: Subject, runner: Runner, names: Sequence[str]) -> list[Outputs]:
    def one(feed: Mapping[str, Array]) -> Outputs:
        found = runner.run(feed)
        return [found[name] for name in names]

    return subject.run_all(one)


def _measure_case(reference: Reference, case: Case, work: Path) -> CaseResult:
    """Compile one case and measure it; a failure is a result too."""
    subject = reference.subject
    folder = work / subject.name
    folder.mkdir(parents=True, exist_ok=True)
    result = CaseResult(subject.group, subject.name, case.target, case.recipe, size_before=reference.size)
    result.metrics_float = reference.metrics
    result.float_error = _refusal(subject.path, subject, case.target)
    start = time.perf_counter()
    # Two targets whose tables agree in a recipe decide alike: the second repeats the first one's record.
    twin = next((c for c in CASES if c.recipe == case.recipe and c != case and _record(folder, c).exists()), None)
    record = Decisions.from_json(_record(folder, twin).read_text(encoding="utf-8")) if twin else None
    options = Options(
        target=case.target, recipe=case.recipe, calibration=list(subject.calibration), decisions=record, threads=1
    )  # fmt: skip
    compilation = Compilation(subject.path, options, shared=reference.data)
    try:
        made = compilation.run()
    except QCompilerError as error:
        result.error = str(error)
        return result
    result.seconds = round(time.perf_counter() - start, 1)
    reference.data = compilation.data
    _record(folder, case).write_text(made.decisions.to_json(), encoding="utf-8")
    (folder / f"{case.target}.{case.recipe}.onnx").write_bytes(made.to_bytes())
    result.build_error = _refusal(made.to_bytes(), subject, case.target)
    _fill_counts(result, made.report)
    build = compilation.workshop.build(made.decisions.forms, made.decisions.engine_forms)
    _fill_accuracy(result, reference, compilation.engine, compilation.workshop.computable(build))
    return result


def _record(folder: Path, case: Case) -> Path:
    return folder / f"{case.target}.{case.recipe}.decisions.json"


def _refusal(source: Path | bytes, subject: Subject, target: str) -> str | None:
    """Return why the builder refuses a model, None if it builds it."""
    samples = {name: tuple(array.shape) for name, array in subject.feed.items()}
    sm = load_target(target).sm
    report = Prober().probe(source, [sm], {}, samples)[sm]
    return None if report.built else str(report.issues[0])


def _fill_counts(result: CaseResult, report: Report) -> None:
    proof = report.proof
    kinds = {g.group: g.operator for g in report.groups}
    result.planned, result.fused = proof.planned, len(proof.fused)
    result.products = sum(kind in PRODUCTS for kind in kinds.values())
    result.products_fused = sum(kinds.get(name) in PRODUCTS for name in proof.fused)
    lost = [m for m in proof.missed if kinds.get(m.group, m.kind) in PRODUCTS]
    result.products_planned = result.products_fused + len(lost)
    result.missed = [f"{m.kind} {m.group}: {m.reason}: {m.text}" for m in proof.missed]
    result.float_products = {
        g.group: g.why for g in report.groups if g.operator in PRODUCTS and g.group not in proof.fused
    }
    result.share, result.size = report.integer_share, report.bytes_after
    result.returned = sum(len(step["groups"]) for step in report.returned)
    result.warnings = list(report.warnings)
    result.held_out_db = {} if report.quality is None else dict(report.quality.sqnr_db)


def _fill_accuracy(result: CaseResult, reference: Reference, engine: Engine, model: ir.Model) -> None:
    runner = engine.load(model, AS_WRITTEN)
    outputs = _run(reference.subject, runner, reference.names)
    meter = SqnrMeter(reference.names)
    for wanted, found in zip(reference.outputs, outputs, strict=True):
        meter.add(wanted, found)
    result.sqnr_db = meter.decibels()
    result.metrics = reference.subject.metric(outputs)
    result.holds = holds(reference.metrics, result.metrics)


def _context(missing: Mapping[str, Sequence[str]]) -> dict[str, str]:
    packages = ("tensorrt-rtx-cu13", "onnxruntime", "onnx", "numpy", "qcompiler")
    found = {
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "proof": "the layer log of TensorRT for RTX, built for the target's compute capability without a GPU",
        "accuracy": "the emitted ONNX on ONNX Runtime CPU without optimizations, evaluation data",
    }
    open_cases = "; ".join(f"{case}: {', '.join(names)}" for case, names in missing.items() if names)
    return {**found, "not measured yet": open_cases} if open_cases else found


if __name__ == "__main__":
    typer.run(main)
