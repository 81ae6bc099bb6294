"""Names of cache entries: a digest of everything that the compiled model depends on."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler import __version__
from qcompiler.plugins import plugin_versions

if TYPE_CHECKING:
    import onnx

_KEY_VERSION = 1
"""Raise it when entries of an older release must not be read."""
_ENGINES = ("onnxruntime", "onnx", "onnx-ir", "numpy")
_DATA_TABLES = ("qcompiler.targets", "qcompiler.recipes")
_LINE_NAMES = ("model name", "flags", "Features", "CPU implementer", "CPU part")


def entry_key(model: str, options: Mapping[str, Any]) -> str:
    """Return the name of the cache entry of a model under options, 40 hexadecimal digits.

    Args:
        model: digest of the model, see `model_digest`.
        options: everything else that decides what comes out; files count by what is in them.
    """
    parts = {
        "version": _KEY_VERSION,
        "qcompiler": __version__,
        "engines": {name: _installed(name) for name in _ENGINES},
        "plugins": plugin_versions(),
        "tables": tables_digest(),
        "processor": processor_identity(),
        "model": model,
        "options": canonical(options),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def model_digest(source: str | Path | bytes) -> str:
    """Return a digest of a model with the weights that lie in other files.

    Raises:
        OSError: a file cannot be read.
        ValueError: the model cannot be parsed.
    """
    made = hashlib.sha256()
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    made.update(data)
    # Parsing takes far longer than hashing: only a model that holds the key of a file's name can have such files.
    if b"location" in data and (names := _external_files(data)):
        folder = Path() if isinstance(source, bytes) else Path(source).parent
        for name in names:
            made.update(f"\0{name}\0".encode())
            made.update(file_digest(folder / name).encode())
    return made.hexdigest()


def _external_files(data: bytes) -> list[str]:
    import onnx

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's own type differs between its implementations
        raise ValueError(f"not an ONNX model: {error}") from error
    nodes = [node for function in proto.functions for node in function.node]
    found: set[str] = set()
    for tensor in _tensors(proto.graph, nodes):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            found.update(entry.value for entry in tensor.external_data if entry.key == "location")
    return sorted(found)


def _tensors(graph: onnx.GraphProto, more: Iterable[onnx.NodeProto] = ()) -> Iterator[onnx.TensorProto]:
    """Yield every stored tensor of a graph and of the bodies in it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in (*graph.node, *more):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _tensors(body)


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; the file is read in blocks.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def tables_digest() -> str:
    """Return a digest of the capability tables and recipes of this release."""
    made = hashlib.sha256()
    for package in _DATA_TABLES:
        for name, data in sorted(_tables(package)):
            made.update(f"{package}/{name}:{len(data)};".encode())
            made.update(data)
    return made.hexdigest()[:32]


def _tables(package: str) -> list[tuple[str, bytes]]:
    # Reading the packages as modules would load onnx-ir, half a second at every start.
    root = resources.files("qcompiler").joinpath(package.rpartition(".")[2])
    return [(item.name, item.read_bytes()) for item in root.iterdir() if item.name.endswith(".toml")]


@cache
def processor_identity() -> str:
    """Return what tells this processor from others: architecture, model and features, as a digest."""
    lines = [platform.machine().lower(), platform.processor()]
    described = Path("/proc/cpuinfo")
    if described.exists():
        first, _, _ = described.read_text(encoding="utf-8", errors="replace").partition("\n\n")
        lines += [line for line in first.splitlines() if line.partition(":")[0].strip() in _LINE_NAMES]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@cache
def _installed(name: str) -> str:
    # Several distributions give the engine's module (onnxruntime-gpu, -openvino ...): the module knows its own version.
    if (module := sys.modules.get(name)) is not None and hasattr(module, "__version__"):
        return f"{module.__version__}"
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def canonical(value: Any) -> Any:
    """Return JSON data that differs where a value does; a file counts by its contents, a function by its code."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return _contents(Path(value))
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.asarray(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__qualname__, **{f.name: canonical(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(name): canonical(item) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(canonical(item), sort_keys=True) for item in value)
    if isinstance(value, Sequence):
        return [canonical(item) for item in value]
    if callable(value):
        return _function(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _contents(path: Path) -> Any:
    try:
        if path.is_file():
            return {"file": file_digest(path)}
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            stats = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in inside]
            return {"folder": hashlib.sha256(repr(stats).encode()).hexdigest()}
    except OSError:
        pass
    return {"missing": str(path)}


def _array(array: Any) -> dict[str, Any]:
    data = repr(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array).tobytes()
    return {"array": hashlib.sha256(data).hexdigest(), "dtype": str(array.dtype), "shape": list(array.shape)}


def _function(function: Callable[..., Any]) -> dict[str, str]:
    made = {"function": f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"}
    with suppress(OSError, TypeError):  # built in, typed at a prompt, or an object
        made["source"] = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    return made
