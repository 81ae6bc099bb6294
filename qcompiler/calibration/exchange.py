"""Ranges of other tools: TensorRT's calibration cache and ONNX Runtime's JSON, read and written.

Both hold one range per tensor and no histogram, so what is read becomes a `RangeTable`: it can be planned with, and
every estimator gives the range that the file holds.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from qcompiler.calibration.container import replace_file
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec

Range = tuple[float, float]

TENSORRT_HEADER = "TRT-8601-EntropyCalibration2"
"""First line of a written cache: release and algorithm of the calibrator."""

_HEADER = re.compile(r"TRT-\d+-\w+")
_STEPS = 127
"""TensorRT's int8 is symmetric: scale = amax / 127."""
_TINY, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_MIN_MAX = "MinMax"
_METHODS = {"entropy": "Entropy", "percentile": "Percentile"}
"""ONNX Runtime's names of methods. It refuses a cache of another method than it is called with, so that estimators that
it does not have go by the name of its default."""

OrtForm = Literal["tensors-data", "table"]


class NamedRanges(Protocol):
    """What can be written: `Statistics` and `RangeTable` are such."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        ...

    def observed(self, name: str) -> bool:
        """Return whether there is a range of the value."""
        ...

    def range(self, name: str, estimator: str) -> Range:
        """Return (low, high) of the value by an estimator."""
        ...


@dataclass(frozen=True)
class RangeTable:
    """Ranges without histograms, as another tool wrote them; a `qcompiler.quant.spec.RangeSource`.

    Attributes:
        ranges: (low, high) by value name; low <= high, both finite.
        origin: where they come from, for messages.
    """

    ranges: Mapping[str, Range]
    origin: str = "a table of ranges"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            CalibrationError: one is not finite, or its ends are exchanged.
        """
        for name, (low, high) in self.ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise CalibrationError(
                    f"{self.origin}: the range of {name!r} is ({low:g}, {high:g}); expected two finite ends, the "
                    "smaller one first; calibrate that model anew"
                )

    @property
    def note(self) -> str:
        """Return one sentence for the report on what these ranges cannot tell."""
        return (
            f"ranges come from {self.origin}: one per tensor and no histogram, so estimators have no effect and E[x^2] "
            "is taken as that of a uniform distribution over the range"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranges)

    def observed(self, name: str) -> bool:
        """Return whether there is a range of the value."""
        return name in self.ranges

    def range(self, name: str, estimator: str = "min-max", spec: QuantSpec | None = None) -> Range:
        """Return (low, high) as the file has it, whatever the estimator and the specification.

        Raises:
            CalibrationError: there is no range of the value.
        """
        if name not in self.ranges:
            raise CalibrationError(f"{self.origin} has no range of {name}")
        return self.ranges[name]

    def mean_square(self, name: str) -> float:
        """Return E[x^2] of a uniform distribution over the range: an approximation, since the values are not known.

        Raises:
            CalibrationError: there is no range of the value.
        """
        low, high = self.range(name)
        return (low * low + low * high + high * high) / 3.0

    def elements_per_feed(self, name: str) -> int:
        """Return 0: a table of ranges does not tell."""
        return 0


# ---- reading -------------------------------------------------------------------------------------------------------


def read_ranges(path: str | Path, names: Mapping[str, str] | None = None) -> RangeTable:
    """Read a TensorRT calibration cache or ONNX Runtime's JSON, told apart by content.

    Args:
        path: the file.
        names: name of a value -> its name in the file; by default they are equal. Values that the file does not have
            stay unobserved, and ranges that no value asks for are left out.

    Raises:
        CalibrationError: the file is neither, is damaged, or has none of the names.
    """
    start = _text(Path(path)).lstrip()[:4]
    if start == "TRT-":
        return read_tensorrt(path, names)
    if start.startswith("{"):
        return read_onnxruntime(path, names)
    raise CalibrationError(
        f"{path} holds no ranges; expected a TensorRT calibration cache (first line TRT-...) or the JSON of ONNX "
        "Runtime's calibration"
    )


def read_tensorrt(path: str | Path, names: Mapping[str, str] | None = None) -> RangeTable:
    """Read a TensorRT calibration cache: ``name: scale`` per line, the scale as the hexadecimal bits of a float32.

    The range is symmetric, (-127 scale, 127 scale) (TensorRT developer guide, sampleINT8: scale = amax / 127).

    Args:
        path: the file.
        names: see `read_ranges`.

    Raises:
        CalibrationError: not such a file, a line that is none, or none of the names.
    """
    lines = _text(Path(path)).splitlines()
    if not lines or not _HEADER.fullmatch(lines[0].strip()):
        found = lines[0][:40] if lines else ""
        raise CalibrationError(
            f"{path} is not a TensorRT calibration cache; expected a first line such as {TENSORRT_HEADER}, "
            f"found {found!r}"
        )
    ranges: dict[str, Range] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        name, colon, bits = line.rpartition(":")
        bits = bits.strip()
        if not colon or not re.fullmatch(r"[0-9a-fA-F]{1,8}", bits):
            raise CalibrationError(
                f"{path}, line {number}: expected 'name: hexadecimal float32', found {line[:80]!r}; "
                "let TensorRT write the cache anew"
            )
        reach = float(struct.unpack(">f", bytes.fromhex(bits.zfill(8)))[0]) * _STEPS
        found_range = (-reach, reach)
        if ranges.setdefault(name, found_range) != found_range:
            raise CalibrationError(f"{path}, line {number}: tensor {name!r} has two scales; keep one of the lines")
    return _table(ranges, names, f"the TensorRT calibration cache {Path(path).name}")


def read_onnxruntime(path: str | Path, names: Mapping[str, str] | None = None) -> RangeTable:
    """Read ranges that ONNX Runtime's quantization tool wrote as JSON.

    All its forms are read: what ``save_tensors_data`` and ``quantize_static(calibration_cache_path=...)`` write,
    ``calibration.json`` of ``write_calibration_table``, and the pairs of numbers that older releases wrote there. Of
    ranges per channel the widest is taken; histograms are left out.

    Args:
        path: the file.
        names: see `read_ranges`.

    Raises:
        CalibrationError: not such a file, an entry without a range, or none of the names.
    """
    try:
        data = json.loads(_text(Path(path)))
    except ValueError as error:
        raise CalibrationError(f"{path} is not JSON: {error}") from error
    entries = data.get("data") if isinstance(data, dict) and data.get("CLS") == "TensorsData" else data
    if not isinstance(entries, dict):
        raise CalibrationError(f"{path}: expected a table of ranges by tensor, found {type(entries).__name__}")
    ranges: dict[str, Range] = {}
    for name, entry in entries.items():
        try:
            low, high = (entry["lowest"], entry["highest"]) if isinstance(entry, dict) else entry
            ranges[name] = _number(low, np.min), _number(high, np.max)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path}: tensor {name!r} has no range ({type(error).__name__}: {error}); expected 'lowest' and "
                "'highest', as MinMax, Entropy and Percentile calibration write them"
            ) from error
    return _table(ranges, names, f"ONNX Runtime's ranges {Path(path).name}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text; expected TensorRT's cache or ONNX Runtime's JSON") from error


def _number(value: Any, reduce: Callable[[Any], Any]) -> float:
    """Return the number in ``1.0``, ``[1.0, 2.0]`` or ``{"CLS": "numpy.array", "data": ..., "dtype": ...}``."""
    inner = value["data"] if isinstance(value, dict) else value
    return float(reduce(np.asarray(inner, np.float64)))


def _table(ranges: Mapping[str, Range], names: Mapping[str, str] | None, origin: str) -> RangeTable:
    if names is None:
        return RangeTable(dict(ranges), origin)
    kept = {name: ranges[there] for name, there in names.items() if there in ranges}
    if ranges and names and not kept:
        raise CalibrationError(
            f"{origin}: none of its tensors is in the model, such as {next(iter(ranges))!r}; the model has "
            f"{next(iter(names.values()))!r}: give the ranges of this model"
        )
    return RangeTable(kept, origin)


# ---- writing -------------------------------------------------------------------------------------------------------


def write_tensorrt(
    source: NamedRanges,
    path: str | Path,
    estimator: str = "entropy",
    names: Mapping[str, str] | None = None,
    header: str = TENSORRT_HEADER,
) -> tuple[str, ...]:
    """Write a TensorRT calibration cache: scale = max(|low|, |high|) / 127 per tensor.

    A tensor that is always zero gets the scale 1, as everywhere in qcompiler.

    Args:
        source: `Statistics` or a `RangeTable`.
        path: the file; an existing one is replaced.
        estimator: range estimator.
        names: name of a value -> its name in the model that TensorRT will read; by default they are equal. Where
            several values have one name there, it gets the widest range.
        header: release and algorithm, as the TensorRT that will read the cache writes it; it may refuse another.

    Returns:
        Values that were left out: never observed, or without a name in ``names``.

    Raises:
        CalibrationError: the file cannot be written, the header is none, or a name has a line break in it.
    """
    if not _HEADER.fullmatch(header):
        raise CalibrationError(f"a TensorRT cache has a first line such as {TENSORRT_HEADER}, not {header!r}")
    ranges, left = _named(source, estimator, names)
    lines = [header]
    for name, (low, high) in ranges.items():
        if len(name.splitlines()) != 1:
            raise CalibrationError(f"tensor {name!r}: a TensorRT cache cannot hold a name with a line break")
        reach = max(-low, high)
        bits = struct.pack(">f", min(max(reach / _STEPS, _TINY), _LARGEST) if reach > 0 else 1.0).hex()
        lines.append(f"{name}: {bits}")
    replace_file(Path(path), ("\n".join(lines) + "\n").encode())
    return left


def write_onnxruntime(
    source: NamedRanges,
    path: str | Path,
    estimator: str = "min-max",
    names: Mapping[str, str] | None = None,
    form: OrtForm = "tensors-data",
) -> tuple[str, ...]:
    """Write ranges as the JSON of ONNX Runtime's quantization tool.

    Args:
        source: `Statistics` or a `RangeTable`.
        path: the file; an existing one is replaced.
        estimator: range estimator. ``quantize_static`` takes the file only with the same ``calibrate_method``: Entropy
            and Percentile for those, MinMax for all others.
        names: see `write_tensorrt`.
        form: ``tensors-data`` for ``load_tensors_data`` and ``quantize_static(calibration_cache_path=...)``, ``table``
            for a ``calibration.json`` as ``write_calibration_table`` writes it.

    Returns:
        Values that were left out: never observed, or without a name in ``names``.

    Raises:
        CalibrationError: the file cannot be written.
    """
    ranges, left = _named(source, estimator, names)
    entries = {
        name: {"lowest": _array(low), "highest": _array(high), "CLS": "TensorData"}
        for name, (low, high) in ranges.items()
    }
    method = _METHODS.get(estimator.partition(":")[0], _MIN_MAX)
    data: dict[str, Any] = {
        "CLS": "TensorsData", "data": entries,
        "calibration_method": {"CLS": "CalibrationMethod", "value": f"CalibrationMethod.{method}"},
        "smooth_quant": False,
    }  # fmt: skip
    replace_file(Path(path), json.dumps(entries if form == "table" else data).encode())
    return left


def _array(value: float) -> dict[str, Any]:
    """Return a float32 scalar as ONNX Runtime encodes a NumPy array."""
    bounded = float(np.float32(min(max(value, -_LARGEST), _LARGEST)))
    return {"data": bounded, "dtype": "float32", "CLS": "numpy.array"}


def _named(
    source: NamedRanges, estimator: str, names: Mapping[str, str] | None
) -> tuple[dict[str, Range], tuple[str, ...]]:
    """Return (range by name in the file, values left out)."""
    ranges: dict[str, Range] = {}
    left: list[str] = []
    for value in source:
        name = value if names is None else names.get(value)
        if name is None or not source.observed(value):
            left.append(value)
            continue
        low, high = source.range(value, estimator)
        before = ranges.get(name, (low, high))
        ranges[name] = min(low, before[0]), max(high, before[1])
    return ranges, tuple(left)
