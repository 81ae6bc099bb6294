"""``qcompiler explain``: why a node is as it is, and what would make it fuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.cli_data import DataSettings, Images, Synthetic, Tokenizer, read_source_options
from qcompiler.cli_options import (
    SOURCE_HELP,
    Quiet,
    RandomFeeds,
    ShapeRanges,
    Source,
    Target,
    Threads,
    load_metric,
    parse_shape_ranges,
)
from qcompiler.cli_progress import progress_lines
from qcompiler.cli_show import stdout_console
from qcompiler.errors import ModelError

if TYPE_CHECKING:
    from qcompiler.explaining.explain import Explanation


def explain_command(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="An ONNX model.", show_default=False)] = None,
    node: Annotated[
        str, typer.Argument(metavar="[NODE]", help="A node, its original name, or a value.", show_default=False)
    ] = "",
    target: Target = "host",
    recipe: Annotated[str, typer.Option(help="int8, int8-static, int8-dynamic, or the path of a .toml.")] = "int8",
    calibration: Source = None,
    synthetic: Synthetic = None,
    random_calibration: RandomFeeds = None,
    images: Images = None,
    tokenizer: Tokenizer = None,
    data: DataSettings = None,
    override: Annotated[Path | None, typer.Option(metavar="FILE", help="A .toml with [[override]] rows.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="FILE.py:F", help="As for compile.")] = None,
    evaluation: Annotated[str | None, typer.Option(metavar="SRC", help=f"Feeds for the metric: {SOURCE_HELP}.")] = None,
    shapes: ShapeRanges = None,
    decisions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Explain these decisions without measuring anew.")
    ] = None,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Explain an earlier build: its --dump.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Explain an earlier build: its --report.")] = None,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help="Measure, as compile does.")] = True,
    errors: Annotated[
        bool | None, typer.Option("--errors/--no-errors", help="Measure error shares; default for one NODE.")
    ] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say why a node is as it is: form, scales, group, what stands in the way of integers, and what to do about it.

    MODEL is compiled as `compile` would. Without NODE all groups are listed with the first reason. A model that has
    Q/DQ already, without calibration data, is explained as it is: why the engine does not fuse these pairs. An earlier
    build is explained from its --dump (and --report), without compiling.

    \b
    Examples:
      qcompiler explain model.onnx --calibration feeds.npz
      qcompiler explain model.onnx /layer1/conv2/Conv --calibration feeds.npz
      qcompiler explain quantized.onnx
      qcompiler explain --dump DIR --report out.json /layer1/conv2/Conv
    """
    from qcompiler.explaining.text import show_explanation

    if model is None and dump is None and report is None:
        raise ModelError("nothing to explain: name an ONNX model, or an earlier build by --dump DIR or --report FILE")
    if dump is not None or report is not None:
        made = _earlier(dump, report, node or (str(model) if model is not None else ""))
    else:
        from qcompiler.explaining.explain import explain_build, explain_given, is_quantized
        from qcompiler.options import Options

        assert model is not None
        options = Options(
            target=target, recipe=recipe, calibration=calibration, overrides=override,
            metric=None if metric is None else load_metric(metric), evaluation=evaluation,
            shapes=parse_shape_ranges(shapes) or None, decisions=decisions, threads=threads, guard=guard,
            random_calibration=random_calibration or 0, synthetic_calibration=synthetic or 0,
            sources=read_source_options(images, tokenizer, data),
        )  # fmt: skip
        with_data = calibration is not None or bool(random_calibration or synthetic)
        if not with_data and decisions is None and is_quantized(str(model)):
            made = explain_given(str(model), options, node)
        else:
            with progress_lines(quiet or as_json) as progress:
                made = explain_build(str(model), _with(options, progress), node, errors=errors)
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
        return
    show_explanation(made, stdout_console(), _next_step(made, model))


def _with(options: Any, progress: Any) -> Any:
    from dataclasses import replace

    return replace(options, progress=progress)


def _earlier(dump: Path | None, report: Path | None, node: str) -> Explanation:
    from qcompiler.explaining.explain import explain_dump, explain_report

    if dump is not None:
        return explain_dump(dump, node, report)
    assert report is not None
    return explain_report(report, node)


def _next_step(made: Explanation, model: Path | None) -> str:
    """Return the command that a reader of this explanation may want next."""
    if made.single:
        return ""
    waiting = [a for a in made.accounts if a.causes and a.form in ("float", "given")]
    if not waiting:
        return ""
    worst = max(waiting, key=lambda a: (a.time_share or 0.0, a.macs_share or 0.0))
    return f"qcompiler explain {model or 'MODEL'} {worst.node} ... for the whole account of one node"
