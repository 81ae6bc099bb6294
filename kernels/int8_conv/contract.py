"""Contract of ``int8_conv``: out[n, p, q, o] = epilogue(sum_rsc x[n, h, w, c] * w[o, r, s, c] + offset[o]).

h = p * stride_h + r * dilation_h - pad_top, and w likewise. Outside the picture ``x`` is its zero point, the number
that stands for the real 0 with which ONNX pads, so ``offset[o] = bias[o] - zero point * sum_rsc w[o, r, s, c]`` is
right at the border, too. ``pad zero`` is for a zero point of 0 (the copies fill it in), ``pad point`` for any other (it
costs a pass through registers), ``pad none`` for pictures that are not padded: no border is checked.

Tensors in u8 are kept as s8 with a zero point less 128, as for ``int8_matmul``. Layouts:

- ``x`` and ``out`` are NHWC, with any stride per picture, row and pixel for ``x``; pixels of ``out`` and ``residual``
  lie at one distance from each other, which may be longer than O (a slice of the channels of a wider tensor);
- ``w`` is [O, R, S, D] without gaps, D = C / group, or more, zeros behind C / group. The fast variant needs
  C / group and D to be multiples of 16;
- ``kind depthwise`` (a group per channel of x, O a multiple of C) has weights [R, S, O] in ``w_rso``, and no matrix
  units;
- convolutions of one dimension have H = R = 1.

The sum is exact in int32 up to R * S * C / group = 65793 with any zero point, as in ``int8_matmul``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument, Choice, Contract, Dims, Options, Traffic, operands_only
from qcompiler.kernels.epilogue.contract import EPILOGUE_CHOICES, EPILOGUE_SCALARS, RESIDUAL_DTYPES, epilogue_rule
from qcompiler.kernels.operand import ITEMSIZE, Operand, describe, strides

MOST_TERMS = 65793
"""Greatest R * S * C / group for which the sum fits int32."""

GEOMETRY: Mapping[str, int] = {
    "stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1,
    "pad_top": 0, "pad_left": 0, "pad_bottom": 0, "pad_right": 0,
}  # fmt: skip
"""The scalars that say where a window lies, with the least value of each."""


@dataclass(frozen=True)
class ConvContract(Contract):
    """A contract whose output's shape and traffic follow from numbers, not from shapes alone.

    Attributes:
        most_terms: greatest length of a sum; 0 for any.
    """

    most_terms: int = 0

    def check(self, given: Mapping[str, Any], options: Options) -> dict[str, int]:
        """Check a call; return the length of each axis, with P and Q also where ``out`` is left out.

        Raises:
            TargetError: as `Contract.check`; or the geometry does not fit the shapes.
        """
        dims = super().check(given, options)
        for name, least in GEOMETRY.items():
            if int(given[name]) < least:
                raise TargetError(f"{self.name}: {name} must be at least {least}; found {given[name]}")
        self._check_channels(dims, int(given.get("group", 1)), options)
        for picture, window, out, ends, letter in (
            ("H", "R", "P", "top bottom", "h"),
            ("W", "S", "Q", "left right", "w"),
        ):
            begin, end = (int(given[f"pad_{side}"]) for side in ends.split())
            if options["pad"] == "none" and (begin or end):
                raise TargetError(f"{self.name}: pad none is for pictures without padding; found {begin} and {end}")
            reach = (dims[window] - 1) * int(given[f"dilation_{letter}"]) + 1
            expected = (dims[picture] + begin + end - reach) // int(given[f"stride_{letter}"]) + 1
            if expected < 1 or dims.setdefault(out, expected) != expected:
                raise TargetError(f"{self.name}: out must have {out} = {expected}, at least 1; found {dims.get(out)}")
        for name in ("w", "w_rso"):
            if name in given and not _without_gaps(given[name], 0):
                raise TargetError(f"{self.name}: {name} must have no gaps; found strides {strides(given[name])}")
        for name in ("out", "residual"):
            if name in given and not _without_gaps(given[name], 1):
                raise TargetError(
                    f"{self.name}: pixels of {name} must lie at one distance; found {strides(given[name])}"
                )
        return dims

    def _check_channels(self, dims: Dims, group: int, options: Options) -> None:
        channels, columns = dims["C"], dims["O"]
        if options["kind"] == "depthwise":
            if columns % channels:
                raise TargetError(f"{self.name}: depthwise needs O a multiple of C = {channels}; found O = {columns}")
            terms = dims["R"] * dims["S"]
        else:
            if group < 1 or channels % group or columns % group or dims["D"] * group < channels:
                raise TargetError(
                    f"{self.name}: {group} groups must divide C = {channels} and O = {columns}, and w must have "
                    f"D >= C / group; found D = {dims['D']}"
                )
            terms = dims["R"] * dims["S"] * channels // group
        if 0 < self.most_terms < terms:
            raise TargetError(f"{self.name}: the sum fits int32 up to {self.most_terms} terms; found {terms}")

    def example_scalars(self, options: Options) -> dict[str, int | float]:
        """Return numbers for calls that are only compiled: a stride of 1, padding that keeps 3 x 3 the same size."""
        padding = 0 if options["pad"] == "none" else 1
        known = {name: padding if name.startswith("pad") else 1 for name in GEOMETRY}
        groups = {"group": 1} if options["kind"] == "dense" else {}
        return {**super().example_scalars(options), **known, **groups}

    def requests(self, operands: Mapping[str, Any], options: Options, config: Config) -> Traffic:
        """Return the exact bytes that a launch asks for and the multiply-adds that it issues.

        Args:
            operands: all tensors of the call, and its geometry (a number that is missing has its least value).
            options: complete.
            config: of the launch.
        """
        known = {name: describe(t) for name, t in operands_only(operands).items()}
        dims = self.dims(known, options)
        group, size = int(operands.get("group", 1)), ITEMSIZE[known["x"].dtype]
        pixels = dims["N"] * dims["P"] * dims["Q"]
        rows, columns = -(-pixels // config["BLOCK_M"]), dims["O"] // group
        taken = dims["N"] * valid_taps(operands, dims, options)
        macs = 0
        if options["kind"] == "depthwise":
            read = size * (taken * columns + rows * dims["R"] * dims["S"] * columns)
        else:
            depth = dims["R"] * dims["S"] * dims["D"]
            tiles_n = -(-columns // config["BLOCK_N"])
            read = size * (taken * (dims["C"] // group) * tiles_n + rows * columns * depth)
            steps = -(-depth // config["BLOCK_K"])
            macs = rows * config["BLOCK_M"] * tiles_n * config["BLOCK_N"] * steps * config["BLOCK_K"] * group
        read += 4 * columns * rows * sum(options.get(o) == "channel" for o in ("multiplier", "offset"))
        if options["bias"] == "channel":
            read += ITEMSIZE[known["bias"].dtype] * columns * rows
        if options["residual"] != "none":
            read += pixels * columns * ITEMSIZE[known["residual"].dtype]
        return Traffic(read * group, pixels * dims["O"] * ITEMSIZE[options["out"]], macs)


def _without_gaps(tensor: Any, kept: int) -> bool:
    """Return whether the axes, all but the last ``kept``, lie one behind the other as if they were one."""
    shape, steps = describe(tensor).shape, strides(tensor)
    step = steps[-1 - kept] if kept else 1
    for length, found in list(zip(shape, steps, strict=True))[: len(shape) - kept][::-1]:
        if length > 1 and found != step:
            return False
        step *= length
    return True


def valid_taps(geometry: Mapping[str, Any], dims: Dims, options: Options) -> int:
    """Return how many pairs of an output's pixel and a tap of its window lie inside one picture."""
    return int(
        _inside(geometry, dims, "H", "R", "P", "top", "h").sum()
        * _inside(geometry, dims, "W", "S", "Q", "left", "w").sum()
    )


def _inside(
    geometry: Mapping[str, Any], dims: Dims, picture: str, window: str, out: str, side: str, letter: str
) -> npt.NDArray[np.bool_]:
    numbers = {**GEOMETRY, **geometry}
    start = np.arange(dims[out]) * int(numbers[f"stride_{letter}"]) - int(numbers[f"pad_{side}"])
    place = start[:, None] + np.arange(dims[window]) * int(numbers[f"dilation_{letter}"])
    return np.asarray((place >= 0) & (place < dims[picture]))


def conv_macs(dims: Dims, options: Options) -> int:
    """Return the multiply-adds of a convolution."""
    terms = 1 if options["kind"] == "depthwise" else dims["D"]
    return math.prod(dims[d] for d in "NPQORS") * terms


def refuse_requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    """Raise `TargetError`: `ConvContract.requests` knows."""
    raise TargetError(f"the requests of {contract.name} follow from its geometry; ask the contract with all arguments")


def _plain_rule(dims: Dims, options: Options) -> str | None:
    if (options["out"] == "int32") != (options["multiplier"] == "none"):
        return f"out int32 has multiplier none, others have one; found {options['out']}, {options['multiplier']}"
    return None


CONTRACT = ConvContract(
    name="int8_conv",
    purpose="s8 x s8 convolution in NHWC with padding by the zero point, groups, scales and a fused epilogue",
    arguments=(
        Argument("x", ("int8",), ("N", "H", "W", "C"), why="activations"),
        Argument("w", ("int8",), ("O", "R", "S", "D"), when=("kind", ("dense",)), why="weights"),
        Argument("w_rso", ("int8",), ("R", "S", "O"), when=("kind", ("depthwise",)), why="weights of one channel each"),
        Argument(
            "multiplier", ("float32",), ("O",), when=("multiplier", ("channel",)), why="scale per step of the sum"
        ),
        Argument("scale", ("float32",), role="scalar", when=("multiplier", ("scalar",)), why="the same for all"),
        Argument("offset", ("int32",), ("O",), when=("offset", ("channel",)), why="zero-point term and int32 bias"),
        Argument("x_zero", ("int32",), role="scalar", when=("pad", ("point",)), why="zero point of x, for the border"),
        Argument("bias", ("float32", "float16"), ("O",), when=("bias", ("channel",)), why="float bias"),
        Argument(
            "residual", RESIDUAL_DTYPES, ("N", "P", "Q", "O"), when=("residual", ("before", "after")), why="to add"
        ),
        Argument("group", ("int32",), role="scalar", when=("kind", ("dense",)), why="groups of channels"),
        *(Argument(name, ("int32",), role="scalar", why=f"geometry, at least {n}") for name, n in GEOMETRY.items()),
        *EPILOGUE_SCALARS,
        Argument("out", (), ("N", "P", "Q", "O"), role="output", dtype_of="out", why="result"),
    ),
    choices=(
        Choice("kind", ("dense", "depthwise"), "dense, also in groups, or one channel for each output"),
        Choice("pad", ("point", "zero", "none"), "what lies outside the picture: x_zero, 0, or nothing does"),
        Choice("multiplier", ("channel", "scalar", "none"), "float32 factor of the sum; none for out int32 only"),
        Choice("offset", ("none", "channel"), "int32 added to the sum"),
        *EPILOGUE_CHOICES,
        Choice("out", ("int8", "uint8", "float16", "bfloat16", "float32", "int32"), "dtype of out"),
    ),
    macs_rule=conv_macs,
    requests_rule=refuse_requests,
    rules=(_plain_rule, epilogue_rule),
    most_terms=MOST_TERMS,
)
