"""Rows into feeds: datasets, lines of text and pictures, a column per input, as many rows as the model's batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.calibration.image_options import is_image_input, plan_images
from qcompiler.calibration.images import image_array, is_picture, need_pillow
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.texts import IDS, MASK, POSITIONS, ROLES, TextEncoder, text_role
from qcompiler.engine import Array, Feeds, TensorInfo
from qcompiler.errors import CalibrationError

Row = Mapping[str, Any]
BATCH = 8
"""Rows per feed where the model leaves its batch axis open and the user does not say."""


@dataclass(frozen=True)
class Cells:
    """How one input is made of the rows of a batch.

    Attributes:
        inputs: the inputs that this makes.
        make: rows to one array per input.
        whole: each row is a whole feed, batch axis included (or the input has none).
        padded: rows may differ in length without harm.
    """

    inputs: tuple[TensorInfo, ...]
    make: Callable[[Sequence[Row]], Feeds]
    whole: bool = False
    padded: bool = True


def as_array(value: Any) -> Array:
    """Return an array of whatever stands for one: lists, NumPy, and tensors of torch and its kind."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16 of torch's; float32 holds every one of its numbers.
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def row_feeds(rows: Iterable[Row], inputs: Sequence[TensorInfo], options: SourceOptions) -> Iterator[Feeds]:
    """Yield feeds of rows; one batch of rows is alive at a time.

    A column goes to the input of its name (or as ``options.rename`` says). Pictures and texts, by the kind of the cell,
    go to the image-like input and to the inputs that `text_columns` finds. Other columns are left out. Where the
    model's batch is fixed, the last feed repeats rows of the one before (or the rows there are, in turn).

    Raises:
        CalibrationError: an input that no column fits, or cells that do not fit together.
    """
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        return
    if not isinstance(first, Mapping):
        raise CalibrationError(f"a row of the calibration data is a {type(first).__name__}; expected a dict of columns")
    recipe = plan_rows(first, inputs, options)
    size, fixed = batch_size(recipe, options)
    before: list[Row] = []
    for read in _batches(itertools.chain([first], stream), size):
        batch = read
        if fixed and len(read) < size:
            batch = (before + read)[-size:] if before else list(itertools.islice(itertools.cycle(read), size))
        yield _filled({n: a for cells in recipe for n, a in cells.make(batch).items()}, inputs, options, len(batch))
        before = batch


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def plan_rows(first: Row, inputs: Sequence[TensorInfo], options: SourceOptions) -> list[Cells]:
    """Decide which columns make which inputs, by the first row.

    Raises:
        CalibrationError: an input that no column fits.
    """
    recipe: list[Cells] = []
    left = []
    for info in inputs:
        column = options.rename.get(info.name, info.name)
        if column not in first:
            left.append(info)
        elif is_picture(first[column]) and is_image_input(info, options.images):
            recipe.append(picture_cells(info, column, options))
        elif not isinstance(first[column], str | Path) or info.dtype.kind == "O":
            recipe.append(_array_cells(info, column, first, options))
        else:
            left.append(info)
    recipe += _picture_column(first, left, options)
    done = {i.name for cells in recipe for i in cells.inputs}
    left = [i for i in left if i.name not in done]
    if left and isinstance(first.get(options.text), str):
        cells = text_cells(inputs, left, options)
        recipe += [cells] if cells.inputs else []
        left = [i for i in left if i not in cells.inputs]
    missing = [i.name for i in left if i.name not in options.values]
    if missing:
        raise CalibrationError(
            f"the calibration data has the columns {', '.join(first)}; the model's input {missing[0]!r} takes none of "
            "them; name its column (--data rename.INPUT=COLUMN) or fill it with a number (--data values.INPUT=NUMBER)"
        )
    return recipe


def _picture_column(first: Row, left: Sequence[TensorInfo], options: SourceOptions) -> list[Cells]:
    """Return the one input that takes pictures with the one column that holds them."""
    columns = [name for name, value in first.items() if is_picture(value)]
    columns += [name for name, value in first.items() if isinstance(value, Path)]
    named = [i for i in left if options.rename.get(i.name) in columns]
    takers = named or [i for i in left if is_image_input(i, options.images) and i.name not in options.values]
    if not columns or not takers:
        return []
    if len(takers) > 1 or (len(columns) > 1 and not named):
        raise CalibrationError(
            f"which pictures go where is not clear: columns {', '.join(columns)}, inputs "
            f"{', '.join(i.name for i in takers)}; name the column of each input (--data rename.INPUT=COLUMN)"
        )
    return [picture_cells(takers[0], options.rename[takers[0].name] if named else columns[0], options)]


def picture_cells(info: TensorInfo, column: str, options: SourceOptions) -> Cells:
    """Return how pictures become one input."""
    need_pillow()
    plan = plan_images(info, options.images)
    where = plan.layout.find("N")

    def make(rows: Sequence[Row]) -> Feeds:
        arrays = [image_array(row[column], plan) for row in rows]
        if len({a.shape for a in arrays}) > 1:
            raise CalibrationError(
                f"pictures of one batch differ in size ({column}); give --data batch=1 or --image size=224"
            )
        return {info.name: arrays[0] if where < 0 else np.stack(arrays, axis=where)}

    return Cells((info,), make, whole=where < 0)


def text_cells(inputs: Sequence[TensorInfo], left: Sequence[TensorInfo], options: SourceOptions) -> Cells:
    """Return how texts become the inputs that nothing else makes."""
    open_inputs = [i for i in left if i.name not in options.values]
    encoder = TextEncoder(options.tokenizer_file(), open_inputs, options.rename, options.sequence)
    made = tuple(i for i in open_inputs if i.name in encoder.columns)
    whole = any(i.shape is not None and len(i.shape) == 1 for i in made)

    def make(rows: Sequence[Row]) -> Feeds:
        feed = encoder.encode([row[options.text] for row in rows])
        return {name: array[0] for name, array in feed.items()} if whole else feed

    # Padding of which the model is not told would be data to it: there, a feed is one row of its own length.
    return Cells(made, make, whole, encoder.length is not None or MASK in encoder.columns.values())


def _array_cells(info: TensorInfo, column: str, first: Row, options: SourceOptions) -> Cells:
    rank = None if info.shape is None else len(info.shape)
    whole = rank is None or as_array(first[column]).ndim == rank
    role = text_role(column) if info.dtype.kind in "iu" or text_role(column) == MASK else None
    length = None
    if role in ROLES and rank == 2 and info.shape is not None:
        own = info.shape[1]
        length = own if isinstance(own, int) else options.sequence

    def make(rows: Sequence[Row]) -> Feeds:
        arrays = [as_array(row[column]) for row in rows]
        if whole:
            return {info.name: _as_type(arrays[0], info)}
        if role in ROLES and rank == 2:
            arrays = _even(arrays, role, length)
        shapes = sorted({a.shape for a in arrays})
        if len(shapes) > 1:
            raise CalibrationError(
                f"rows of one batch differ in shape in the column {column!r}: {list(shapes[0])}, {list(shapes[-1])}; "
                "give --data batch=1, or pad them"
            )
        return {info.name: _as_type(np.stack(arrays), info)}

    return Cells((info,), make, whole, role != IDS or length is not None)


def _as_type(array: Array, info: TensorInfo) -> Array:
    """Give numbers out of Python lists, which have no type of their own, the input's type."""
    if (array.dtype == np.float64 and info.dtype.kind in "fV") or (array.dtype == np.int64 and info.dtype.kind in "fV"):
        return array.astype(info.dtype)
    return array


def _even(arrays: Sequence[Array], role: str, length: int | None) -> list[Array]:
    """Bring rows of tokens to one length: zeros behind (positions go on counting), cut at a length that is given."""
    longest = length if length is not None else max(len(a) for a in arrays)
    made = []
    for array in arrays:
        spare = max(0, longest - len(array))
        if role == POSITIONS and len(array):
            behind = np.arange(1, spare + 1, dtype=array.dtype) + array[-1]
        else:
            behind = np.zeros(spare, array.dtype)
        made.append(np.concatenate([array[:longest], behind]))
    return made


def batch_size(recipe: Sequence[Cells], options: SourceOptions) -> tuple[int, bool]:
    """Return the rows per feed, and whether every feed needs as many.

    Raises:
        CalibrationError: the option batch is not the model's fixed batch.
    """
    whole = any(cells.whole for cells in recipe)
    fixed = [
        info.shape[0]
        for cells in recipe
        for info in cells.inputs
        if info.shape and isinstance(info.shape[0], int) and not cells.whole
    ]
    if whole or fixed:
        size = 1 if whole else max(1, fixed[0])
        if options.batch not in (None, size):
            raise CalibrationError(f"the option batch is {options.batch}; the model's batch is fixed at {size}")
        return size, True
    columns = [options.rename.get(info.name, info.name) for cells in recipe for info in cells.inputs]
    masked = MASK in map(text_role, columns)
    even = masked or all(cells.padded for cells in recipe)
    return options.batch or (BATCH if even else 1), False


def _filled(feed: Feeds, inputs: Sequence[TensorInfo], options: SourceOptions, rows: int) -> Feeds:
    """Add the inputs that one number fills: open axes have length 1, an open first axis that of the batch."""
    return {**{i.name: filling(i, options.values[i.name], rows) for i in inputs if i.name in options.values}, **feed}


def filling(info: TensorInfo, value: float, rows: int = 1) -> Array:
    """Return one number in the shape and type of an input.

    Raises:
        CalibrationError: the number does not fit the type.
    """
    shape = [d if isinstance(d, int) else rows if axis == 0 else 1 for axis, d in enumerate(info.shape or ())]
    full = np.full(shape, value)
    if info.dtype.kind in "iub" and not np.array_equal(full, full.astype(info.dtype)):
        raise CalibrationError(f"input {info.name!r} of {info.dtype} cannot hold {value:g}")
    return full.astype(info.dtype)
