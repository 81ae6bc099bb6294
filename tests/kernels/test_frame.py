from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.catalog import contract_of, kernel_names, reference_of
from qcompiler.kernels.config import Entry, config, dump_table, load_table, parse_table, table_arch
from qcompiler.kernels.contract import resolve
from qcompiler.kernels.operand import Operand, describe, dtype_name, strides

SMALL, LARGE = config({"BLOCK": 16}), config({"BLOCK": 128}, warps=8, stages=3)

TABLE = """{"kernel": "k", "entries": [
  {"arch": "sm80", "when": {"M": [null, 16]}, "multiple": {"N": 8}, "options": {"out": ["int8"]}, "tile": {"BLOCK": 16},
   "warps": 4, "stages": 2, "triton": "3.6.0", "device": null, "microseconds": null},
  {"arch": "sm80", "tile": {"BLOCK": 128}, "warps": 8, "stages": 3, "triton": "3.6.0", "device": null,
   "microseconds": null}]}"""


@pytest.mark.parametrize(
    ("dims", "out", "expected"),
    [
        ({"M": 16, "N": 8}, "int8", SMALL),
        ({"M": 17, "N": 8}, "int8", LARGE),
        ({"M": 16, "N": 9}, "int8", LARGE),
        ({"M": 16, "N": 8}, "float16", LARGE),
    ],
)
def test_the_first_entry_that_holds_is_taken(dims: dict[str, int], out: str, expected: object) -> None:
    assert parse_table(TABLE, "test").choose("sm80", dims, {"out": out}) == expected


def test_tables_survive_writing_and_reading() -> None:
    for table in (parse_table(TABLE, "test"), *map(load_table, kernel_names())):
        assert parse_table(dump_table(table), "test") == table


def test_a_users_table_goes_first(tmp_path: Path) -> None:
    options = contract_of("norm_quantize").options({})
    mine = Entry("sm90", config({"ROWS": 2}), triton="3.6.0", device="some GPU", microseconds=1.5)
    (tmp_path / "norm_quantize.json").write_text(dump_table(replace(load_table("norm_quantize"), entries=(mine,))))
    dims = {"M": 4, "N": 100}
    assert load_table("norm_quantize", tmp_path).entry("sm90", dims, options) == mine
    assert load_table("norm_quantize", tmp_path).choose("sm80", dims, options) == config({"ROWS": 16}, 4, 1)
    assert load_table("norm_quantize", tmp_path / "absent").choose("sm90", dims, options) == config({"ROWS": 16}, 4, 1)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("sm80", "sm80"), ("sm86", "sm80"), ("sm89", "sm89"), ("sm90", "sm90"), ("sm103", "sm100"), ("sm120", "sm89")],
)
def test_other_architectures_use_the_nearest_table(arch: str, expected: str) -> None:
    assert table_arch(arch, ("sm80", "sm89", "sm90", "sm100")) == expected


def test_errors_of_tables() -> None:
    with pytest.raises(TargetError, match="no configuration for sm75; expected at least sm80"):
        table_arch("sm75", ("sm80", "sm90"))
    with pytest.raises(TargetError, match="unknown architecture 'hopper'"):
        table_arch("hopper", ("sm80",))
    with pytest.raises(TargetError, match="configurations of mine are malformed: KeyError"):
        parse_table('{"kernel": "k", "entries": [{}]}', "mine")
    with pytest.raises(TargetError, match="unknown kernel 'conv'; expected one of"):
        contract_of("conv")
    table = replace(parse_table(TABLE, "test"), entries=parse_table(TABLE, "test").entries[:1])
    with pytest.raises(TargetError, match="k has no configuration for sm80"):
        table.choose("sm80", {"M": 99, "N": 8}, {"out": "int8"})


def test_dims_may_be_quotients_of_axes_and_options() -> None:
    assert resolve("K/128", {"K": 129}, {}) == 2
    assert resolve("K/group", {"K": 128}, {"group": "32"}) == 4
    assert resolve("K/G", {"K": 10, "G": 5}, {}) == 2
    assert resolve("K", {}, {}) is None
    assert resolve("16", {}, {}) == 16


def test_operands_describe_arrays() -> None:
    array = np.zeros((4, 6), np.float16)[:, :3]
    assert describe(array) == Operand("float16", (4, 3))
    assert strides(array) == (6, 1)
    assert strides(Operand("int8", (4, 3, 2))) == (6, 2, 1)
    assert Operand("float32", (4, 3)).nbytes == 48
    with pytest.raises(TargetError, match="no kernel takes dtype complex64"):
        dtype_name(np.zeros(1, np.complex64))


@pytest.mark.parametrize("kernel", kernel_names())
def test_references_give_what_contracts_say(kernel: str) -> None:
    """The traffic of a call counts each tensor once, and a launch never asks for less."""
    assert callable(reference_of(kernel).reference)
    contract = contract_of(kernel)
    options = contract.options({})
    axes = {d for a in contract.arguments for d in a.dims if d.isidentifier()}
    dims = dict.fromkeys(axes, 128) | {axis: 1 for axis in axes if axis in ("B", "W")}
    operands = contract.operands(dims, options, {})
    least = contract.traffic({**operands, **contract.example_scalars(options)}, options)
    assert least.total == sum(o.nbytes for o in operands.values())
    chosen = load_table(kernel).choose("sm90", dims, options)
    asked = contract.requests(operands, options, chosen)
    assert asked.read >= least.read
    assert asked.written >= least.written
    assert asked.macs >= least.macs


@pytest.mark.parametrize("number", [3.7, 2**40, "x", True, None])
def test_a_scalar_is_held_to_its_dtype(number: Any) -> None:
    contract = contract_of("int8_matmul")
    options = contract.options({"zeros": "kernel", "out": "float32"})
    dims = {"B": 1, "W": 1, "M": 16, "N": 16, "K": 32}
    given: dict[str, Any] = {**contract.operands(dims, options, {}), "w_point": 0}
    given |= {a.name: 1 for a in contract.arguments if a.role == "scalar" and a.wanted(options)}
    contract.check({**given, "a_point": np.int32(7)}, options)
    with pytest.raises(TargetError, match=r"a_point .* must be one int32 number"):
        contract.check({**given, "a_point": number}, options)
