"""``qcompiler demo``: compile the demo models and show what that gained."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from qcompiler.cli_files import check_new_folder
from qcompiler.cli_options import Quiet, Threads
from qcompiler.cli_progress import progress_lines
from qcompiler.cli_show import size_text, stdout_console
from qcompiler.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcompiler.compiled import CompiledModel


def demo_command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where the results go; a new temporary folder.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="This model only; may be repeated.")] = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Compile the demo models of the checkout: accuracy, size and speed before and after, and where the dumps are.

    \b
    Examples:
      qcompiler demo
      qcompiler demo --output demo-results --only digits_resnet
    """
    models = {m.name: m for m in _demo_data().demo_models()}
    if unknown := set(only or ()) - set(models):
        raise ModelError(f"no demo model is named {sorted(unknown)[0]!r}; there are: {', '.join(models)}")
    check_new_folder(output, "the results")
    folder = output if output is not None else Path(tempfile.mkdtemp(prefix="qcompiler-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    console = stdout_console()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("model", "metric", "float", "compiled", "size", "speed", "fused/planned", "integers"):
        table.add_column(column, justify="left" if column in ("model", "metric") else "right")
    warnings: list[str] = []
    with progress_lines(quiet) as progress:
        for name in only or models:
            before, compiled = _compile(models[name], folder, threads, _prefixed(progress, name))
            table.add_row(*map(Text, _row(models[name], before, compiled)))
            warnings += [f"{name}: {w}" for w in compiled.report.warnings]
    if not quiet:
        console.print(table)
        console.print(Text("dumps (see: qcompiler inspect DIR):"))
        for name in only or models:
            console.print(Text(f"  {folder / f'{name}.dump'}"), soft_wrap=True)
        console.print(Text(f"models, decisions records and reports: {folder}"), soft_wrap=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _prefixed(progress: Callable[[str], None] | None, name: str) -> Callable[[str], None] | None:
    return None if progress is None else lambda text: progress(f"{name}: {text}")


def _compile(
    model: Any, folder: Path, threads: int | None, progress: Callable[[str], None] | None
) -> tuple[float, CompiledModel]:
    """Return the float model's metric and the compiled model, whose files are written."""
    from qcompiler.api import compile as compile_api
    from qcompiler.api import load
    from qcompiler.results import write_results

    reference = load(model.path, threads=threads or 1)
    before = model.metric([reference.run(feed) for feed in model.evaluation])
    compiled = compile_api(
        model.path, calibration=model.calibration, metric=lambda outputs, _: float(model.metric(outputs)),
        evaluation=model.evaluation, budget="drop<=1pt", dump=folder / f"{model.name}.dump", threads=threads,
        progress=progress,
    )  # fmt: skip
    write_results(compiled, folder / f"{model.name}.onnx", folder / f"{model.name}.report.json")
    return before, compiled


def _row(model: Any, before: float, compiled: CompiledModel) -> Iterator[str]:
    report = compiled.report
    after = None if report.quality is None else report.quality.metric
    yield from (model.name, model.metric_name, f"{before:.4f}", "" if after is None else f"{after:.4f}")
    yield size_text(report.bytes_before, report.bytes_after)
    yield "" if report.speedup is None else f"{report.speedup:.2f}x"
    yield f"{len(report.proof.fused)}/{report.proof.planned}"
    yield f"{report.integer_share:.1%}"


def _demo_data() -> ModuleType:
    """Load examples/demo_data.py of the working folder or of the checkout that the package runs from.

    Raises:
        ModelError: neither has it; the examples are no part of an installed package.
    """
    places = [Path.cwd() / "examples", Path(__file__).resolve().parents[1] / "examples"]
    file = next((p / "demo_data.py" for p in places if (p / "demo_data.py").is_file()), None)
    if file is None:
        raise ModelError("the demo models are not here: run it in a checkout of qcompiler (examples/ is not installed)")
    name = "qcompiler_demo_data"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module
