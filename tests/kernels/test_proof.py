"""The static proof finds what it is for, and states what the kernels' configurations rest on."""

from __future__ import annotations

from typing import Any

import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.catalog import contract_of
from qcompiler.kernels.config import Config, config, load_table

pytestmark = pytest.mark.aot

LARGE = {"B": 1, "M": 4096, "N": 4096, "K": 4096, "W": 1}


def compiled(kernel: str, arch: str, given: dict[str, str], tile: Config | None = None) -> Any:
    from qcompiler.kernels.catalog import implementation_of
    from qcompiler.kernels.proof.compiling import compile_for

    contract = contract_of(kernel)
    options = contract.options(given)
    tensors = {**contract.operands(LARGE, options, {}), **contract.example_scalars(options)}
    chosen = tile or load_table(kernel).choose(arch, LARGE, options)
    [call] = implementation_of(kernel).calls(tensors, options, chosen)
    return compile_for(call, arch)


def test_int8_on_sm90_is_wgmma_with_wide_loads_and_no_contraction() -> None:
    found = compiled("int8_matmul", "sm90", {"offset": "channel", "activation": "relu", "out": "int8"})
    assert found.faults("IGMMA") == []
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in found.ptx
    assert set(found.waits) == {0}  # Triton leaves only float sums in flight
    assert "FFMA" not in found.instructions  # requantization rounds the product before it adds
    # The tiles and the stores are 128 bits wide; the vectors of an epilogue may be narrower.
    assert found.loads[128] >= 0.8 * sum(found.loads.values())
    assert set(found.stores) == {128}
    assert found.scratch == 0


def test_fp8_on_sm90_is_wgmma_with_one_in_flight() -> None:
    found = compiled("fp8_matmul", "sm90", {"a_scale": "token"})
    assert found.faults("QGMMA") == []
    assert "e4m3.e4m3" in found.ptx
    assert 1 in found.waits
    assert set(found.stores) == {128}


def test_promotion_adds_up_outside_the_tensor_core() -> None:
    tile = config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8}, 8, 4)
    fast = compiled("fp8_matmul", "sm90", {}, tile)
    promoted = compiled("fp8_matmul", "sm90", {"accumulate": "promoted"}, tile)
    assert promoted.instructions["FADD"] >= fast.instructions.get("FADD", 0) + 64  # one per sum that a thread holds


def test_faults_name_spills_shared_memory_and_instructions() -> None:
    narrow = config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "GROUP_M": 8}, warps=4, stages=3)
    faults = compiled("int8_matmul", "sm80", {}, narrow).faults("IGMMA")
    assert any(f.startswith("expected IGMMA; found IMMA") for f in faults)
    assert any(f.startswith("spills: ") for f in faults)
    deep = config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8}, warps=8, stages=6)
    assert any("shared memory; sm89 has 101376" in f for f in compiled("int8_matmul", "sm89", {}, deep).faults())


def test_what_an_architecture_lacks_is_refused() -> None:
    with pytest.raises(TargetError, match="fp8_matmul does not compile for sm80"):
        compiled("fp8_matmul", "sm80", {}, config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8}))


def test_signatures_are_those_of_a_launch() -> None:
    from qcompiler.kernels.call import signature
    from qcompiler.kernels.catalog import implementation_of

    contract = contract_of("int8_matmul")
    options = contract.options({"out": "int8"})
    dims = {"B": 1, "M": 1, "N": 30, "K": 1, "W": 1}
    tensors = {**contract.operands(dims, options, {}), **contract.example_scalars(options), "out_zero": 1}
    tile = load_table("int8_matmul").choose("sm90", dims, options)
    found = signature(implementation_of("int8_matmul").calls(tensors, options, tile)[0])
    assert (found.types["a_ptr"], found.types["out_ptr"], found.types["scale"]) == ("*i8", "*i8", "fp32")
    assert (found.types["bias_ptr"], found.constants["bias_ptr"]) == ("constexpr", None)
    assert (found.types["K"], found.constants["K"]) == ("constexpr", 1)
    assert (found.types["M"], found.types["out_zero"]) == ("i32", "i32")  # never specialised
    assert "a_ptr" in found.divisible
    assert "N" not in found.divisible
