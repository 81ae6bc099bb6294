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
from pathlib import Path
from typing import Annotated

import typer
from baselines import NNCF_PYTHON, OPENVINO_FORMS
from building import GIB, Limits
from measuring import ModelResult, Plan, context, measure, summary
from openvino_tables import write_openvino
from rich.console import Console
from scoring import FormResult
from subjects import RESULTS, list_subjects, models_folder

DONE = "figures.json"
PACKAGES = ("openvino", "onnxruntime", "onnx", "numpy", "qcompiler")


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
    folder = models_folder(models)
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
        console.print(summary(result))
    results = _finished(work, subjects)
    written = write_openvino(output, results, context(PACKAGES, rounds, seconds))
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


if __name__ == "__main__":
    typer.run(main)
