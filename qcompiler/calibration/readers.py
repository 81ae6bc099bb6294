"""Where feeds come from: arrays, callables, iterators, files and folders; validated before any of them is run."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import numpy_helper

from qcompiler.engine import Array, Feeds, TensorInfo
from qcompiler.errors import CalibrationError

Source = str | Path | Iterable[Feeds] | Callable[[], Iterable[Feeds]]
CHUNK = 32
"""Rows per feed when an array is cut for a model whose batch axis is open."""


@dataclass(frozen=True)
class Split:
    """Feeds for range-finding, feeds set aside for checking, and whether they are the same ones."""

    ranges: FeedSource
    held_out: FeedSource
    shared: bool = False


class FeedSource:
    """A re-iterable, validated sequence of feeds.

    Attributes:
        inputs: what each feed must give.
        identity: digest of the data where it is cheap to have (files), else None.
    """

    def __init__(
        self,
        start: Callable[[], Iterable[Feeds]],
        inputs: Sequence[TensorInfo],
        identity: str | None = None,
        length: int | None = None,
    ) -> None:
        self._start, self.inputs, self.identity = start, tuple(inputs), identity
        self._length = length

    def __iter__(self) -> Iterator[dict[str, Array]]:
        count = 0
        try:
            for index, feed in enumerate(self._start()):
                count += 1
                yield validate(feed, self.inputs, index)
        except CalibrationError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise CalibrationError(f"reading sample {count} failed: {type(error).__name__}: {error}") from error
        if count == 0:
            raise CalibrationError("the calibration source is empty; give at least one feed")
        self._length = count

    def __len__(self) -> int:
        if self._length is None:
            # Counting would read all the data once more, and list() asks on its own: TypeError means "not known" to it.
            raise TypeError("the number of feeds is known after one pass only")
        return self._length

    def _some(self, aside: Callable[[int], bool], wanted: bool) -> Iterator[Feeds]:
        return (feed for index, feed in enumerate(self) if aside(index) is wanted)

    def _part(self, aside: Callable[[int], bool], wanted: bool, name: str) -> FeedSource:
        identity = None if self.identity is None else f"{self.identity}/{name}"
        length = None if self._length is None else sum(aside(i) is wanted for i in range(self._length))
        return FeedSource(partial(self._some, aside, wanted), self.inputs, identity, length)

    def split(self, holdout: float = 0.2) -> Split:
        """Set feeds aside for checking: every k-th one, a fifth by default, at least one.

        A single feed is split along its first axis where that axis is open for every input and long enough; otherwise
        the same feed serves both, and the result says so. No more than the first k feeds are read.
        """
        every = max(2, round(1 / holdout))
        first = list(itertools.islice(self, every))
        if len(first) > 1:
            last = len(first) - 1
            # With fewer feeds than k the last one is every-th by this rule too: last == every - 1 otherwise.
            aside = lambda index: index % every == every - 1 or index == last < every - 1  # noqa: E731
            return Split(self._part(aside, False, "ranges"), self._part(aside, True, "held-out"))
        feed = first[0]
        rows = _open_batch(feed, self.inputs)
        if rows < 2:
            return Split(self, self, shared=True)
        cut = rows - max(1, round(rows * holdout))
        head = {n: a[:cut] if a.ndim else a for n, a in feed.items()}
        tail = {n: a[cut:] if a.ndim else a for n, a in feed.items()}
        return Split(
            FeedSource(lambda: [head], self.inputs, length=1), FeedSource(lambda: [tail], self.inputs, length=1)
        )


def _open_batch(feed: Feeds, inputs: Sequence[TensorInfo]) -> int:
    """Return the common length of the open first axes, or 0 if the feed cannot be split there."""
    lengths = set()
    names = set()
    for info in inputs:
        array = feed[info.name]
        if array.ndim == 0:
            continue
        if info.shape is None or isinstance(info.shape[0], int):
            return 0
        lengths.add(array.shape[0])
        names.add(info.shape[0])
    # Axes that the model names differently are as long as each other by chance.
    return lengths.pop() if len(lengths) == 1 and len(names - {None}) < 2 else 0


def validate(feed: Feeds, inputs: Sequence[TensorInfo], index: int) -> dict[str, Array]:
    """Check one feed against the model's inputs and make safe conversions.

    Raises:
        CalibrationError: a name, type, shape or number that does not fit; names the sample and the tensor.
    """
    if not isinstance(feed, Mapping):
        raise CalibrationError(f"sample {index} is a {type(feed).__name__}; expected a dict of input name to array")
    known = {i.name: i for i in inputs}
    listed = ", ".join(f"{i.name} {i.dtype}{list(i.shape or ())}" for i in inputs)
    for name in feed:
        if name not in known:
            raise CalibrationError(f"sample {index}: the model has no input {name!r}; its inputs are: {listed}")
    checked = {}
    for info in inputs:
        if info.name not in feed:
            raise CalibrationError(f"sample {index}: input {info.name!r} is missing; the inputs are: {listed}")
        checked[info.name] = _checked(np.asarray(feed[info.name]), info, index)
    return checked


def _checked(array: Array, info: TensorInfo, index: int) -> Array:
    where = f"sample {index}, input {info.name!r}"
    if array.dtype != info.dtype:
        floats = array.dtype.kind == "f" and info.dtype.kind in "fV"
        if not (floats or np.can_cast(array.dtype, info.dtype, "safe") or _fits(array, info.dtype)):
            raise CalibrationError(f"{where}: type {array.dtype}, expected {info.dtype}")
        finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
        with np.errstate(over="ignore"):
            array = array.astype(info.dtype)
        if finite and info.dtype.kind in "fV" and not np.isfinite(array.astype(np.float32)).all():
            raise CalibrationError(f"{where}: the data holds numbers too large for {info.dtype}")
    if info.shape is not None:
        fits = len(info.shape) == array.ndim and all(
            not isinstance(want, int) or want == have for want, have in zip(info.shape, array.shape, strict=True)
        )
        if not fits:
            raise CalibrationError(f"{where}: shape {list(array.shape)}, expected {list(info.shape)}")
    if array.dtype.kind in "fV" and not np.isfinite(array.astype(np.float32)).all():
        kind = "NaN" if np.isnan(array.astype(np.float32)).any() else "infinity"
        raise CalibrationError(f"{where}: the data holds {kind}; remove or mend that sample")
    return array


def _fits(array: Array, dtype: np.dtype[Any]) -> bool:
    """Return whether integers fit another integer type by value."""
    if array.dtype.kind not in "iu" or dtype.kind not in "iu" or array.size == 0:
        return False
    limits = np.iinfo(dtype)
    return int(array.min()) >= limits.min and int(array.max()) <= limits.max


def as_feed_source(source: Source | FeedSource, inputs: Sequence[TensorInfo]) -> FeedSource:
    """Make a feed source of whatever a caller hands in.

    Args:
        source: a re-iterable of ``{input: array}``, a callable that returns an iterator, a plain iterator (spooled to a
            temporary file, since calibration reads twice), or a path as for `read_source`.
        inputs: the model's inputs.
    """
    if isinstance(source, FeedSource):
        return source
    if isinstance(source, str | Path):
        return read_source(source, inputs)
    if isinstance(source, Mapping):
        return FeedSource(lambda: [source], inputs, length=1)
    if callable(source):
        return FeedSource(source, inputs)
    if isinstance(source, Iterator):
        return FeedSource(_Spool(source), inputs)
    if isinstance(source, Iterable):
        return FeedSource(lambda: source, inputs, length=len(source) if isinstance(source, Sequence) else None)
    raise CalibrationError(f"cannot read calibration data from a {type(source).__name__}")


class _Spool:
    """Keep what an iterator gives in a temporary file, so that it can be read again."""

    def __init__(self, source: Iterator[Feeds]) -> None:
        self._source: Iterator[Feeds] | None = source
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="qcompiler-")  # noqa: SIM115  # lives as long as this
        self._kept: list[tuple[int, dict[str, np.dtype[Any]]]] = []
        weakref.finalize(self, self._file.close)

    def __call__(self) -> Iterator[Feeds]:
        for place in itertools.count():
            if place == len(self._kept):  # asked anew each time: another reader may have gone further
                feed = next(self._source, None) if self._source is not None else None
                if feed is None:
                    self._source = None
                    return
                self._write(feed)
            yield self._read(*self._kept[place])

    def _write(self, feed: Feeds) -> None:
        arrays = {name: np.asarray(value) for name, value in feed.items()}
        offset = self._file.seek(0, 2)
        for array in arrays.values():
            np.save(self._file, array)
        # The format forgets types that NumPy does not define, bfloat16 for one.
        self._kept.append((offset, {name: array.dtype for name, array in arrays.items()}))

    def _read(self, offset: int, dtypes: Mapping[str, np.dtype[Any]]) -> Feeds:
        self._file.seek(offset)
        feed = {}
        for name, dtype in dtypes.items():
            array = np.load(self._file, allow_pickle=True)  # text; the file is private to this object
            feed[name] = array if array.dtype == dtype else array.view(dtype)
        return feed


def read_source(source: str | Path, inputs: Sequence[TensorInfo]) -> FeedSource:
    """Open a source named on the command line.

    It is an .npz, a folder of .npz, a folder with (or of) ONNX ``test_data_set_*``, or ``file.py:function``. In an .npz
    an array of the model's rank is cut into the model's batch (`CHUNK` rows where the batch axis is open), one of rank
    + 1 is one feed per row, and a scalar is repeated. Every row is used: behind an open batch the last feed is shorter,
    behind a fixed one it repeats rows of the one before. Arrays named ``label...`` are left out.

    Raises:
        CalibrationError: nothing of that kind is there.
    """
    text = str(source)
    if (match := re.fullmatch(r"(.+\.py):(\w+)", text)) is not None:
        return FeedSource(load_function(match[1], match[2]), inputs)
    path = Path(text)
    if path.is_file() and path.suffix == ".npz":
        return FeedSource(lambda: _npz_feeds(path, inputs), inputs, _digest([path]))
    if path.is_dir():
        sets = sorted(path.glob("test_data_set_*"), key=_natural)
        if not sets and path.name.startswith("test_data_set_"):
            sets = [path]
        if sets:
            files = [f for s in sets for f in sorted(s.glob("input_*.pb"), key=_natural)]
            return FeedSource(lambda: (_onnx_feed(s, inputs) for s in sets), inputs, _digest(files))
        files = sorted(path.glob("*.npz"), key=_natural)
        if files:
            every = lambda: itertools.chain.from_iterable(_npz_feeds(f, inputs) for f in files)  # noqa: E731
            return FeedSource(every, inputs, _digest(files))
        raise CalibrationError(f"the folder {path} holds neither .npz files nor test_data_set_* folders")
    if not path.exists():
        raise CalibrationError(f"cannot read calibration data from {text}: no such file or folder")
    raise CalibrationError(f"cannot read calibration data from {text}: expected .npz, a folder, or file.py:function")


def load_function(file: str, name: str) -> Callable[..., Any]:
    """Load a function from a Python file.

    Raises:
        CalibrationError: no such file or function, or the file fails to import.
    """
    path = Path(file)
    if not path.is_file():
        raise CalibrationError(f"cannot load {file}:{name}: no such file")
    spec = importlib.util.spec_from_file_location(f"qcompiler_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        del sys.modules[module.__name__]
        raise CalibrationError(f"cannot load {file}:{name}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise CalibrationError(f"cannot load {file}:{name}: the file has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _digest(files: Sequence[Path]) -> str:
    made = hashlib.sha256()
    for file in files:
        made.update(file.name.encode())
        made.update(hashlib.sha256(file.read_bytes()).digest())
    return made.hexdigest()[:16]


def _npz_feeds(path: Path, inputs: Sequence[TensorInfo]) -> Iterator[Feeds]:
    try:
        # Opened here, since np.load leaves the file open where it is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files if not name.startswith("label")}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    known = {i.name: i for i in inputs}
    for name in arrays:
        if name not in known:
            raise CalibrationError(f"{path}: the model has no input {name!r}; its inputs are: {', '.join(known)}")
    if not arrays:
        raise CalibrationError(f"{path} holds no array for the model's inputs: {', '.join(known)}")
    columns = {name: _cut(array, known[name]) for name, array in arrays.items()}
    lengths = {name: len(c) for name, c in columns.items() if c is not None}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise CalibrationError(f"{path}: the arrays give different numbers of feeds: {listed}; make them equally long")
    for index in range(next(iter(lengths.values()), 1)):
        yield {n: _single(arrays[n], known[n]) if c is None else c[index] for n, c in columns.items()}


def _single(array: Array, info: TensorInfo) -> Array:
    """Return the one value for all feeds in the input's rank."""
    return array.reshape((1,) * len(info.shape)) if info.shape is not None else array


def _cut(array: Array, info: TensorInfo) -> Sequence[Array] | None:
    """Return the feeds in an array, or None if it is one value for all feeds."""
    rank = len(info.shape) if info.shape is not None else array.ndim
    ones = info.shape is not None and all(d == 1 for d in info.shape)
    if array.ndim == 0 or (array.size == 1 and (rank == 0 or (ones and array.ndim == rank == 1))):
        return None
    if array.ndim == rank + 1:
        return list(array)
    if array.ndim != rank or rank == 0:
        return [array]  # validation says what is wrong with it
    if info.shape is None:
        return [array]  # which axis is the batch is not known
    if not isinstance(info.shape[0], int):
        return [array[i : i + CHUNK] for i in range(0, len(array), CHUNK)]
    batch = max(1, info.shape[0])
    starts = list(range(0, max(1, len(array) - batch + 1), batch))
    if len(array) > batch and len(array) % batch:
        starts.append(len(array) - batch)
    return [array[i : i + batch] for i in starts]


def _onnx_feed(folder: Path, inputs: Sequence[TensorInfo]) -> Feeds:
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


def random_feeds(inputs: Sequence[TensorInfo], count: int, seed: int = 0) -> list[Feeds]:
    """Make random feeds: standard normal floats, small non-negative integers, mixed booleans; open axes have length 1.

    Raises:
        CalibrationError: an input's rank is unknown, or its type is text.
    """
    generator = np.random.default_rng(seed)
    feeds: list[Feeds] = []
    for _ in range(count):
        feed: dict[str, Array] = {}
        for info in inputs:
            if info.shape is None or info.dtype.kind == "O":
                raise CalibrationError(f"cannot make random data for input {info.name!r}: give --calibration SRC")
            shape = [d if isinstance(d, int) and d >= 0 else 1 for d in info.shape]
            drawn: Array
            if info.dtype.kind in "fV":
                drawn = generator.standard_normal(shape)
            elif info.dtype.kind == "b":
                drawn = generator.random(shape) < 0.5
            else:
                drawn = generator.integers(0, 2, shape)
            feed[info.name] = np.asarray(drawn).astype(info.dtype)
        feeds.append(feed)
    return feeds
