"""Compare our calibration with ONNX Runtime's on the same feeds: peak memory and time.

Run ``python benchmarks/calibration.py``; ``--help`` lists the options. A full run writes ``calibration.md`` and
``calibration.json``; one that is narrowed by ``--only`` or ``--parts`` writes ``calibration-partial.*``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from calibration_tables import GENERATOR_MODELS, VARIANTS, Figures, ModelRow, Results, Variant, markdown, merged
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from subjects import DEMO, RESULTS, list_subjects, models_folder

from qcompiler.targets.host import detect

WORKER = Path(__file__).resolve().parent / "calibration_worker.py"
USUAL = ("minilm_l6", "yolox_nano", "efficientnet_lite0", "vit_cifar10")
"""Models that are measured where the folder has them; else all that it has."""
PARTS = ("models", "generator", "reductions")
SAFE_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LIMIT = 3600.0

Say = Callable[[str], None]


@dataclass
class Bench:
    """Starts one process after another and keeps what they found.

    Attributes:
        folder: folder of models, None for the demo models.
        rounds: how often each variant of a model runs, in turn.
        few: feeds of the short run of a generator.
        many: those of the long one.
        results: what was found so far.
    """

    folder: Path | None
    rounds: int
    few: int
    many: int
    results: Results = field(default_factory=Results)

    def models(self, subjects: Sequence[tuple[str, str]], say: Say) -> None:
        """Measure every variant of every model, variants in turn."""
        for group, name in subjects:
            found: dict[Variant, list[Figures]] = {variant: [] for variant in VARIANTS}
            for index in range(self.rounds):
                for variant, rounds in found.items():
                    if index and (variant.once or "error" in rounds[0]):
                        continue
                    say(f"{name}: {variant.name}, round {index + 1} of {self.rounds}")
                    rounds.append(self._variant(variant, group, name))
            self.results.models.append(ModelRow(name, {v.name: merged(v, rounds) for v, rounds in found.items()}))

    def _variant(self, variant: Variant, group: str, name: str) -> Figures:
        """Measure one variant; where ONNX Runtime's percentile fails on some value, it gets fewer to look at."""
        request = {"task": variant.task, "executor": variant.executor, "single": variant.single}
        found = self._run({**request, "group": group, "name": name})
        if "error" not in found or variant.task != "theirs":
            return found
        again = self._run({**request, "group": group, "name": name, "operators": SAFE_OPERATORS})
        return found if "error" in again else again | {"failed": found["error"]}

    def generators(self, say: Say) -> None:
        """Measure how memory grows with the number of feeds."""
        for name in GENERATOR_MODELS:
            for executor in ("inline", "threads"):
                row: Figures = {"model": name, "executor": executor}
                for key, count in (("few", self.few), ("many", self.many)):
                    say(f"{name}: {count} feeds from a generator, {executor}")
                    request = {"task": "generator", "group": DEMO, "name": name, "feeds": count}
                    row[key] = self._run({**request, "executor": executor, "single": executor == "inline"})
                self.results.generator.append(row)

    def reductions(self, say: Say) -> None:
        """Measure reductions inside and outside the graph."""
        say("reductions inside and outside the graph")
        self.results.reductions = self._run({"task": "reductions"}).get("rows", [])

    def _run(self, request: Figures) -> Figures:
        """Measure in a fresh process."""
        with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as work:
            asked, answer, said = (Path(work) / name for name in ("request.json", "result.json", "stderr.log"))
            models = None if self.folder is None else str(self.folder)
            asked.write_text(json.dumps({**request, "models": models}), encoding="utf-8")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            with said.open("wb") as stderr:
                try:
                    done = subprocess.run(
                        [sys.executable, str(WORKER), str(asked), str(answer)],
                        stdout=subprocess.DEVNULL, stderr=stderr, env=environment, timeout=_LIMIT, check=False,
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    return {"error": f"takes longer than {_LIMIT:.0f} s"}
            if not answer.exists():
                lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                return {"error": lines[-1][:200] if lines else f"exit code {done.returncode}"}
            found: Figures = json.loads(answer.read_text(encoding="utf-8"))
            return found


def chosen_subjects(folder: Path | None, only: Sequence[str]) -> list[tuple[str, str]]:
    """Return (group, name) of the models to measure.

    Raises:
        KeyError: a name that there is no model of.
    """
    subjects = list_subjects(folder)
    names = [name for _, name in subjects]
    if unknown := set(only) - set(names):
        raise KeyError(f"no model {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    if only:
        return [s for s in subjects if s[1] in only]
    known = [(g, n) for usual in USUAL for g, n in subjects if n == usual]
    return known or [s for s in subjects if s[0] != DEMO] or subjects


def main(
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}, separated by commas.")] = ",".join(PARTS),
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    rounds: Annotated[int, typer.Option(help="Rounds in which the variants of a model take turns.")] = 2,
    few: Annotated[int, typer.Option(help="Feeds of a generator's short run.")] = 50,
    many: Annotated[int, typer.Option(help="Feeds of a generator's long run.")] = 2000,
) -> None:
    """Measure models, generators and reductions one process at a time, and write the tables."""
    console = Console(width=200)
    folder = models_folder(models)
    wanted = parts.split(",")
    try:
        if unknown := set(wanted) - set(PARTS):
            raise KeyError(f"no part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
        subjects = chosen_subjects(folder, only or ())
    except (KeyError, FileNotFoundError) as error:
        console.print(f"[red]error:[/red] {error.args[0]}")
        raise typer.Exit(2) from error
    bench = Bench(folder, rounds, few, many)
    per_model = sum(1 if v.once else rounds for v in VARIANTS)
    steps = {"models": per_model * len(subjects), "generator": 4 * len(GENERATOR_MODELS), "reductions": 1}
    with _progress(console) as progress:
        task = progress.add_task("", total=sum(steps[part] for part in wanted))

        def say(text: str) -> None:
            progress.update(task, description=text, completed=say_count[0])
            say_count[0] += 1

        say_count = [0]
        if "reductions" in wanted:
            bench.reductions(say)
        if "generator" in wanted:
            bench.generators(say)
        if "models" in wanted:
            bench.models(subjects, say)
        progress.update(task, completed=sum(steps[part] for part in wanted))
    stem = "calibration-partial" if only or len(wanted) < len(PARTS) else "calibration"
    text = markdown(bench.results, _context(rounds))
    console.print(text, markup=False, soft_wrap=True)
    data = {"context": _context(rounds), **asdict(bench.results)}
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{stem}.md").write_text(text, encoding="utf-8")
    (output / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {output / stem}.md and .json")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _context(rounds: int) -> dict[str, Any]:
    processor = detect()
    cores = len(os.sched_getaffinity(0))
    return {
        "processor": f"{processor.model} ({processor.machine}; {', '.join(sorted(processor.features))}), {cores} cores",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "numpy", "qcompiler")),
        "timing": f"every run in a fresh process, the variants of a model in turn, {rounds} rounds",
    }


if __name__ == "__main__":
    typer.run(main)
