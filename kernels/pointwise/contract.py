"""Contract of ``pointwise``: out = quantize(activation((a op b) third c)), element by element, or out = table[x].

Every operand stands for (stored - zero) * scale; floats are given with scale 1 and zero 0. ``op``:

- ``add``, ``sub``, ``mul`` of ``a`` and ``b``; ``third`` adds or multiplies by one more;
- ``convert`` of ``a`` alone: QuantizeLinear, DequantizeLinear, or one scale to another, with an activation if wanted;
- ``table``: one of 256 entries for every number of ``x``, entry 0 for the least; what any function of one s8 or u8
  tensor becomes. Entries have the output's dtype.

``arithmetic`` is that of all numbers before they are rounded to 8 bits, ties to even:

- ``float32``: as ONNX computes DequantizeLinear, the operators and QuantizeLinear one by one, bit for bit, the quotient
  by the output's scale an IEEE division;
- ``fast``: the same with a product by 1 / scale. It differs by at most one step, where the quotient lies within a few
  2**-24 of its size of a tie;
- ``float64``: one rounding, for s8 and u8 outputs and piecewise linear activations.

ONNX Runtime's QLinearAdd adds the zero point before it rounds, and QLinearMul multiplies scales first: they differ from
``float32`` by one step at ties, where the zero point is odd, and very near to them.

``a``, ``x`` and ``out`` are [P, M, N] without gaps. Each axis of ``b`` and ``c`` has that length or 1, so a number per
channel fits NHWC ([1, M, C]: M = H * W) and NCHW ([1, C, 1]), and so does one per picture and channel; `collapse` finds
the three axes of tensors of any rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument, Choice, Contract, Dims, Options, Traffic
from qcompiler.kernels.epilogue.contract import ACTIVATIONS, PIECEWISE
from qcompiler.kernels.operand import ITEMSIZE, Operand

NUMBERS = ("int8", "uint8", "float16", "bfloat16", "float32")
QUANTIZED = ("int8", "uint8")
PAIRS = ("add", "sub", "mul")
COMPUTED = (*PAIRS, "convert")

Shape = tuple[int, int, int]


def collapse(shape: Sequence[int], others: Sequence[Sequence[int]]) -> tuple[Shape, list[Shape]] | None:
    """Find three axes for tensors that are broadcast to one shape.

    Args:
        shape: of ``a`` and of the result.
        others: of the other operands, aligned at their last axes as NumPy does.

    Returns:
        The shape, and those of the others, under three axes each; None if three are too few, or ``a`` itself would
        have to be broadcast.
    """
    if any(len(other) > len(shape) for other in others):
        return None
    aligned = [(1,) * (len(shape) - len(other)) + tuple(other) for other in others]
    merged: list[tuple[int, tuple[bool, ...]]] = []
    for axis, length in enumerate(shape):
        if any(other[axis] not in (1, length) for other in aligned):
            return None
        if length == 1:
            continue
        whole = tuple(other[axis] == length for other in aligned)
        if merged and merged[-1][1] == whole:
            merged[-1] = (merged[-1][0] * length, whole)
        else:
            merged.append((length, whole))
    if len(merged) > 3:
        return None
    merged = [(1, (True,) * len(others))] * (3 - len(merged)) + merged
    first, second, third = (length for length, _ in merged)
    made = [tuple(length if whole[i] else 1 for length, whole in merged) for i in range(len(others))]
    return (first, second, third), [(b, m, n) for b, m, n in made]


@dataclass(frozen=True)
class Tiling:
    """How a call is cut.

    Attributes:
        shape: [P, M, N], with axes joined where all operands allow it.
        block: rows and columns of a tile.
        modes: by operand what a tile takes of it: ``full``, ``columns`` (a number per column), ``rows`` or ``one``.
        steps: by operand, numbers from one of the P matrices to the next, 0 if all take the same.
    """

    shape: Shape
    block: tuple[int, int]
    modes: Mapping[str, str]
    steps: Mapping[str, int]

    @property
    def tiles(self) -> tuple[int, int]:
        """Return the number of tiles over rows and columns of one matrix."""
        return -(-self.shape[1] // self.block[0]), -(-self.shape[2] // self.block[1])

    @property
    def programs(self) -> int:
        """Return the number of programs."""
        return self.shape[0] * self.tiles[0] * self.tiles[1]


def tile_call(shape: Shape, others: Mapping[str, Shape], elements: int) -> Tiling:
    """Cut a call into tiles of ``elements`` numbers, a power of 2."""
    modes = {name: _mode(shape, other) for name, other in others.items()}
    whole = {n: m == "full" and others[n][0] == shape[0] for n, m in modes.items()}
    same = {n: m in ("columns", "one") and others[n][0] == 1 for n, m in modes.items()}
    if all(whole[n] or (same[n] and modes[n] == "one") for n in modes):
        shape = (1, 1, shape[0] * shape[1] * shape[2])
    elif all(whole[n] or same[n] or (modes[n] == "rows" and others[n][0] == shape[0]) for n in modes):
        shape = (1, shape[0] * shape[1], shape[2])
    columns = min(elements, 1 << max(shape[2] - 1, 0).bit_length())
    matrix = {"full": shape[1] * shape[2], "columns": shape[2], "rows": shape[1], "one": 1}
    steps = {n: 0 if others[n][0] == 1 else matrix[m] for n, m in modes.items()}
    return Tiling(shape, (elements // columns, columns), modes, steps)


def _mode(shape: Shape, other: Shape) -> str:
    rows, columns = other[1] == shape[1], other[2] == shape[2]
    return "full" if rows and columns else "columns" if columns else "rows" if rows else "one"


def shapes_of(operands: Mapping[str, Operand]) -> tuple[Shape, dict[str, Shape]]:
    """Return the shape of the result of a call, and those of the operands that are broadcast."""
    first, second, third = operands["a"].shape
    others = {name: operands[name].shape for name in ("b", "c") if name in operands}
    return (first, second, third), {name: (b, m, n) for name, (b, m, n) in others.items()}


def _macs(dims: Dims, options: Options) -> int:
    return 0


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    written = operands["out"].nbytes
    if options["op"] == "table":
        return Traffic(operands["x"].nbytes + operands["x"].size * ITEMSIZE[options["out"]], written)
    shape, others = shapes_of(operands)
    tiling = tile_call(shape, others, config["BLOCK"])
    batch, rows, columns = tiling.shape
    counts = {"full": batch * rows * columns, "columns": batch * tiling.tiles[0] * columns}
    counts |= {"rows": batch * tiling.tiles[1] * rows, "one": tiling.programs}
    read = operands["a"].nbytes
    read += sum(counts[mode] * ITEMSIZE[operands[name].dtype] for name, mode in tiling.modes.items())
    return Traffic(read, written)


def _broadcast_rule(dims: Dims, options: Options) -> str | None:
    for name in "bc":
        for axis in "PMN":
            if dims.get(name.upper() + axis, 1) not in (1, dims[axis]):
                found = dims[name.upper() + axis]
                return f"{name} must have {axis} = {dims[axis]} or 1; found {found}"
    return None


def _combination_rule(dims: Dims, options: Options) -> str | None:
    if options["op"] == "table":
        for name, default in (("third", "none"), ("activation", "none"), ("arithmetic", "float32")):
            if options[name] != default:
                return f"a table holds everything; expected {name} {default}, found {options[name]}"
    wide = options["arithmetic"] == "float64"
    if wide and (options["out"] not in QUANTIZED or options["activation"] not in PIECEWISE):
        return (
            f"arithmetic float64 is for out {' or '.join(QUANTIZED)} and activation {', '.join(PIECEWISE)}; "
            f"found {options['out']} and {options['activation']}"
        )
    return None


_BROADCAST = " each axis of the output's length or 1"
_COMPUTED, _PAIRED, _THIRD = ("op", COMPUTED), ("op", PAIRS), ("third", ("add", "mul"))
_STORED = ("out", QUANTIZED)


CONTRACT = Contract(
    name="pointwise",
    purpose="sums, products, tables and conversions of quantized tensors, element by element",
    arguments=(
        Argument("a", NUMBERS, ("P", "M", "N"), when=_COMPUTED, why="first operand"),
        Argument("b", NUMBERS, ("BP", "BM", "BN"), when=_PAIRED, why="second operand," + _BROADCAST),
        Argument("c", NUMBERS, ("CP", "CM", "CN"), when=_THIRD, why="third operand," + _BROADCAST),
        Argument("x", QUANTIZED, ("P", "M", "N"), when=("op", ("table",)), why="numbers to look up"),
        Argument("table", (), ("256",), when=("op", ("table",)), dtype_of="out", why="entry of each, the least first"),
        *(
            Argument(f"{name}_{part}", (kind,), role="scalar", when=when, why=f"{part} of {name}")
            for name, when in (("a", _COMPUTED), ("b", _PAIRED), ("c", _THIRD))
            for part, kind in (("scale", "float32"), ("zero", "int32"))
        ),
        Argument(
            "low", ("float32",), role="scalar", when=("activation", ("clip", "leaky_relu")), why="bound, or slope"
        ),
        Argument("high", ("float32",), role="scalar", when=("activation", ("clip",)), why="upper bound of clip"),
        Argument("out_scale", ("float32",), role="scalar", when=_STORED, why="scale of the output; a table ignores it"),
        Argument("out_zero", ("int32",), role="scalar", when=_STORED, why="zero point of it; a table ignores it"),
        Argument("out", (), ("P", "M", "N"), role="output", dtype_of="out", why="result"),
    ),
    choices=(
        Choice("op", (*COMPUTED, "table"), "what is computed"),
        Choice("third", ("none", "add", "mul"), "one more operand"),
        Choice("activation", ACTIVATIONS, "element-wise function of the real number; bounds are real numbers, too"),
        Choice("arithmetic", ("float32", "fast", "float64"), "how exact numbers are before they are rounded to 8 bits"),
        Choice("out", NUMBERS, "dtype of out"),
    ),
    macs_rule=_macs,
    requests_rule=_requests,
    rules=(_broadcast_rule, _combination_rule),
)
