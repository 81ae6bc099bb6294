"""``qcompiler kernels`` and ``tune`` on a machine without Triton or a GPU, and what they print."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcompiler.cli_kernels import differences
from qcompiler.kernels.catalog import kernel_names
from qcompiler.kernels.proof.table import shipped_rows

ROW = {
    "arch": "sm90", "when": {"M": [1, 1]}, "tile": {"BLOCK_N": 64, "BLOCK_M": 16}, "warps": 4, "stages": 3,
    "triton": "3.6.0", "device": "NVIDIA H200", "microseconds": 12.5, "gain": 1.25, "dims": {"M": 1, "N": 64},
    "date": "2026-01-02",
}  # fmt: skip


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest)
    )


def test_the_proof_is_a_table_that_needs_no_triton(call: Any, without_triton: None) -> None:
    done = call("kernels", "int8_matmul")
    assert done.code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[:6] == ["kernel", "arch", "case", "config", "matrix", "regs"]
    [line] = [text for text in lines if " requantize, relu " in text]
    assert "IGMMA" in line
    assert line.split()[-2:] == ["50.4", "1364.45"]  # MB, and 4096**3 multiply-adds per byte of them
    assert {text.split()[1] for text in lines[1:]} == {"sm90"}


def test_all_architectures_and_json(call: Any, without_triton: None) -> None:
    found = json.loads(call("kernels", "fp8_matmul", "--arch", "all", "--json").stdout)
    assert set(found) == {"rows"}
    rows = found["rows"]
    assert {r["arch"] for r in rows} == {"sm89", "sm90", "sm100"}
    assert {r["kernel"] for r in rows} == {"fp8_matmul"}
    row = next(r for r in rows if r["arch"] == "sm90" and r["case"] == "per row")
    assert (row["instruction"], row["stack"], row["waits"]) == ("QGMMA", 0, [1, 0])
    assert row["macs"] == 4096**3
    assert row["read"] == 2 * 4096**2 + 2 * 4 * 4096
    assert row["macs_per_byte"] == pytest.approx(row["macs"] / (row["read"] + row["written"]), abs=0.01)


def test_all_kernels_are_listed_or_named_as_missing(call: Any, without_triton: None) -> None:
    text = call("kernels").stdout
    assert all(kernel in text for kernel in kernel_names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "nothing"), "unknown kernel 'nothing'; expected one of decode_attention, "),
        (("kernels", "--arch", "sm75"), "no proof for 'sm75'; expected one of sm80, sm89, sm90, sm100, all"),
        (("kernels", "--compile"), "compiling kernels needs triton (Linux): pip install 'qcompiler[triton]'"),
        (("tune", "compile", "int8_matmul", "-o", "x"), "compiling kernels needs triton (Linux)"),
        (
            ("tune", "time", "no-such-folder"),
            "no candidates in no-such-folder; write some with: qcompiler tune compile",
        ),
        (("tune", "show", "nothing"), "unknown kernel 'nothing'"),
    ],
)
def test_errors_are_one_line(call: Any, without_triton: None, arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_differences_name_what_changed() -> None:
    first, second, third = shipped_rows()[:3]
    changed = replace(second, registers=second.registers + 1, stack=16)
    new = replace(first, case="another")
    lines = differences([first, changed, new], [first, second, third], full=True)
    assert lines[0].endswith(f"registers {second.registers} -> {second.registers + 1}, stack 0 -> 16")
    assert lines[0].startswith(" ".join(second.key))
    assert lines[1].endswith("another: not in the shipped table")
    assert lines[2].endswith("in the shipped table, but no longer compiled")
    assert differences([first], [first, second], full=False) == []


def test_tables_of_the_user_are_shown(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.cli_tune._triton_version", lambda: "3.9.0")
    assert call("tune", "show", "--folder", tmp_path).stdout == f"0 entries in {tmp_path}\n"
    rows = [ROW, ROW | {"triton": "3.9.1", "device": "NVIDIA H100"}]
    (tmp_path / "int8_matmul.json").write_text(json.dumps({"kernel": "int8_matmul", "entries": rows}))
    text = call("tune", "show", "int8_matmul", "--folder", tmp_path).stdout
    stale, fresh = (next(t for t in text.splitlines() if device in t) for device in ("H200", "H100"))
    assert "16x64 w4 s3" in stale
    assert "1.250x" in stale
    assert "stale: Triton here is 3.9.0" in stale
    assert "stale" not in fresh
    (tmp_path / "int8_matmul.json").write_text("{")
    done = call("tune", "show", "--folder", tmp_path)
    assert done.code == 2
    assert "int8_matmul.json are malformed" in done.stderr


def test_the_users_folder_is_the_default(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_KERNEL_CONFIGS", str(tmp_path / "mine"))
    assert call("tune", "show").stdout == f"0 entries in {tmp_path / 'mine'}\n"


def test_help_has_examples(call: Any) -> None:
    for command in (("kernels",), ("tune", "compile"), ("tune", "time"), ("tune", "show")):
        assert "Examples:" in call(*command, "--help").stdout
