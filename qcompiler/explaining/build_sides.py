"""One side of a comparison of builds: what a model file, a report and a dump say of it, group by group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.compiled import decisions_path
from qcompiler.explaining.evidence import ExplainError, dump_evidence
from qcompiler.explaining.given import is_conversion
from qcompiler.explaining.stored_values import stored_numbers
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.reader import read_model
from qcompiler.ir.serialize import weight_bytes
from qcompiler.options import read_decisions
from qcompiler.pipeline.instruments.dump import INDEX_FILE


@dataclass(frozen=True)
class Side:
    """What is known of one build; whatever is not known is empty.

    Attributes:
        name: the path that was given.
        forms: form per group that is not float.
        why: reason per group.
        kernels: the engine's kernel per group.
        scales: (scale, zero point, format) per stored value.
        operators: operator of each node, by name, conversions left out.
        figures: sizes, speed, SQNR per output, counts.
        settings: versions, target, recipe, estimators.
        origins: imported nodes behind a group.
    """

    name: str
    forms: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, tuple[float, int, str]] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_side(path: str | Path, report: str | Path | None = None) -> Side:
    """Read a build: a compiled model with its decisions record, a dump folder, or a report file.

    Args:
        path: an .onnx, the folder of a --dump, or the .json of a --report.
        report: the report of the same build, where there is one; ``MODEL.report.json`` beside a model is found.

    Raises:
        QCompilerError: it is none of these, or damaged.
    """
    place = Path(path)
    if place.is_dir():
        return _of_dump(place, report)
    if place.suffix == ".json":
        return _of_report(str(place), _load(place))
    if not place.is_file():
        raise ExplainError(f"there is no {place}; expected a compiled model, a --dump folder or a --report file")
    return _of_model(place, report)


def _of_model(path: Path, report: str | Path | None) -> Side:
    model = read_model(path)
    record_path = decisions_path(path)
    record = read_decisions(record_path) if record_path.is_file() else None
    beside = path.with_suffix(".report.json")
    told = report if report is not None else beside if beside.is_file() else None
    other = _of_report(str(path), _load(Path(told))) if told is not None else Side(str(path))
    settings = dict(other.settings)
    if record is not None:
        settings |= {**record.context, "estimator": record.estimator}
        settings |= {f"estimator of {g}": e for g, e in record.estimators.items()}
        settings |= {f"engine form {k}": v for k, v in record.engine_forms.items()}
    return Side(
        str(path),
        dict(record.forms) if record is not None else other.forms,
        {**other.why, **(record.why if record is not None else {})},
        other.kernels,
        _scales(model),
        {str(n.name): n.op_type for n in all_nodes(model) if not is_conversion(n)},
        {**other.figures, "file bytes": float(path.stat().st_size), "weight bytes": float(weight_bytes(model)),
         "nodes": float(sum(1 for _ in all_nodes(model)))},
        settings,
    )  # fmt: skip


def _scales(model: ir.Model) -> dict[str, tuple[float, int, str]]:
    found = {}
    for name, numbers in stored_numbers(model).items():
        kind = "int8" if numbers.qmin == -128 else "uint8" if numbers.qmax == 255 else f"{numbers.qmin}..{numbers.qmax}"
        if numbers.scale.size == 1:
            scale, zero = float(numbers.scale.reshape(-1)[0]), int(numbers.zero_point.reshape(-1)[0])
            found[name.removesuffix(":q")] = (scale, zero, kind)
    return found


def _of_dump(folder: Path, report: str | Path | None) -> Side:
    if not (folder / INDEX_FILE).is_file():
        raise ExplainError(f"{folder} is no dump: expected {INDEX_FILE} in it")
    from qcompiler.report.dumps import load_dump

    dump = load_dump(folder)
    evidence = dump_evidence(folder, report)
    last = dump.stages[-1]
    told = None if report is None else _of_report(str(folder), _load(Path(report)))
    figures = {} if told is None else dict(told.figures)
    if last.numerics is not None:
        figures |= {f"SQNR {name}": db for name, db in last.numerics.sqnr_db.items()}
    scales = {
        name: (float(p["scale"]), int(p["zero_point"]), str(p["format"]))
        for name, p in evidence.points.items()
        if isinstance(p.get("scale"), int | float)
    }
    path = dump.model_path(last.number)
    operators = (
        {str(n.name): n.op_type for n in all_nodes(read_model(path)) if not is_conversion(n)} if path.is_file() else {}
    )
    figures |= {"weight bytes": float(last.weight_bytes), "nodes": float(last.nodes)}
    settings = {
        "target": dump.target,
        "pipeline": dump.pipeline,
        **{f"version of {k}": v for k, v in dump.versions.items()},
    }
    from qcompiler.explaining.evidence import origins_of

    return Side(
        str(folder),
        {n: f for n, f in evidence.forms.items() if f != "float"},
        evidence.why,
        evidence.kernels,
        scales,
        operators,
        figures,
        settings,
        {g.name: origins_of(evidence, g) for g in evidence.groups},
    )


def _of_report(name: str, data: Mapping[str, Any]) -> Side:
    figures: dict[str, float] = {}
    for key, label in (
        ("bytes_after", "bytes"), ("speedup", "speedup"), ("integer_share", "integer share"), ("metric", "metric"),
    ):  # fmt: skip
        if isinstance(data.get(key), int | float):
            figures[label] = float(data[key])
    figures |= {f"SQNR {n}": float(db) for n, db in data.get("sqnr_db", {}).items() if isinstance(db, int | float)}
    figures |= {f"agreement {n}": float(a) for n, a in data.get("agreement", {}).items() if isinstance(a, int | float)}
    groups = data["groups"]
    return Side(
        name,
        {g["group"]: g["form"] for g in groups if g["form"] != "float"},
        {g["group"]: g["why"] for g in groups},
        data["proof"].get("kernels", {}),
        figures=figures,
        settings=dict(data.get("context", {})),
    )


def _load(path: Path) -> dict[str, Any]:
    from qcompiler.explaining.evidence import read_report

    try:
        return read_report(path)
    except json.JSONDecodeError as error:  # pragma: no cover - read_report wraps it
        raise ExplainError(str(error)) from error
