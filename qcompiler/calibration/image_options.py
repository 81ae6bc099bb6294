"""What is done to a picture before a model sees it: options, a small TOML, and defaults from the model's input."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError

RESIZES = ("auto", "shorter", "exact", "letterbox", "none")
ORDERS = ("rgb", "bgr", "gray")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
PLACES = ("centre", "corner")
PIXEL = 1 / 255
"""Scale that takes a pixel to 0..1."""


@dataclass(frozen=True)
class ImageOptions:
    """How a picture is treated: resize, crop, order, ``(pixel * scale - mean) / std``, layout; the type is the model's.

    Attributes:
        size: (height, width); by default the model's.
        resize: ``shorter`` fits the shorter side (times 1 / ``crop``) and crops the centre, ``exact`` stretches,
            ``letterbox`` fits the longer side and pads, ``none`` takes pictures as they are, ``auto`` is ``none`` for
            a picture of the right size and ``shorter`` for others.
        crop: share of the resized shorter side that the centre crop keeps (0.875 is 224 of 256).
        interpolation: nearest, bilinear, bicubic or lanczos.
        place: where a letterbox puts the picture, ``centre`` or ``corner`` (top left).
        pad: what a letterbox pads with, 0 to 255 before scaling.
        layout: letters of the axes, such as NCHW or NHWC; by default read off the model's input.
        order: rgb, bgr or gray; by default by the model's number of channels.
        scale: multiplies the pixel (0 to 255); 1/255 by default, 1 for an integer input.
        mean: subtracted behind the scale, one number or one per channel; 0 by default, 128 for an int8 input.
        std: divides behind the mean, one number or one per channel; 1 by default.
    """

    size: tuple[int, int] | None = None
    resize: str = "auto"
    crop: float = 0.875
    interpolation: str = "bilinear"
    place: str = "centre"
    pad: int = 114
    layout: str | None = None
    order: str | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _one_of("resize", self.resize, RESIZES)
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _one_of("place", self.place, PLACES)
        if self.order is not None:
            _one_of("order", self.order, ORDERS)
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise CalibrationError(f"the image option size is {list(self.size)}; expected height and width in pixels")
        if not 0 < self.crop <= 1:
            raise CalibrationError(f"the image option crop is {self.crop:g}; expected a share above 0, up to 1")
        if not 0 <= self.pad <= 255:
            raise CalibrationError(f"the image option pad is {self.pad}; expected 0 to 255")
        if self.std is not None and 0 in self.std:
            raise CalibrationError("the image option std holds 0; expected numbers to divide by")
        letters = self.layout
        if letters is not None and (len(set(letters)) != len(letters) or not set("HW") <= set(letters) <= set("NCHW")):
            raise CalibrationError(f"the image option layout is {letters!r}; expected letters of NCHW, like NHWC")


def _one_of(name: str, text: str, known: Sequence[str]) -> None:
    if text not in known:
        raise CalibrationError(f"the image option {name} is {text!r}; expected {', '.join(known)}")


def parse_image_options(text: str, name: str = "the image options") -> ImageOptions:
    """Read options from TOML: keys are the fields of `ImageOptions`; ``size`` and ``std`` may be one number.

    Args:
        text: the TOML.
        name: what errors call it, such as the path of the file.

    Raises:
        CalibrationError: no TOML, an unknown key, or a value of another type.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CalibrationError(f"cannot read {name}: {error}") from error
    known = [f.name for f in fields(ImageOptions)]
    for key in data:
        if key not in known:
            raise CalibrationError(f"{name}: unknown key {key!r}; expected {', '.join(known)}")
    return ImageOptions(**{key: _typed(key, value, name) for key, value in data.items()})


def _typed(key: str, value: Any, name: str) -> Any:
    """Return a TOML value in the field's type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in ("resize", "interpolation", "place", "order", "layout"):
        fits, expected = isinstance(value, str), "text"
    elif key in ("crop", "scale"):
        fits, expected = number, "a number"
    elif key == "pad":
        fits, expected = number and isinstance(value, int), "a whole number"
    else:
        listed = value if isinstance(value, list) else [value] * (2 if key == "size" else 1)
        kind: Any = int if key == "size" else int | float
        fits = bool(listed) and all(isinstance(v, kind) and not isinstance(v, bool) for v in listed)
        if fits:
            return tuple(listed)
        expected = "numbers"
    if not fits:
        raise CalibrationError(f"{name}: {key} is {value!r}; expected {expected}")
    return value


@dataclass(frozen=True)
class ImagePlan:
    """Options with every default filled in for one input.

    Attributes:
        size: (height, width), or None for pictures as they are.
        layout: letters of the input's axes.
        order: rgb, bgr or gray.
        scale: multiplies the pixel.
        mean: float32 [1] or [channels].
        std: float32 [1] or [channels].
        dtype: type of the input.
        options: the rest (how to resize).
        assumed: what neither the model nor the user said.
    """

    size: tuple[int, int] | None
    layout: str
    order: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: np.dtype[Any]
    options: ImageOptions
    assumed: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Return the number of channels."""
        return 1 if self.order == "gray" else 3

    def __str__(self) -> str:
        size = "own size" if self.size is None else f"{self.size[0]}x{self.size[1]}"
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        scale = "1/255" if self.scale == PIXEL else f"{self.scale:g}"
        text = f"{size} ({self.options.resize}), {self.order}, {self.layout}, scale {scale}, mean {mean}, std {std}"
        return text + (f"; assumed: {', '.join(self.assumed)}" if self.assumed else "")


def is_image_input(info: TensorInfo, options: ImageOptions | None = None) -> bool:
    """Return whether pictures fit an input: numbers, with a layout that is given or can be read off the shape."""
    if info.dtype.kind not in "fViu":
        return False
    if options is not None and options.layout is not None:
        return info.shape is None or len(info.shape) == len(options.layout)
    return image_layout(info) is not None


def image_layout(info: TensorInfo) -> str | None:
    """Read NCHW or NHWC off the shape of an input of rank 4: the axis of 1 or 3, or the one that is named so.

    An input that leaves both axes open counts as NCHW, ONNX's own order. None if neither fits.
    """
    shape = info.shape
    if shape is None or len(shape) != 4:
        return None
    first, last = (_is_channel(shape[axis]) for axis in (1, 3))
    if first is not False and (first or last is not True):
        return "NCHW"
    return "NHWC" if last else None


def _is_channel(dim: int | str | None) -> bool | None:
    """Return whether an axis is the channels; None if nothing speaks for or against it."""
    if isinstance(dim, int):
        return dim in (1, 3)
    name = (dim or "").lower()
    if "channel" in name or name == "c":
        return True
    return False if any(word in name for word in ("height", "width")) or name in ("h", "w") else None


def plan_images(info: TensorInfo, options: ImageOptions) -> ImagePlan:
    """Fill in every default from the model's input.

    Raises:
        CalibrationError: the input takes no pictures, or the model leaves something open that has no default.
    """
    where = f"input {info.name!r}"
    layout = options.layout or image_layout(info)
    if layout is None or (info.shape is not None and len(info.shape) != len(layout)) or info.dtype.kind not in "fViu":
        wanted = f"{info.dtype}{list(info.shape or ())}"
        raise CalibrationError(f"{where} of {wanted} takes no pictures of layout {layout or 'NCHW or NHWC'}")
    dims: Mapping[str, int | str | None] = (
        dict.fromkeys(layout) if info.shape is None else dict(zip(layout, info.shape, strict=True))
    )
    assumed = []
    channels = dims.get("C", 1)
    order = options.order
    if order is None:
        if isinstance(channels, int) and channels not in (1, 3):
            raise CalibrationError(f"{where} has {channels} channels; pictures have 1 or 3")
        order = "gray" if channels == 1 else "rgb"
        if order == "rgb":
            assumed.append("order rgb")
    elif isinstance(channels, int) and channels != (1 if order == "gray" else 3):
        raise CalibrationError(f"{where} has {channels} channels; the image option order {order} does not fit")
    if options.scale is None and options.mean is None and options.std is None and info.dtype.kind in "fV":
        assumed.append("scale 1/255 without mean and std")
    count = 1 if order == "gray" else 3
    zero = 128.0 if info.dtype == np.int8 else 0.0
    scale = options.scale if options.scale is not None else PIXEL if info.dtype.kind in "fV" else 1.0
    mean, std = options.mean or (zero,), options.std or (1.0,)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, count):
            raise CalibrationError(f"the image option {name} has {len(values)} numbers; {where} has {count} channels")
    size = _size(dims, options, where)
    return ImagePlan(size, layout, order, scale, mean, std, info.dtype, options, tuple(assumed))


def _size(dims: Mapping[str, int | str | None], options: ImageOptions, where: str) -> tuple[int, int] | None:
    """Return (height, width) from the options and the model, None for pictures as they are."""
    if options.resize == "none":
        return None
    found = []
    for axis, given in zip("HW", options.size or (None, None), strict=True):
        own = dims.get(axis)
        if isinstance(own, int) and given is not None and given != own:
            raise CalibrationError(f"{where} has {axis} = {own}; the image option size says {given}")
        length = own if isinstance(own, int) else given
        if length is None:
            raise CalibrationError(
                f"{where} leaves height or width open; give the image option size (--image size=224)"
            )
        found.append(length)
    return found[0], found[1]
