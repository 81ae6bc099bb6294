"""Several graphs that were compiled together: their report, and how they are written with one file of weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qcompiler.backends.backend import Written
from qcompiler.backends.catalog import open_backend
from qcompiler.compiled import CompiledModel
from qcompiler.decisions import SetDecisions
from qcompiler.errors import ModelError, QCompilerError, TargetError
from qcompiler.report.report import Report
from qcompiler.staging import Staging
from qcompiler.weights_file import WeightsFile, lay_out, open_folder, write_together

DECISIONS = "decisions.json"
"""Name of the decisions record in the folder of a set."""
FILES = ("onnx", "xml", "plan", "qc")
"""Kinds of files that a set is written as."""


@dataclass(frozen=True)
class WeightRow:
    """One weight that groups of several canonical graphs compute with.

    Attributes:
        names: its name in each graph.
        nbytes: its size as given.
        stored: how each graph stores it: a format, or float.
        extra_bytes: what it takes beyond its smallest form, because graphs store it in different ways.
        why: the reasons of the graphs that differ, by graph.
    """

    names: Mapping[str, str]
    nbytes: int
    stored: Mapping[str, str]
    extra_bytes: int = 0
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def agreed(self) -> bool:
        """Return whether all graphs store it alike."""
        return len(set(self.stored.values())) == 1

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "names": dict(self.names), "bytes_as_given": self.nbytes, "stored": dict(self.stored),
            "extra_bytes": self.extra_bytes, "why": dict(self.why),
        }  # fmt: skip


@dataclass(frozen=True)
class StoredRow:
    """One stored tensor that several graphs use: type, shape, bytes, and its names by graph."""

    kind: str
    shape: tuple[int, ...]
    nbytes: int
    names: Mapping[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        names = {graph: list(found) for graph, found in self.names.items()}
        return {"type": self.kind, "shape": list(self.shape), "bytes": self.nbytes, "names": names}


@dataclass(frozen=True)
class SetReport:
    """What a build of several graphs says of itself.

    Attributes:
        graphs: the report of each graph.
        alone: bytes of each graph as a file of its own.
        together: bytes of all graph files and the one weights file.
        weights_file: its name, empty where nothing lies in it.
        weights_bytes: its size.
        stored: tensors that several graphs use, the largest first.
        weights: weights of the graphs as given that several of them compute with.
        warnings: what a user should know of the set.
    """

    graphs: Mapping[str, Report]
    alone: Mapping[str, int]
    together: int
    weights_file: str
    weights_bytes: int
    stored: tuple[StoredRow, ...]
    weights: tuple[WeightRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def saved(self) -> int:
        """Return the bytes that storing shared tensors once saves."""
        return sum(self.alone.values()) - self.together

    @property
    def deviations(self) -> tuple[WeightRow, ...]:
        """Return the shared weights that graphs store in different ways."""
        return tuple(row for row in self.weights if not row.agreed)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "graphs": {name: report.to_dict() for name, report in self.graphs.items()},
            "bytes": {"alone": dict(self.alone), "together": self.together, "saved": self.saved},
            "weights_file": {"name": self.weights_file, "bytes": self.weights_bytes},
            "stored_once": [row.to_dict() for row in self.stored],
            "shared_weights": [row.to_dict() for row in self.weights],
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class CompiledSet(Mapping[str, CompiledModel]):
    """Several graphs that were compiled together, by name.

    Attributes:
        models: the compiled graphs.
        weights: their shared weights, and how they agree on them.
        warnings: what a user should know of the set.
    """

    models: Mapping[str, CompiledModel]
    weights: tuple[WeightRow, ...] = ()
    warnings: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> CompiledModel:
        return self.models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)

    @cached_property
    def layout(self) -> WeightsFile:
        """Return where each tensor lies in the one weights file."""
        return lay_out({name: compiled.model for name, compiled in self.models.items()})

    @property
    def decisions(self) -> SetDecisions:
        """Return what measurement chose; replay it with ``compile_together(..., decisions=...)``."""
        return SetDecisions({name: compiled.decisions for name, compiled in self.models.items()})

    @cached_property
    def report(self) -> SetReport:
        """Return sizes, shared tensors and the reports of all graphs."""
        layout = self.layout
        together = layout.nbytes + sum(len(layout.model_bytes(name)) for name in self.models)
        rows = [
            StoredRow(
                s.tensor.dtype.name.lower(), tuple(s.tensor.shape.numpy()), s.nbytes,
                {graph: tuple(names) for graph, names in s.uses.items()},
            )
            for s in layout.stored.values() if len(s.uses) > 1
        ]  # fmt: skip
        return SetReport(
            {name: compiled.report for name, compiled in self.models.items()},
            {name: compiled.report.bytes_after for name, compiled in self.models.items()},
            together,
            layout.name if layout.stored else "",
            layout.nbytes,
            tuple(sorted(rows, key=lambda row: -row.nbytes)),
            self.weights,
            self.warnings,
        )

    def files(self, wanted: str | None = None) -> str:
        """Return the kind of files that the set is written as.

        Args:
            wanted: a kind of file; None is the usual one of the engine that the graphs were compiled for.

        Raises:
            TargetError: there is no such kind, or it is not one of a graph's engine.
        """
        if wanted is not None and wanted not in FILES:
            raise TargetError(f"files is {wanted!r}; expected one of {', '.join(FILES)}")
        kinds = {name: open_backend(compiled.target).files for name, compiled in self.models.items()}
        usual = next(iter(kinds.values()))[0]
        found = usual if wanted is None else wanted
        for name, known in kinds.items():
            if found not in known:
                target = self.models[name].target.name
                raise TargetError(
                    f"files is {found!r}, but {name} was compiled for {target}, which is written as "
                    f"{' or '.join(known)}; give files={known[0]!r} (--save-as {known[0]}), or another target"
                )
        return found

    def save(self, folder: str | Path, *, files: str | None = None) -> Written:
        """Write all graphs into a folder: NAME.onnx each, one weights file, and the record ``decisions.json``.

        Nothing is half-written: files get their names when all are complete, and on any error what was in the folder
        stays. The weights file is named by a digest of its contents, so an older build in the folder stays usable until
        it is replaced; then its weights file is removed, unless another model in the folder refers to it.

        Args:
            folder: is made if its parent is there.
            files: ``onnx``, or ``xml`` (OpenVINO), ``plan`` (TensorRT) or ``qc`` (Triton kernels): an engine's own
                files, each with its own weights. By default ``qc`` for Triton targets, else ``onnx``.

        Returns:
            The files, and what is left to do, if anything.

        Raises:
            ModelError: the folder cannot be written to.
            TargetError: the kind of file is of another engine than the models were compiled for.
        """
        path, kind = Path(folder), self.files(files)
        record = self.decisions.to_json()
        if kind == "onnx":
            return Written(write_together(path, self.layout, {DECISIONS: record}))
        return self._save_engines(path, kind, record)

    def _save_engines(self, path: Path, kind: str, record: str) -> Written:
        """Write each graph in its engine's own form into a folder beside the places, then move all of them there."""
        notes = [f"weights are stored once only in ONNX files: each .{kind} has its own"]
        written: list[Path] = []
        with Staging() as staging:
            open_folder(staging, path)
            try:
                scratch = staging.scratch(path)
                inside = f"{scratch.name}{os.sep}"
                for name, compiled in self.models.items():
                    done = _save_one(compiled, scratch / f"{name}.{kind}", inside)
                    notes += [f"{name}: {done.note}"] if done.note else []
                # All that is there, not what the engines list: a large model has its weights beside it.
                for made in sorted(scratch.iterdir()):
                    staging.move(made, path / made.name)
                    written.append(path / made.name)
                staging.stage_file(path / DECISIONS).write_text(record, encoding="utf-8")
                staging.commit()
            except OSError as error:
                raise ModelError(f"cannot write to {path}: {error.strerror or error}") from error
        return Written((*written, path / DECISIONS), "\n".join(notes))


def _save_one(compiled: CompiledModel, path: Path, inside: str) -> Written:
    """Write one graph in its engine's own form; texts do not name the folder that it lies in for now."""
    try:
        done = open_backend(compiled.target, compiled.profiles, compiled.samples).save(compiled.model, path)
    except QCompilerError as error:
        raise type(error)(str(error).replace(inside, "")) from error
    return Written(done.files, done.note.replace(inside, ""))
