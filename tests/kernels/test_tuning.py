"""Tuning: what is tried, what is dropped, and which configuration an invented GPU makes the winner."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.catalog import contract_of, kernel_names
from qcompiler.kernels.config import ARCHS, Config, config, load_table
from qcompiler.kernels.tuning import compiling
from qcompiler.kernels.tuning.compiling import (
    Candidate,
    CandidateSet,
    compile_work,
    read_candidates,
    read_folder,
    select,
)
from qcompiler.kernels.tuning.ranking import floor_us, least_traffic, machine_of
from qcompiler.kernels.tuning.space import candidates, expected_instruction
from qcompiler.kernels.tuning.timing import Place, known, read_rows, row_of, store, time_all, time_set
from qcompiler.kernels.tuning.work import Work, bucket, choose_case, from_json, make_work, parse_shape

LARGE = {"B": 1, "M": 4096, "N": 4096, "K": 4096, "W": 1}
PRODUCT = Case("product", LARGE, {"offset": "channel", "out": "int8"})


def product(arch: str = "sm90", shape: str = "") -> Work:
    return make_work("int8_matmul", arch, PRODUCT, shape)


# ---- what is tuned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, (1, 1)), (2, (2, 4)), (4, (2, 4)), (5, (5, 16)), (64, (17, 64)), (65, (65, 128)), (4096, (2049, 4096))],
)
def test_buckets_of_rows(rows: int, expected: tuple[int, int]) -> None:
    assert bucket(rows) == expected


def test_buckets_cover_all_lengths_once() -> None:
    ends = [bucket(n) for n in range(1, 3000)]
    assert all(low <= n <= high for n, (low, high) in enumerate(ends, 1))
    assert all(a == b or a[1] + 1 == b[0] for a, b in pairwise(ends))


def test_shapes_are_read() -> None:
    contract = contract_of("int8_matmul")
    assert parse_shape(contract, LARGE, "64x128x256") == {"B": 1, "M": 64, "N": 128, "K": 256, "W": 1}
    assert parse_shape(contract, LARGE, "B=4xM=7") == LARGE | {"B": 4, "M": 7}
    assert parse_shape(contract, LARGE, "") == LARGE
    broadcast = {"M": 8, "N": 16, "BM": 8, "BN": 1}
    assert parse_shape(contract, broadcast, "32x64") == {"M": 32, "N": 64, "BM": 32, "BN": 1}
    for text, message in (("64x128", "takes a shape MxNxK"), ("Q=3", "cannot read 'Q=3'"), ("M=0", "at least 1")):
        with pytest.raises(TargetError, match=message):
            parse_shape(contract, LARGE, text)


def test_works_survive_json_and_have_names_of_their_own() -> None:
    work = product()
    assert from_json(json.loads(json.dumps(work.to_json()))) == work
    other = make_work("int8_matmul", "sm90", PRODUCT, options={"out": "float16"})
    assert work.name != other.name
    assert work.when == {"B": (1, 1), "M": (2049, 4096), "N": (4096, 4096), "K": (4096, 4096), "W": (1, 1)}
    with pytest.raises(TargetError, match="unknown case 'nothing'; expected one of 'product'"):
        choose_case([PRODUCT], "nothing")


# ---- candidates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_candidates_begin_with_the_shipped_one_and_stay_within_bounds(arch: str) -> None:
    work = product(arch)
    found = candidates(work)
    assert found[0] == load_table("int8_matmul").choose(arch, work.dims, work.options)
    assert len(found) == len(set(found)) > 30
    for each in found[1:]:
        assert {each[n] & (each[n] - 1) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K")} == {0}
        assert each["BLOCK_M"] * each["BLOCK_N"] <= 128 * 32 * each.warps


def test_the_instruction_that_a_candidate_must_have_follows_its_tile() -> None:
    work = product()
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8}
    assert expected_instruction(work, config(tile)) == "IGMMA"
    assert expected_instruction(work, config(tile | {"BLOCK_M": 32})) == "IMMA"  # too few rows for a warp group


def test_block_scales_keep_the_depth_that_they_are_for() -> None:
    blocks = {"multiplier": "block", "a_scale": "block"}
    work = make_work("fp8_matmul", "sm90", Case("", LARGE, blocks))
    assert {each["BLOCK_K"] for each in candidates(work)} == {128}


def test_the_roofline_and_the_traffic_of_a_product() -> None:
    work = product()
    least = least_traffic(work)
    assert least.macs == 4096**3
    assert (least.read, least.written) == (2 * 4096**2 + 2 * 4 * 4096, 4096**2)
    assert floor_us(work, machine_of("sm90")) == pytest.approx(69.45, abs=0.01)  # 1979 TOPS
    assert floor_us(product(shape="16x4096x4096"), machine_of("sm90")) == pytest.approx(16.95e6 / 4.8e6, rel=0.01)


# ---- the half without a GPU ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InventedCode:
    registers: int
    shared: int
    programs_per_processor: int
    matrix: str

    def faults(self, instruction: str = "") -> list[str]:
        wrong = [f"expected {instruction}; found {self.matrix}"] if instruction not in ("", self.matrix) else []
        return wrong + (["spills: 8 bytes of stack"] if self.registers > 255 else [])


@dataclass
class InventedCompiler:
    """Registers grow with the sums of a thread and with a deep pipeline, shared memory with the tile and its stages."""

    compiled: list[Config] = field(default_factory=list)
    stop_after: int = 10**9

    def __call__(self, call: Call, arch: str) -> InventedCode:
        if len(self.compiled) >= self.stop_after:
            raise KeyboardInterrupt
        self.compiled.append(call.config)
        tile = dict(call.config.tile)
        registers = 40 + 3 * tile["BLOCK_M"] * tile["BLOCK_N"] // (64 * call.config.warps)
        registers += 64 if call.config.stages > 4 else 0
        shared = (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * call.config.stages
        return InventedCode(registers, shared, max(1, 65536 // (registers * 32 * call.config.warps)), "IGMMA")


@pytest.fixture(autouse=True)
def invented_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(tensors: dict[str, Any], options: dict[str, str], each: Config) -> list[Call]:
        rows, columns = tensors["out"].shape[1:]
        tiles = -(-rows // each["BLOCK_M"]) * -(-columns // each["BLOCK_N"])
        return [Call(None, (tiles, 1, 1), tensors, {}, each)]

    monkeypatch.setattr(compiling, "implementation_of", lambda kernel: SimpleNamespace(calls=calls))


def test_unfit_candidates_are_dropped_and_the_shipped_one_is_kept(tmp_path: Path) -> None:
    compiler = InventedCompiler()
    found = compile_work(product(), tmp_path, compiler, "3.6.0", keep=8, most=50)
    assert len(compiler.compiled) == 50
    assert len(found.kept) == 8
    assert found.shipped in [c.config for c in found.kept]
    assert set(found.dropped) == {"spills"}
    assert all(c.registers <= 255 and not c.fault for c in found.kept)
    assert len({c.config.tile for c in found.kept}) >= 2  # variants of one tile do not fill the list
    assert read_folder(tmp_path) == [found]


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    first = InventedCompiler(stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        compile_work(product(), tmp_path, first, "3.6.0", most=20)
    [partial] = tmp_path.glob("*.partial")
    partial.write_text(partial.read_text() + '{"cut off')
    second = InventedCompiler()
    found = compile_work(product(), tmp_path, second, "3.6.0", most=20)
    assert len(second.compiled) == 13
    assert not set(first.compiled) & set(second.compiled)
    assert list(tmp_path.glob("*.partial")) == []
    third = InventedCompiler()
    assert compile_work(product(), tmp_path, third, "3.6.0", most=20) == found
    assert third.compiled == []
    compile_work(product(), tmp_path, third, "3.9.0", most=20)  # another version compiles anew
    assert len(third.compiled) == 20


def test_candidates_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no candidates in .*; write some with: qcompiler tune compile KERNEL"):
        read_folder(tmp_path / "absent")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(TargetError, match=r"x.json are malformed: KeyError\('shipped'\); compile them again"):
        read_candidates(tmp_path / "x.json")


def test_a_kernel_that_refuses_a_tile_is_no_error() -> None:
    def refuse(call: Call, arch: str) -> InventedCode:
        raise TargetError("out of resources")

    judged = compiling.judge(product(), candidates(product())[0], refuse)
    assert judged.fault == "does not compile: out of resources"


# ---- the half with one --------------------------------------------------------------------------------------------

PLACE = Place("sm90", "NVIDIA H200", "580.1", "3.6.0", "2026-01-02")


@dataclass
class InventedTimer:
    """Runs take what ``speeds`` says, with noise that repeats; each takes ten milliseconds of the budget."""

    speeds: dict[Config, float]
    noise: float = 0.0
    wrong: tuple[Config, ...] = ()
    broken: tuple[Config, ...] = ()
    place: Place = PLACE
    now: float = 0.0
    count: int = 0

    def check(self, work: Work, each: Config, trusted: Config) -> str:
        return "its results differ" if each in self.wrong else ""

    def run(self, work: Work, each: Config) -> float:
        if each in self.broken:
            raise RuntimeError("CUDA error:\n an illegal memory access")
        self.now += 0.01
        self.count += 1
        return self.speeds[each] * (1 + self.noise * (self.count % 3 - 1))

    def seconds(self) -> float:
        return self.now


def survivors(count: int = 6) -> CandidateSet:
    found = [c for c in candidates(product()) if c["BLOCK_M"] >= 64][:count]
    return CandidateSet(product(), found[0], tuple(Candidate(c) for c in found), {}, "3.6.0")


def speeds(found: CandidateSet, fastest: int, gain: float = 0.5) -> dict[Config, float]:
    return {c.config: 100.0 * (gain if i == fastest else 1 + i / 100) for i, c in enumerate(found.kept)}


@pytest.mark.parametrize("fastest", range(6))
def test_the_fastest_wins(fastest: int) -> None:
    found = survivors()
    result = time_set(found, InventedTimer(speeds(found, fastest), noise=0.01), budget=10)
    assert result.best.config == found.kept[fastest].config
    assert result.best.median == pytest.approx(50, rel=0.011)
    assert result.best.spread == pytest.approx(0.02, abs=0.001)
    assert len(result.best.runs) == 10
    assert result.timed == 6
    assert result.gain == pytest.approx(1.0 if fastest == 0 else 2.0, rel=0.03)


def test_within_the_spread_the_shipped_one_stays() -> None:
    found = survivors()
    assert time_set(found, InventedTimer(speeds(found, 3, 0.97), noise=0.05), 10).best.config == found.shipped
    assert time_set(found, InventedTimer(speeds(found, 3, 0.97)), 10).best.config == found.kept[3].config


def test_wrong_and_broken_candidates_never_win() -> None:
    found = survivors()
    configs = [c.config for c in found.kept]
    times = {c: 100.0 - 10 * i for i, c in enumerate(configs)}
    timer = InventedTimer(times, wrong=(configs[5],), broken=(configs[4],))
    result = time_set(found, timer, 10)
    assert result.best.config == configs[3]
    assert result.failed[str(configs[5])] == "its results differ"
    assert result.failed[str(configs[4])] == "RuntimeError: CUDA error: an illegal memory access"
    with pytest.raises(TargetError, match=r"no candidate of int8_matmul .* ran"):
        time_set(found, InventedTimer(times, broken=tuple(configs)), 10)


def test_the_budget_ends_it() -> None:
    found = survivors()
    timer = InventedTimer(speeds(found, 5))
    assert time_set(found, timer, budget=0.0).best.config == found.shipped  # three runs of it, in any case
    assert timer.count == 3
    assert time_set(found, InventedTimer(speeds(found, 5)), budget=0.08).timed == 3


def test_the_users_table_is_written_and_goes_first(tmp_path: Path) -> None:
    found = survivors()
    timer = InventedTimer(speeds(found, 2))
    [result] = time_all([found], timer, tmp_path, 10)
    winner, work = found.kept[2].config, found.work
    table = load_table("int8_matmul", tmp_path)
    entry = table.entry("sm90", work.dims, work.options)
    assert entry.config == winner == result.best.config
    assert (entry.device, entry.triton, entry.microseconds) == ("NVIDIA H200", "3.6.0", 50.0)
    assert entry.instruction == "IGMMA"
    [row] = read_rows(tmp_path, "int8_matmul")
    assert (row["driver"], row["date"], row["runs"], row["gain"]) == ("580.1", "2026-01-02", 10, 2.0)
    # The same bucket of rows, but not another one, other options or another architecture.
    assert table.choose("sm90", work.dims | {"M": 3000}, work.options) == winner
    shipped = load_table("int8_matmul")
    for dims, options, arch in (
        (work.dims | {"M": 2048}, work.options, "sm90"),
        (work.dims | {"K": 2048}, work.options, "sm90"),
        (work.dims, {**work.options, "out": "uint8"}, "sm90"),
        (work.dims, work.options, "sm80"),
    ):
        assert table.choose(arch, dims, options) == shipped.choose(arch, dims, options)


def test_what_is_known_is_not_timed_again(tmp_path: Path) -> None:
    found = survivors()
    assert len(time_all([found], InventedTimer(speeds(found, 2)), tmp_path, 10)) == 1
    timer = InventedTimer(speeds(found, 1))
    assert time_all([found], timer, tmp_path, 10) == []
    assert timer.count == 0
    assert known(tmp_path, found.work, PLACE)
    newer = Place("sm90", "NVIDIA H200", "580.1", "3.9.0", "2026-01-02")
    assert not known(tmp_path, found.work, newer)
    [again] = time_all([found], InventedTimer(speeds(found, 1), place=newer), tmp_path, 10)
    assert [r["triton"] for r in read_rows(tmp_path, "int8_matmul")] == ["3.9.0"]  # in place of the older one
    store(tmp_path, time_set(found, InventedTimer(speeds(found, 1)), 1), PLACE)
    assert row_of(again, newer)["tile"] == dict(found.kept[1].config.tile)


def test_a_stale_entry_is_used_and_says_so(tmp_path: Path) -> None:
    found = survivors()
    time_all([found], InventedTimer(speeds(found, 2)), tmp_path, 10)
    entry = load_table("int8_matmul", tmp_path).entry("sm90", found.work.dims, found.work.options)
    assert entry.config == found.kept[2].config
    assert entry.stale("3.9.1")
    assert not entry.stale("3.6.2")


def test_candidates_for_another_gpu_are_refused(tmp_path: Path) -> None:
    found = survivors()
    other = InventedTimer({}, place=Place("sm89", "NVIDIA L4", "1", "3.6.0", ""))
    with pytest.raises(
        TargetError, match=r"are for sm90; this GPU \(NVIDIA L4\) is sm89: compile them with --arch sm89"
    ):
        time_all([found], other, tmp_path, 10)


def test_selection_keeps_the_shipped_one_though_the_model_thinks_it_slow() -> None:
    work = product()
    configs = candidates(work)[:10]
    judged = [Candidate(c, estimate=100.0 - i) for i, c in enumerate(configs)]
    kept = select(work, judged, 3, "3.6.0").kept
    assert [c.config for c in kept] == [configs[9], configs[8], configs[0]]


@pytest.mark.parametrize("kernel", kernel_names())
def test_every_kernel_has_candidates_and_an_instruction_for_them(kernel: str) -> None:
    """Whatever the kernel: axes at 128 give some, and each knows what it must compile to."""
    contract = contract_of(kernel)
    axes = {d for a in contract.arguments for d in a.dims if d.isidentifier()}
    dims = dict.fromkeys(axes, 128) | {axis: 1 for axis in axes if axis in ("B", "W")}
    work = Work(kernel, "sm90", dims, contract.options({}), {})
    found = candidates(work)
    assert len(found) >= 4
    legal = {e.instruction for e in load_table(kernel).of("sm90")}
    assert {expected_instruction(work, c) for c in found} <= legal


@pytest.mark.aot
def test_real_candidates_compile_and_the_bad_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.kernels.catalog import implementation_of
    from qcompiler.kernels.proof.compiling import compile_for

    monkeypatch.setattr(compiling, "implementation_of", implementation_of)
    work = product()
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8}
    assert compiling.judge(work, config(tile, 8, 3), compile_for).fault == ""
    assert "shared memory" in compiling.judge(work, config(tile, 8, 9), compile_for).fault
    assert compiling.judge(work, config(tile | {"BLOCK_N": 256}, 4, 3), compile_for).fault.startswith("spills")
    assert compiling.judge(work, config(tile | {"BLOCK_M": 24}, 4, 2), compile_for).fault.startswith("does not compile")
