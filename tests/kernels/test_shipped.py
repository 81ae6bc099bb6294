"""Every shipped configuration compiles for its architectures, to the right instructions and without spills."""

from __future__ import annotations

import os

import pytest

from qcompiler.kernels.catalog import contract_of, kernel_names
from qcompiler.kernels.config import ARCHS, arch_number, load_table

EVERYTHING = os.environ.get("QCOMPILER_KERNELS") == "all"

KERNELS_BY_ARCH = [
    (kernel, arch) for kernel in kernel_names() for arch in ARCHS if arch_number(arch) >= contract_of(kernel).least_arch
]


@pytest.mark.aot
@pytest.mark.parametrize(("kernel", "arch"), KERNELS_BY_ARCH)
def test_shipped_configurations_compile(kernel: str, arch: str) -> None:
    """They are fit to ship, and the shipped table of the proof says what they compile to.

    The table is rewritten by ``python -m qcompiler.kernels.proof.table kernels/proof/table.json``.
    """
    from qcompiler.kernels.launching import compilations
    from qcompiler.kernels.proof.compiling import compile_for
    from qcompiler.kernels.proof.table import row_of, shipped_rows

    shipped = {row.key: row for row in shipped_rows()}
    found = compilations(kernel, arch, full=EVERYTHING)
    assert found
    faults, differing = {}, []
    # Outside the full sweep one case of each other architecture, and what the table lacks yet is not asked for.
    for case in found if EVERYTHING or arch == "sm90" else found[:1]:
        for step, call in enumerate(case.calls):
            compiled = compile_for(call, arch)
            faults[case.case.label, step] = compiled.faults(case.instruction if step == 0 else "")
            row = row_of(case, step, compiled)
            if row.key in shipped or EVERYTHING:
                differing += [(row, shipped.get(row.key))] if row != shipped.get(row.key) else []
    assert {key: found for key, found in faults.items() if found} == {}
    assert differing == []


@pytest.mark.aot
@pytest.mark.parametrize(("kernel", "arch"), KERNELS_BY_ARCH)
def test_every_entry_is_compiled_by_some_case(kernel: str, arch: str) -> None:
    from qcompiler.kernels.launching import compilations

    reached = {c.entry for c in compilations(kernel, arch)}
    assert [str(e.config) for e in load_table(kernel).of(arch) if e not in reached] == []


@pytest.mark.parametrize(("kernel", "arch"), KERNELS_BY_ARCH)
def test_the_last_entry_fits_every_call(kernel: str, arch: str) -> None:
    last = load_table(kernel).of(arch)[-1]
    assert (last.when, last.multiple, last.options) == ((), (), ())


@pytest.mark.parametrize("kernel", kernel_names())
def test_tables_name_axes_and_options_of_the_contract(kernel: str) -> None:
    contract, table = contract_of(kernel), load_table(kernel)
    assert table.kernel == contract.name == kernel
    axes = {d.split("/")[0] for a in contract.arguments for d in a.dims}
    values = {c.name: set(c.values) for c in contract.choices}
    for entry in table.entries:
        assert {name for name, _ in (*entry.when, *entry.multiple)} <= axes
        assert all(set(legal) <= values[name] for name, legal in entry.options)
        assert (entry.microseconds is None) == (entry.device is None)


@pytest.mark.parametrize("kernel", kernel_names())
def test_contracts_are_consistent(kernel: str) -> None:
    contract = contract_of(kernel)
    names = [a.name for a in contract.arguments]
    assert len(names) == len(set(names))
    values = {c.name: set(c.values) for c in contract.choices}
    for argument in contract.arguments:
        assert argument.why
        assert argument.when is None or set(argument.when[1]) <= values[argument.when[0]]
        assert not argument.dtype_of or argument.dtype_of in values
        assert argument.dtypes or argument.dtype_of


def test_the_shipped_table_has_no_spills_and_the_promised_instructions() -> None:
    from qcompiler.kernels.proof.table import print_rows, shipped_rows

    rows = shipped_rows()
    assert [row for row in rows if row.stack] == []
    assert len({row.key for row in rows}) == len(rows)
    promised = {("int8_matmul", "sm80"): "IMMA", ("int8_matmul", "sm90"): "IGMMA", ("fp8_matmul", "sm89"): "QMMA"}
    promised |= {("fp8_matmul", "sm90"): "QGMMA", ("fp8_matmul", "sm100"): "UTCQMMA"}
    for (kernel, arch), instruction in promised.items():
        assert instruction in {row.instruction for row in rows if (row.kernel, row.arch) == (kernel, arch)}
    lines = print_rows(rows[:2]).splitlines()
    assert lines[0].split()[:4] == ["kernel", "case", "tile", "matrix"]
    assert len(lines) == 3
