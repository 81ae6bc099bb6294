"""Shapes to build for: TensorRT wants a least, a best and a largest length for each open axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcompiler.engine import ShapeRange
from qcompiler.errors import TargetError

MOST = 8
"""How many times its best length an open axis may be, where nothing was said."""
_LENGTH = 64
"""Best length of an open axis that is not the first, where no sample is known."""

Dims = Sequence[int | str | None]


def settle_profiles(
    inputs: Mapping[str, Dims],
    given: Mapping[str, ShapeRange],
    samples: Mapping[str, Sequence[int]] | None = None,
) -> tuple[dict[str, ShapeRange], tuple[str, ...]]:
    """Return a range for each input with open axes, and a note for each that was assumed.

    An axis that nothing was said about is built for 1 to 8 times its best length. That is the sample's; without a
    sample 1 for the first axis, which is the batch, and 64 for another. Axes of one name get one range.

    Args:
        inputs: dimensions of the model's inputs; a name or None is open.
        given: what the user asked for.
        samples: shape of one calibration batch per input.

    Raises:
        TargetError: a given range does not fit the input, or names none.
    """
    for name in given:
        if name not in inputs:
            raise TargetError(
                f"shapes are given for {name!r}, but the model's inputs are {', '.join(inputs) or 'none'}"
            )
    named: dict[str, tuple[int, int, int]] = {}
    for name, wanted in given.items():
        _check(name, inputs[name], wanted)
        for dim, low, best, high in zip(inputs[name], wanted.least, wanted.best, wanted.most, strict=True):
            if isinstance(dim, str):
                named.setdefault(dim, (low, best, high))
    found, notes = {}, []
    for name, dims in inputs.items():
        if not any(_open(dim) for dim in dims):
            continue
        if name in given:
            found[name] = given[name]
            continue
        found[name] = _assumed(dims, (samples or {}).get(name), named)
        notes.append(f"{name} was built for the shapes {shape_text(found[name])}; give --shapes {name}:... for others")
    return found, tuple(notes)


def _open(dim: int | str | None) -> bool:
    return not isinstance(dim, int) or dim < 0


def _assumed(dims: Dims, sample: Sequence[int] | None, named: dict[str, tuple[int, int, int]]) -> ShapeRange:
    ranges = []
    for axis, dim in enumerate(dims):
        if isinstance(dim, int) and dim >= 0:
            ranges.append((dim, dim, dim))
            continue
        fits = sample is not None and len(sample) == len(dims)
        best = max(1, sample[axis]) if fits and sample is not None else 1 if axis == 0 else _LENGTH
        made = (1, best, MOST * best)
        ranges.append(named.setdefault(dim, made) if isinstance(dim, str) else made)
    least, most_likely, most = zip(*ranges, strict=True)
    return ShapeRange(tuple(least), tuple(most_likely), tuple(most))


def _check(name: str, dims: Dims, wanted: ShapeRange) -> None:
    text = "x".join(str(d) if isinstance(d, int) else "?" if d is None else d for d in dims)
    if not len(wanted.least) == len(wanted.best) == len(wanted.most) == len(dims):
        raise TargetError(f"the shapes {shape_text(wanted)} of {name} do not fit: the model declares {text}")
    for dim, low, best, high in zip(dims, wanted.least, wanted.best, wanted.most, strict=True):
        if not 0 <= low <= best <= high:
            raise TargetError(f"the shapes {shape_text(wanted)} of {name} do not grow: expected least <= best <= most")
        if isinstance(dim, int) and dim >= 0 and (low, high) != (dim, dim):
            raise TargetError(f"the shapes {shape_text(wanted)} of {name} do not fit: the model declares {text}")


def shape_text(shapes: ShapeRange) -> str:
    """Return ``1x3x224x224..8x3x224x224``, with the best in the middle where it is neither end."""
    least, best, most = ("x".join(map(str, s)) for s in (shapes.least, shapes.best, shapes.most))
    ends = [least] if least == most else [least, most] if best in (least, most) else [least, best, most]
    return "..".join(ends)
