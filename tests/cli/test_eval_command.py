"""``qcompiler eval``: figures on stdout and in JSON, the page, and one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.cli.test_bad_input import refused
from tests.evaluating.pairs import Files, chain, write

SCORE = """
import numpy as np


def top1(outputs, feeds):
    return float(np.mean([o["y"].argmax(-1) == 0 for o in outputs]))


def broken(outputs, feeds):
    raise KeyError("label")
"""


@pytest.fixture
def files(place: Any) -> Files:
    """Return a float model, a build of it in which layer 2 has a scale 20 times too wide, and feeds."""
    (place.folder / "score.py").write_text(SCORE)
    return write(place.folder, broken=2, factor=20.0)


def arguments(files: Files, *more: object) -> list[object]:
    return [files.model, files.compiled, "--evaluation", files.feeds, *more]


def test_the_planted_layer_leads_and_json_has_all(place: Any, call: Any, files: Files) -> None:
    target = place.folder / "eval.json"
    done = call("eval", *arguments(files, "--metric", f"{place.folder}/score.py:top1", "--json", target))
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    born = next(i for i, line in enumerate(lines) if line.startswith("error is born"))
    assert lines[born + 2].startswith("bias2/Gemm")
    assert "metric" in done.stdout
    assert "95 % within" in done.stdout
    assert lines[-1] == f"wrote {target}"
    data = json.loads(target.read_text())
    assert data["born"][0] == "bias2/Gemm"
    layer = next(row for row in data["layers"] if row["layer"] == "bias2/Gemm")
    assert set(layer["origins"]) >= {"fc2", "bias2"}
    assert layer["own_db"] < 30
    assert data["samples"] == 96
    assert data["sample"] == "row"
    assert len(data["sample_sqnr_db"]) == 96
    metric = data["metric"]
    assert metric["difference"] == pytest.approx(metric["compiled"] - metric["float"])
    assert metric["interval"]["low"] <= metric["difference"] <= metric["interval"]["high"]
    worst = data["worst_samples"][0]
    assert worst["sqnr_db"] == pytest.approx(min(data["sample_sqnr_db"]), abs=0.01)
    assert data["sample_sqnr_db"][worst["index"]] == pytest.approx(worst["sqnr_db"], abs=0.01)
    assert (worst["feed"], worst["row"]) == divmod(worst["index"], 32)


def test_the_worst_sample_is_the_planted_one(place: Any, call: Any, files: Files) -> None:
    data = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    data[41] *= 30  # far outside all stored ranges
    feeds = place.save_feeds("spoilt.npz", x=data)
    done = call("eval", files.model, files.compiled, "--evaluation", feeds, "--json", "-")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["worst_samples"][0]["index"] == 41


def test_json_on_stdout_is_nothing_but_json(place: Any, call: Any, files: Files) -> None:
    done = call("eval", *arguments(files, "--json", "-", "--layer-feeds", 0))
    data = json.loads(done.stdout)
    assert data["layers"] == []
    assert data["metric"] is None
    assert data["outputs"]["y"]["agreement"] <= 1.0
    assert data["notes"][-1] == "layers were left out"


def test_the_same_data_gives_the_same_figures(place: Any, call: Any, files: Files) -> None:
    metric = ("--metric", f"{place.folder}/score.py:top1", "--json", "-")
    assert call("eval", *arguments(files, *metric)).stdout == call("eval", *arguments(files, *metric)).stdout


def test_the_page_holds_every_part(place: Any, call: Any, files: Files) -> None:
    report = place.folder / "eval.html"
    build = {
        "groups": [{"group": "bias2/Gemm", "operator": "Gemm", "form": "static", "why": "static: it is faster"}],
        "proof": {"planned": 1, "fused": 0, "kernels": {}, "note": "",
                  "missed": [{"group": "bias2/Gemm", "kind": "Gemm", "reason": "float-bias", "text": "the bias"}]},
        "forms_tried": {"static": {"speedup": 2.0, "sqnr_db": 30.0}, "chosen": {"speedup": 1.5, "sqnr_db": 40.0}},
    }  # fmt: skip
    (place.folder / "build.json").write_text(json.dumps(build))
    done = call("eval", *arguments(files, "--report", report, "--build-report", place.folder / "build.json", "-q"))
    assert (done.code, done.stdout) == (0, "")
    text = report.read_text()
    for part in ("Error along the network", "Values of the worst tensors", "Worst samples", "Planned, fused, missed",
                 "float-bias: the bias; static: it is faster", "Cost against quality"):  # fmt: skip
        assert part in text
    assert text.count('class="values"') == 4


@pytest.mark.parametrize("command", ["eval", "profile"])
def test_swapped_and_different_models(place: Any, call: Any, files: Files, command: str) -> None:
    more = ["--evaluation", files.feeds]
    onnx.save(chain(width=16), place.folder / "other.onnx")
    before = place.files()
    refused(place, call(command, files.compiled, files.model, *more), before, "look swapped")
    refused(place, call(command, files.model, place.folder / "other.onnx", *more), before, "do not belong together")


def test_bad_input(place: Any, call: Any, files: Files) -> None:
    before = place.files()
    gone = Path("gone.onnx")
    refused(place, call("eval", files.model, gone, "--evaluation", files.feeds), before, "gone.onnx", "no such file")
    refused(place, call("eval", gone, files.compiled, "--evaluation", files.feeds), before, "gone.onnx")
    refused(place, call("eval", files.model, files.compiled, "--evaluation", "gone.npz"), before, "gone.npz")
    refused(place, call("eval", *arguments(files, "--metric", "score.py")), before, "expected file.py:function")
    broken = call("eval", *arguments(files, "--metric", f"{place.folder}/score.py:broken"))
    refused(place, broken, place.files(), "KeyError", "label")
    refused(
        place, call("eval", *arguments(files, "--report", files.model)), place.files(), "the model is the same file"
    )
    missing = call("eval", *arguments(files, "--report", place.folder / "no" / "x.html"))
    refused(place, missing, place.files(), "does not exist; make it first")
    wrong = call("eval", *arguments(files, "--report", place.folder / "x.html", "--build-report", files.feeds))
    assert wrong.code == 2
