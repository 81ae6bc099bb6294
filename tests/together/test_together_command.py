"""``qcompiler compile`` of several models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import qcompiler
from qcompiler.cli import app
from qcompiler.cli_progress import progress_lines
from tests.together.models import LINKS, calibration, sources

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, model in sources().items():
        (tmp_path / f"{name}.onnx").write_bytes(model)
        feeds = calibration()[name]
        np.savez(tmp_path / f"{name}.npz", **{n: np.concatenate([f[n] for f in feeds]) for n in feeds[0]})
    return tmp_path


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(place)

    def run(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["compile", *arguments], env={"COLUMNS": "160"})
        return done.exit_code, done.stdout, done.stderr

    return run


MODELS = ("encoder.onnx", "decoder.onnx", "decoder_with_past.onnx")
DATA = tuple(text for name in sources() for text in ("-c", f"{name}={name}.npz"))
LINKED = tuple(text for taker, giver in LINKS.items() for text in ("--link", f"{taker}={giver}"))
FAST = ("--no-guard", "--quiet")


def test_one_command_writes_a_folder_that_python_would_write(place: Path, call: Call):
    # Rows are cut into feeds of 32 here: the 16 of these files are one feed, whose rows are split.
    code, stdout, stderr = call(*MODELS, "-o", "out", *DATA, *LINKED, "--no-guard", "--report", "report.json")
    assert (code, stderr) == (0, "")
    made = qcompiler.compile_together(
        {name: place / f"{name}.onnx" for name in sources()}, links=LINKS, guard=False,
        calibration={name: place / f"{name}.npz" for name in sources()},
    )  # fmt: skip
    made.save(place / "again")
    assert {p.name: p.read_bytes() for p in (place / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (place / "again").iterdir()
    }
    report = json.loads((place / "report.json").read_text())
    assert report["bytes"]["saved"] == made.report.saved
    assert [row["names"] for row in report["stored_once"]] == [
        {g: list(n) for g, n in row.names.items()} for row in made.report.stored
    ]
    assert "weights   3 weights in several graphs: 3 as int8 per axis 1 in all of them" in stdout
    assert f"wrote {Path('out') / made.layout.name}" in stdout


def test_the_record_repeats_the_folder(place: Path, call: Call):
    assert call(*MODELS, "-o", "out", *DATA, *LINKED, *FAST)[0] == 0
    assert call(*MODELS, "-o", "two", *DATA, *LINKED, "-q", "--decisions", "out/decisions.json")[0] == 0
    assert {p.name: p.read_bytes() for p in (place / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (place / "two").iterdir()
    }


def test_one_model_is_compiled_as_before(place: Path, call: Call):
    assert call("encoder.onnx", "-o", "out.onnx", "-c", "encoder.npz", *FAST)[0] == 0
    alone = qcompiler.compile(place / "encoder.onnx", calibration=place / "encoder.npz", guard=False)
    assert (place / "out.onnx").read_bytes() == alone.to_bytes()
    assert (place / "out.decisions.json").is_file()


def test_values_for_one_graph_and_for_all(place: Path, call: Call):
    (place / "float.toml").write_text('[[override]]\nmatch = "/out/MatMul"\nform = "float"\n')
    code, _, stderr = call(
        *MODELS, "-o", "out", *DATA, *LINKED, *FAST, "--override", "decoder=float.toml", "--shapes", "tokens:2x-1",
        "--shapes", "decoder_with_past=next_token:2x1",
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    record = json.loads((place / "out" / "decisions.json").read_text())["graphs"]
    assert "/out/MatMul" not in record["decoder"]["forms"]
    assert record["decoder_with_past"]["forms"]["/out/MatMul"] != "float"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("encoder.onnx", "other/encoder.onnx", "-o", "out"), "have the same name 'encoder': rename one of them"),
        ((*MODELS, "-o", "encoder.npz"), "cannot write to encoder.npz: it is a file; several models go into a folder"),
        ((*MODELS, "-o", "out.onnx"), "several models go into a folder: give its name, such as out"),
        ((*MODELS, "-o", "missing/out"), "missing does not exist; make it first"),
        ((*MODELS, "-o", "."), "the model is the same file; choose another name"),
        ((*MODELS, "-o", "out", "-c", "dekoder=decoder.npz"), "there is no graph 'dekoder'; the graphs are: encoder, "),
        ((*MODELS, "-o", "out", "-c", "decoder="), "--calibration decoder=: expected NAME=VALUE"),
        ((*MODELS, "-o", "out", "-c", "decoder=a.npz", "-c", "decoder=b.npz"), "given more than once for decoder"),
        ((*MODELS, "-o", "out", "--shapes", "nothing:1x3"), "no graph has the input 'nothing'"),
        ((*MODELS, "-o", "out", *DATA, "--link", "decoder.encoder_hidden_states=encoder.x"), "has no output 'x'"),
        ((*MODELS, "-o", "out", *DATA, "--link", "decoder.y=encoder.last_hidden_state"), "has no input 'y'"),
        ((*MODELS, "-o", "out", *DATA), "decoder: sample 0: input 'encoder_hidden_states' is missing"),
        ((*MODELS, "-o", "out", "--locked", "x.lock"), "a lock is of one graph: give --decisions FILE"),
        ((*MODELS, "-o", "out", "--save-as", "plan"), "--save-as plan is for tensorrt, but the target is ort-"),
        ((*MODELS, "-o", "out", "--save-as", "qc", "--target", "cpu"), "qc is for triton, but the target is cpu"),
        (
            (*MODELS, "-o", "out", "--save-as", "onnx", "--target", "triton-sm90"),
            "--save-as onnx does not fit the target triton-sm90, which is written as qc",
        ),
        (("encoder.onnx", "-o", "out.onnx", "--link", "a.b=c.d"), "--link joins several models; give them all"),
        (("encoder.onnx", "-o", "out.onnx", "--save-as", "xml"), "--save-as is for several models"),
        (("encoder.onnx", "-o", "out.onnx", "-c", "a.npz", "-c", "b.npz"), "--calibration is given 2 times"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, call: Call, arguments: tuple[str, ...], text: str):
    (place / "other").mkdir()
    (place / "other" / "encoder.onnx").write_bytes(b"")
    before = sorted(p.relative_to(place) for p in place.rglob("*"))
    code, stdout, stderr = call(*arguments, *FAST)
    assert (code, stdout) == (2, "")
    assert text in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1 or "warning" in stderr
    assert sorted(p.relative_to(place) for p in place.rglob("*")) == before


def test_models_for_triton_become_artifacts_without_asking(place: Path, call: Call):
    code, stdout, stderr = call(*MODELS, "-o", "out", *DATA, *LINKED, "--no-guard", "--target", "triton-sm90")
    assert code == 0, stderr
    written = [f"{name}.qc" for name in sources()]
    assert sorted(p.name for p in (place / "out").iterdir()) == sorted([*written, "decisions.json"])
    assert "encoder.onnx -> out/encoder.qc" in stdout
    assert "weights are stored once only in ONNX files: each .qc has its own" in stdout
    assert "stored once" not in stdout.partition("together")[2].partition("wrote")[0]
    again = call(*MODELS, "-o", "named", *DATA, *LINKED, *FAST, "--target", "triton-sm90", "--save-as", "qc")
    assert again[0] == 0
    assert {p.name: p.read_bytes() for p in (place / "named" / "encoder.qc").iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in (place / "out" / "encoder.qc").iterdir() if p.is_file()
    }


def test_a_record_of_other_graphs_is_refused(place: Path, call: Call):
    assert call(*MODELS[:2], "-o", "out", *DATA[:4], *LINKED[:2], *FAST)[0] == 0
    code, _, stderr = call(*MODELS, "-o", "two", "--decisions", "out/decisions.json", "-q")
    assert code == 2
    assert "is of the graphs decoder, encoder, expected decoder, decoder_with_past, encoder" in stderr
    code, _, stderr = call("encoder.onnx", "-o", "x.onnx", "--decisions", "out/decisions.json", "-q")
    assert (code, "the decisions record is of several graphs: decoder, encoder" in stderr) == (2, True)
    (place / "bad.json").write_text("{}")
    code, _, stderr = call(*MODELS, "-o", "two", "--decisions", "bad.json", "-q")
    assert (code, "bad.json: not a decisions record of several graphs" in stderr) == (2, True)
    assert not (place / "two").exists()


def test_steps_of_several_graphs_are_told_apart_on_a_terminal():
    from rich.console import Console

    console = Console(force_terminal=True, record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    with progress_lines(False, console) as show:
        assert show is not None
        for line in ("[t5-a] import", "[t5-a] calibrate 1/2", "[t5-a] calibrate 2/2 (0 s left)", "[t5-b] import"):
            show(line)
    console.file.close()
    kept = [line.split(" s  ")[1].strip() for line in console.export_text().splitlines() if " s  [" in line]
    assert kept == ["[t5-a] import", "[t5-a] calibrate 2/2 (0 s left)", "[t5-b] import"]
