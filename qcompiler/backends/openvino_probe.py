"""Whether OpenVINO's compiler survives a model: asked in a process of its own, which it may take down."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.serialize import save_model

_REFUSED = 3
_CODE = f"""
import sys
import openvino
settings = {{"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}}
try:
    core = openvino.Core()
    model = core.read_model(sys.argv[1])
    for precision in sys.argv[2:]:
        try:
            hint = {{"INFERENCE_PRECISION_HINT": precision}} if precision else {{}}
            core.compile_model(model, "CPU", {{**settings, **hint}})
            break
        except RuntimeError:
            if precision:
                raise
except Exception:
    sys.exit({_REFUSED})
"""
"""Compiles in the precisions given until one is taken."""


def survives(model: ir.Model, precision: str = "", seconds: float = 600.0) -> bool:
    """Compile a model in a process of its own, and return whether OpenVINO takes it; costs that compilation and 0.5 s.

    Args:
        model: a graph that did not come out of this package.
        precision: what float operators compute in; empty leaves it to OpenVINO.
        seconds: after which the attempt is stopped.

    Raises:
        ModelError: OpenVINO crashes on the model, or does not come to an end.
    """
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        words = [sys.executable, "-c", _CODE, str(path), *([precision] if precision else ["", "f32"])]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise ModelError(
                f"openvino did not compile the model within {seconds:g} s; compile for ONNX Runtime: --target host"
            ) from None
    if done.returncode in (0, _REFUSED):
        return done.returncode == 0
    raise ModelError(
        f"openvino crashes on the model ({_ending(done.returncode, done.stderr)}), tried in a process of its own; "
        "compile for ONNX Runtime: --target host"
    )


def _ending(code: int, said: str) -> str:
    if code < 0:
        return signal.Signals(-code).name
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return lines[-1][:160] if lines else f"exit code {code}"
