"""Compare our compiled models with float and with ONNX Runtime's own quantizer on this processor, one thread.

Run ``python benchmarks/cpu.py``; ``--help`` lists the options. A full run writes ``cpu.md`` and ``cpu.json``; one that
is narrowed by ``--only`` or ``--forms`` writes ``cpu-partial.*``, so that it never replaces a full one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from baselines import FLOAT, FORMS, form_named
from building import GIB, Limits
from measuring import ModelResult, Plan, context, measure, summary
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from subjects import RESULTS, list_subjects, models_folder
from tables import write_results

PACKAGES = ("onnxruntime", "onnx", "numpy", "qcompiler")


def main(
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    forms: Annotated[str, typer.Option(help="Names of forms, separated by commas; float is always measured.")] = "",
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    seconds: Annotated[float, typer.Option(help="Least time for each form of a model.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Least number of interleaved rounds.")] = 30,
    memory: Annotated[float, typer.Option(help="GiB that building one form may take.")] = 6.0,
) -> None:
    """Measure every model in every form, interleaved, and write the tables."""
    console = Console()
    folder = models_folder(models)
    try:
        subjects = list_subjects(folder)
        chosen = [form_named(name) for name in forms.split(",")] if forms else list(FORMS)
        unknown = set(only or ()) - {name for _, name in subjects}
        if unknown:
            raise KeyError(f"no model {', '.join(sorted(unknown))}; known: {', '.join(n for _, n in subjects)}")
    except (KeyError, FileNotFoundError) as error:
        console.print(f"[red]error:[/red] {error.args[0]}")
        raise typer.Exit(2) from error
    if only:
        subjects = [s for s in subjects if s[1] in only]
    wanted = [form_named(FLOAT), *(f for f in chosen if f.name != FLOAT)]
    stem = "cpu-partial" if only or forms else "cpu"
    results: list[ModelResult] = []
    with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as work, _progress(console) as progress:
        plan = Plan(folder, wanted, Path(work), rounds, seconds, Limits(memory=int(memory * GIB)))
        task = progress.add_task("", total=len(subjects))
        for group, name in subjects:
            result = measure(group, name, plan, lambda text: progress.update(task, description=text))
            results.append(result)
            progress.advance(task)
            progress.console.print(summary(result))
            written = write_results(output, stem, results, context(PACKAGES, rounds, seconds))
    console.print("wrote " + ", ".join(str(path) for path in written))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


if __name__ == "__main__":
    typer.run(main)
