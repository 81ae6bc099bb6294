"""The forms that are compared: the model as given, what other quantizers make of it, and ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import qcompiler
from qcompiler.backends.catalog import engine_backend, engine_of
from qcompiler.engine import EngineOptions, Runner

FLOAT = "float"
OURS = "ours"
OURS_CPU = "ours-cpu"
FLOAT_OPENVINO = "float-openvino"
OURS_OPENVINO = "ours-openvino"
NNCF_PYTHON = "QCOMPILER_NNCF_PYTHON"
"""Environment variable with the Python that has nncf: it is no dependency of this project."""

_PLAN = ("predicted_us", "measured_us", "predicted_db", "measured_db", "rounds")
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
        engine: what runs the result; empty for the engine that it was compiled for.
    """

    name: str
    what: str
    build: Callable[[Path, Feeds, Path], Notes]
    most_feeds: int | None = None
    engine: str = ""


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
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


def _ours(target: str) -> Callable[[Path, Feeds, Path], Notes]:
    def build(model: Path, feeds: Feeds, output: Path) -> Notes:
        compiled = qcompiler.compile(model, calibration=feeds, target=target)
        compiled.save(output)
        report = compiled.report.to_dict()
        proof = report["proof"]
        return {
            "engine": compiled.engine,
            "planned": proof["planned"],
            "fused": proof["fused"],
            "missed": len(proof["missed"]),
            "integer_share": report["integer_share"],
            "speedup_reported": report["speedup"],
            "warnings": report["warnings"],
            "plan": {key: value for key, value in report.get("plan", {}).items() if key in _PLAN},
        }

    return build


def _nncf(mode: str) -> Callable[[Path, Feeds, Path], Notes]:
    """Return a form that NNCF makes, in the environment that has it, of the same model and feeds."""

    def build(model: Path, feeds: Feeds, output: Path) -> Notes:
        python = os.environ.get(NNCF_PYTHON)
        if python is None:
            raise RuntimeError(f"{NNCF_PYTHON} does not name a Python that has nncf")
        worker = Path(__file__).resolve().parent / "nncf_worker.py"
        with tempfile.TemporaryDirectory(prefix="qcompiler-nncf-") as folder:
            for index, feed in enumerate(feeds):
                np.savez(Path(folder) / f"{index:06}.npz", **feed)
            done = subprocess.run(
                [python, str(worker), str(model), folder, mode, str(output)],
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no word of why"]
            raise RuntimeError(lines[-1])
        return {}

    return build


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
    Form(OURS, "qcompiler.compile(path, calibration=feeds)", _ours("host")),
    Form(OURS_CPU, 'qcompiler.compile(path, calibration=feeds, target="cpu")', _ours("cpu")),
)
"""All forms, in the order of the tables; `most_feeds` bounds the memory of ONNX Runtime's percentile calibration."""
OPENVINO_FORMS: tuple[Form, ...] = (
    Form(FLOAT, "the model as given on ONNX Runtime", _float, engine="onnxruntime"),
    Form(FLOAT_OPENVINO, "the model as given on OpenVINO, in its default precision", _float, engine="openvino"),
    Form("nncf", "nncf.quantize, its defaults, on OpenVINO", _nncf("default"), engine="openvino"),
    Form(
        "nncf-transformer",
        "nncf.quantize, model type transformer, on OpenVINO",
        _nncf("transformer"),
        engine="openvino",
    ),
    Form(OURS_OPENVINO, 'qcompiler.compile(path, calibration=feeds, target="openvino")', _ours("openvino")),
    Form(OURS_CPU, 'qcompiler.compile(path, calibration=feeds, target="cpu")', _ours("cpu")),
)
"""What is compared on OpenVINO."""


def form_named(name: str) -> Form:
    """Return a form by its name.

    Raises:
        KeyError: no form has that name.
    """
    for form in (*FORMS, *OPENVINO_FORMS):
        if form.name == name:
            return form
    raise KeyError(f"no form {name!r}; known: {', '.join(f.name for f in FORMS)}")


def open_runner(form: Form, path: Path) -> Runner:
    """Load what a form built, for one thread.

    Raises:
        QCompilerError: its engine refuses it, or is not installed.
    """
    name = form.engine or engine_of(path)
    return engine_backend(name).engine.load(path, EngineOptions(threads=1))


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
