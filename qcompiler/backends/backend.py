"""Engines as the compiler needs them: how to lower for one, run it, and prove what it fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.backends.readback import Planned, Proof, prove
from qcompiler.engine import Engine, EngineOptions
from qcompiler.errors import TargetError
from qcompiler.ir.serialize import save_model
from qcompiler.passes.assign_float_type import AssignFloatType
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.lower_openvino import EXACT, LowerOpenvino
from qcompiler.passes.store_half_precision import StoreHalfPrecision
from qcompiler.pipeline.base import Pass


@dataclass(frozen=True)
class Written:
    """Files that were written, and what the user has still to do, if anything."""

    files: tuple[Path, ...]
    note: str = ""


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

    @property
    def version(self) -> str:
        """Return the version of the engine, empty where none is installed."""
        ...

    def twin(self, model: ir.Model) -> tuple[Pass, ...]:
        """Return passes from FUSED to a model with the same numbers that `engine` runs; none where it runs this one.

        Args:
            model: a lowered model.
        """
        ...

    @property
    def exact_forms(self) -> Mapping[str, str]:
        """Return engine forms that ask for float32; none where the engine computes floats in that anyway."""
        ...

    def draft(self) -> tuple[Pass, ...]:
        """Return passes from FUSED to a model that ONNX Runtime runs fast, with nearly the numbers of the lowered one.

        Ranges are compared on it, many times; none where the lowered model serves.
        """
        ...

    @property
    def measures(self) -> bool:
        """Return whether `engine` is the target's own, so that timing it says something."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Return the kinds of file that `save` writes, as suffixes without the dot; the usual one first."""
        ...

    def save(self, model: ir.Model, path: Path) -> Written:
        """Write a lowered model in the form that the suffix of the path names.

        Raises:
            ModelError: the path cannot be written, or the engine does not take the model.
            TargetError: the suffix is of another engine.
        """
        ...


class RunsLowered:
    """What a backend says whose engine runs what is lowered, in float32."""

    def twin(self, model: ir.Model) -> tuple[Pass, ...]:
        """Return no passes: the engine runs what is lowered."""
        return ()

    def draft(self) -> tuple[Pass, ...]:
        """Return no passes: the lowered model serves."""
        return ()

    @property
    def exact_forms(self) -> Mapping[str, str]:
        """Return none: floats are float32."""
        return {}


@dataclass(frozen=True)
class OrtBackend(RunsLowered):
    """ONNX Runtime on CPU.

    Attributes:
        engine: runs lowered models.
        reader: gives the graphs that the engine makes of them on the target's processor.
    """

    engine: Engine = field(default_factory=OrtEngine)
    reader: Engine = field(default_factory=OrtEngine)
    emits_operators: bool = True
    measures: bool = True
    files: tuple[str, ...] = ("onnx",)

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the passes from FUSED to LOWERED."""
        return LowerOnnxruntime(emit=emit), AssignFloatType(), AvoidEngineTraps(), StoreHalfPrecision()

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """Read the graph back that ONNX Runtime executes: always the optimized one, also where nothing is timed."""
        return prove(planned, self.reader.optimized_graph(model, replace(options, optimize=True)))

    @property
    def version(self) -> str:
        """Return ONNX Runtime's version."""
        return self.engine.version

    def save(self, model: ir.Model, path: Path) -> Written:
        """Write an ONNX model."""
        return save_onnx(model, path, "onnxruntime")


@dataclass(frozen=True)
class OvBackend(RunsLowered):
    """OpenVINO on CPU."""

    engine: Engine
    emits_operators: bool = False
    measures: bool = True
    files: tuple[str, ...] = ("onnx", "xml")

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the passes from FUSED to LOWERED: OpenVINO reads Q/DQ and nothing else."""
        if emit == "qoperator":
            raise TargetError("emit is 'qoperator', but OpenVINO reads Q/DQ only; leave --emit away")
        return LowerOpenvino(), StoreHalfPrecision()

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """List the layers that OpenVINO executes, and their precision."""
        from qcompiler.backends.openvino_proof import prove_layers

        return prove_layers(planned, self.engine.optimized_graph(model, options))

    @property
    def exact_forms(self) -> Mapping[str, str]:
        """Return the metadata that makes OpenVINO compute in float32."""
        return EXACT

    @property
    def version(self) -> str:
        """Return OpenVINO's version."""
        return self.engine.version

    def save(self, model: ir.Model, path: Path) -> Written:
        """Write an ONNX model, or OpenVINO's own form for a path that ends in .xml."""
        if path.suffix != ".xml":
            return save_onnx(model, path, "openvino")
        from qcompiler.backends.openvino import save_openvino

        save_openvino(model, path)
        return Written((path, path.with_suffix(".bin")))


@dataclass(frozen=True)
class AbsentBackend(RunsLowered):
    """An engine that is not installed: its passes lower, ONNX Runtime computes, nothing is timed or proven.

    Attributes:
        name: the engine's name.
        passes: from FUSED to LOWERED.
        install: what to install for the rest.
        engine: computes the lowered model's numbers.
    """

    name: str
    passes: tuple[Pass, ...]
    install: str
    engine: Engine = field(default_factory=OrtEngine)
    emits_operators: bool = False
    measures: bool = False
    version: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """Return ONNX and the engine's own form, for which `save` says what to install."""
        return ("onnx", *(suffix[1:] for suffix, owner in OWN_SUFFIXES.items() if owner == self.name))

    def lowering(self, emit: str) -> tuple[Pass, ...]:
        """Return the engine's own passes."""
        if emit == "qoperator":
            raise TargetError(f"emit is 'qoperator', but {self.name} reads Q/DQ only; leave --emit away")
        return self.passes

    def prove(self, planned: Sequence[Planned], model: ir.Model, options: EngineOptions) -> Proof:
        """Return a proof that says what is missing."""
        return Proof(len(planned), note=self.install)

    def save(self, model: ir.Model, path: Path) -> Written:
        """Write an ONNX model.

        Raises:
            TargetError: the path asks for the engine's own form, which needs the engine.
        """
        if OWN_SUFFIXES.get(path.suffix) == self.name:
            raise TargetError(f"cannot write {path}: {self.install}, or take a path that ends in .onnx")
        return save_onnx(model, path, self.name)


OWN_SUFFIXES = {".xml": "openvino", ".plan": "tensorrt", ".qc": "triton"}
"""File suffixes of engines' own forms."""


def save_onnx(model: ir.Model, path: Path, engine: str) -> Written:
    """Write a lowered model as ONNX.

    Raises:
        ModelError: the path cannot be written.
        TargetError: the suffix asks for an engine's own form.
    """
    if (owner := OWN_SUFFIXES.get(path.suffix)) is not None:
        raise TargetError(
            f"{path} asks for {owner}'s own form, but the model was compiled for {engine}; give --target {owner}, or a "
            "path that ends in .onnx"
        )
    save_model(model, path, strip=True)
    return Written((path,))
