"""The forms that are compared: the model as given, what ONNX Runtime's own quantizer makes of it, and ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import qcompiler

FLOAT = "float"
OURS = "ours"

Feeds = Sequence[Mapping[str, Any]]
Notes = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One way to make a model small.

    Attributes:
        name: short, for ``--forms`` and the tables.
        what: the call, in words.
        build: (model, calibration feeds, output) -> notes; writes the output.
        most_feeds: calibration feeds it is given at most; None for all.
    """

    name: str
    what: str
    build: Callable[[Path, Feeds, Path], Notes]
    most_feeds: int | None = None


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hand feeds to ONNX Runtime's quantizer one by one."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds: Iterator[Mapping[str, Any]] = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next feed, or None at the end."""
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


def _float(model: Path, feeds: Feeds, output: Path) -> Notes:
    copy_model(model, output)
    return {}


def _static_default(model: Path, feeds: Feeds, output: Path) -> Notes:
    quantize_static(model, output, _Reader(feeds))
    return {}


def _static_u8s8(method: CalibrationMethod) -> Callable[[Path, Feeds, Path], Notes]:
    def build(model: Path, feeds: Feeds, output: Path) -> Notes:
        quantize_static(
            model,
            output,
            _Reader(feeds),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
        )
        return {}

    return build


def _dynamic(per_channel: bool) -> Callable[[Path, Feeds, Path], Notes]:
    def build(model: Path, feeds: Feeds, output: Path) -> Notes:
        quantize_dynamic(model, output, per_channel=per_channel)
        return {}

    return build


def _ours(model: Path, feeds: Feeds, output: Path) -> Notes:
    compiled = qcompiler.compile(model, calibration=feeds)
    compiled.save(output)
    report = compiled.report.to_dict()
    proof = report["proof"]
    return {
        "planned": proof["planned"],
        "fused": proof["fused"],
        "missed": len(proof["missed"]),
        "integer_share": report["integer_share"],
        "speedup_reported": report["speedup"],
        "warnings": report["warnings"],
    }


FORMS: tuple[Form, ...] = (
    Form(FLOAT, "the model as given", _float),
    Form("ort-static", "quantize_static, its defaults (s8/s8 per tensor, min-max)", _static_default),
    Form("ort-u8s8-minmax", "quantize_static, u8/s8 per channel, min-max", _static_u8s8(CalibrationMethod.MinMax)),
    Form(
        "ort-u8s8-percentile",
        "quantize_static, u8/s8 per channel, percentile",
        _static_u8s8(CalibrationMethod.Percentile),
        most_feeds=4,
    ),
    Form("ort-dynamic", "quantize_dynamic, its defaults", _dynamic(per_channel=False)),
    Form("ort-dynamic-pc", "quantize_dynamic, per channel", _dynamic(per_channel=True)),
    Form(OURS, "qcompiler.compile(path, calibration=feeds)", _ours),
)
"""All forms, in the order of the tables; `most_feeds` bounds the memory of ONNX Runtime's percentile calibration."""


def form_named(name: str) -> Form:
    """Return a form by its name.

    Raises:
        KeyError: no form has that name.
    """
    for form in FORMS:
        if form.name == name:
            return form
    raise KeyError(f"no form {name!r}; known: {', '.join(f.name for f in FORMS)}")


def copy_model(source: Path, target: Path) -> None:
    """Copy a model and the files its weights lie in; ONNX Runtime's quantizer writes beside the model it is given."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    for name in external_files(source):
        (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / name, target.parent / name)


def external_files(model: Path) -> list[str]:
    """Return the files, relative to a model, that hold initializers of its main graph."""
    graph = onnx.load(str(model), load_external_data=False).graph
    entries = (entry for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location")
    return sorted({entry.value for entry in entries})
