import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qcompiler.backends.triton.artifact import load_artifact
from qcompiler.cli import app
from qcompiler.errors import ModelError, TargetError
from tests.triton import models

DATA = models.feeds(4, 2, 5, 32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qc") / "m.qc"
    models.compiled(models.mlp_block(), DATA).save(path)
    return path


def _copy(saved: Path, folder: Path) -> Path:
    import shutil

    shutil.copytree(saved, folder / "m.qc")
    return folder / "m.qc"


def test_the_folder_holds_plan_weights_and_sources(saved: Path) -> None:
    names = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert {"plan.json", "plan.txt", "weights.safetensors", "kernels/int8_matmul/triton_kernel.py"} <= names
    found = load_artifact(saved)
    assert found.sm == 90
    assert [p.name for p in found.program.inputs] == ["x"]


def test_the_text_has_one_line_per_step(saved: Path) -> None:
    lines = (saved / "plan.txt").read_text().splitlines()
    assert lines[0] == "plan for sm90: x [2x5x32]"
    assert len(lines) == 2 + 5
    assert "int8_matmul[bias=channel activation=gelu out=int8]" in lines[2]
    assert "s8[2x5x32], s8[1x64x32]" in lines[2]
    assert lines[-1].startswith(
        "5 steps: 5 kernels, 0 torch functions, 0 views, 0 on the host; 46.1 thousand multiply-"
    )
    assert ", 100.0 % of them in kernels; reads " in lines[-1]


def test_inspect_prints_the_plan(saved: Path) -> None:
    found = CliRunner().invoke(app, ["inspect", str(saved)])
    assert found.exit_code == 0
    assert found.stdout == (saved / "plan.txt").read_text()


def test_inspect_refuses_a_folder_without_a_plan(tmp_path: Path) -> None:
    (tmp_path / "m.qc").mkdir()
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.qc")])
    assert found.exit_code == 2
    assert "is no model compiled for Triton" in " ".join(found.output.split())


def test_the_same_model_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    models.compiled(models.mlp_block(), DATA).save(tmp_path / "again.qc")
    first, second = (json.loads((p / "plan.json").read_text()) for p in (saved, tmp_path / "again.qc"))
    assert first == second


def test_saving_twice_replaces_the_folder(saved: Path, tmp_path: Path) -> None:
    path = _copy(saved, tmp_path)
    (path / "old.txt").write_text("x")
    models.compiled(models.mlp_block(), DATA).save(path)
    assert not (path / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_cannot_be_replaced_stays(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _copy(saved, tmp_path)
    (path / "old.txt").write_text("x")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if source.suffix == ".part" and target.suffix == ".qc":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(ModelError, match=r"cannot write .*m\.qc: No space left on device"):
        models.compiled(models.mlp_block(), DATA).save(path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.qc"]


def test_a_changed_weight_is_told(saved: Path, tmp_path: Path) -> None:
    path = _copy(saved, tmp_path)
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(bytes(data))
    with pytest.raises(ModelError, match=r"weights\.safetensors is missing or was changed"):
        load_artifact(path)


def test_a_changed_plan_is_told(saved: Path, tmp_path: Path) -> None:
    path = _copy(saved, tmp_path)
    (path / "plan.json").write_text((path / "plan.json").read_text().replace("gelu", "relu"))
    with pytest.raises(ModelError, match=r"plan\.json was changed"):
        load_artifact(path)


def test_another_version_is_told(saved: Path, tmp_path: Path) -> None:
    path = _copy(saved, tmp_path)
    body = json.loads((path / "plan.json").read_text())
    (path / "plan.json").write_text(json.dumps({**body, "format": 9}))
    with pytest.raises(ModelError, match="its form has version 9, this qcompiler reads 1"):
        load_artifact(path)


def test_a_folder_that_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mine.qc"
    path.mkdir()
    (path / "notes.txt").write_text("keep")
    with pytest.raises(ModelError, match="is no artifact"):
        models.compiled(models.mlp_block(), DATA).save(path)
    assert (path / "notes.txt").read_text() == "keep"


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"ends in \.qc"):
        models.compiled(models.mlp_block(), DATA).save(tmp_path / "m.onnx")
