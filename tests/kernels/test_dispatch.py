"""Whatever the shape, the options and the architecture: there is a configuration, and the GPU can hold it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompiler.errors import TargetError
from qcompiler.kernels.catalog import contract_of, kernel_names
from qcompiler.kernels.config import Config, arch_number, load_table, user_folder
from qcompiler.kernels.contract import Contract
from qcompiler.kernels.proof.compiling import shared_limit
from qcompiler.kernels.proof.table import shipped_rows

GPUS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
LENGTH = st.one_of(st.integers(1, 300), st.sampled_from((16, 64, 128, 512, 1024, 2048, 4096, 8192, 14336)))
KERNELS = kernel_names()

ROWS_BY_CONFIG: dict[tuple[str, str, str], list[Any]] = {}
for _row in shipped_rows():
    ROWS_BY_CONFIG.setdefault((_row.kernel, _row.arch, _row.config), []).append(_row)


@st.composite
def calls(draw: st.DrawFn, kernel: str) -> tuple[Contract, dict[str, int], dict[str, str]]:
    """Draw axes and options of a call that the contract allows."""
    contract = contract_of(kernel)
    options = {c.name: draw(st.sampled_from(c.values), label=c.name) for c in contract.choices}
    if draw(st.booleans(), label="mostly defaults"):
        varied = draw(st.sampled_from([c.name for c in contract.choices]))
        options = contract.options({varied: options[varied]})
    axes = {d for a in contract.tensors(options) for d in a.axes(options) if d.isidentifier() and d not in options}
    dims = {axis: draw(LENGTH, label=axis) for axis in sorted(axes)}
    _relate(draw, contract, dims, options)
    try:
        operands = contract.operands(dims, options, {})
        contract.check({**operands, **contract.example_scalars(options)}, options)
    except TargetError:
        assume(False)
    return contract, dims, options


def _relate(draw: st.DrawFn, contract: Contract, dims: dict[str, int], options: dict[str, str]) -> None:
    """Make axes fit each other, by what they are called in the contracts."""
    if "W" in dims and "B" in dims:
        dims["W"] = draw(st.sampled_from((1, dims["B"])))
    for axis in [a for a in dims if len(a) == 2 and a[1] in dims]:  # an operand that is broadcast
        dims[axis] = draw(st.sampled_from((1, dims[axis[1]])))
    if {"G", "H", "D"} <= set(dims):
        dims["D"] = draw(st.sampled_from((64, 128, 256)))
        dims["H"] = dims["G"] * draw(st.sampled_from((1, 4, 8)))
    if options.get("scale") == "group":
        dims["N"] = draw(st.integers(1, 64)) * int(options["group"])
    if contract.name == "int4_matvec":
        dims["M"] = draw(st.integers(1, 64))
    if {"P", "Q", "R", "S"} <= set(dims):
        _relate_windows(draw, contract, dims, options)


def _relate_windows(draw: st.DrawFn, contract: Contract, dims: dict[str, int], options: dict[str, str]) -> None:
    numbers = contract.example_scalars(options)
    dims |= {"R": draw(st.sampled_from((1, 3, 7))), "S": draw(st.sampled_from((1, 3, 5)))}
    for picture, window, out, ends in (("H", "R", "P", "top bottom"), ("W", "S", "Q", "left right")):
        padding = sum(int(numbers[f"pad_{end}"]) for end in ends.split())
        dims[picture] = min(dims[picture], 64) + dims[window]
        dims[out] = dims[picture] + padding - dims[window] + 1
    if options["kind"] == "depthwise":
        dims["O"] = dims["C"]
    else:
        dims["D"] = dims["C"]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_there_is_always_a_configuration_that_fits(kernel: str, data: st.DataObject) -> None:
    contract, dims, options = data.draw(calls(kernel))
    arch = data.draw(st.sampled_from([a for a in GPUS if arch_number(a) >= contract.least_arch]))
    table = load_table(kernel)
    entry = table.entry(arch, dims, options)
    chosen = table.choose(arch, dims, options)
    assert chosen == entry.config
    assert entry.holds(dims, options)
    for row in ROWS_BY_CONFIG.get((kernel, entry.arch, str(chosen)), ()):
        assert row.shared <= shared_limit(arch)
        assert row.programs >= 1
    for name, operand in contract.scratch(dims, options, chosen).items():
        assert contract.argument(name).role == "scratch"
        assert operand.nbytes > 0
    given_all = {**contract.operands(dims, options, {}), **contract.example_scalars(options)}
    asked = contract.requests(given_all, options, chosen)
    assert asked.macs >= 0
    assert asked.written >= sum(contract.operands(dims, options, {})[a.name].nbytes for a in contract.tensors(options)
                                if a.role == "output")  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_are_powers_of_two_and_warps_are_legal(kernel: str) -> None:
    for entry in load_table(kernel).entries:
        assert entry.config.warps in (1, 2, 4, 8, 16, 32)
        assert 1 <= entry.config.stages <= 8
        for name, number in entry.config.tile:
            assert number & (number - 1) == 0, f"{name} {number}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_architecture_from_the_least_on_has_a_table(kernel: str) -> None:
    contract, table = contract_of(kernel), load_table(kernel)
    for arch in GPUS:
        if arch_number(arch) >= contract.least_arch:
            assert table.of(arch)[-1].when == ()
    if contract.least_arch > 80:
        with pytest.raises(TargetError, match=f"no configuration for sm80; expected at least sm{contract.least_arch}"):
            table.of("sm80")


@pytest.mark.parametrize("kernel", sorted({key[0] for key in ROWS_BY_CONFIG}))
def test_every_shipped_configuration_that_was_proven_fits_its_architecture(kernel: str) -> None:
    shipped = {(e.arch, str(e.config)) for e in load_table(kernel).entries}
    for (name, arch, config), rows in ROWS_BY_CONFIG.items():
        if name == kernel and (arch, config) in shipped:
            assert all(r.shared <= shared_limit(arch) and r.stack == 0 and r.programs >= 1 for r in rows)


def test_where_the_users_tables_lie(tmp_path: Any) -> None:
    assert user_folder({"QCOMPILER_KERNEL_CONFIGS": "/k", "QCOMPILER_CACHE": "/c"}).as_posix() == "/k"
    assert user_folder({"QCOMPILER_CACHE": "/c"}).as_posix() == "/c/kernels"
    assert user_folder({"XDG_CACHE_HOME": "/x"}).as_posix() == "/x/qcompiler/kernels"
    assert user_folder({}).parts[-3:] == (".cache", "qcompiler", "kernels")
    assert Config((("BLOCK", 1),)) == Config((("BLOCK", 1),), 4, 2)
