"""A validated sequence of feeds that can be read again and again, and how it is split."""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from qcompiler.engine import Array, Feeds, TensorInfo
from qcompiler.errors import CalibrationError

Identity = str | Callable[[], str] | None


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
        about: how the feeds are made of what lies behind them, assumptions included; None where they are taken as is.
        synthetic: how the feeds were invented; None for data.
    """

    def __init__(
        self,
        start: Callable[[], Iterable[Feeds]],
        inputs: Sequence[TensorInfo],
        identity: Identity = None,
        length: int | None = None,
        about: str | None = None,
        synthetic: str | None = None,
    ) -> None:
        self._start, self.inputs, self._identity = start, tuple(inputs), identity
        self._length = length
        self.about, self.synthetic = about, synthetic

    @property
    def identity(self) -> str | None:
        """Return the digest of the data and of the options that it is read with, or None if nothing stands for it.

        Files are hashed on the first call, in blocks.
        """
        if callable(self._identity):
            self._identity = self._identity()
        return self._identity

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

    def _named(self, name: str) -> Identity:
        return None if self._identity is None else lambda: f"{self.identity}/{name}"

    def _part(self, aside: Callable[[int], bool], wanted: bool, name: str) -> FeedSource:
        length = None if self._length is None else sum(aside(i) is wanted for i in range(self._length))
        start = partial(self._some, aside, wanted)
        return FeedSource(start, self.inputs, self._named(name), length, self.about, self.synthetic)

    def limited(self, count: int) -> FeedSource:
        """Return a source of the first ``count`` feeds; no more are read."""
        length = None if self._length is None else min(count, self._length)
        start = lambda: itertools.islice(self, count)  # noqa: E731
        return FeedSource(start, self.inputs, self._named(f"first-{count}"), length, self.about, self.synthetic)

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
        return Split(self._one(head, f"rows-to-{cut}"), self._one(tail, f"rows-from-{cut}"))

    def _one(self, feed: Feeds, name: str) -> FeedSource:
        return FeedSource(lambda: [feed], self.inputs, self._named(name), 1, self.about, self.synthetic)


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


class Spool:
    """Keep what an iterator gives in a temporary file, so that it can be read again."""

    def __init__(self, source: Iterator[Feeds]) -> None:
        self._source: Iterator[Feeds] | None = source
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="qcompiler-")  # noqa: SIM115  # lives as long as this
        self._kept: list[tuple[int, dict[str, np.dtype[Any]]]] = []
        weakref.finalize(self, self._file.close)

    def __call__(self) -> Iterator[Feeds]:
        """Yield what was kept, then go on with what was not read yet."""
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
