"""Write an engine, or say which command writes it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from qcompiler.backends.tensorrt.api import RTX, TENSORRT
from qcompiler.backends.tensorrt.probe import Prober, require_built
from qcompiler.backends.tensorrt.report import BuildReport
from qcompiler.engine import ShapeRange
from qcompiler.errors import ModelError
from qcompiler.staging import Staging

_TOOLS = {TENSORRT: "trtexec", RTX: "tensorrt_rtx"}
"""The command-line tool that comes with each flavour outside of its Python packages."""


def build_plan(
    model: bytes | Path,
    sm: int,
    profiles: Mapping[str, ShapeRange] | None,
    path: Path,
    prober: Prober | None = None,
    samples: Mapping[str, tuple[int, ...]] | None = None,
) -> BuildReport:
    """Build an engine for one compute capability and write it, whole or not at all.

    Args:
        model: an ONNX file or its contents.
        sm: compute capability, 89 for 8.9.
        profiles: shapes of inputs with open axes; see `settle_profiles`.
        path: where the engine goes.
        prober: whose flavour to use.
        samples: shape of a calibration batch per input.

    Raises:
        ModelError: the model is not built, or the path cannot be written.
        TargetError: no flavour is installed, or none builds for exactly that compute capability.
    """
    used = prober if prober is not None else Prober()
    used.require_target(sm)
    report = require_built(used.probe(model, [sm], profiles, samples, keep=True)[sm])
    if report.plan is None:
        raise ModelError(f"{report.flavour} {report.version} built the model for sm{sm} but handed no engine out")
    try:
        with Staging() as staging:
            staging.stage_file(path).write_bytes(report.plan)
            staging.commit()
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from error
    return report


def trtexec_line(
    model: Path,
    plan: Path,
    profiles: Mapping[str, ShapeRange] | None = None,
    flavour: str = TENSORRT,
) -> str:
    """Return the command that builds an engine from an ONNX file, quoted for a POSIX shell.

    TensorRT 11 takes types from the model alone, so there is no flag for a precision.

    Args:
        model: the ONNX file.
        plan: where the engine goes.
        profiles: shapes of inputs with open axes.
        flavour: ``tensorrt`` for trtexec, ``tensorrt_rtx`` for the tool of that name.
    """
    words = [_TOOLS[flavour], f"--onnx={model}", f"--saveEngine={plan}"]
    if flavour == TENSORRT:
        words.append("--skipInference")
    chosen: tuple[tuple[str, Callable[[ShapeRange], tuple[int, ...]]], ...] = (
        ("--minShapes", lambda shapes: shapes.least),
        ("--optShapes", lambda shapes: shapes.best),
        ("--maxShapes", lambda shapes: shapes.most),
    )
    for option, pick in chosen if profiles else ():
        listed = ",".join(f"{_name(name)}:{_dims(pick(shapes))}" for name, shapes in (profiles or {}).items())
        words.append(f"{option}={listed}")
    return shlex.join(words)


def _name(name: str) -> str:
    """Return an input's name as the tool reads it: one with a colon or a comma stands in single quotes."""
    return f"'{name}'" if any(mark in name for mark in ":,") else name


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
