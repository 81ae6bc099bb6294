"""The commands: what they print, their exit codes, their JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from typer.testing import CliRunner

from qcompiler.cli import Commands
from qcompiler.cli_blame import blame_command
from qcompiler.cli_diff import diff_command
from qcompiler.cli_explain import explain_command
from qcompiler.cli_lock import lock_command
from qcompiler.compiler import compile_model
from qcompiler.options import Options
from tests.explain.nets import plant, random_net
from tests.explain.planted import GIVEN
from tests.explain.test_causes import given_model
from tests.synthetic import feeds_of, residual_cnn

RULE = ("--no-guard", "-q", "--target", "ort-x86")

app = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False)
for name, command in (
    ("explain", explain_command), ("diff", diff_command), ("blame", blame_command), ("lock", lock_command),
):  # fmt: skip
    app.command(name)(command)

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call() -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        return done.exit_code, done.stdout, done.stderr

    return run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(residual_cnn(), tmp_path / "m.onnx")
    np.savez(tmp_path / "f.npz", x=np.concatenate([f["x"] for f in feeds_of({"x": (2, 3, 16, 16)}, 8)]))
    return tmp_path


def test_explain_lists_all_groups_and_the_next_step(call: Call, place: Path) -> None:
    code, out, _ = call("explain", place / "m.onnx", "--calibration", place / "f.npz", *RULE)
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("/")}
    assert list(rows) == ["/stem/Conv", "/block/Conv1", "/block/Conv2", "/block/Add", "/pool", "/flatten", "/fc"]
    assert "QLinearConv" in rows["/stem/Conv"]
    assert "too-small" in rows["/fc"]
    assert "next: qcompiler explain" in out


def test_explain_one_node_in_full(call: Call, place: Path) -> None:
    code, out, _ = call("explain", place / "m.onnx", "/block/Relu1", "--calibration", place / "f.npz", *RULE)
    assert code == 0
    assert out.startswith("/block/Relu1 (Relu): static, group /block/Conv1, QLinearConv")
    assert "observed, mse" in out
    assert "derived: r0 x /block/Conv1#1" in out
    assert "% of the output's error" in out
    assert "dq-conv-q: fired" in out


def test_explain_as_json(call: Call, place: Path) -> None:
    code, out, _ = call("explain", place / "m.onnx", "/fc", "--calibration", place / "f.npz", *RULE, "--json")
    assert code == 0
    (account,) = json.loads(out)["accounts"]
    assert account["causes"][0]["code"] == "too-small"
    assert account["causes"][0]["advice"]
    assert account["form"] == "float"


def test_a_misspelt_node_is_answered_with_those_like_it(call: Call, place: Path) -> None:
    code, _, err = call("explain", place / "m.onnx", "/block/conv", "--calibration", place / "f.npz", *RULE)
    assert code == 2
    assert "did you mean" in err
    assert "'/block/Conv1'" in err


def test_explain_given_qdq_without_data(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    path.write_bytes(given_model(GIVEN["a wrong bias scale"][1]))
    code, out, _ = call("explain", path, "n", "--target", "ort-x86")
    assert code == 0
    assert "n (Conv): float, although it stands in Q/DQ" in out
    assert "bias-scale: the bias has scale 0.05, expected x_scale * w_scale = 0.0005" in out
    assert "store the bias with scale x_scale * w_scale" in out
    assert "qcompiler compile mends it: QLinearConv" in out
    code, _, err = call("explain", path, "m", "--target", "ort-x86")
    assert code == 2
    assert "no node" in err


def test_explain_an_earlier_build(call: Call, place: Path) -> None:
    options = Options(calibration=str(place / "f.npz"), guard=False, target="ort-x86", dump=place / "dump")
    made = compile_model(str(place / "m.onnx"), options)
    (place / "r.json").write_text(json.dumps(made.report.to_dict()))
    live = call("explain", place / "m.onnx", "--calibration", place / "f.npz", *RULE)[1].splitlines()
    dumped = call("explain", "--dump", place / "dump", "--report", place / "r.json")[1].splitlines()
    assert live[1:-1] == dumped[1:-1]
    code, out, _ = call("explain", "--report", place / "r.json", "/fc")
    assert code == 0
    assert "too-small" in out
    code, out, _ = call("explain", "--dump", place / "dump", "/block/Conv2", "--json")
    places = {p["role"]: p for p in json.loads(out)["accounts"][0]["places"]}
    assert places["output"]["format"] == "uint8"
    assert places["input"]["source"] == "observed, mse"


@pytest.mark.parametrize("bad", [(), ("--dump", "absent"), ("--report", "absent.json"), ("absent.onnx",)])
def test_nothing_to_explain(bad: tuple[str, ...], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call("explain", *bad)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_diff_exits_with_one_if_builds_differ(call: Call, place: Path) -> None:
    for name, rule in (("a", "int8"), ("b", "int8-dynamic")):
        options = Options(calibration=str(place / "f.npz"), guard=False, target="ort-x86", recipe=rule)
        compile_model(str(place / "m.onnx"), options).save(place / f"{name}.onnx")
    code, out, _ = call("diff", place / "a.onnx", place / "b.onnx")
    assert code == 1
    assert "6 forms" in out
    assert call("diff", place / "a.onnx", place / "a.onnx")[0] == 0
    assert json.loads(call("diff", place / "a.onnx", place / "b.onnx", "--json")[1])["differences"]
    assert call("diff", place / "a.onnx", place / "absent.onnx")[0] == 2


def test_lock_writes_lock_and_model(call: Call, place: Path) -> None:
    code, out, _ = call(
        "lock", place / "m.onnx", "--calibration", place / "f.npz", "--no-guard", "--target", "ort-x86",
        "-o", place / "m.lock", "--compiled", place / "c.onnx",
    )  # fmt: skip
    assert code == 0
    assert f"locked {(place / 'c.onnx').stat().st_size} bytes" in out
    assert json.loads((place / "m.lock").read_text())["lock"] == 1


def test_blame_ranks_and_applies(call: Call, tmp_path: Path) -> None:
    made = plant(4, tmp_path, 0.05)
    (tmp_path / "m.onnx").write_bytes(made.source)
    np.savez(tmp_path / "e.npz", x=np.concatenate([f["x"] for f in made.feeds]))
    common = ("blame", tmp_path / "m.onnx", made.path, "--evaluation", tmp_path / "e.npz")
    code, out, _ = call(*common, "-q")
    assert code == 0
    assert "clipped: " in out
    assert '[[override]]\nmatch = "' in out
    code, out, _ = call(
        *common, "--apply", "-o", tmp_path / "o.onnx", "--override", tmp_path / "o.toml", "--budget", "sqnr>=20",
        "--json",
    )  # fmt: skip
    data = json.loads(out)
    assert code == 0
    assert data["applied"]["met"]
    assert data["applied"]["steps"][-1]["sqnr_db"] >= 20 > data["applied"]["before_db"]
    assert 'form = "float"' in (tmp_path / "o.toml").read_text()
    assert (tmp_path / "o.decisions.json").is_file()
    assert call(*common, "--apply")[0] == 2
    assert call("blame", tmp_path / "m.onnx", tmp_path / "absent.onnx", "--evaluation", tmp_path / "e.npz")[0] == 2


def test_a_record_of_another_model_is_refused(call: Call, tmp_path: Path) -> None:
    made = plant(3, tmp_path, 1.0)
    (tmp_path / "m.onnx").write_bytes(random_net(1)[0])
    np.savez(tmp_path / "e.npz", x=random_net(1)[1][0]["x"])
    code, _, err = call("blame", tmp_path / "m.onnx", made.path, "--evaluation", tmp_path / "e.npz")
    assert code == 2
    assert "of another model" in err


def _pictures(folder: Path) -> Path:
    images = pytest.importorskip("PIL.Image")
    folder.mkdir()
    draw = np.random.default_rng(3)
    for index in range(4):
        images.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def test_explain_reads_pictures_as_told(call: Call, place: Path) -> None:
    pictures = _pictures(place / "pictures")
    found = []
    for scale in ("1", "0.5"):
        shared = ("--calibration", pictures, "--image", f"scale={scale}", "--image", "mean=0,0,0", *RULE)
        code, out, _ = call("explain", place / "m.onnx", "/stem/Conv", *shared, "--no-errors", "--json")
        assert code == 0
        (account,) = json.loads(out)["accounts"]
        found.append(next(p["scale"][0] for p in account["places"] if p["value"] == "x"))
    assert found[0] / found[1] == pytest.approx(2.0, rel=1e-3)


def test_lock_and_blame_read_pictures_as_told(call: Call, place: Path) -> None:
    pictures = _pictures(place / "pictures")
    shared = ("--calibration", pictures, "--image", "scale=0.5", *RULE)
    made, lock = place / "m.int8.onnx", place / "m.lock"
    assert call("lock", place / "m.onnx", *shared, "-o", lock, "--compiled", made)[0] == 0
    code, out, _ = call("blame", place / "m.onnx", made, "--evaluation", pictures, "--image", "scale=0.5", "--json")
    assert code == 0
    near = json.loads(out)
    code, out, _ = call("blame", place / "m.onnx", made, "--evaluation", pictures, "--image", "scale=50", "--json")
    far = json.loads(out)
    assert min(far["outputs_db"].values()) < min(near["outputs_db"].values()) - 10
    code, _, err = call("blame", place / "m.onnx", made, "--evaluation", pictures, "--image", "resize=twice")
    assert code == 2
    assert "resize" in err


def test_a_quantized_model_shows_the_numbers_around_a_node(call: Call, place: Path) -> None:
    made = place / "q.onnx"
    assert (
        call("lock", place / "m.onnx", "--calibration", place / "f.npz", *RULE, "-o", place / "l", "--compiled", made)[
            0
        ]
        == 0
    )
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(made).graph.initializer}
    code, out, _ = call("explain", made, "/stem/Conv", "--json")
    assert code == 0
    (account,) = json.loads(out)["accounts"]
    assert account["form"] == "fused"
    by_role = {p["role"]: p for p in account["places"]}
    assert [p["role"] for p in account["places"]] == ["input", "weight", "bias", "output"]
    weight = by_role["weight"]
    assert weight["format"] == "int8, per channel of axis 0, symmetric"
    scales = stored[weight["value"].removesuffix(":q") + ":scale"]
    assert weight["scale"] == pytest.approx([float(scales.min()), float(scales.max())])
    assert weight["zero_point"] == [0]
    assert by_role["input"]["format"] == "uint8"
    assert by_role["bias"]["format"] == "int32, per channel of axis 0, symmetric"
    assert len(by_role["output"]["scale"]) == 1


def test_a_dump_alone_does_not_claim_to_know_the_reason(call: Call, place: Path) -> None:
    override = place / "o.toml"
    override.write_text('[[override]]\nmatch = "/block/Conv1"\nform = "float"\n')
    options = Options(
        calibration=place / "f.npz", guard=False, target="ort-x86", dump=place / "dump", overrides=override
    )
    compile_model(str(place / "m.onnx"), options)
    code, out, _ = call("explain", "--dump", place / "dump", "/block/Conv1", "--json")
    assert code == 0
    (account,) = json.loads(out)["accounts"]
    assert account["causes"][0]["code"] == "not-recorded"
    assert "--report" in account["causes"][0]["advice"]
