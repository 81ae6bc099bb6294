"""A file of named arrays and one JSON text: safetensors, checked by a digest, the same bytes for the same content.

Integers are stored in the least width that holds them, without the zeros at both ends. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qcompiler.engine import Array
from qcompiler.errors import CalibrationError

FORMAT_VERSION = 1
"""Version of the file's layout."""

_ENTRY = "qcal"
_MAX_ELEMENTS = 1 << 26
"""Elements of one array that a file may claim; a damaged length must not take all memory."""
_STORED = {"float32", "float64", "int64", "uint64"}
_NARROW = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32)


def write_container(path: Path, body: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write one file, which appears whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        body: JSON-ready data with text keys.
        arrays: float32, float64, int64 or uint64, any shape.

    Raises:
        CalibrationError: the file cannot be written, or a number in the body is not finite.
    """
    stored: dict[str, Array] = {}
    packing: dict[str, list[Any]] = {}
    for name, array in arrays.items():
        stored[name], packing[name] = _packed(array)
    full = {"body": body, "packing": packing}
    try:
        # One entry, since safetensors writes several in any order.
        text = _json({"version": FORMAT_VERSION, "sha256": _checksum(full, stored), **full})
    except ValueError as error:
        raise CalibrationError(f"cannot write {path}: a number in it is not finite ({error})") from error
    replace_file(path, safetensors.numpy.save(stored, {_ENTRY: text}))


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what `write_container` wrote.

    Returns:
        The JSON body and the arrays.

    Raises:
        CalibrationError: no such file, damaged, or of another version; says what to do.
    """
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder; expected a .qcal file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_ENTRY)
            if text is None:
                raise CalibrationError(f"{path} is a safetensors file, but holds no calibration statistics")
            stored: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head = json.loads(text)
        if head["version"] != FORMAT_VERSION:
            raise CalibrationError(
                f"{path} has version {head['version']}, this release reads {FORMAT_VERSION}; calibrate anew"
            )
        full = {"body": head["body"], "packing": head["packing"]}
        if head["sha256"] != _checksum(full, stored):
            raise CalibrationError(f"{path} is damaged: its checksum does not fit its content; calibrate anew")
        return head["body"], {name: _unpacked(stored[name], *how) for name, how in head["packing"].items()}
    except FileNotFoundError as error:
        raise CalibrationError(f"there is no file {path}; qcompiler calibrate writes one") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CalibrationError(f"{path} cannot be read as a .qcal file ({error}); calibrate anew") from error
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> CalibrationError:
    """Return the error to raise for a file whose parts do not fit each other."""
    return CalibrationError(f"{path} is damaged: {type(error).__name__}: {error}; calibrate anew")


def replace_file(path: Path, data: bytes) -> None:
    """Write bytes under a temporary name beside the file, then rename: the file appears whole or not at all.

    Raises:
        CalibrationError: the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise CalibrationError(
            f"cannot write {path} ({len(data) / 1e6:.1f} MB): {error.strerror or error}; nothing was changed there, "
            "give a path with enough room that may be written to"
        ) from error


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(body: Mapping[str, Any], stored: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(_json(body).encode())
    for name in sorted(stored):
        array = stored[name]
        digest.update(f"\n{name} {array.dtype.str} {array.size}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _packed(array: Array) -> tuple[Array, list[Any]]:
    """Return (array to store, [dtype, shape, first place stored]); integers are trimmed and narrowed."""
    flat = np.ascontiguousarray(array).reshape(-1)
    first = 0
    if array.dtype == np.int64:
        filled = np.nonzero(flat)[0]
        first, last = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 0)
        flat = flat[first:last]
        low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
        fits = [t for t in _NARROW if np.iinfo(t).min <= low and high <= np.iinfo(t).max]
        flat = flat.astype(fits[0] if fits else np.int64)
    return flat, [array.dtype.name, list(array.shape), first]


def _unpacked(stored: Array, dtype: str, shape: list[int], first: int) -> Array:
    size = math.prod(shape)
    if dtype not in _STORED or stored.ndim != 1 or min([0, *shape]) < 0 or size > _MAX_ELEMENTS:
        raise ValueError(f"an array of {dtype} {shape} is not expected here")
    if not 0 <= first <= first + stored.size <= size:
        raise ValueError(f"{stored.size} stored elements from {first} do not fit {size}")
    array: Array = np.zeros(size, dtype)
    array[first : first + stored.size] = stored
    return array.reshape(shape)
