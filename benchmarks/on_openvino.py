"""Compare our compiled models on OpenVINO with float and with NNCF's on this processor, one thread.

Run ``python benchmarks/on_openvino.py --nncf-python PATH``, where PATH is the Python of an environment with nncf and
onnx; without it NNCF is left out. What is built, and the figures of every model that is done, stay in ``--work``: a run
that is broken off, or narrowed by ``--only``, goes on from there, and the tables hold all models that are done. Delete
a model's folder there to have it measured anew.

(A file named ``openvino.py`` in this folder would stand in front of the library of that name.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from baselines import FLOAT, NNCF_PYTHON, OPENVINO_FORMS
from building import GIB, Limits
from cpu import RESULTS, SHARED_MODELS
from measuring import ModelResult, Plan, measure
from openvino_tables import write_openvino
from rich.console import Console
from scoring import FormResult
from subjects import list_subjects

from qcompiler.targets.host import detect

DONE = "figures.json"


def main(
    nncf_python: Annotated[Path | None, typer.Option(help="Python of an environment with nncf and onnx.")] = None,
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps what was built and measured.")] = Path("build/openvino"),
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    seconds: Annotated[float, typer.Option(help="Least time for each form of a model.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Least number of interleaved rounds.")] = 30,
    memory: Annotated[float, typer.Option(help="GiB that building one form may take.")] = 6.0,
) -> None:
    """Measure every model that is not done yet in every form, interleaved, and write the tables."""
    console = Console()
    folder = models if models is not None else SHARED_MODELS if (SHARED_MODELS / "load.py").is_file() else None
    try:
        subjects = list_subjects(folder)
    except FileNotFoundError as error:
        console.print(f"[red]error:[/red] {error.args[0]}")
        raise typer.Exit(2) from error
    if unknown := set(only or ()) - {name for _, name in subjects}:
        console.print(f"[red]error:[/red] no model {', '.join(sorted(unknown))}")
        raise typer.Exit(2)
    forms = [f for f in OPENVINO_FORMS if nncf_python is not None or not f.name.startswith("nncf")]
    if nncf_python is not None:
        os.environ[NNCF_PYTHON] = str(nncf_python.absolute())  # its links are what makes it an environment
    plan = Plan(folder, forms, work, rounds, seconds, Limits(memory=int(memory * GIB)), reuse=True)
    for group, name in subjects:
        done = work / name / DONE
        if done.exists() or (only and name not in only):
            continue
        result = measure(group, name, plan, lambda text: console.print(text, style="dim"))
        done.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
        console.print(_line(result))
    results = _finished(work, subjects)
    written = write_openvino(output, results, _context(rounds, seconds))
    console.print("wrote " + ", ".join(str(path) for path in written))


def _finished(work: Path, subjects: Sequence[tuple[str, str]]) -> list[ModelResult]:
    found = []
    for _, name in subjects:
        done = work / name / DONE
        if done.exists():
            data = json.loads(done.read_text(encoding="utf-8"))
            forms = {form: FormResult(**figures) for form, figures in data.pop("forms").items()}
            found.append(ModelResult(**data, forms=forms))
    return found


def _line(result: ModelResult) -> str:
    parts = []
    for name, form in result.forms.items():
        if name != FLOAT:
            figure = "failed" if form.speedup is None else f"{form.speedup:.2f}" + ("" if form.holds else " inaccurate")
            parts.append(f"{name} {figure}")
    return f"{result.name}: {', '.join(parts)}"


def _context(rounds: int, seconds: float) -> dict[str, str]:
    processor = detect()
    packages = ("openvino", "onnxruntime", "onnx", "numpy", "qcompiler")
    return {
        "processor": f"{processor.model} ({processor.machine}; {', '.join(sorted(processor.features))})",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "timing": f"1 thread, the forms of a model interleaved, at least {rounds} rounds and {seconds:g} s for each",
    }


if __name__ == "__main__":
    typer.run(main)
