"""``qcompiler compile`` of several models: one folder, one file of weights."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qcompiler.cli_files import check_folder, check_new_folder, check_outputs
from qcompiler.cli_options import load_metric, parse_shape_ranges
from qcompiler.cli_progress import progress_lines
from qcompiler.cli_show import show_report, size_text, stdout_console
from qcompiler.errors import ModelError, PassError, TargetError

if TYPE_CHECKING:
    from qcompiler.calibration.source_options import SourceOptions
    from qcompiler.compiled_set import CompiledSet, SetReport
    from qcompiler.engine import ShapeRange
    from qcompiler.options import Objective

_MOST = 8
"""Rows of a list that are shown; the report file has the rest."""


@dataclass(frozen=True)
class Request:
    """The options of ``compile`` as typed; lists may hold ``NAME=VALUE`` where there are several models."""

    target: str
    recipe: str
    calibration: Sequence[str] | None
    synthetic: int
    random: int
    sources: SourceOptions
    memory: int | None
    executor: str | None
    scheduler: str | None
    override: Sequence[str] | None
    budget: list[str] | None
    metric: Sequence[str] | None
    evaluation: Sequence[str] | None
    shapes: list[str] | None
    min_sqnr: float | None
    decisions: Path | None
    emit: str
    opset: int | None
    dump: Path | None
    report: Path | None
    threads: int | None
    guard: bool
    quiet: bool
    objective: Objective
    measure: bool


def only(texts: Sequence[str] | None, option: str) -> str | None:
    """Return the one value of an option.

    Raises:
        PassError: there are several.
    """
    if texts and len(texts) > 1:
        raise PassError(f"{option} is given {len(texts)} times; there is one model")
    return texts[0] if texts else None


def graph_names(models: Sequence[Path]) -> dict[str, Path]:
    """Return the models by name: the file's, without its suffix.

    Raises:
        ModelError: two have the same.
    """
    found: dict[str, Path] = {}
    for path in models:
        if (other := found.setdefault(path.stem, path)) is not path:
            raise ModelError(f"{other} and {path} have the same name {path.stem!r}: rename one of them")
    return found


def compile_several(
    models: Sequence[Path], output: Path, request: Request, links: Sequence[str], files: str | None
) -> None:
    """Compile several models into a folder, and show what came of it.

    Args:
        models: the files.
        output: the folder.
        request: the options.
        links: of ``--link``.
        files: kind of the files; None is the target's usual one.

    Raises:
        QCompilerError: bad input.
    """
    from qcompiler.compiled import staged_text
    from qcompiler.links import parse_link
    from qcompiler.results import plain_json

    named = graph_names(models)
    _check_places(named, output, request)
    _check_files(files, request)
    given = _arguments(named, request)
    joined: dict[str, str] = {}
    for text in links:
        taker, giver = parse_link(text, list(named))
        if taker in joined:
            raise ModelError(f"--link {taker} is given twice")
        joined[taker] = giver
    with progress_lines(request.quiet) as progress:
        compiled = _compile(named, request, given, joined, progress)
        if request.report is None:
            written = compiled.save(output, files=files)
        else:
            with staged_text(request.report, plain_json(compiled.report.to_dict())):
                written = compiled.save(output, files=files)
    if request.quiet:
        for warning in _warnings(compiled):
            print(f"warning: {warning}", file=sys.stderr)
    else:
        console, kind = stdout_console(), compiled.files(files)
        for name, one in compiled.items():
            show_report(one.report, console, f"{named[name]} -> {output / name}.{kind}", ())
        show_set(compiled.report, console, kind == "onnx")
        extra = (*([request.report] if request.report else []), *([request.dump] if request.dump else []))
        for path in (*written.files, *extra):
            console.print(Text(f"wrote {path}"), soft_wrap=True)
    if written.note:
        print(written.note, file=sys.stderr if request.quiet else sys.stdout)


def _check_places(named: Mapping[str, Path], output: Path, request: Request) -> None:
    """Refuse places that cannot be written to, before the long work."""
    if output.exists() and not output.is_dir():
        raise ModelError(f"cannot write to {output}: it is a file; several models go into a folder")
    if not output.exists() and output.suffix == ".onnx":
        raise ModelError(f"-o is {output}; several models go into a folder: give its name, such as {output.stem}")
    check_folder(output if output.is_dir() else output.absolute().parent, f"to {output}")
    for name, model in named.items():
        if output.is_dir():
            check_outputs({f"graph {name}": output / f"{name}.onnx"}, {"model": model})
    check_outputs({"report": request.report}, {f"model {n}": m for n, m in named.items()})
    check_new_folder(request.dump, "the dump")


def _check_files(files: str | None, request: Request) -> None:
    """Refuse a kind of files that the target's engine does not have, before the long work."""
    from qcompiler.backends.backend import OWN_SUFFIXES
    from qcompiler.backends.catalog import open_backend
    from qcompiler.best_engine import CPU
    from qcompiler.options import Options, settle

    if files is None:
        return
    name: str = CPU
    kinds: tuple[str, ...] = ("onnx", "xml")
    if request.target != CPU:
        target = settle(Options(target=request.target, recipe=request.recipe)).target
        name, kinds = target.name, open_backend(target).files
    if files in kinds:
        return
    if (owner := OWN_SUFFIXES.get(f".{files}")) is not None:
        raise TargetError(f"--save-as {files} is for {owner}, but the target is {name}; give --target {owner}")
    raise TargetError(f"--save-as {files} does not fit the target {name}, which is written as {' or '.join(kinds)}")


@dataclass(frozen=True)
class _Arguments:
    """What is said of each graph."""

    calibration: dict[str, str]
    evaluation: dict[str, str]
    override: dict[str, str]
    metric: dict[str, Callable[..., float]]
    budget: dict[str, list[str]]
    shapes: dict[str, dict[str, Sequence[int] | ShapeRange]]


def _arguments(named: Mapping[str, Path], request: Request) -> _Arguments:
    from qcompiler.per_graph import single_values, split_texts
    from qcompiler.together import fitting_shapes

    names = list(named)

    def single(texts: Sequence[str] | None, option: str) -> dict[str, str]:
        return single_values(split_texts(texts, names, option), option)

    evaluation = single(request.evaluation, "--evaluation")
    metrics = {name: load_metric(text) for name, text in single(request.metric, "--metric").items()}
    if request.evaluation:  # a metric for all is for those that have something to be measured on
        metrics = {name: metric for name, metric in metrics.items() if name in evaluation}
    bare = [text for text in request.shapes or () if text.partition("=")[0] not in named]
    split_texts([text for text in bare if "=" in text], names, "--shapes")
    shapes: dict[str, dict[str, Sequence[int] | ShapeRange]] = {
        name: dict(lengths)
        for name, lengths in fitting_shapes(dict(named), parse_shape_ranges(bare)).items()
    }  # fmt: skip
    for name in names:
        own = [text.partition("=")[2] for text in request.shapes or () if text.partition("=")[0] == name]
        shapes[name] |= parse_shape_ranges(own)
    return _Arguments(
        single(request.calibration, "--calibration"),
        evaluation,
        single(request.override, "--override"),
        metrics,
        {name: found for name, found in split_texts(request.budget, names, "--budget").items() if found},
        {name: lengths for name, lengths in shapes.items() if lengths},
    )


def _compile(
    named: Mapping[str, Path], request: Request, given: _Arguments, links: Mapping[str, str],
    progress: Callable[[str], None] | None,
) -> CompiledSet:  # fmt: skip
    from qcompiler.api import compile_together

    return compile_together(
        {name: str(path) for name, path in named.items()}, target=request.target, recipe=request.recipe,
        calibration=given.calibration or None, overrides=given.override or None, budget=given.budget or None,
        metric=given.metric or None, evaluation=given.evaluation or None, shapes=given.shapes or None, links=links,
        decisions=request.decisions, dump=request.dump, threads=request.threads, guard=request.guard,
        emit=request.emit, min_sqnr=request.min_sqnr, random_calibration=request.random, opset=request.opset,
        progress=progress, synthetic_calibration=request.synthetic, sources=request.sources,
        calibration_memory=request.memory, executor=request.executor, scheduler=request.scheduler,
        objective=request.objective, measure=request.measure,
    )  # fmt: skip


def _warnings(compiled: CompiledSet) -> list[str]:
    own = [f"{name}: {warning}" for name, one in compiled.items() for warning in one.report.warnings]
    return [*own, *compiled.warnings]


def show_set(report: SetReport, console: Console, once: bool = True) -> None:
    """Print what the graphs of a build share.

    Args:
        report: of the set.
        console: where to.
        once: whether shared weights were stored once.
    """
    console.print(Text("together", style="bold"))
    agreed = Counter(next(iter(row.stored.values())) for row in report.weights if row.agreed)
    forms = ", ".join(f"{count} as {form}" for form, count in agreed.most_common())
    differ = len(report.deviations)
    shared = f"{len(report.weights)} weights in several graphs: {forms or 'none'} in all of them"
    console.print(Text(f"weights   {shared}" + (f", {differ} not alike" if differ else "")), soft_wrap=True)
    if once:
        tensors = sum(row.nbytes for row in report.stored)
        alone = sum(report.alone.values())
        console.print(Text(f"stored    {len(report.stored)} tensors of {tensors / 1e6:.2f} MB are stored once"))
        console.print(Text(f"size      {size_text(alone, report.together)} apart and together"), soft_wrap=True)
    for row in report.deviations[:_MOST]:
        forms = ", ".join(f"{form} in {graph}" for graph, form in row.stored.items())
        why = "; ".join(f"{graph}: {reason}" for graph, reason in row.why.items())
        name = next(iter(row.names.values()))
        console.print(Text(f"  differs {name}: {forms}, {row.extra_bytes} bytes more ({why})"), soft_wrap=True)
    if (more := differ - _MOST) > 0:
        console.print(Text(f"  differs {more} more; --report FILE.json lists all"))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
