"""Where feeds come from: arrays, callables, iterators, data sets, files and folders."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qcompiler.calibration.arrays import CHUNK, npy_feeds, npz_feeds, onnx_feed
from qcompiler.calibration.feed_source import FeedSource, Split, Spool, validate
from qcompiler.calibration.image_options import ImageOptions, is_image_input, parse_image_options, plan_images
from qcompiler.calibration.images import SUFFIXES, find_images, natural, need_pillow
from qcompiler.calibration.objects import (
    dataset_identity,
    is_dataset,
    is_loader,
    is_shuffled,
    plain_feeds,
    refuse_dataset_dict,
)
from qcompiler.calibration.rows import batch_size, plan_rows, row_feeds
from qcompiler.calibration.source_options import SourceOptions, file_digest
from qcompiler.calibration.synthetic import random_feeds, synthetic_feeds
from qcompiler.calibration.texts import load_tokenizer
from qcompiler.engine import Feeds, TensorInfo
from qcompiler.errors import CalibrationError

__all__ = [
    "CHUNK",
    "FeedSource",
    "ImageOptions",
    "Source",
    "SourceOptions",
    "Split",
    "as_feed_source",
    "load_function",
    "parse_image_options",
    "random_feeds",
    "read_source",
    "synthetic_feeds",
    "validate",
]

Source = str | Path | Iterable[Feeds] | Callable[[], Iterable[Feeds]]
PICTURE = "image"
"""Column of the pictures in a folder."""

_Item = TypeVar("_Item")


def as_feed_source(
    source: Source | FeedSource, inputs: Sequence[TensorInfo], options: SourceOptions | None = None
) -> FeedSource:
    """Make a feed source of whatever a caller hands in.

    Args:
        source: a re-iterable of feeds, a callable that returns an iterator of them, a plain iterator (spooled to a
            temporary file, since calibration reads twice), a Hugging Face data set, a PyTorch data loader (spooled if
            it shuffles), or a path as for `read_source`. A feed is ``{input: array}``, a tuple in the model's order,
            or the bare array for a model of one input.
        inputs: the model's inputs.
        options: how files and rows become feeds.

    Raises:
        CalibrationError: nothing of that kind.
    """
    options = options or SourceOptions()
    if isinstance(source, str | Path):
        return read_source(source, inputs, options)
    made = source if isinstance(source, FeedSource) else _object_source(source, inputs, options)
    return made if options.limit is None else made.limited(options.limit)


def _object_source(source: Any, inputs: Sequence[TensorInfo], options: SourceOptions) -> FeedSource:
    refuse_dataset_dict(source)
    if is_dataset(source):
        mark = dataset_identity(source)
        identity = None if mark is None else lambda: f"{mark}-{options.digest()}"
        return FeedSource(lambda: _feeds_of(source, inputs, options), inputs, identity, about="rows of a data set")
    if callable(source) and not is_loader(source):
        return FeedSource(lambda: _feeds_of(source(), inputs, options), inputs)
    if isinstance(source, Iterator) or (is_loader(source) and is_shuffled(source)):
        # A loader that shuffles gives other batches the next time: some set aside for checking would be among those
        # for ranges.
        return FeedSource(Spool(_feeds_of(source, inputs, options)), inputs)
    if not isinstance(source, Iterable):
        raise CalibrationError(f"cannot read calibration data from a {type(source).__name__}")
    length = 1 if isinstance(source, Mapping) else len(source) if isinstance(source, Sequence) else None
    return FeedSource(lambda: _feeds_of(source, inputs, options), inputs, length=length)


def _feeds_of(source: Any, inputs: Sequence[TensorInfo], options: SourceOptions) -> Iterator[Feeds]:
    """Return the feeds of an object, once."""
    refuse_dataset_dict(source)
    if is_dataset(source):
        return row_feeds(source, inputs, options)
    if isinstance(source, Mapping):
        return plain_feeds([source], inputs)
    if not isinstance(source, Iterable):
        raise CalibrationError(f"cannot read calibration data from a {type(source).__name__}")
    return plain_feeds(source, inputs, extra=is_loader(source))


def read_source(source: str | Path, inputs: Sequence[TensorInfo], options: SourceOptions | None = None) -> FeedSource:
    """Open a source named on the command line; one feed at a time is in memory.

    It is a file: .npz, .npy, .txt (a text per line), .jsonl (a row per line), a picture, ``file.py:function``; or a
    folder: with (or of) ONNX ``test_data_set_*``, of .npz, of .npy (named as inputs, in a folder per sample or not; for
    a model of one input whatever their names), of pictures in any depth, of .txt or .jsonl. The first of these kinds
    that a folder holds is read. How arrays are cut into feeds: `qcompiler.calibration.arrays.cut`; how rows are:
    `qcompiler.calibration.rows.row_feeds`.

    Raises:
        CalibrationError: nothing of that kind is there, or an option or an optional package is missing.
    """
    options = options or SourceOptions()
    text = str(source)
    if (match := re.fullmatch(r"(.+\.py):(\w+)", text)) is not None:
        function = load_function(match[1], match[2])
        return as_feed_source(function, inputs, options)
    path = Path(text)
    if path.is_dir():
        return _folder(path, inputs, options)
    if not path.exists():
        raise CalibrationError(f"cannot read calibration data from {text}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _npz([path], inputs, options)
    if suffix == ".npy":
        return _npy([_npy_names([path], inputs, options)], inputs, options)
    if suffix in SUFFIXES:
        return _pictures([path], inputs, options)
    if suffix in (".txt", ".jsonl"):
        return _lines([path], inputs, options)
    raise CalibrationError(
        f"cannot read calibration data from {text}: expected .npz, .npy, .txt, .jsonl, a picture, a folder, or "
        "file.py:function"
    )


def _folder(path: Path, inputs: Sequence[TensorInfo], options: SourceOptions) -> FeedSource:
    sets = sorted(path.glob("test_data_set_*"), key=natural)
    if not sets and path.name.startswith("test_data_set_"):
        sets = [path]
    if sets:
        files = [f for s in sets for f in sorted(s.glob("input_*.pb"), key=natural)]
        return _limited(
            lambda: (onnx_feed(s, inputs) for s in sets),
            files,
            inputs,
            options,
            length=len(sets),
            about="ONNX test data",
        )
    if files := sorted(path.glob("*.npz"), key=natural):
        return _npz(files, inputs, options)
    if files := sorted(path.glob("*.npy"), key=natural):
        return _npy_folder(files, inputs, options)
    samples = [files for f in sorted(path.iterdir(), key=natural) if f.is_dir() and (files := sorted(f.glob("*.npy")))]
    if samples:
        return _npy([_npy_names(files, inputs, options) for files in _spread(samples, options.limit)], inputs, options)
    if files := find_images(path):
        return _pictures(files, inputs, options)
    if files := sorted((*path.glob("*.txt"), *path.glob("*.jsonl")), key=natural):
        return _lines(files, inputs, options)
    raise CalibrationError(
        f"the folder {path} holds neither test_data_set_* folders nor .npz, .npy, pictures, .txt or .jsonl files"
    )


def _limited(
    start: Callable[[], Iterator[Feeds]],
    files: Sequence[Path],
    inputs: Sequence[TensorInfo],
    options: SourceOptions,
    *,
    length: int | None = None,
    about: str | None = None,
) -> FeedSource:
    """Return the source of what lies in files, cut off at the limit."""
    made = FeedSource(start, inputs, lambda: f"{file_digest(files)}-{options.digest()}", length, about)
    return made if options.limit is None else made.limited(options.limit)


def _spread(items: Sequence[_Item], count: int | None) -> list[_Item]:
    """Return ``count`` items evenly spaced over a sequence, in its order."""
    if count is None or count >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _npz(files: Sequence[Path], inputs: Sequence[TensorInfo], options: SourceOptions) -> FeedSource:
    names, chunk = {column: name for name, column in options.rename.items()}, options.batch or CHUNK

    def start() -> Iterator[Feeds]:
        return itertools.chain.from_iterable(npz_feeds(f, inputs, names, chunk) for f in files)

    return _limited(start, files, inputs, options)


def _npy_folder(files: Sequence[Path], inputs: Sequence[TensorInfo], options: SourceOptions) -> FeedSource:
    known = {options.rename.get(i.name, i.name) for i in inputs}
    if len(inputs) == 1 and not known <= {f.stem for f in files}:
        files = _spread([f for f in files if not f.stem.startswith("label")], options.limit)
        return _npy([{inputs[0].name: f} for f in files], inputs, options)
    return _npy([_npy_names(files, inputs, options)], inputs, options)


def _npy_names(files: Sequence[Path], inputs: Sequence[TensorInfo], options: SourceOptions) -> dict[str, Path]:
    """Return .npy files by input name."""
    if len(inputs) == len(files) == 1:
        return {inputs[0].name: files[0]}
    names = {column: name for name, column in options.rename.items()}
    return {names.get(f.stem, f.stem): f for f in files}


def _npy(samples: Sequence[Mapping[str, Path]], inputs: Sequence[TensorInfo], options: SourceOptions) -> FeedSource:
    chunk = options.batch or CHUNK

    def start() -> Iterator[Feeds]:
        return itertools.chain.from_iterable(npy_feeds(files, inputs, {}, chunk) for files in samples)

    return _limited(start, [f for files in samples for f in files.values()], inputs, options)


def _pictures(files: list[Path], inputs: Sequence[TensorInfo], options: SourceOptions) -> FeedSource:
    """Return the source of pictures; what is wrong with the options shows here, before any is read."""
    need_pillow()
    recipe = plan_rows({PICTURE: files[0]}, inputs, options)
    rows, _ = batch_size(recipe, options)
    chosen = _spread(files, None if options.limit is None else options.limit * rows)
    taker = next(i for cells in recipe for i in cells.inputs if is_image_input(i, options.images))
    about = f"{len(chosen)} of {len(files)} pictures: {plan_images(taker, options.images)}"
    start = partial(row_feeds, [{PICTURE: file} for file in chosen], inputs, options)
    return _limited(start, chosen, inputs, options, length=-(-len(chosen) // rows), about=about)


def _lines(files: Sequence[Path], inputs: Sequence[TensorInfo], options: SourceOptions) -> FeedSource:
    if all(f.suffix.lower() == ".txt" for f in files):
        load_tokenizer(options.tokenizer_file())  # an absent or broken one shows before any text is read
    start = lambda: row_feeds(_line_rows(files, options.text), inputs, options)  # noqa: E731
    return _limited(start, files, inputs, options, about="lines of text")


def _line_rows(files: Sequence[Path], column: str) -> Iterator[dict[str, Any]]:
    """Yield a row per line: a text, or an object of JSON; blank lines are left out."""
    for path in files:
        plain = path.suffix.lower() == ".txt"
        try:
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield {column: line.strip()} if plain else _json_row(line, f"{path}:{number}")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"cannot read {path}: {error}") from error


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"cannot read {where}: {error}") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"cannot read {where}: expected an object, found a {type(row).__name__}")
    return row


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
