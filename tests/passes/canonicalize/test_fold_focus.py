"""fold-focus: space-to-depth, as slices or as the operator, in front of a convolution."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from qcompiler.ir.graph import attr_ints
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fold_focus import FoldFocus
from qcompiler.passes.fuse_batch_norm import FuseBatchNorm

_F = np.float32
END = 2**31 - 1
ORDER = list(product((0, 1), (0, 1)))


def numbers(*items: int) -> np.ndarray:
    return np.asarray(items, np.int64)


def focus(
    rng: np.random.Generator,
    order: Sequence[tuple[int, int]] = tuple(ORDER),
    step: int = 2,
    kernel: tuple[int, int] = (3, 3),
    conv: str = "Conv<pads=[1,1,1,1]>",
    nested: bool = False,
    end: int = END,
    bias: bool = True,
    channels: int = 3,
) -> tuple[str, dict[str, np.ndarray]]:
    """Return the body and the constants of a Focus stem."""
    weights = {
        "w": rng.normal(size=(5, channels * len(order), *kernel)).astype(_F),
        "step": numbers(step), "steps": numbers(step, step), "end": numbers(end), "ends": numbers(end, end),
        "rows": numbers(2), "columns": numbers(-1), "both": numbers(2, 3),
    }  # fmt: skip
    lines = []
    for index, (row, column) in enumerate(order):
        weights |= {f"r{index}": numbers(row), f"c{index}": numbers(column), f"s{index}": numbers(row, column)}
        if nested:
            lines.append(f"a{index} = Slice(x, r{index}, end, rows, step)")
            lines.append(f"p{index} = Slice(a{index}, c{index}, end, columns, step)")
        else:
            lines.append(f"p{index} = Slice(x, s{index}, ends, both, steps)")
    lines.append(f"f = Concat<axis=1>({', '.join(f'p{i}' for i in range(len(order)))})")
    if bias:
        weights["b"] = rng.normal(size=5).astype(_F)
    lines.append(f"y = {conv}(f, w{', b' if bias else ''})")
    used = " ".join(lines)
    return used, {n: a for n, a in weights.items() if any(f"{n}{mark}" in used for mark in ",)")}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_slices_vanish(run, text, rng, nested, bias):
    body, weights = focus(rng, nested=nested, bias=bias)
    found = run(FoldFocus(), text("float[n,3,8,12] x", "float[n,5,p,q] y", body, weights))
    assert found.ops == {"Conv": 1}
    conv = found.node("Conv")
    assert attr_ints(conv, "kernel_shape") == (6, 6)
    assert attr_ints(conv, "strides") == (2, 2)
    assert attr_ints(conv, "pads") == (2, 2, 2, 2)
    assert len(conv.inputs) == 2 + bias


@pytest.mark.parametrize("order", [ORDER[::-1], [(0, 0), (1, 0), (0, 1), (1, 1)], [(1, 1), (0, 1), (0, 0), (1, 0)]])
@pytest.mark.parametrize("nested", [False, True])
def test_the_starts_decide_and_not_the_order(run, text, rng, order, nested):
    body, weights = focus(rng, order, nested=nested)
    assert run(FoldFocus(), text("float[n,3,8,8] x", "float[n,5,p,q] y", body, weights)).ops == {"Conv": 1}


@pytest.mark.parametrize(
    ("conv", "kernel", "wide", "strides", "pads"),
    [
        ("Conv<pads=[0,1,2,1]>", (1, 3), (2, 6), (2, 2), (0, 2, 4, 2)),
        ("Conv<strides=[1,2], pads=[1,0,0,2]>", (3, 2), (6, 4), (2, 4), (2, 0, 0, 4)),
        ("Conv", (2, 2), (4, 4), (2, 2), (0, 0, 0, 0)),
        ("Conv<auto_pad=\"VALID\">", (3, 1), (6, 2), (2, 2), (0, 0, 0, 0)),
        ("Conv<strides=[2,2], dilations=[1,1], group=1, kernel_shape=[3,3]>", (3, 3), (6, 6), (4, 4), (0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_windows(run, text, rng, conv, kernel, wide, strides, pads):
    body, weights = focus(rng, conv=conv, kernel=kernel)
    found = run(FoldFocus(), text("float[n,3,10,8] x", "float[n,5,p,q] y", body, weights))
    made = found.node("Conv")
    assert found.ops == {"Conv": 1}
    assert [attr_ints(made, a) for a in ("kernel_shape", "strides", "pads")] == [wide, strides, pads]


@pytest.mark.parametrize("end", [12, 13, END])
def test_blocks_of_three(run, text, rng, end):
    body, weights = focus(rng, list(product(range(3), range(3))), step=3, kernel=(2, 2), conv="Conv", end=end)
    found = run(FoldFocus(), text("float[n,3,12,12] x", "float[n,5,p,q] y", body, weights))
    assert attr_ints(found.node("Conv"), "kernel_shape") == (6, 6)


def test_slices_of_slices_along_one_axis(run, text, rng):
    """Rows by two and by two again are rows by four; their order is that of the outer step first."""
    lines, weights = [], {"two": numbers(2), "end": numbers(END), "rows": numbers(2), "columns": numbers(3)}
    weights |= {f"n{i}": numbers(i) for i in range(4)} | {
        "four": numbers(4),
        "w": rng.normal(size=(5, 16, 1, 1)).astype(_F),
    }
    for index, (outer, inner, column) in enumerate(product((0, 1), (0, 1), range(4))):
        lines.append(
            f"a{index} = Slice(x, n{inner}, end, rows, two) b{index} = Slice(a{index}, n{outer}, end, rows, two)"
        )
        lines.append(f"p{index} = Slice(b{index}, n{column}, end, columns, four)")
    lines.append(f"f = Concat<axis=-3>({', '.join(f'p{i}' for i in range(16))}) y = Conv(f, w)")
    found = run(FoldFocus(), text("float[n,1,8,8] x", "float[n,5,p,q] y", " ".join(lines), weights))
    assert found.ops == {"Conv": 1}
    assert attr_ints(found.node("Conv"), "strides") == (4, 4)


def test_a_pixel_that_stands_in_two_parts(run, text, rng):
    body, weights = focus(rng, [*ORDER, (0, 0)])
    assert run(FoldFocus(), text("float[n,3,8,8] x", "float[n,5,p,q] y", body, weights)).ops == {"Conv": 1}


@pytest.mark.parametrize(("size", "kernel"), [(2, 3), (4, 1)])
def test_space_to_depth(run, text, rng, size, kernel):
    weights = {"w": rng.normal(size=(5, 3 * size * size, kernel, kernel)).astype(_F)}
    body = f"f = SpaceToDepth<blocksize={size}>(x) y = Conv<strides=[1,2]>(f, w)"
    found = run(FoldFocus(), text("float[n,3,16,16] x", "float[n,5,p,q] y", body, weights))
    assert found.ops == {"Conv": 1}
    assert attr_ints(found.node("Conv"), "strides") == (size, 2 * size)


def test_half_precision(run, text, rng):
    body, weights = focus(rng)
    weights = {n: a.astype(np.float16) if a.dtype == _F else a for n, a in weights.items()}
    assert run(FoldFocus(), text("float16[n,3,8,8] x", "float16[n,5,p,q] y", body, weights)).ops == {"Conv": 1}


@pytest.mark.parametrize(
    ("options", "shape", "reason"),
    [
        ({}, "n,3,h,8", "slice-form"),
        ({}, "n,3,7,8", "slice-form"),
        ({"end": 6}, "n,3,8,8", "slice-form"),
        ({"order": [(0, 0), (0, 1), (1, 0), (1, 2)]}, "n,3,8,8", "slice-form"),
        ({"order": [(0, 0), (0, 1), (1, 0)]}, "n,3,8,8", "incomplete"),
        ({"conv": "Conv<auto_pad=\"SAME_UPPER\">"}, "n,3,8,8", "auto-pad"),
        ({"conv": "Conv<dilations=[2,2], pads=[2,2,2,2]>"}, "n,3,8,8", "dilation"),
        ({"nested": True}, "n,3,8,w", "slice-form"),
    ],
)  # fmt: skip
def test_declines(run, text, rng, options, shape, reason):
    body, weights = focus(rng, **options)
    odd = shape == "n,3,7,8" or any(2 in p for p in options.get("order", []))  # parts differ in size: it cannot run
    found = run(FoldFocus(), text(f"float[{shape}] x", "float[n,5,p,q] y", body, weights), compare=not odd, sizes=(8,))
    assert found.changes == 0
    assert found.reason("focus-conv") == reason


def test_declines_a_grouped_convolution(run, text, rng):
    body, weights = focus(rng, conv="Conv<group=2>", bias=False)
    weights["w"] = rng.normal(size=(4, 6, 3, 3)).astype(_F)
    found = run(FoldFocus(), text("float[n,3,8,8] x", "float[n,4,p,q] y", body, weights))
    assert (found.changes, found.reason("focus-conv")) == (0, "group")


def test_declines_parts_of_two_values(run, text, rng):
    body, weights = focus(rng)
    body = body.replace("p3 = Slice(x", "p3 = Slice(z")
    found = run(FoldFocus(), text("float[n,3,8,8] x, float[n,3,8,8] z", "float[n,5,p,q] y", body, weights))
    assert (found.changes, found.reason("focus-conv")) == (0, "slice-form")


@pytest.mark.parametrize(
    ("more", "outputs", "reason"),
    [
        ("t = Relu(f)", "float[n,5,p,q] y, float[n,12,4,4] t", "interior-used-elsewhere"),
        ("", "float[n,5,p,q] y, float[n,12,4,4] f", "graph-output"),
        ("t = Relu(p2)", "float[n,5,p,q] y, float[n,3,4,4] t", "interior-used-elsewhere"),
    ],
)
def test_declines_where_the_blocks_are_read_otherwise(run, text, rng, more, outputs, reason):
    body, weights = focus(rng)
    found = run(FoldFocus(), text("float[n,3,8,8] x", outputs, f"{body} {more}", weights))
    assert (found.changes, found.reason("focus-conv")) == (0, reason)


def test_an_inner_slice_that_something_else_reads_stays(run, text, rng):
    body, weights = focus(rng, nested=True)
    outputs = "float[n,5,p,q] y, float[n,3,4,8] t"
    found = run(FoldFocus(), text("float[n,3,8,8] x", outputs, f"{body} t = Relu(a1)", weights))
    assert found.ops == {"Conv": 1, "Slice": 1, "Relu": 1}


def test_a_weight_that_another_convolution_reads_stays(run, text, rng):
    body, weights = focus(rng, bias=False)
    body += " z = Conv(u, w)"
    found = run(
        FoldFocus(), text("float[n,3,8,8] x, float[n,12,5,5] u", "float[n,5,p,q] y, float[n,5,r,s] z", body, weights)
    )
    assert found.ops == {"Conv": 2}


def test_in_canonicalize_batch_norm_follows(run, text, rng):
    body, weights = focus(rng, bias=False)
    weights |= {n: rng.uniform(0.5, 1.5, 5).astype(_F) for n in ("s", "o", "m", "v")}
    body = f"{body.replace('y = Conv', 'c = Conv')} y = BatchNormalization(c, s, o, m, v)"
    given = text("float[n,3,8,8] x", "float[n,5,p,q] y", body, weights)
    assert run(FuseBatchNorm(), given).ops == {"Slice": 4, "Concat": 1, "Conv": 1}
    assert run(Canonicalize(), given).ops == {"Conv": 1}
