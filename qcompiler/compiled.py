"""The result of a compilation, and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.backends.backend import Written
from qcompiler.backends.catalog import open_backend
from qcompiler.backends.onnxruntime import OrtRunner
from qcompiler.decisions import Decisions
from qcompiler.engine import EngineOptions, ShapeRange
from qcompiler.errors import PassError
from qcompiler.ir.serialize import to_bytes
from qcompiler.pipeline.state import Remark
from qcompiler.report.report import Report
from qcompiler.staging import Staging
from qcompiler.targets.target import Target


@dataclass(frozen=True, repr=False)
class CompiledModel:
    """The result of a compilation.

    Attributes:
        model: the LOWERED graph.
        decisions: what measurement chose; replay it with ``compile(..., decisions=...)``.
        remarks: why things were or were not done.
        report: proof, accuracy, size, speed.
        target: the capability table that it was compiled for.
        profiles: ranges of input shapes that were given, by input name.
        samples: shape of a feed's arrays, by input name; empty without data.
    """

    model: ir.Model
    decisions: Decisions
    remarks: tuple[Remark, ...]
    report: Report
    target: Target
    profiles: Mapping[str, ShapeRange] = field(default_factory=dict)
    samples: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        proof, speed = self.report.proof, self.report.speedup
        measured = "" if speed is None else f", {speed:.2f}x of float"
        return f"<CompiledModel for {self.target.name}: {len(proof.fused)} of {proof.planned} fusions{measured}>"

    @property
    def engine(self) -> str:
        """Return the name of the engine that it was compiled for."""
        return self.target.engine

    def to_bytes(self) -> bytes:
        """Return the serialized model; the same inputs and decisions give the same bytes."""
        return to_bytes(self.model, strip=True)

    def save(self, path: str | Path) -> Written:
        """Write the model, and the decisions record beside it (``model.decisions.json``); nothing half-written.

        Args:
            path: an .onnx, an .xml for OpenVINO's own form (with the weights beside it as .bin), or a .plan for
                TensorRT's.

        Returns:
            The files, and what is left to do: where this machine cannot build a .plan, the ONNX model is written in
            its place, and the note is the command that builds it.

        Raises:
            ModelError: the path cannot be written, or the engine does not build the model.
            TargetError: the suffix is of another engine than the model was compiled for.
        """
        target = Path(path)
        with staged_text(decisions_path(target), self.decisions.to_json()):
            written = open_backend(self.target, self.profiles, self.samples).save(self.model, target)
        return Written((*written.files, decisions_path(target)), written.note)

    def session(self, threads: int = 0) -> Any:
        """Return the engine's own object: an ``onnxruntime.InferenceSession``, or an ``openvino.CompiledModel``.

        Args:
            threads: threads inside one operator; 0 leaves it to the engine.
        """
        runner = open_backend(self.target).engine.load(self.model, EngineOptions(threads=threads))
        return runner.session if isinstance(runner, OrtRunner) else runner.compiled  # type: ignore[attr-defined]


def decisions_path(path: str | Path) -> Path:
    """Return where `CompiledModel.save` puts the decisions record of a model."""
    return Path(path).with_suffix(".decisions.json")


@contextmanager
def staged_text(path: Path, text: str) -> Iterator[None]:
    """Write a text file under a temporary name, and rename it once the block has succeeded.

    Raises:
        PassError: the path cannot be written.
    """
    with Staging() as staging:
        try:
            staging.stage_file(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise PassError(f"cannot write {path}: {error.strerror or error}") from error
        yield
        try:
            staging.commit()
        except OSError as error:
            raise PassError(f"cannot write {path}: {error.strerror or error}") from error
