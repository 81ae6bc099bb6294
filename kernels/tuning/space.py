"""Candidates of a kernel for one call: around the entries of its table that hold; no compiler is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from qcompiler.kernels.config import Config, Entry, load_table
from qcompiler.kernels.tuning.work import Work

LEAST = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_S": 16, "BLOCK": 256, "ROWS": 1, "SPLIT": 1}
MOST = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_S": 256, "BLOCK": 16384, "ROWS": 32, "SPLIT": 128}
"""How far constants that may vary freely go beyond the table's own numbers, a factor of two at a time."""

MOST_SUMS = 128
"""Sums of a tile that one thread may hold; more of them spill."""


def candidates(work: Work) -> list[Config]:
    """Return all candidates of a call; the entry that would be chosen comes first."""
    table = load_table(work.kernel)
    chosen = table.entry(work.arch, work.dims, work.options)
    holding = [e for e in table.of(work.arch) if e.holds(work.dims, work.options)]
    found: dict[Config, None] = {chosen.config: None}
    for family in _families(holding):
        for config in _around(family):
            if plausible(config, family[0]):
                found[config] = None
    return list(found)


def expected_instruction(work: Work, config: Config) -> str:
    """Return the matrix instruction that a candidate must compile to: that of the nearest entry with no larger tile."""
    known = load_table(work.kernel).of(work.arch)
    alike = [e for e in known if _family_key(e) == _key(config)] or list(known)
    rows = dict(config.tile).get("BLOCK_M", 0)
    smaller = [e for e in alike if dict(e.config.tile).get("BLOCK_M", 0) <= rows]
    if smaller:
        return max(smaller, key=lambda e: dict(e.config.tile).get("BLOCK_M", 0)).instruction
    return min(alike, key=lambda e: dict(e.config.tile).get("BLOCK_M", 0)).instruction


def plausible(config: Config, like: Entry) -> bool:
    """Return whether a candidate is worth compiling: enough numbers per thread, and not too many sums."""
    tile = dict(config.tile)
    threads = 32 * config.warps
    if like.instruction and "BLOCK_M" in tile:
        sums = tile["BLOCK_M"] * tile["BLOCK_N"]
        return threads <= sums <= MOST_SUMS * threads
    if "BLOCK" in tile:
        return tile["BLOCK"] >= 2 * threads
    return True


def _key(config: Config) -> tuple[object, ...]:
    tile = dict(config.tile)
    return (*sorted(tile), tile.get("BLOCK_M") == 1, tile.get("SWAP"))


def _family_key(entry: Entry) -> tuple[object, ...]:
    return _key(entry.config)


def _families(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Group entries with the same constants: a row alone, for one, is another program than a tile."""
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        found.setdefault(_family_key(entry), []).append(entry)
    return list(found.values())


def _around(family: Sequence[Entry]) -> Iterator[Config]:
    configs = [e.config for e in family]
    names = [name for name, _ in configs[0].tile]
    ranges = [_range(name, [c[name] for c in configs]) for name in names]
    warps = sorted({c.warps for c in configs})
    usual = (4, 8) if family[0].instruction else _powers(warps[0], warps[-1], 1, 16)
    warps = sorted({*usual, *warps})
    deepest = max(c.stages for c in configs)
    stages = [1, 2] if deepest == 1 else list(range(max(2, min(c.stages for c in configs) - 1), deepest + 2))
    for tile in itertools.product(*ranges):
        for warp, stage in itertools.product(warps, stages):
            yield Config(tuple(zip(names, tile, strict=True)), warp, stage)


def _range(name: str, values: Sequence[int]) -> list[int]:
    """Return what a constant may be; those whose meaning depends on the call stay within the table's numbers."""
    if name not in LEAST or (max(values) == 1 and name == "BLOCK_M"):
        return _span(min(values), max(values)) if min(values) > 0 else sorted(set(values))
    return _powers(min(values), max(values), LEAST[name], MOST[name])


def _powers(low: int, high: int, least: int, most: int) -> list[int]:
    """Return the numbers from half the lowest to twice the highest, in powers of two, within bounds."""
    return [n for n in _span(max(low // 2, least), min(high * 2, most)) if least <= n <= most] or [low]


def _span(low: int, high: int) -> list[int]:
    found = [low]
    while found[-1] * 2 <= high:
        found.append(found[-1] * 2)
    return found
