"""Options on data that several commands share: where feeds come from, how they are made, how they are run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.errors import CalibrationError

if TYPE_CHECKING:
    from qcompiler.calibration.source_options import SourceOptions

Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image", metavar="KEY=VALUE", help="How pictures are treated: size=224, mean=0.485,0.456,0.406, std=..., "
        "resize=letterbox, layout=NHWC, order=bgr, scale=1, or the path of a .toml of these; may be repeated.",
    ),
]  # fmt: skip
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A tokenizer.json, or its folder, for text files.")
]
DataSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--data", metavar="KEY=VALUE", help="How data is read: limit=100, batch=8, sequence=128, text=COLUMN, "
        "rename.INPUT=COLUMN, values.INPUT=NUMBER; may be repeated.",
    ),
]  # fmt: skip
Memory = Annotated[
    str | None,
    typer.Option(
        "--calibration-memory", metavar="SIZE",
        help="Memory for observed values, like 512MB or 2GiB; default a quarter of what is free.",
    ),
]  # fmt: skip
ExecutorName = Annotated[
    str | None,
    typer.Option(
        "--executor", metavar="WHERE", help="Where calibration runs: threads (default), threads:N, inline, processes, "
        "processes:N, or dask with --scheduler.",
    ),
]  # fmt: skip
Scheduler = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Address of a Dask scheduler, like tcp://host:8786.")
]
Synthetic = Annotated[
    int | None,
    typer.Option(
        "--synthetic", min=1, metavar="N", help="Make N feeds up from the graph instead of data (the report says so)."
    ),
]

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", re.IGNORECASE)
_NUMBERS = ("limit", "batch", "sequence")


def parse_memory(text: str | None) -> int | None:
    """Read a size such as ``512MB`` or ``1.5GiB`` into bytes.

    Raises:
        CalibrationError: a text of another form, or nothing at all.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    size = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2].upper(), 0))
    if size < 1:
        raise CalibrationError(f"--calibration-memory is {text!r}; expected a size like 512MB or 2GiB")
    return size


def read_source_options(
    images: Sequence[str] | None, tokenizer: Path | None, settings: Sequence[str] | None
) -> SourceOptions:
    """Put the options on data together.

    Raises:
        CalibrationError: a text of another form, or an unknown key.
    """
    from qcompiler.calibration.image_options import ImageOptions, parse_image_options
    from qcompiler.calibration.source_options import SourceOptions

    lines: list[str] = []
    given = ImageOptions()
    for text in images or ():
        if "=" not in text:
            given = parse_image_options(_read(Path(text)), text)
            continue
        key, value = _pair(text, "--image")
        lines.append(f"{key} = {_toml(value)}")
    stated = parse_image_options("\n".join(lines), "--image")
    named = {line.split(" = ")[0]: getattr(stated, line.split(" = ")[0]) for line in lines}
    made = SourceOptions(images=replace(given, **named), tokenizer=tokenizer)
    fields: dict[str, Any] = {}
    rename: dict[str, str] = {}
    values: dict[str, float] = {}
    for text in settings or ():
        key, value = _pair(text, "--data")
        if key in _NUMBERS:
            fields[key] = _number(text, value, whole=True)
        elif key == "text":
            fields[key] = value
        elif key.startswith("rename."):
            rename[key.removeprefix("rename.")] = value
        elif key.startswith("values."):
            values[key.removeprefix("values.")] = _number(text, value)
        else:
            raise CalibrationError(
                f"--data {text}: unknown key {key!r}; expected {', '.join(_NUMBERS)}, text, rename.INPUT or "
                "values.INPUT"
            )
    return replace(made, rename=rename, values=values, **fields)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise CalibrationError(f"cannot read the image options {path}: {reason}") from error


def _pair(text: str, option: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key or not value:
        raise CalibrationError(f"{option} {text}: expected KEY=VALUE")
    return key.strip(), value.strip()


def _toml(value: str) -> str:
    """Return a value as TOML: numbers, several numbers (also 224x224), or text."""
    parts = re.split(r"[,x]", value) if re.fullmatch(r"[\d.eE+\-,x\s]+", value) else [value]
    try:
        numbers = [part.strip() for part in parts if float(part) is not None]
    except ValueError:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return numbers[0] if len(numbers) == 1 else f"[{', '.join(numbers)}]"


def _number(text: str, value: str, whole: bool = False) -> Any:
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise CalibrationError(f"--data {text}: expected a {'whole number' if whole else 'number'}") from None
