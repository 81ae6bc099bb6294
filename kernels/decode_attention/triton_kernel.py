"""``decode_attention`` in Triton: the query heads of one head of the cache are rows of a tile, its parts programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.decode_attention.contract import ROWS, SCALES, head_tiles, softmax_factor
from qcompiler.kernels.epilogue.triton_kernel import to_output
from qcompiler.kernels.operand import describe, strides


@triton.jit
def to_half(stored, CACHE: tl.constexpr, UPPER: tl.constexpr):
    """Return stored numbers of the cache as float16, exactly; integers by way of the mantissa, no I2F."""
    if CACHE == "float8e4m3fn":
        return stored.to(tl.float16)
    elif CACHE == "int8":
        number = (stored.to(tl.uint8, bitcast=True) ^ 128).to(tl.uint16) | 0x6400
        return number.to(tl.float16, bitcast=True) - 1152.0
    elif UPPER:
        number = (stored >> 4).to(tl.uint16) | 0x6400
        return number.to(tl.float16, bitcast=True) - 1032.0
    else:
        number = (stored & 15).to(tl.uint16) | 0x6400
        return number.to(tl.float16, bitcast=True) - 1032.0


@triton.jit(do_not_specialize=["H", "G", "S", "GROUP"])
def decode_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    lengths_ptr,
    partial_ptr,
    statistics_ptr,
    B,
    H,
    G,
    S,
    GROUP,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    softmax_scale,
    CACHE: tl.constexpr,
    K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attend up to ROWS query heads of one cache head to one part of its tokens."""
    wide: tl.constexpr = D // 2 if CACHE == "uint4" else D
    cached = tl.program_id(0) // TILES
    batch = cached // G
    head = cached % G
    part = tl.program_id(1)
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    row_mask = row < GROUP
    channel = tl.arange(0, wide)
    token = tl.arange(0, BLOCK_S)

    length = tl.load(lengths_ptr + batch)
    share = tl.cdiv(tl.cdiv(length, BLOCK_S), SPLIT) * BLOCK_S
    start = part * share
    stop = tl.minimum(length, start + share)
    line = (batch * H + head * GROUP).to(tl.int64)
    place = part.to(tl.int64) * B * H + line
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if start < stop:
        q_ptrs = q_ptr + batch.to(tl.int64) * stride_qb + (head * GROUP + row[:, None]) * stride_qh + channel[None, :]
        q = tl.load(q_ptrs, mask=row_mask[:, None], other=0.0).to(tl.float32)
        # exp is taken to the base of 2.
        factor = softmax_scale * 1.4426950408889634
        k_scale_ptrs = k_scale_ptr
        if K_SCALE == "channel":
            k_scale_ptrs = k_scale_ptr + head * D + channel
            q = q * tl.load(k_scale_ptrs)[None, :]
        elif K_SCALE == "tensor":
            factor = factor * tl.load(k_scale_ptr)
        q = q.to(tl.float16)
        upper_q = q
        if CACHE == "uint4":
            upper_q = tl.load(q_ptrs + wide, mask=row_mask[:, None], other=0.0).to(tl.float32)
            if K_SCALE == "channel":
                upper_q = upper_q * tl.load(k_scale_ptrs + wide)[None, :]
            upper_q = upper_q.to(tl.float16)

        k_start = k_ptr + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kg
        v_start = v_ptr + batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vg
        tokens = cached.to(tl.int64) * S
        values = tl.zeros((ROWS, wide), tl.float32)
        upper_values = tl.zeros((ROWS, wide), tl.float32)
        for s in range(start, stop, BLOCK_S):
            known = token < stop - s
            k_ptrs = k_start + tl.cast(s, tl.int64) * stride_ks + token[:, None] * stride_ks + channel[None, :]
            if CACHE == "float8e4m3fn":
                stored = tl.load(k_ptrs, mask=known[:, None], other=0.0)
            else:
                stored = tl.load(k_ptrs, mask=known[:, None], other=0)
            scores = tl.dot(q, tl.trans(to_half(stored, CACHE, False)))
            if CACHE == "uint4":
                scores = tl.dot(upper_q, tl.trans(to_half(stored, CACHE, True)), scores)
            scores = scores * factor
            if K_SCALE == "token":
                scores = scores * tl.load(k_scale_ptr + tokens + s + token, mask=known, other=0.0)[None, :]
            scores = tl.where(known[None, :], scores, float("-inf"))
            before = greatest
            greatest = tl.maximum(greatest, tl.max(scores, 1))
            fading = tl.exp2(before - greatest)
            weights = tl.exp2(scores - greatest[:, None])
            total = total * fading + tl.sum(weights, 1)
            if V_SCALE == "token":
                weights = weights * tl.load(v_scale_ptr + tokens + s + token, mask=known, other=0.0)[None, :]
            weights = weights.to(tl.float16)
            v_ptrs = v_start + tl.cast(s, tl.int64) * stride_vs + token[:, None] * stride_vs + channel[None, :]
            if CACHE == "float8e4m3fn":
                stored = tl.load(v_ptrs, mask=known[:, None], other=0.0)
            else:
                stored = tl.load(v_ptrs, mask=known[:, None], other=0)
            values = tl.dot(weights, to_half(stored, CACHE, False), values * fading[:, None])
            if CACHE == "uint4":
                upper_values = tl.dot(weights, to_half(stored, CACHE, True), upper_values * fading[:, None])

        v_scale_ptrs = v_scale_ptr
        scale = 1.0
        if V_SCALE == "channel":
            v_scale_ptrs = v_scale_ptr + head * D + channel
            values = values * tl.load(v_scale_ptrs)[None, :]
        elif V_SCALE == "tensor":
            scale = tl.load(v_scale_ptr)
            values = values * scale
        partial_ptrs = partial_ptr + (place + row[:, None]) * D + channel[None, :]
        tl.store(partial_ptrs, values, mask=row_mask[:, None])
        if CACHE == "uint4":
            if V_SCALE == "channel":
                upper_values = upper_values * tl.load(v_scale_ptrs + wide)[None, :]
            elif V_SCALE == "tensor":
                upper_values = upper_values * scale
            tl.store(partial_ptrs + wide, upper_values, mask=row_mask[:, None])

    statistics_ptrs = statistics_ptr + (place + row) * 2
    tl.store(statistics_ptrs, greatest, mask=row_mask)
    tl.store(statistics_ptrs + 1, total, mask=row_mask)


@triton.jit(do_not_specialize=["LINES"])
def combine(
    partial_ptr,
    statistics_ptr,
    out_ptr,
    LINES,
    H,
    stride_ob,
    stride_oh,
    OUT: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add the parts of one query head, each faded to the greatest score of all; a part without tokens holds nothing."""
    line = tl.program_id(0)
    channel = tl.arange(0, D)
    greatest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    values = tl.zeros((D,), tl.float32)
    for part in range(SPLIT):
        place = tl.cast(part, tl.int64) * LINES + line
        before = greatest
        score = tl.load(statistics_ptr + place * 2)
        amount = tl.load(statistics_ptr + place * 2 + 1)
        held = amount > 0.0
        greatest = tl.maximum(greatest, score)
        fading = tl.where(before == float("-inf"), 0.0, tl.exp2(before - greatest))
        share = tl.where(held, tl.exp2(score - greatest), 0.0)
        found = tl.load(partial_ptr + place * D + channel, mask=channel < tl.where(held, D, 0), other=0.0)
        values = values * fading + found * share
        total = total * fading + amount * share
    values = values / tl.where(total > 0.0, total, 1.0)
    out_ptrs = out_ptr + (line // H).to(tl.int64) * stride_ob + (line % H) * stride_oh + channel
    tl.store(out_ptrs, to_output(values, 0, OUT))


def calls(tensors: Mapping[str, Any], options: Options, config: Config) -> list[Call]:
    """Return the launches: the parts, and their sum.

    Args:
        tensors: arguments by name, checked against the contract, with ``out`` and the scratch.
        options: complete.
        config: with BLOCK_S and SPLIT.
    """
    q, out = tensors["q"], tensors["out"]
    k, v = (tensors[letter + "4" if options["cache"] == "uint4" else letter] for letter in "kv")
    batch, heads, length = describe(q).shape
    cached, steps = describe(k).shape[1:3]
    tiles = head_tiles({"H": heads, "G": cached})
    k_scale, v_scale = (tensors[f"{name}_{'one' if options[name] == 'tensor' else options[name]}"] for name in _SCALES)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_scale_ptr": k_scale,
        "v_scale_ptr": v_scale,
        "lengths_ptr": tensors["lengths"],
        "partial_ptr": tensors["partial"],
        "statistics_ptr": tensors["statistics"],
        "B": batch,
        "H": heads,
        "G": cached,
        "S": steps,
        "GROUP": heads // cached,
        **dict(zip(("stride_qb", "stride_qh"), strides(q)[:2], strict=True)),
        **dict(zip(("stride_kb", "stride_kg", "stride_ks"), strides(k)[:3], strict=True)),
        **dict(zip(("stride_vb", "stride_vg", "stride_vs"), strides(v)[:3], strict=True)),
        "softmax_scale": softmax_factor(tensors, options, length),
    }
    constants: dict[str, Any] = {name.upper(): options[name] for name in ("cache", *_SCALES)}
    constants |= {"D": length, "ROWS": ROWS, "TILES": tiles} | dict(config.tile)
    attend = Call(decode_attention, (batch * cached * tiles, config["SPLIT"], 1), arguments, constants, config)
    kept = {name: arguments[name] for name in ("partial_ptr", "statistics_ptr", "H")}
    kept |= {"out_ptr": out, "LINES": batch * heads}
    kept |= dict(zip(("stride_ob", "stride_oh"), strides(out)[:2], strict=True))
    own = {"OUT": options["out"], "D": length, "SPLIT": config["SPLIT"]}
    return [attend, Call(combine, (batch * heads, 1, 1), kept, own, Config(config.tile, 1, 2))]


_SCALES = ("k_scale", "v_scale")


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, every cache and kind of scale once."""
    batch = {"B": 16, "H": 32, "G": 8, "S": 8192, "D": 128}
    single = batch | {"B": 1, "S": 32768}
    tokens = {"k_scale": "token", "v_scale": "token"}
    found = [
        Case("int8, per token", batch, tokens),
        Case(
            "uint4, keys per channel, values per token",
            batch,
            {"cache": "uint4", "k_scale": "channel"} | {"v_scale": "token"},
        ),
    ]
    if arch != "sm80":  # no 8-bit floats there
        found.append(Case("float8e4m3fn, per tensor", batch, {"cache": "float8e4m3fn"}, full=True))
    found += [Case(f"int8, scales per {s}", single, {"k_scale": s, "v_scale": s}, full=True) for s in SCALES]
    found += [
        Case(f"{cache}, heads of {length}", single | {"D": length}, {"cache": cache} | tokens, full=True)
        for length in (64, 256)
        for cache in ("int8", "uint4", *(("float8e4m3fn",) if arch != "sm80" else ()))
    ]
    return tuple(found)
