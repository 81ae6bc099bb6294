"""Engines as the compiler needs them: how to lower for one, run it, and prove what it fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx
import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import Planned, Proof, prove
from qcompiler.engine import Engine, EngineOptions
from qcompiler.errors import TargetError
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.lower_openvino import LowerOpenvino
from qcompiler.pipeline.base import Pass


class Backend(Protocol):
    """One engine, with the passes that lower for it and the way to read its graph back."""

    @property
    def engine(self) -> Engine:
        """Return the engine that runs lowered models."""
        ...

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the passes from FUSED to LOWERED.

        Args:
            emit: ``auto``, ``qdq`` or ``qoperator``.

        Raises:
            TargetError: the engine has no integer operators that could be emitted.
        """
        ...

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """Load a lowered model and match what the engine executes with what was planned."""
        ...

    @property
    def emits_operators(self) -> bool:
        """Return whether a group that is not fused from Q/DQ can be emitted as the engine's own operator."""
        ...


@dataclass(frozen=True)
class OrtBackend:
    """ONNX Runtime on CPU."""

    engine: Engine = field(default_factory=OrtEngine)
    emits_operators: bool = True

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the passes from FUSED to LOWERED."""
        return LowerOnnxruntime(emit=emit), AvoidEngineTraps()

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """Read the graph back that ONNX Runtime executes."""
        return prove(planned, self.engine.optimized_graph(model, options))


@dataclass(frozen=True)
class OvBackend:
    """OpenVINO on CPU."""

    engine: Engine
    emits_operators: bool = False

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the passes from FUSED to LOWERED: OpenVINO reads Q/DQ and nothing else."""
        if emit == "qoperator":
            raise TargetError("emit is 'qoperator', but OpenVINO reads Q/DQ only; leave --emit away")
        return (LowerOpenvino(),)

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """List the layers that OpenVINO executes, and their precision."""
        from qcompiler.backends.openvino_proof import prove_layers

        return prove_layers(planned, self.engine.optimized_graph(model, options))


ENGINE = "qcompiler.engine"
"""Metadata of a model that another engine than ONNX Runtime is to run."""


def engine_of(path: Path) -> str:
    """Return the name of the engine that a model file was compiled for; ONNX Runtime where it does not say.

    A file that is no model is left to the engine to refuse.
    """
    if path.suffix == ".xml":
        return "openvino"
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf and the file system raise their own types
        return "onnxruntime"
    return next((p.value for p in model.metadata_props if p.key == ENGINE), "onnxruntime")


def open_backend(name: str) -> Backend:
    """Return the backend of an engine by its name in a target's table.

    Raises:
        TargetError: no such engine, or it is not installed.
    """
    if name == "onnxruntime":
        return OrtBackend()
    if name == "openvino":
        from qcompiler.backends.openvino import OvEngine

        engine = OvEngine()
        _ = engine.version  # raises where OpenVINO is not installed
        return OvBackend(engine)
    raise TargetError(f"there is no backend for the engine {name!r}; there are onnxruntime and openvino")
