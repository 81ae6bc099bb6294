from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config, config
from qcompiler.kernels.decode_attention.contract import CONTRACT, SCALES, softmax_factor
from qcompiler.kernels.decode_attention.reference import dequantized, pack, probabilities, reference, unpack

KERNEL = "decode_attention"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
CACHES = ("int8", "float8e4m3fn", "uint4")


def cut(block: int = 32, split: int = 3) -> Config:
    return config({"BLOCK_S": block, "SPLIT": split})


def operands(
    options: dict[str, str],
    *,
    heads: tuple[int, int] = (4, 2),
    steps: int = 100,
    length: int = 64,
    lengths: tuple[int, ...] | None = None,
    dtype: str = "float16",
) -> dict[str, Any]:
    """Return queries and caches that use every stored number; scores have a spread of some units."""
    rng = np.random.default_rng([steps, length, *heads])
    chosen = CONTRACT.options(options)
    known = (steps, steps) if lengths is None else lengths
    shape = (len(known), heads[1], steps, length)
    given: dict[str, Any] = {"q": rng.normal(0, 1, (len(known), heads[0], length)).astype(DTYPES[dtype])}
    for letter in "kv":
        most = 127
        if chosen["cache"] == "uint4":
            most = 8
            given[letter + "4"] = pack(rng.integers(0, 16, shape, np.uint8))
        elif chosen["cache"] == "int8":
            given[letter] = rng.integers(-128, 128, shape).astype(np.int8)
        else:
            most = 448
            codes = rng.integers(0, 255, shape, np.uint8)
            codes[(codes & 127) == 127] = 1  # no NaN
            given[letter] = codes.view(ml_dtypes.float8_e4m3fn)
        kind = chosen[f"{letter}_scale"]
        form = {"tensor": (), "channel": (heads[1], length), "token": shape[:3]}[kind]
        name = f"{letter}_scale_{'one' if kind == 'tensor' else kind}"
        given[name] = np.asarray(rng.uniform(0.5, 2, form) * 2 / most, np.float32)
    given |= {"softmax_scale": 0.2} if chosen["factor"] == "given" else {}
    return given | {"lengths": np.array(known, np.int32)}


def bound(given: dict[str, Any], options: dict[str, str]) -> np.ndarray:
    """Return the largest error of a float32 output, [B, H, D].

    A query is rounded to float16 (twice where a channel's scale is multiplied in), so a score is off by
    ``2**-10 * sum |q| |k|`` and its probability by that factor; a probability (times its value's scale) is rounded to
    float16, by 2**-11 of it or 2**-25 of the greatest. Sums of float32 add some 2**-24 for each token.
    """
    chosen = CONTRACT.options(options)
    q, k, v = given["q"].astype(np.float64), dequantized(given, chosen, "k"), dequantized(given, chosen, "v")
    group, factor = q.shape[1] // k.shape[1], softmax_factor(given, chosen, q.shape[2])
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    magnitude = np.einsum("bhd,bhsd->bhs", np.abs(q), np.abs(k)) * factor
    known = np.arange(k.shape[2]) < given["lengths"][:, None, None]
    least = 2.0**-25 * np.abs(q).max() * factor * np.abs(k).sum(-1).max()
    shift = (2.0**-10 + 80 * 2.0**-24) * np.max(magnitude, -1, where=known, initial=0.0)[..., None] + least
    p = probabilities(given, chosen)
    each = np.expm1(2 * shift) + 2.0**-11 + (k.shape[2] + 8) * 2.0**-24
    small = 2.0**-25 * np.abs(v).sum(2) / min(1.0, _least_scale(given))
    return np.asarray(np.einsum("bhs,bhsd->bhd", p * each, np.abs(v)) + small)


def _least_scale(given: dict[str, Any]) -> float:
    return float(given["v_scale_token"].min()) if "v_scale_token" in given else 1.0


def check(
    interpreter: ModuleType, given: dict[str, Any], options: dict[str, str], tile: Config, *, full: bool = False
) -> np.ndarray:
    """Run the kernel; assert its output within the bound of its formats, and its bytes if no sequence is shorter."""
    run = interpreter.run_kernel(KERNEL, given, options, tile)
    if full:
        interpreter.check_traffic(KERNEL, run, given, options, tile)
    chosen = CONTRACT.options(options)
    want = reference(given, chosen)["out"].astype(np.float64)
    got: np.ndarray = run.outputs["out"]
    assert got.dtype == DTYPES[chosen["out"]]
    allowed = bound(given, options) + 2 * ROUNDING[chosen["out"]] * np.abs(want) + 2.0**-24
    error = np.abs(got.astype(np.float64) - want)
    assert (error <= allowed).all(), (error / allowed).max()
    # The bound itself is small beside the values.
    assert np.linalg.norm(got.astype(np.float64) - want) <= 0.01 * np.linalg.norm(want)
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize("k_scale", SCALES)
@pytest.mark.parametrize("v_scale", SCALES)
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_and_scale(interpreter: ModuleType, cache: str, k_scale: str, v_scale: str) -> None:
    options = {"cache": cache, "k_scale": k_scale, "v_scale": v_scale, "out": "float32"}
    check(interpreter, operands(options), options, cut(64, 2), full=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lengths", [(100, 1, 33), (0, 64, 65), (32, 31, 99)])
def test_lengths_of_each_sequence(interpreter: ModuleType, cache: str, lengths: tuple[int, ...]) -> None:
    options = {"cache": cache, "k_scale": "token", "v_scale": "channel", "out": "float32"}
    given = operands(options, lengths=lengths, heads=(2, 1))
    got = check(interpreter, given, options, cut())
    if lengths[0] == 0:
        assert not got[0].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (16, 1), (20, 1), (34, 2)])
def test_groups_of_query_heads(interpreter: ModuleType, heads: tuple[int, int]) -> None:
    options = {"k_scale": "channel", "v_scale": "token", "out": "float32"}
    check(interpreter, operands(options, heads=heads, steps=50), options, cut(64, 1), full=True)


@pytest.mark.interpreter
def test_one_sequence(interpreter: ModuleType) -> None:
    options = {"cache": "uint4", "k_scale": "channel", "v_scale": "token"}
    check(interpreter, operands(options, lengths=(77,)), options, cut())


@pytest.mark.interpreter
@pytest.mark.parametrize("length", [64, 128, 256])
@pytest.mark.parametrize("cache", ["int8", "uint4"])
def test_lengths_of_heads(interpreter: ModuleType, cache: str, length: int) -> None:
    options = {"cache": cache, "k_scale": "channel", "v_scale": "channel", "out": "float32"}
    check(interpreter, operands(options, length=length, heads=(2, 1)), options, cut(64, 2), full=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "out"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16")])
def test_dtypes_of_queries_and_outputs(interpreter: ModuleType, dtype: str, out: str) -> None:
    options = {"out": out, "factor": "given"}
    check(interpreter, operands(options, dtype=dtype), options, cut(), full=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [1, 4, 16])
def test_more_parts_than_blocks(interpreter: ModuleType, split: int) -> None:
    options = {"out": "float32"}
    check(interpreter, operands(options, steps=70, heads=(2, 1)), options, cut(16, split), full=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("cache", CACHES)
def test_one_token_gives_its_value(interpreter: ModuleType, cache: str) -> None:
    """The only token has probability 1: the output is the value itself, every stored number exact."""
    options = {"cache": cache, "out": "float32"}
    given = operands(options, lengths=(1, 1), steps=20)
    given["v_scale_one"] = np.asarray(0.25, np.float32)
    got = interpreter.run_kernel(KERNEL, given, options, cut()).outputs["out"]
    np.testing.assert_array_equal(got, np.repeat(dequantized(given, CONTRACT.options(options), "v")[:, :, 0], 2, 1))


@pytest.mark.interpreter
def test_tokens_beyond_the_length_do_not_count(interpreter: ModuleType) -> None:
    options = {"cache": "float8e4m3fn", "out": "float32", "k_scale": "token", "v_scale": "token"}
    given = operands(options, lengths=(40, 70))
    want = interpreter.run_kernel(KERNEL, given, options, cut()).outputs["out"]
    for name in ("k", "v"):
        given[name].view(np.uint8)[0, :, 40:] = 127  # NaN
    for name in ("k_scale_token", "v_scale_token"):
        given[name][0, :, 40:] = np.nan
    got = interpreter.run_kernel(KERNEL, given, options, cut()).outputs["out"]
    np.testing.assert_array_equal(got, want)


@pytest.mark.interpreter
def test_a_cache_that_is_a_part_of_a_longer_one(interpreter: ModuleType) -> None:
    options = {"out": "float32"}
    given = operands(options)
    for name in "kv":
        given[name] = np.pad(given[name], ((0, 0), (0, 0), (0, 28), (0, 0)))[:, :, :100]
    check(interpreter, given, options, cut(), full=True)


def test_packing_is_undone_by_unpacking() -> None:
    numbers = np.random.default_rng(0).integers(0, 16, (2, 3, 5, 64), np.uint8)
    np.testing.assert_array_equal(unpack(pack(numbers)), numbers)
    assert pack(np.arange(16, dtype=np.uint8))[1] == 1 | 9 << 4


def test_reference_is_the_softmax_of_float64() -> None:
    options = CONTRACT.options({"k_scale": "token", "v_scale": "channel", "out": "float32"})
    given = operands(options, lengths=(7, 100), heads=(4, 2))
    k, v = dequantized(given, options, "k")[0, 1, :7], dequantized(given, options, "v")[0, 1, :7]
    scores = k @ given["q"][0, 3].astype(np.float64) / 8
    weights = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(reference(given, options)["out"][0, 3], weights @ v, rtol=1e-6)


def test_traffic_is_that_of_every_tensor_once() -> None:
    options = CONTRACT.options({"cache": "uint4"})
    least = CONTRACT.traffic(operands(options) | {"out": np.zeros((2, 4, 64), np.float16)}, options)
    assert (least.read, least.written) == (2 * 4 * 64 * 2 + 2 * (2 * 2 * 100 * 32) + 8 + 8, 2 * 4 * 64 * 2)
    assert least.macs == 2 * 2 * 4 * 100 * 64


def test_requests_are_the_cache_once_and_the_parts() -> None:
    """With one part and one tile, little is asked for beyond every tensor once: the parts and their statistics."""
    options = CONTRACT.options({"cache": "uint4"})
    given = operands(options) | {"out": np.zeros((2, 4, 64), np.float16)}
    asked = CONTRACT.requests(given, options, cut(128, 1))
    once = 2 * 4 * 64 * 2 + 2 * (2 * 2 * 100 * 32) + 4 * 4 * 3  # a program per cached head: length and two scales
    parts = 4 * 2 * 4 * (64 + 2)
    assert (asked.read, asked.written) == (once + parts, 2 * 4 * 64 * 2 + parts)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"cache": "uint4"}, "takes k only with cache"),
        ({"q": np.zeros((2, 3, 64), np.float16)}, {}, "must be a multiple of the cache's 2; found 3"),
        ({"lengths": np.zeros(3, np.int32)}, {}, "lengths must have B = 2"),
        ({"k": np.zeros((2, 2, 100, 64), np.uint8)}, {}, "k must have dtype int8; found uint8"),
        ({}, {"k_scale": "token"}, "takes k_scale_one only with k_scale tensor"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(operands({}) | changes, CONTRACT.options(options))


def test_other_lengths_of_heads_are_refused() -> None:
    with pytest.raises(TargetError, match="heads must have length 64, 128, 256; found 80"):
        CONTRACT.check(operands({}, length=80), CONTRACT.options({}))


@pytest.mark.aot
def test_caches_are_loaded_wide_and_not_converted_one_by_one() -> None:
    from qcompiler.kernels.launching import compilations
    from qcompiler.kernels.proof.compiling import compile_for

    [found] = [c for c in compilations(KERNEL, "sm90", full=False) if c.case.label == "int8, per token"]
    attend = compile_for(found.calls[0], "sm90")
    assert not {8, 16} & set(attend.loads)
    assert attend.instructions.get("I2F", 0) <= 2  # divisions by the number of heads; none per token
    assert "HMMA" in attend.matrix
