"""Load artifacts, and lowered models, on a CPU, in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.backends.triton.artifact import load_artifact
from qcompiler.backends.triton.program import Program, build_program
from qcompiler.engine import Array, EngineOptions, EngineValue, Feeds, ModelLike, Profile
from qcompiler.errors import ModelError, TargetError
from qcompiler.ir.reader import read_model

if TYPE_CHECKING:
    from qcompiler.backends.triton.executor import TritonRunner

DEVICES = ("auto", "cpu", "interpreter", "cuda")
DEVICE = "QCOMPILER_TRITON_DEVICE"
"""Environment variable with one of `DEVICES`, for callers that cannot name a device."""
BUCKETS = "QCOMPILER_TRITON_BUCKETS"
"""Environment variable with lengths of open axes, such as ``batch=1,8,32``, for callers that cannot name them."""
INSTALL = "running a .qc model needs torch: pip install 'qcompiler[triton]'"


class TritonEngine:
    """The project's kernels behind the protocol of `qcompiler.engine.Engine`.

    Attributes:
        name: ``triton``.
        device: ``cuda``, ``interpreter`` (real kernels on the CPU, for tests), ``cpu`` (references), or ``auto``: cuda
            where there is one, else cpu.
        buckets: lengths that open axes are filled up to, such as ``batch=1,8,32 time=64,128``; none by default.
    """

    name = "triton"

    def __init__(self, device: str = "", buckets: str = "") -> None:
        self.device = device or os.environ.get(DEVICE, "auto")
        self.buckets = buckets or os.environ.get(BUCKETS, "")
        if self.device not in DEVICES:
            raise TargetError(f"unknown device {self.device!r} for Triton; expected one of {', '.join(DEVICES)}")

    @property
    def version(self) -> str:
        """Return torch's version."""
        if importlib.util.find_spec("torch") is None:
            raise TargetError(INSTALL)
        import torch

        return f"torch {torch.__version__}"

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> TritonRunner:
        """Load an artifact (a folder) or a lowered model.

        Raises:
            ModelError: the artifact is damaged or of another version, or an operator has no step.
            TargetError: torch is not installed, or the device is not there.
        """
        if importlib.util.find_spec("torch") is None:
            raise TargetError(INSTALL)
        program, sm = _program(model)
        import torch

        from qcompiler.backends.triton.buckets import parse_buckets
        from qcompiler.backends.triton.executor import Executor, TritonRunner

        buckets = parse_buckets(self.buckets)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            if options.threads:
                torch.set_num_threads(options.threads)
            return TritonRunner(Executor(program), buckets)
        if device == "interpreter":
            _interpret()
            from qcompiler.backends.triton.launcher import Launcher

            return TritonRunner(Executor(program, "cpu", Launcher(f"sm{sm}")), buckets)
        if not torch.cuda.is_available():
            raise TargetError("the device is cuda, but torch sees no GPU; take cpu, or install torch for CUDA")
        from qcompiler.backends.triton.cuda import open_executor

        return TritonRunner(open_executor(program, sm), buckets)

    def value(self, array: Array) -> EngineValue:
        """Refuse: this engine hands out no values of its own.

        Raises:
            ModelError: always.
        """
        raise ModelError("the Triton executor has no values of its own; pass arrays")

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        """Refuse: steps are timed on a GPU by the benchmarks.

        Raises:
            ModelError: always.
        """
        raise ModelError("the Triton executor does not profile; time whole runs on a GPU")

    def optimized_graph(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> ir.Model:
        """Return the graph as it is: the steps are its nodes."""
        return read_model(model)


def _program(model: ModelLike) -> tuple[Program, int]:
    if isinstance(model, str | Path) and Path(model).is_dir():
        found = load_artifact(Path(model))
        return found.program, found.sm
    if isinstance(model, str | Path) and Path(model).suffix == ".qc":
        raise ModelError(f"cannot load {model}: there is no such folder")
    return build_program(read_model(model)), 80


def _interpret() -> None:
    """Make Triton interpret, which it decides when it is imported.

    Raises:
        TargetError: it was imported before without, or is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise TargetError("the device is interpreter, but triton is not installed; take cpu")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise TargetError("Triton was imported to compile in this process; set TRITON_INTERPRET=1 before it starts")
    os.environ["TRITON_INTERPRET"] = "1"
    from qcompiler.kernels.proof.interpreting import repair_interpreter

    repair_interpreter()
