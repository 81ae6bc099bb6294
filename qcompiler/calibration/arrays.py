"""Arrays in files: .npz, .npy, folders of them, ONNX test data. Rows are read as feeds ask for them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import onnx
from onnx import numpy_helper

from qcompiler.engine import Array, Feeds, TensorInfo
from qcompiler.errors import CalibrationError

CHUNK = 32
"""Rows per feed when an array is cut for a model whose batch axis is open."""

_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    struct.error,
    zipfile.BadZipFile,
    NotImplementedError,
)
"""What NumPy and zipfile raise on files that are none of theirs."""


class Rows(Protocol):
    """An array of which feeds take rows; `Array` is one in all but name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the whole array's shape."""
        ...

    def take(self, start: int, stop: int) -> Array:
        """Return rows; ``start`` never goes back behind that of the call before."""
        ...


@dataclass(frozen=True)
class Mapped:
    """An array in memory or mapped from a file."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the whole array's shape."""
        return self.array.shape

    def take(self, start: int, stop: int) -> Array:
        """Return a view of rows."""
        return self.array[start:stop]


class Streamed:
    """An array in a compressed file, decompressed as far as rows were asked for; the last rows taken are kept."""

    def __init__(self, stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._stream, self.shape, self._dtype = stream, shape, dtype
        self._first = 0
        self._kept: Array = np.empty((0, *shape[1:]), dtype)

    def take(self, start: int, stop: int) -> Array:
        """Return rows; those before ``start`` are gone for good."""
        stop = min(stop, self.shape[0])
        end = self._first + len(self._kept)
        if start > end:
            self._read(start - end)
            end = start
        kept = self._kept[max(0, start - self._first) :]
        more = self._read(stop - end) if stop > end else self._kept[:0]
        self._kept, self._first = (np.concatenate([kept, more]) if len(kept) else more), start
        return self._kept[: stop - start]

    def _read(self, count: int) -> Array:
        rows = np.empty((count, *self.shape[1:]), self._dtype)
        into = memoryview(rows.reshape(-1).view(np.uint8).data)
        done = 0
        while done < len(into):
            block = self._stream.read(min(1 << 20, len(into) - done))
            if not block:
                raise EOFError("the array is cut short")
            into[done : done + len(block)] = block
            done += len(block)
        return rows


@dataclass(frozen=True)
class Column:
    """The feeds in one array.

    Attributes:
        rows: the array.
        bounds: (first row, row behind the last one) per feed; None is the whole array, once.
        inner: whether a feed is one row without its axis.
    """

    rows: Rows
    bounds: tuple[tuple[int, int], ...] | None
    inner: bool = False

    def __len__(self) -> int:
        return 1 if self.bounds is None else len(self.bounds)

    def __getitem__(self, index: int) -> Array:
        start, stop = (0, max(1, self.rows.shape[0])) if self.bounds is None else self.bounds[index]
        taken = self.rows.take(start, stop)
        return taken[0] if self.inner else taken


def cut(rows: Rows, info: TensorInfo, chunk: int = CHUNK) -> Column | None:
    """Return the feeds in an array, or None if it is one value for all feeds.

    An array of the input's rank is cut into the model's batch (`chunk` rows where that axis is open), one of rank + 1
    is one feed per row. The last feed behind a fixed batch repeats rows of the one before.
    """
    shape = rows.shape
    rank = len(info.shape) if info.shape is not None else len(shape)
    ones = info.shape is not None and all(d == 1 for d in info.shape)
    if not shape or (np.prod(shape) == 1 and (rank == 0 or (ones and len(shape) == rank == 1))):
        return None
    count = shape[0]
    if len(shape) == rank + 1:
        return Column(rows, tuple((i, i + 1) for i in range(count)), inner=True)
    if len(shape) != rank or rank == 0 or info.shape is None:
        # Validation says what is wrong; where the model does not tell its rank, which axis is the batch is not known.
        return Column(rows, None)
    if not isinstance(info.shape[0], int):
        return Column(rows, tuple((i, min(count, i + chunk)) for i in range(0, count, chunk)))
    batch = max(1, info.shape[0])
    starts = list(range(0, max(1, count - batch + 1), batch))
    if count > batch and count % batch:
        starts.append(count - batch)
    return Column(rows, tuple((i, i + batch) for i in starts))


def npz_feeds(
    path: Path, inputs: Sequence[TensorInfo], names: Mapping[str, str], chunk: int = CHUNK
) -> Iterator[Feeds]:
    """Yield the feeds in an .npz; arrays named ``label...`` are left out.

    Stored arrays are mapped, compressed ones are decompressed as feeds ask for them (whole, if in Fortran order).

    Args:
        path: the file.
        inputs: the model's inputs.
        names: array name to input name, where they differ.
        chunk: rows per feed where the model leaves its batch axis open.
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = [m for m in archive.infolist() if not m.filename.startswith("label")]
            arrays = {m.filename.removesuffix(".npy"): _member(path, archive, m, stack) for m in members}
        except _BROKEN as error:
            raise CalibrationError(f"cannot read {path}: {error}") from error
        yield from _with_place(path, column_feeds(arrays, inputs, names, str(path), chunk))


def _with_place(path: Path, feeds: Iterator[Feeds]) -> Iterator[Feeds]:
    """Name the file where reading on fails."""
    try:
        yield from feeds
    except _BROKEN as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error


def npy_feeds(
    files: Mapping[str, Path], inputs: Sequence[TensorInfo], names: Mapping[str, str], chunk: int = CHUNK
) -> Iterator[Feeds]:
    """Yield the feeds in .npy files, which are mapped into memory.

    An array of one axis less than its input is one row, where the model's batch may be 1.

    Args:
        files: array name to file; those named ``label...`` are left out.
        inputs: the model's inputs.
        names: array name to input name, where they differ.
        chunk: rows per feed where the model leaves its batch axis open.
    """
    known = {i.name: i for i in inputs}
    kept = {name: path for name, path in files.items() if not name.startswith("label")}
    arrays = {
        name: Mapped(_with_batch(load_npy(path), known.get(names.get(name, name)))) for name, path in kept.items()
    }
    yield from column_feeds(arrays, inputs, names, ", ".join(map(str, kept.values())), chunk)


def _with_batch(array: Array, info: TensorInfo | None) -> Array:
    shape = info.shape if info is not None else None
    lacks = shape is not None and len(shape) > 1 and array.ndim == len(shape) - 1
    return array[None] if lacks and shape is not None and (shape[0] == 1 or not isinstance(shape[0], int)) else array


def load_npy(path: Path) -> Array:
    """Map an .npy into memory.

    Raises:
        CalibrationError: the file is none, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            shape, order, dtype = _header(file)
            return _mapped(path, file.tell(), shape, order, dtype)
    except _BROKEN as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, order, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read; save numbers or text of a fixed length")
    return shape, order, dtype


def _mapped(path: Path, offset: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]) -> Array:
    if 0 in shape:
        return np.empty(shape, dtype)  # nothing to map
    if path.stat().st_size < offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError("the array is cut short")
    mapped = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    return mapped.view(np.ndarray)


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, stack: ExitStack) -> Rows:
    stream = stack.enter_context(archive.open(member))
    shape, fortran, dtype = _header(stream)
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            # The local header's name and extra field may be of another length than the directory's.
            file.seek(member.header_offset + 26)
            start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(start)
            _header(file)
            return Mapped(_mapped(path, file.tell(), shape, fortran, dtype))
    if shape and not fortran:
        return Streamed(stream, shape, dtype)
    whole = np.frombuffer(stream.read(), dtype)
    return Mapped(whole.reshape(shape, order="F" if fortran else "C"))


def column_feeds(
    arrays: Mapping[str, Rows], inputs: Sequence[TensorInfo], names: Mapping[str, str], where: str, chunk: int = CHUNK
) -> Iterator[Feeds]:
    """Yield the feeds in named arrays.

    Args:
        arrays: by array name.
        inputs: the model's inputs.
        names: array name to input name, where they differ.
        where: what errors call the source.
        chunk: rows per feed where the model leaves its batch axis open.

    Raises:
        CalibrationError: an array for no input, none at all, or arrays of different numbers of feeds.
    """
    known = {i.name: i for i in inputs}
    given = {names.get(name, name): rows for name, rows in arrays.items()}
    for name in given:
        if name not in known:
            raise CalibrationError(f"{where}: the model has no input {name!r}; its inputs are: {', '.join(known)}")
    if not given:
        raise CalibrationError(f"{where} holds no array for the model's inputs: {', '.join(known)}")
    columns = {name: cut(rows, known[name], chunk) for name, rows in given.items()}
    lengths = {name: len(c) for name, c in columns.items() if c is not None}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise CalibrationError(f"{where}: the arrays give different numbers of feeds: {listed}; make them equally long")
    single = {name: _single(given[name], known[name]) for name, c in columns.items() if c is None}
    for index in range(next(iter(lengths.values()), 1)):
        yield {n: _typed(single[n] if c is None else c[index], known[n]) for n, c in columns.items()}


def _single(rows: Rows, info: TensorInfo) -> Array:
    """Return the one value for all feeds in the input's rank."""
    array = rows.array if isinstance(rows, Mapped) else rows.take(0, 1)
    return array.reshape((1,) * len(info.shape)) if info.shape is not None else array


def _typed(array: Array, info: TensorInfo) -> Array:
    """Give bytes of a type that NumPy does not define (bfloat16 and its kind are saved as such) the input's type."""
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == info.dtype.itemsize:
        return array.view(info.dtype)
    return array


def onnx_feed(folder: Path, inputs: Sequence[TensorInfo]) -> Feeds:
    """Read one ``test_data_set_N`` of the ONNX project: ``input_K.pb`` by the model's order.

    Raises:
        CalibrationError: an input is missing or is no tensor.
    """
    feed = {}
    for index, info in enumerate(inputs):
        path = folder / f"input_{index}.pb"
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(path.read_bytes())
            feed[info.name] = numpy_helper.to_array(tensor)
        except Exception as error:  # protobuf raises its own types
            raise CalibrationError(f"cannot read {path}: {error}") from error
    return feed
