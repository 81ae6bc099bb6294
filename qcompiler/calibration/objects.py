"""Python objects as sources: data sets and loaders, known by what they have; neither datasets nor torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.calibration.rows import as_array
from qcompiler.engine import Feeds, TensorInfo
from qcompiler.errors import CalibrationError


def is_dataset(source: object) -> bool:
    """Return whether an object is a ``datasets.Dataset`` or ``IterableDataset``: rows with named columns."""
    return all(hasattr(source, name) for name in ("column_names", "features", "map")) and isinstance(source, Iterable)


def refuse_dataset_dict(source: object) -> None:
    """Refuse a ``datasets.DatasetDict``: which split to read is the user's choice.

    Raises:
        CalibrationError: it is one.
    """
    if isinstance(source, Mapping) and source and all(is_dataset(part) for part in source.values()):
        names = ", ".join(map(str, source))
        raise CalibrationError(f"the calibration data is a dict of data sets; give one of them: {names}")


def dataset_identity(source: object) -> str | None:
    """Return what stands for a data set's contents (its fingerprint), if it has one."""
    mark = getattr(source, "_fingerprint", None)
    return mark if isinstance(mark, str) else None


def is_loader(source: object) -> bool:
    """Return whether an object loads batches as ``torch.utils.data.DataLoader`` does."""
    return all(hasattr(source, name) for name in ("dataset", "batch_size", "collate_fn"))


def is_shuffled(source: object) -> bool:
    """Return whether a loader may give its batches in another order the next time."""
    sampler = getattr(source, "sampler", None)
    inner = getattr(getattr(source, "batch_sampler", None), "sampler", sampler)
    return type(inner).__name__ not in ("SequentialSampler", "_InfiniteConstantSampler", "NoneType")


def plain_feeds(source: Iterable[Any], inputs: Sequence[TensorInfo], *, extra: bool = False) -> Iterator[Feeds]:
    """Yield feeds of dicts, of tuples in the model's order, or of the bare array for a model of one input.

    Args:
        source: what a user hands in; arrays may be tensors of another library.
        inputs: the model's inputs.
        extra: leave out what the model has no input for (labels), as a loader gives them.
    """
    known = [i.name for i in inputs]
    for item in source:
        feed = _named(item, known)
        yield {n: v for n, v in feed.items() if n in known} if extra and isinstance(feed, Mapping) else feed


def _named(item: Any, known: Sequence[str]) -> Any:
    if isinstance(item, Mapping):
        return {name: _plain(value) for name, value in item.items()}
    if isinstance(item, tuple | list) and len(item) >= len(known) and all(hasattr(v, "__array__") for v in item):
        # Labels come behind the inputs.
        return {name: _plain(value) for name, value in zip(known, item, strict=False)}
    if hasattr(item, "__array__") and len(known) == 1:
        return {known[0]: _plain(item)}
    return item  # validation says what is wrong with it


def _plain(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) or not hasattr(value, "__array__") else as_array(value)
