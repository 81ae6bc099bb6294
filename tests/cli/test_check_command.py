"""``qcompiler check``: table, JSON and exit codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qcompiler.cli import Commands
from qcompiler.cli_check import check_command, parse_target_name
from qcompiler.errors import TargetError
from tests.backends.quantized_graphs import Quant, Spec, build

APP = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False)
APP.command("check")(check_command)
APP.command("other")(lambda: None)  # one command alone would take no name


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def call(*arguments: object) -> Done:
    done = CliRunner().invoke(APP, ["check", *map(str, arguments)], env={"COLUMNS": "160"})
    return Done(done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    graphs = {
        "good": Spec("matmul"),
        "uint8": Spec("pair", x=Quant("uint8")),
        "loss": Spec("matmul", w=Quant(axis=0, form="dq")),
        "fp8": Spec("pair", x=Quant("float8e4m3fn")),
    }
    for name, spec in graphs.items():
        (tmp_path / f"{name}.onnx").write_bytes(build(spec))
    return tmp_path


def test_a_clean_model_exits_with_0(folder: Path) -> None:
    done = call(folder / "good.onnx")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{folder / 'good.onnx'} on tensorrt sm89: no errors, no losses\n"


def test_an_error_exits_with_1_and_is_shown_with_its_advice(folder: Path) -> None:
    done = call(folder / "uint8.onnx", "--target", "tensorrt-sm89")
    lines = done.out.splitlines()
    assert done.code == 1
    assert lines[1].split()[:2] == ["error", "uint8-quantization"]
    assert lines[1].rstrip().endswith("numbers are stored as uint8")
    assert lines[2] == "uint8-quantization (1): quantize symmetrically to int8 with an explicit zero point 0"
    assert lines[3].endswith("on tensorrt sm89: 1 error, no losses")


def test_a_loss_exits_with_0(folder: Path) -> None:
    done = call(folder / "loss.onnx")
    assert done.code == 0
    assert "scales lie on axis 0; expected 1, the output axis" in done.out
    assert done.out.splitlines()[-1].endswith("no errors, 1 loss")


def test_json_has_every_field(folder: Path) -> None:
    done = call(folder / "uint8.onnx", "--json")
    data = json.loads(done.out)
    assert done.code == 1
    assert {k: v for k, v in data.items() if k != "diagnostics"} == {
        "model": str(folder / "uint8.onnx"), "engine": "tensorrt", "sm": 89, "errors": 1, "losses": 0,
    }  # fmt: skip
    assert [set(d) for d in data["diagnostics"]] == [{"code", "severity", "node", "origin", "text", "advice"}]
    assert data["diagnostics"][0]["code"] == "uint8-quantization"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--target", "tensorrt-sm80"], 1), (["--target", "tensorrt-sm89"], 0), (["--target", "tensorrt"], 0),
        (["--target", "tensorrt-sm89", "--sm", 80], 1), (["--target", "openvino"], 0),
        (["--flavour", "tensorrt-rtx"], 0),
        (["--flavour", "lean"], 2), (["--engine-version", "new"], 2), (["--target", "abacus"], 2),
    ],
)  # fmt: skip
def test_target_and_its_options(folder: Path, arguments: list[object], code: int) -> None:
    done = call(folder / "fp8.onnx", *arguments)
    assert done.code == code, done
    assert done.err.count("\n") == (code == 2)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for arguments, text in (
        ([], "no model to check: name an ONNX file (or list the rules with --rules)"),
        ([tmp_path / "none.onnx"], "No such file or directory"),
        ([tmp_path / "none.onnx", "--target", "abacus"], "no legality rules for engine 'abacus'; known: "),
    ):
        done = call(*arguments)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")
        assert text in done.err


def test_rules_are_listed_with_evidence() -> None:
    done = call("--rules")
    assert done.code == 0
    assert "uint8-quantization" in done.out
    assert "fp8-needs-sm89" not in done.out  # holds below 8.9 only
    assert "fp8-needs-sm89" in call("--rules", "--sm", 80).out
    rows = json.loads(call("--rules", "--json").out)["rules"]
    assert all(row["why"] and row["advice"] for row in rows)
    assert {r["code"]: r["stricter"] for r in rows}["bias-quantized"] == ""


def test_target_names_are_split() -> None:
    assert parse_target_name("tensorrt-sm120") == ("tensorrt", 120)
    assert parse_target_name("ort-tensorrt") == ("ort-tensorrt", 89)
    with pytest.raises(TargetError, match="target is ''; expected an engine"):
        parse_target_name("")
