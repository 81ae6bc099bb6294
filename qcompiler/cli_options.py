"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.errors import BudgetError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcompiler.engine import Array, Feeds, ShapeRange
    from qcompiler.search.quality import Metric

SOURCE_HELP = "an .npz, a folder (.npz, .npy, images, test_data_set_*), text, a .qcal, or file.py:function"

Target = Annotated[
    str,
    typer.Option(help="Capability table; 'host' for ONNX Runtime here, 'cpu' for the fastest engine (see: targets)."),
]
Source = Annotated[str | None, typer.Option("--calibration", metavar="SRC", help=f"Calibration feeds: {SOURCE_HELP}.")]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration", "-c", metavar="SRC",
        help=f"Calibration feeds: {SOURCE_HELP}. Of several models: NAME=SRC each.",
    ),
]  # fmt: skip
RandomFeeds = Annotated[
    int | None,
    typer.Option("--random-calibration", min=1, metavar="N", help="Use N random feeds instead of data (warns)."),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shapes", metavar="NAME:DIMS", help="Lengths of open axes, like x:1x3x224x224; may be repeated."),
]
ShapeRanges = Annotated[
    list[str] | None,
    typer.Option(
        "--shapes",
        metavar="NAME:DIMS",
        help="Lengths of open axes, like x:1x3x224x224, or a range of them, like x:1x3x224x224..8x3x224x224 "
        "(least..most, or least..best..most); may be repeated.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=0, help="Threads inside one operator while measuring; default 1.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary; warnings go to stderr.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX model.", show_default=False)]

Models = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL...", help="An ONNX model, or several that share weights.", show_default=False),
]
Links = Annotated[
    list[str] | None,
    typer.Option(
        "--link", metavar="NAME.INPUT=NAME.OUTPUT",
        help="Of several models: feed an input with another's output where its calibration feeds lack it; '*' stands "
        "for any text, the same at both ends; may be repeated.",
    ),
]  # fmt: skip


class Emit(StrEnum):
    """Forms of the output that can be forced."""

    QDQ = "qdq"
    QOPERATOR = "qoperator"


class Goal(StrEnum):
    """What a build makes small within its budgets."""

    LATENCY = "latency"
    BYTES = "bytes"


class SavedAs(StrEnum):
    """Kinds of files that several graphs are written as."""

    ONNX = "onnx"
    XML = "xml"
    PLAN = "plan"
    QC = "qc"


_SHAPE = re.compile(r"\s*(?P<name>.+?):(?P<dims>(?:-1|\d+)(?:x(?:-1|\d+))*)\s*")


def parse_shapes(texts: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Read texts such as ``x:1x3x224x224`` or ``x:1x3,y:-1x5`` into lengths by input name; -1 leaves an axis open.

    Raises:
        ModelError: a text of another form, or an input named twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in (part for given in texts or () for part in given.split(",")):
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise ModelError(f"cannot read the shape {text!r}; expected NAME:DIMS like x:1x3x224x224")
        if match["name"] in shapes:
            raise ModelError(f"--shapes names input {match['name']!r} twice")
        shapes[match["name"]] = tuple(int(length) for length in match["dims"].split("x"))
    return shapes


def parse_shape_ranges(texts: Sequence[str] | None) -> dict[str, tuple[int, ...] | ShapeRange]:
    """Read what `parse_shapes` reads, and ranges such as ``x:1x3x224x224..8x3x224x224`` (or least..best..most).

    Raises:
        ModelError: a text of another form, an input named twice, or a range that does not grow.
    """
    from qcompiler.engine import ShapeRange

    shapes: dict[str, tuple[int, ...] | ShapeRange] = {}
    for text in (part for given in texts or () for part in given.split(",")):
        name, _, dims = text.strip().rpartition(":")
        parts = dims.split("..")
        read = [parse_shapes([f"{name}:{part}"])[name] for part in parts] if name and len(parts) <= 3 else []
        if not read:
            raise ModelError(f"cannot read the shape {text!r}; expected NAME:DIMS like x:1x3x224x224")
        if name in shapes:
            raise ModelError(f"--shapes names input {name!r} twice")
        if len(read) == 1:
            shapes[name] = read[0]
            continue
        least, best, most = read[0], read[len(read) // 2], read[-1]
        grows = len(least) == len(best) == len(most) and all(
            0 <= a <= b <= c for a, b, c in zip(least, best, most, strict=True)
        )
        if not grows:
            raise ModelError(f"the range {text!r} does not grow: expected least..most of the same rank, axis by axis")
        shapes[name] = ShapeRange(least, best, most)
    return shapes


def load_metric(text: str) -> Metric:
    """Load a metric ``file.py:function``; its failures and values that are not finite become errors of one line.

    Raises:
        BudgetError: the text has another form.
        CalibrationError: the file or the function cannot be loaded.
    """
    from qcompiler.calibration.readers import load_function

    match = re.fullmatch(r"(.+\.py):(\w+)", text)
    if match is None:
        raise BudgetError(f"cannot read the metric {text!r}; expected file.py:function")
    function = load_function(match[1], match[2])

    def metric(outputs: Sequence[Mapping[str, Array]], feeds: Sequence[Feeds]) -> float:
        try:
            value = float(function(outputs, feeds))
        except Exception as error:  # the user's own code may raise anything
            raise BudgetError(f"metric {text} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise BudgetError(f"metric {text} gives {value}; expected a finite number, more is better")
        return value

    return metric


def check_decibels(value: float | None) -> None:
    """Refuse a bound that no comparison can be made with.

    Raises:
        BudgetError: the bound is not finite.
    """
    if value is not None and not math.isfinite(value):
        raise BudgetError(f"--min-sqnr is {value}; expected a number of dB")
