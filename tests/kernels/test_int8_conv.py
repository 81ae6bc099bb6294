from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config, Entry, config, load_table
from qcompiler.kernels.epilogue.contract import ACTIVATIONS, PIECEWISE
from qcompiler.kernels.int8_conv.contract import CONTRACT, GEOMETRY
from qcompiler.kernels.int8_conv.reference import fold_zero_point, pack_depthwise, pack_weight, reference
from qcompiler.kernels.int8_matmul.reference import to_signed
from tests.quant.ort_operator import run_operator

KERNEL = "int8_conv"
TILE = config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2})
EPS = 2.0**-24
RNG = np.random.default_rng(0)
PLAIN: dict[str, int] = dict(GEOMETRY)
SAME: dict[str, int] = PLAIN | {"pad_top": 1, "pad_left": 1, "pad_bottom": 1, "pad_right": 1}


def operands(x: tuple[int, ...], w: tuple[int, ...], *, reach: float = 1.0, **geometry: int) -> dict[str, Any]:
    """Return s8 operands over their whole range: x in NHWC, w in [O, R, S, C/g]; three axes make depthwise weights."""
    rng = np.random.default_rng([*x, *w])
    columns, terms = (w[2], w[0] * w[1]) if len(w) == 3 else (w[0], w[1] * w[2] * w[3])
    weights = {"w_rso" if len(w) == 3 else "w": rng.integers(-128, 128, w, np.int8)}
    groups = {"group": 1} if len(w) == 4 else {}
    multiplier = (rng.uniform(0.5, 2.0, columns) * 60 * reach / (74 * 74 * np.sqrt(terms))).astype(np.float32)
    given = {"x": rng.integers(-128, 128, x, np.int8), "multiplier": multiplier, "x_zero": -77, "out_zero": 3}
    return given | weights | SAME | groups | geometry


def check(interpreter: ModuleType, given: dict[str, Any], options: dict[str, str], tile: Config = TILE) -> np.ndarray:
    """Run the kernel; assert its bytes, and its output bit for bit."""
    run = interpreter.run_kernel(KERNEL, given, options, tile)
    interpreter.check_traffic(KERNEL, run, given, options, tile)
    want = reference(given, CONTRACT.options(options))["out"]
    got: np.ndarray = run.outputs["out"]
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((1, 8, 8, 32), (32, 3, 3, 32)),  # every step in one tap
        ((2, 7, 5, 64), (40, 3, 3, 64)),
        ((2, 9, 6, 16), (33, 3, 3, 16)),  # steps over taps
        ((1, 11, 9, 3), (20, 7, 7, 3)),  # first layer
        ((3, 5, 4, 13), (7, 2, 3, 13)),
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 1, 37, 10), (12, 1, 5, 10)),  # one dimension
    ],
)
def test_ragged_shapes(interpreter: ModuleType, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    check(interpreter, operands(x, w), {})


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride_h": 2, "stride_w": 2},
        {"stride_h": 3, "stride_w": 1, "pad_top": 0, "pad_right": 2},
        {"dilation_h": 2, "dilation_w": 3, "pad_left": 4},
        {"pad_top": 5, "pad_bottom": 4, "pad_left": 0, "pad_right": 6},  # windows that lie outside as a whole
        {"stride_h": 9, "stride_w": 9},
    ],
)
@pytest.mark.parametrize("channels", [32, 5])
def test_geometry(interpreter: ModuleType, geometry: dict[str, int], channels: int) -> None:
    check(interpreter, operands((2, 8, 9, channels), (17, 3, 3, channels), **geometry), {})


@pytest.mark.interpreter
@pytest.mark.parametrize("zero", [-128, 127])
@pytest.mark.parametrize(("out", "out_zero"), [("int8", -128), ("int8", 127), ("uint8", 0), ("uint8", 255)])
def test_zero_points_at_both_ends(interpreter: ModuleType, zero: int, out: str, out_zero: int) -> None:
    given = operands((1, 5, 6, 32), (20, 3, 3, 32), x_zero=zero, out_zero=out_zero)
    given["offset"] = fold_zero_point(given["w"], zero, RNG.integers(-1000, 1000, 20, np.int32))
    check(interpreter, given, {"offset": "channel", "out": out})


@pytest.mark.interpreter
@pytest.mark.parametrize("pad", ["zero", "none"])
def test_other_padding(interpreter: ModuleType, pad: str) -> None:
    given = operands((2, 6, 7, 32), (20, 3, 3, 32)) | (PLAIN if pad == "none" else {})
    del given["x_zero"]
    check(interpreter, given, {"pad": pad})


@pytest.mark.interpreter
@pytest.mark.parametrize("stride", [1, 2])
def test_one_tap_is_a_matrix_product(interpreter: ModuleType, stride: int) -> None:
    given = operands((2, 6, 7, 32), (20, 1, 1, 32), stride_h=stride, stride_w=stride) | {"multiplier": None}
    del given["x_zero"], given["multiplier"], given["out_zero"]
    options = {"pad": "none", "multiplier": "none", "out": "int32"}
    got = check(interpreter, given | {k: v for k, v in PLAIN.items() if k.startswith("pad")}, options)
    x = given["x"][:, ::stride, ::stride].astype(int)
    np.testing.assert_array_equal(got, x @ given["w"][:, 0, 0].astype(int).T)


@pytest.mark.interpreter
@pytest.mark.parametrize(("channels", "group", "columns"), [(64, 2, 34), (12, 3, 9), (8, 8, 16)])
def test_groups(interpreter: ModuleType, channels: int, group: int, columns: int) -> None:
    given = operands((2, 5, 6, channels), (columns, 3, 3, channels // group), group=group)
    check(interpreter, given | {"bias": RNG.normal(0, 9, columns).astype(np.float32)}, {"bias": "channel"})


@pytest.mark.interpreter
@pytest.mark.parametrize(("channels", "repeat"), [(40, 1), (20, 2)])
@pytest.mark.parametrize("pad", ["point", "zero", "none"])
def test_depthwise(interpreter: ModuleType, channels: int, repeat: int, pad: str) -> None:
    given = operands((2, 9, 6, channels), (3, 3, channels * repeat), stride_h=2, dilation_w=2)
    if pad != "point":
        del given["x_zero"]
    got = check(interpreter, given | (PLAIN if pad == "none" else {}), {"kind": "depthwise", "pad": pad})
    dense = {k: v for k, v in given.items() if k != "w_rso"} | (PLAIN if pad == "none" else {})
    dense |= {"w": np.ascontiguousarray(given["w_rso"].transpose(2, 0, 1)[..., None]), "group": channels}
    np.testing.assert_array_equal(got, reference(dense, CONTRACT.options({"pad": pad}))["out"])


@pytest.mark.interpreter
@pytest.mark.parametrize(("channels", "stored"), [(3, 16), (30, 64)])
def test_weights_with_padded_channels(interpreter: ModuleType, channels: int, stored: int) -> None:
    given = operands((1, 6, 7, channels), (20, 3, 3, stored))
    given["w"][..., channels:] = 0
    got = check(interpreter, given, {})
    narrow = given | {"w": np.ascontiguousarray(given["w"][..., :channels])}
    np.testing.assert_array_equal(got, reference(narrow, CONTRACT.options({}))["out"])


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32", "int8", "uint8", "int32"])
def test_every_output(interpreter: ModuleType, kind: str, out: str) -> None:
    given = operands((1, 5, 7, 16), (24, 2, 2, 16) if kind == "dense" else (2, 2, 16))
    if out not in ("int8", "uint8"):
        del given["out_zero"]
    if out == "int32":
        del given["multiplier"]
    check(interpreter, given, {"kind": kind, "out": out, "multiplier": "none" if out == "int32" else "channel"})


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(interpreter: ModuleType, activation: str) -> None:
    given = operands((1, 5, 6, 16), (24, 2, 2, 16), reach=0.05)
    given |= {"bias": RNG.normal(0, 2, 24).astype(np.float16)}
    given |= {"low": -0.5} if activation in ("clip", "leaky_relu") else {}
    given |= {"high": 1.75} if activation == "clip" else {}
    options = {"activation": activation, "bias": "channel", "out": "float32"}
    del given["out_zero"]
    if activation in PIECEWISE:
        check(interpreter, given, options)
        return
    got = interpreter.run_kernel(KERNEL, given, options, TILE).outputs["out"]
    want = reference(given, CONTRACT.options(options))["out"]
    # Sums of a few float32 operations on numbers up to 10.
    np.testing.assert_allclose(got, want, rtol=16 * EPS, atol=64 * EPS)


@pytest.mark.interpreter
@pytest.mark.parametrize("entry", load_table(KERNEL).of("sm90"), ids=lambda e: str(e.config))
def test_shipped_tiles(interpreter: ModuleType, entry: Entry) -> None:
    depthwise = dict(entry.options).get("kind") == ("depthwise",)
    channels = max([32, *(factor for name, factor in entry.multiple if name == "D")])
    given = operands((2, 9, 8, channels), (3, 3, channels) if depthwise else (70, 3, 3, channels))
    check(interpreter, given, {"kind": "depthwise" if depthwise else "dense"}, entry.config)


@pytest.mark.interpreter
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
def test_residuals(interpreter: ModuleType, place: str, dtype: str) -> None:
    given = operands((2, 4, 5, 16), (20, 3, 3, 16)) | {"residual_scale": 1.0, "residual_zero": 0}
    if dtype == "int8":
        given |= {"residual": RNG.integers(-128, 128, (2, 4, 5, 20), np.int8), "residual_scale": 0.37}
        given["residual_zero"] = -128
    else:
        numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        given |= {"residual": RNG.normal(0, 30, (2, 4, 5, 20)).astype(numpy_type)}
    check(interpreter, given, {"residual": place, "activation": "relu"})


@pytest.mark.interpreter
def test_one_scale_and_an_inverse(interpreter: ModuleType) -> None:
    given = operands((2, 4, 5, 16), (20, 3, 3, 16)) | {"scale": 0.001, "out_inverse": 3.7}
    del given["multiplier"]
    check(interpreter, given, {"multiplier": "scalar", "out_scale": "scalar"})


@pytest.mark.interpreter
def test_saturation_and_ties(interpreter: ModuleType) -> None:
    got = check(interpreter, operands((2, 6, 5, 16), (20, 3, 3, 16), reach=50.0), {})
    assert (got == -128).mean() > 0.3
    assert (got == 127).mean() > 0.3
    given = operands((1, 4, 6, 1), (1, 1, 1, 1), out_zero=1) | PLAIN
    given |= {"x": np.arange(-12, 12, dtype=np.int8).reshape(1, 4, 6, 1), "w": np.ones((1, 1, 1, 1), np.int8)}
    given["multiplier"] = np.full(1, 0.5, np.float32)
    got = check(interpreter, given, {})
    np.testing.assert_array_equal(got.ravel(), np.rint(np.arange(-12, 12) / 2).astype(int) + 1)


@pytest.mark.interpreter
def test_largest_sums_are_exact(interpreter: ModuleType) -> None:
    given = operands((1, 2, 2, 1024), (2, 2, 2, 1024), x_zero=127) | PLAIN
    given |= {"x": np.full((1, 2, 2, 1024), -128, np.int8), "w": np.full((2, 2, 2, 1024), -128, np.int8)}
    given |= {"offset": fold_zero_point(given["w"], 127)}
    del given["multiplier"], given["out_zero"]
    wide = config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "GROUP_M": 1})
    got = check(interpreter, given, {"multiplier": "none", "offset": "channel", "out": "int32"}, wide)
    assert (got == 4096 * 255 * 128).all()


@pytest.mark.interpreter
def test_pictures_inside_a_larger_one(interpreter: ModuleType) -> None:
    given = operands((2, 6, 7, 16), (20, 3, 3, 16))
    given["x"] = np.pad(given["x"], ((0, 0), (1, 2), (3, 1), (16, 0)))[:, 1:7, 3:10, 16:]
    wide = RNG.integers(-128, 128, (2, 6, 7, 32), np.int8)
    given |= {"residual": wide[..., 5:25], "residual_scale": 0.5, "residual_zero": 3}
    check(interpreter, given, {"residual": "before"})


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("zeros", [(0, 255), (255, 0), (100, 131)])
@pytest.mark.parametrize(("group", "channels", "rank"), [(1, 16, 2), (4, 16, 2), (16, 16, 2), (1, 3, 1)])
def test_reference_is_qlinear_conv(kind: str, zeros: tuple[int, int], group: int, channels: int, rank: int) -> None:
    rng = np.random.default_rng([group, channels])
    shift = 128 if kind == "uint8" else 0
    x = (rng.integers(-128, 128, (2, channels, 9, 8)[: rank + 2]).astype(int) + shift).astype(kind)
    w = rng.integers(-127, 128, (32, channels // group, 3, 2)[: rank + 2], np.int8)
    bias = rng.integers(-3000, 3000, 32, np.int32)
    x_zero, y_zero = (z - 128 + shift for z in zeros)
    x_scale, y_scale = np.float32(0.037), np.float32(0.9)
    w_scale = rng.uniform(0.001, 0.02, 32).astype(np.float32)
    tensors = [x, x_scale, np.array(x_zero, kind), w, w_scale, np.zeros(32, np.int8), y_scale, np.array(y_zero, kind)]
    windows = {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 2, 0, 3]}
    if rank == 1:
        windows = {"strides": [2], "dilations": [3], "pads": [4, 1]}
    [want] = run_operator("QLinearConv", [*tensors, bias], attributes={**windows, "group": group})
    geometry = {"stride_h": 2, "dilation_w": 2, "pad_top": 1, "pad_left": 2, "pad_bottom": 0, "pad_right": 3}
    if rank == 1:
        geometry = {"stride_w": 2, "dilation_w": 3, "pad_left": 4, "pad_right": 1}
    picture = np.ascontiguousarray(to_signed(x).transpose(0, *range(2, rank + 2), 1))
    given = {
        "x": picture if rank == 2 else picture[:, None],
        "w": pack_weight(w),
        "multiplier": x_scale * w_scale / y_scale,
        "offset": fold_zero_point(w, x_zero - shift, bias),
        "x_zero": x_zero - shift,
        "out_zero": y_zero,
        "group": group,
    } | (PLAIN | geometry)
    options = {"offset": "channel", "out": kind}
    assert CONTRACT.check(given, CONTRACT.options(options))["P"] == (want.shape[2] if rank == 2 else 1)
    got = reference(given, CONTRACT.options(options))["out"]
    got = got.transpose(0, 3, 1, 2) if rank == 2 else got[:, 0].transpose(0, 2, 1)
    np.testing.assert_array_equal(got, want)
    if group == channels:
        del given["w"], given["group"]
        same = reference(given | {"w_rso": pack_depthwise(w)}, CONTRACT.options(options | {"kind": "depthwise"}))["out"]
        np.testing.assert_array_equal(same.transpose(0, 3, 1, 2), want)


def test_packing_and_traffic() -> None:
    packed = pack_weight(RNG.integers(0, 256, (5, 3, 7, 7), np.uint8), 16)
    assert packed.shape == (5, 7, 7, 16)
    assert not packed[..., 3:].any()
    given = operands((2, 8, 8, 16), (5, 7, 7, 16), stride_h=2, stride_w=2)
    traffic = CONTRACT.traffic(given | {"w": packed, "out": np.zeros((2, 2, 2, 5), np.int8)}, CONTRACT.options({}))
    assert (traffic.read, traffic.written) == (2 * 64 * 16 + 5 * 49 * 16 + 4 * 5, 2 * 4 * 5)
    assert traffic.macs == 2 * 4 * 5 * 49 * 16


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"stride_h": 0}, {}, "stride_h must be at least 1; found 0"),
        ({"pad_left": -1}, {}, "pad_left must be at least 0; found -1"),
        ({"out": np.zeros((1, 4, 5, 8), np.int8)}, {}, "out must have P = 5, at least 1; found 4"),
        ({"dilation_w": 9}, {}, "out must have Q = -11, at least 1"),
        ({"group": 3}, {}, "3 groups must divide C = 16 and O = 8"),
        ({"w": np.zeros((8, 3, 3, 8), np.int8)}, {}, "w must have D >= C / group; found D = 8"),
        ({"w": np.zeros((8, 3, 3, 32), np.int8)[..., :16]}, {}, "w must have no gaps"),
        ({"out": np.zeros((1, 5, 10, 8), np.int8)[:, :, ::2]}, {}, None),
        ({"out": np.zeros((1, 5, 10, 8), np.int8)[:, :, :5]}, {}, "pixels of out must lie at one distance"),
        ({}, {"pad": "zero"}, "takes x_zero only with pad point"),
        ({}, {"multiplier": "none"}, "takes multiplier only with multiplier channel"),
        ({"x": np.zeros((1, 5, 5, 16), np.uint8)}, {}, "x must have dtype int8; found uint8"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str | None) -> None:
    given = operands((1, 5, 5, 16), (8, 3, 3, 16)) | changes
    if message is None:
        assert CONTRACT.check(given, CONTRACT.options(options))["Q"] == 5
        return
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(given, CONTRACT.options(options))


def test_padding_needs_an_option_and_depthwise_whole_multiples() -> None:
    given = operands((1, 5, 5, 16), (8, 3, 3, 16))
    del given["x_zero"]
    with pytest.raises(TargetError, match="pad none is for pictures without padding; found 1 and 1"):
        CONTRACT.check(given, CONTRACT.options({"pad": "none"}))
    with pytest.raises(TargetError, match="depthwise needs O a multiple of C = 16; found O = 24"):
        CONTRACT.check(operands((1, 5, 5, 16), (3, 3, 24)), CONTRACT.options({"kind": "depthwise"}))
    long = operands((1, 2, 2, 65794), (1, 1, 1, 65794))
    with pytest.raises(TargetError, match="the sum fits int32 up to 65793 terms; found 65794"):
        CONTRACT.check(long, CONTRACT.options({}))


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90", "sm100"])
def test_table_takes_channels_as_they_come(arch: str) -> None:
    table = load_table(KERNEL)
    options = CONTRACT.options({})

    def tile(channels: int, columns: int, side: int = 56, kind: str = "dense") -> str:
        dims = {"C": channels, "D": channels, "O": columns, "P": side}
        return str(table.choose(arch, dims, options | {"kind": kind}))

    assert tile(128, 128) == "128x128x128x8 w8 s3"
    assert tile(512, 512, 7) == "128x64x64x8 w4 s3"  # by name: K, M, N
    assert tile(3, 64) == "64x64x64x8 w8 s2"
    assert tile(32, 32, kind="depthwise") == "16x64x32x1 w4 s2"


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_bulk_is_copied_128_bits_at_a_time(arch: str) -> None:
    from qcompiler.kernels.launching import compilations
    from qcompiler.kernels.proof.compiling import compile_for

    cases = {c.case.label: c for c in compilations(KERNEL, arch, full=False)}
    for label in ("3x3, zero", "3x3, zero point", "depthwise"):
        compiled = compile_for(cases[label].calls[0], arch)
        # Narrower ones are vectors of scales and offsets only.
        assert compiled.loads[128] >= 8
        assert set(compiled.loads) <= {128, 64, 32}
        assert set(compiled.stores) == {128}
        assert compiled.instructions.get("LDGSTS", 0) >= (0 if label == "depthwise" else 8)
