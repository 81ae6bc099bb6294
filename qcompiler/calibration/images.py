"""Pictures into arrays: decode, turn upright, resize, crop, normalize; needs Pillow (the ``vision`` extra)."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.image_options import ImagePlan
from qcompiler.engine import Array
from qcompiler.errors import CalibrationError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
)
Pixels = npt.NDArray[np.uint8]


def need_pillow() -> None:
    """Raise the one error that says how to get Pillow, if it is absent.

    Raises:
        CalibrationError: Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise CalibrationError('reading pictures needs Pillow: pip install "qcompiler[vision]"') from error


def natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a sort key under which ``x2`` comes before ``x10``, folder by folder."""
    parts = (re.split(r"(\d+)", part) for part in path.parts)
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for pieces in parts for p in (*pieces, "")]


def find_images(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its subfolders (links followed, each once; hidden names left out), sorted."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [f for f in folders if not f.startswith((".", "__MACOSX"))]
        found += [Path(place, f) for f in files if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
    return sorted(found, key=natural)


def is_picture(value: Any) -> bool:
    """Return whether a cell is a picture: a Pillow image, an undecoded one, or pixels (uint8 HxW or HxWxC)."""
    if isinstance(value, dict):
        return set(value) == {"bytes", "path"}
    if all(hasattr(value, name) for name in ("convert", "mode", "size", "getexif")):
        return True
    return getattr(value, "dtype", None) == np.uint8 and (value.ndim == 2 or (value.ndim == 3 and value.shape[2] <= 4))


def image_array(value: Any, plan: ImagePlan) -> Array:
    """Return a picture in the layout and type of one input, without the batch axis.

    Args:
        value: a path, or a picture as `is_picture` knows it.
        plan: what is done to it.

    Raises:
        CalibrationError: the picture cannot be read; names the file.
    """
    return normalize(fit(_pixels(value, plan.order == "gray"), plan), plan)


def normalize(pixels: Pixels, plan: ImagePlan) -> Array:
    """Return ``(pixel * scale - mean) / std`` in the plan's order, layout and type.

    Args:
        pixels: uint8 [height, width, 3] in rgb, or [height, width, 1].
        plan: the numbers; an integer input is rounded and clipped to its range.
    """
    if plan.order == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, std = np.asarray(plan.mean, np.float32), np.asarray(plan.std, np.float32)
    scaled: Array = (pixels.astype(np.float32) * np.float32(plan.scale) - mean) / std
    if plan.dtype.kind in "iu":
        limits = np.iinfo(plan.dtype)
        scaled = np.clip(np.rint(scaled), limits.min, limits.max)
    letters = plan.layout.replace("N", "")
    if "C" in letters:
        ordered = scaled.transpose(["HWC".index(x) for x in letters])
    else:
        ordered = scaled[:, :, 0].transpose(["HW".index(x) for x in letters])
    return np.ascontiguousarray(ordered, plan.dtype)


def _pixels(value: Any, gray: bool) -> Pixels:
    """Decode a picture: upright, eight bits, without alpha (dropped, as Pillow and torchvision do)."""
    from PIL import Image, ImageOps

    name = str(value) if isinstance(value, str | Path) else "a picture"
    if isinstance(value, dict):
        name = str(value["path"] or name)
        value = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    try:
        if isinstance(value, str | Path | io.BytesIO):
            with Image.open(value) as opened:
                return _eight_bits(ImageOps.exif_transpose(opened), gray, name)
        if hasattr(value, "convert"):
            return _eight_bits(ImageOps.exif_transpose(value), gray, name)
        array = np.asarray(value)
        return _eight_bits(Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array), gray, name)
    except CalibrationError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and their own
        raise CalibrationError(f"cannot read the picture {name}: {error}; remove or mend it") from error


def _eight_bits(image: Image.Image, gray: bool, name: str) -> Pixels:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Sixteen bits a pixel: the high byte, as Pillow itself does where there are colours; convert() would clip.
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return high[:, :, None] if gray else np.repeat(high[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise CalibrationError(f"the picture {name} holds float pixels of no known range; convert it to eight bits")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, transparency in a palette would make Pillow warn
    if gray:
        return np.asarray(image.convert("L"))[:, :, None]
    return np.asarray(image.convert("RGB"))


def fit(pixels: Pixels, plan: ImagePlan) -> Pixels:
    """Resize, crop and pad uint8 [height, width, channels] to the plan's size."""
    size, options = plan.size, plan.options
    if size is None or (options.resize == "auto" and pixels.shape[:2] == size):
        return pixels
    height, width = pixels.shape[:2]
    if options.resize == "exact":
        return _resized(pixels, size, options.interpolation)
    if options.resize == "letterbox":
        ratio = min(size[0] / height, size[1] / width)
        inner = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        return _padded(_resized(pixels, inner, options.interpolation), size, options.pad, options.place)
    # As torchvision: the shorter side is exact, the other one rounded down, the crop's corner rounded to even.
    box = tuple(int(side / options.crop) for side in size)
    if box[0] * width > box[1] * height:
        wanted = (box[0], max(size[1], box[0] * width // height))
    else:
        wanted = (max(size[0], box[1] * height // width), box[1])
    pixels = _resized(pixels, wanted, options.interpolation)
    top, left = (round((have - want) / 2) for have, want in zip(wanted, size, strict=True))
    return pixels[top : top + size[0], left : left + size[1]]


def _resized(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    from PIL import Image

    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    made = np.asarray(image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()]))
    return made[:, :, None] if made.ndim == 2 else made


def _padded(pixels: Pixels, size: tuple[int, int], value: int, place: str) -> Pixels:
    full = np.full((*size, pixels.shape[2]), value, np.uint8)
    spare = [want - have for want, have in zip(size, pixels.shape[:2], strict=True)]
    top, left = (0, 0) if place == "corner" else (spare[0] // 2, spare[1] // 2)
    full[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return full
