"""Compare models compiled for Triton with ONNX Runtime on the same graphs, on the CPU: step by step, and as a whole.

Run ``python benchmarks/on_triton.py``; it needs torch. Figures of every model that is done stay in ``--work``: a run
that is broken off, or narrowed by ``--only``, goes on from there. Nothing is timed: references compute the steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from subjects import RESULTS, Subject, list_subjects, load_subject, models_folder
from triton_steps import compare_steps, count_steps, nudged, twin_of

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.tensorrt.backend import PlainOrtEngine
from qcompiler.backends.triton.engine import TritonEngine
from qcompiler.backends.triton.executor import Executor
from qcompiler.backends.triton.program import build_program
from qcompiler.backends.triton.work import Work, count_work
from qcompiler.compilation import Compilation
from qcompiler.engine import Runner
from qcompiler.errors import QCompilerError
from qcompiler.options import Options

TARGET = "triton-sm90"
POINTS, NUDGE = 0.002 + 1e-9, 1e-6
"""What metrics may differ by, and by how much inputs are moved where they do."""
COLUMNS = (
    "model", "kernels / torch", "MACs in kernels", "quantized", "quantized without the guard", "fused / planned",
    "off by one", "worst step", "by more", "metric", "ours", "ONNX Runtime", "float",
)  # fmt: skip
PACKAGES = ("qcompiler", "onnxruntime", "torch", "numpy")


@dataclass
class Figures:
    """What was found of one model.

    Attributes:
        name: of the model.
        error: why it does not compile, in the compiler's words.
        planned: fusions that were planned.
        fused: those that a kernel executes.
        steps: of the plan for the evaluation's shapes: kernels, stand-ins, torch functions.
        macs: multiply-adds of that plan: in kernels, in torch functions, products that could not be counted, and those
            in kernels for floats.
        offered: the same of a build where the accuracy guard returned nothing to float.
        values: results of kernels that were compared.
        one: those that differ, by one step at most.
        more: those that differ by more.
        worst: (step, share of differing values) of the worst one.
        ours: metrics of the executor's references.
        theirs: metrics of ONNX Runtime on the same quantized graph.
        moved: by how much those move when its inputs move by a millionth; measured where ours differ by more than 0.2
            points.
        float: metrics of the model as it came.
    """

    name: str
    error: str = ""
    planned: int = 0
    fused: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    offered: dict[str, int] = field(default_factory=dict)
    values: int = 0
    one: int = 0
    more: int = 0
    worst: tuple[str, float] = ("", 0.0)
    ours: dict[str, float] = field(default_factory=dict)
    theirs: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    float: dict[str, float] = field(default_factory=dict)


def main(
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps figures of what is done.")] = Path("build/triton"),
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    feeds: Annotated[int, typer.Option(help="Calibration feeds.")] = 32,
) -> None:
    """Measure every model that is not done yet, and write the table."""
    console, folder = Console(), models_folder(models)
    work.mkdir(parents=True, exist_ok=True)
    names = [(group, name) for group, name in list_subjects(folder) if not only or name in only]
    for group, name in names:
        done = work / f"{name}.json"
        if not done.exists():
            figures = measure(load_subject(group, name, folder), feeds)
            done.write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")
            console.print(row(figures), soft_wrap=True)
    found = [work / f"{name}.json" for _, name in list_subjects(folder)]
    results = [Figures(**json.loads(path.read_text(encoding="utf-8"))) for path in found if path.exists()]
    (output / "triton.md").write_text(render(results, feeds), encoding="utf-8")
    (output / "triton.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")


def measure(subject: Subject, feeds: int) -> Figures:
    """Compile a model as users do, compare its steps on one evaluation feed, and its metrics on all."""
    made = Figures(subject.name)
    job = Compilation(subject.path, Options(target=TARGET, calibration=list(subject.calibration[:feeds])))
    try:
        compiled = job.run()
        program = build_program(compiled.model)
    except QCompilerError as error:
        made.error = str(error)
        return made
    proof, twin = compiled.report.proof, twin_of(job, compiled)
    made.planned, made.fused = proof.planned, len(proof.fused)
    executor = Executor(program)
    plan = executor.prepare({n: a.shape for n, a in subject.feed.items()}).plan
    made.steps, made.macs = count_steps(plan), asdict(count_work(plan, program))
    made.offered = offered_work(subject, feeds)
    gaps = compare_steps(compiled.model, twin, [subject.feed])
    made.values, made.one, made.more = (sum(getattr(g, n) for g in gaps) for n in ("values", "one", "more"))
    worst = max(gaps, key=lambda g: g.share, default=None)
    made.worst = (worst.step, worst.share) if worst is not None else ("", 0.0)
    made.ours = _metric(subject, TritonEngine("cpu").load(compiled.model))
    made.theirs = _metric(subject, PlainOrtEngine().load(twin))
    if any(abs(made.ours[n] - value) > POINTS for n, value in made.theirs.items()):
        others = [_metric(subject, nudged(twin, 1 + by)) for by in (-NUDGE, NUDGE)]
        made.moved = {n: max(abs(m[n] - value) for m in others) for n, value in made.theirs.items()}
    made.float = _metric(subject, OrtEngine().load(subject.path))
    return made


def offered_work(subject: Subject, feeds: int) -> dict[str, int]:
    """Count the multiply-adds of a build without the accuracy guard: what the kernels can take."""
    options = Options(target=TARGET, calibration=list(subject.calibration[:feeds]), guard=False)
    program = build_program(Compilation(subject.path, options).run().model)
    plan = Executor(program).prepare({n: a.shape for n, a in subject.feed.items()}).plan
    return asdict(count_work(plan, program))


def _metric(subject: Subject, runner: Runner) -> dict[str, float]:
    return subject.metric(subject.run_all(lambda feed: list(runner.run(feed).values())))


def row(figures: Figures) -> str:
    """Return a model's row."""
    if figures.error:
        return f"| {figures.name} | {figures.error} |" + " |" * (len(COLUMNS) - 2)
    name = next(iter(figures.ours))
    moved = f" ± {figures.moved[name]:.4f}" if figures.moved else ""
    metrics = f"{figures.ours[name]:.4f} | {figures.theirs[name]:.4f}{moved} | {figures.float[name]:.4f}"
    counts = f"{figures.steps['kernels']} / {figures.steps['stand-ins'] + figures.steps['torch']}"
    share = f"{figures.one / max(figures.values, 1):.1e}"
    return (
        f"| {figures.name} | {counts} | {_share(figures.macs)} | {_quantized(figures.macs)} | "
        f"{_quantized(figures.offered)} | {figures.fused} / {figures.planned} | {share} | "
        f"{figures.worst[1]:.1e} | {figures.more} | {name} | {metrics} |"
    )


def _share(macs: Mapping[str, int]) -> str:
    """Return multiply-adds in kernels in percent of all; products of unknown shapes are named."""
    share = f"{100 * Work(macs['kernels'], macs['torch']).share:.1f} %"
    return share + (f" ({macs['unknown']} unknown)" if macs["unknown"] else "")


def _quantized(macs: Mapping[str, int]) -> str:
    """Return multiply-adds that kernels do on stored numbers in percent of all."""
    return f"{100 * Work(**macs).quantized:.1f} %"


def render(results: Sequence[Figures], feeds: int) -> str:
    """Return the page."""
    lines = [
        "# Triton: steps against ONNX Runtime",
        "",
        f"Default builds for `{TARGET}` from up to {feeds} calibration feeds, computed by the references on the CPU; "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        + ". Written by `benchmarks/on_triton.py`.",
        "",
        "Every step reads what ONNX Runtime computed in front of it, of the same graph in plain Q/DQ without "
        "optimizations. A step of a float result is 1/255 of its range. Multiply-adds (MACs) are those of products and "
        "convolutions, for the shapes of the evaluation's feeds; quantized are those on stored numbers: what is in "
        "float for accuracy's sake, or since its sums are too short, runs in kernels for floats.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *(row(r) for r in results),
        "",
        "Averages over whole pictures differ most: sums of integers are exact here, while ONNX Runtime's Q/DQ adds "
        "floats, whose noise breaks a tie either way (its QLinearGlobalAveragePool gives our numbers, bit for bit).",
        "",
        "A deep model may carry one step far. Where metrics differ by more than 0.2 points though all steps agree, ± "
        "says how far ONNX Runtime's own metric moves when inputs change by a millionth.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
