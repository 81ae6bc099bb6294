"""``qcompiler profile``: tables, JSON, the page, and one clear line for bad input."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.test_bad_input import refused
from tests.evaluating.pairs import Files, write

QUICK = ("--rounds", 2, "--seconds", 0.01)


@pytest.fixture
def files(place: Any) -> Files:
    return write(place.folder)


def test_two_models_stand_beside_each_other(place: Any, call: Any, files: Files) -> None:
    target = place.folder / "profile.json"
    done = call("profile", files.model, files.compiled, "--json", target, "--top", 2, *QUICK)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["A", "B", "A"]
    assert "interleaved rounds, threads 1, random data" in lines[4]
    assert "operators of A" in lines
    data = json.loads(target.read_text())
    assert data["speedup"] == pytest.approx(data["models"][0]["min_us"] / data["models"][1]["min_us"])
    assert sum(g["after_us"] for g in data["groups"]) == pytest.approx(data["models"][1]["operators_us"])
    assert all(g["gain_us"] == pytest.approx(g["before_us"] - g["after_us"]) for g in data["groups"])
    kinds = {o["operator"] for o in data["models"][1]["operators"] if o["conversion"]}
    assert kinds <= {"QuantizeLinear", "DequantizeLinear"}
    assert data["models"][1]["conversion_share"] > 0


def test_one_model_and_its_nodes(place: Any, call: Any, files: Files) -> None:
    done = call("profile", files.model, "--evaluation", files.feeds, "--json", "-", *QUICK)
    assert done.code == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["speedup"], len(data["models"]), data["data"]) == (None, 1, "the first feed of the data")
    shown = call("profile", files.model, "--top", 3, *QUICK).stdout
    assert "nodes, the most time first" in shown
    assert "2 more" in shown or "operators" in shown


def test_the_page_has_the_waterfall_and_both_tables(place: Any, call: Any, files: Files) -> None:
    report = place.folder / "profile.html"
    done = call("profile", files.model, files.compiled, "--report", report, *QUICK)
    assert done.stdout.splitlines()[-1] == f"wrote {report}"
    text = report.read_text()
    assert text.count('class="waterfall"') == 1
    assert "Float beside compiled" in text
    assert "Operators of compiled.onnx" in text
    alone = place.folder / "one.html"
    assert call("profile", files.compiled, "--report", alone, *QUICK).code == 0
    assert "Nodes" in alone.read_text()


def test_bad_input(place: Any, call: Any, files: Files) -> None:
    before = place.files()
    refused(place, call("profile", "gone.onnx"), before, "gone.onnx", "no such file")
    refused(place, call("profile", files.model, "gone.onnx"), before, "gone.onnx", "no such file")
    refused(place, call("profile", files.model, "--seconds", 0), before, "--seconds is 0")
    both = call("profile", files.model, "--evaluation", files.feeds, "--calibration", files.feeds)
    refused(place, both, before, "give one of them")
    refused(place, call("profile", files.model, "--evaluation", "x.qcal"), before, "needs feeds, found statistics")
    refused(place, call("profile", files.model, "--json", files.model), before, "the model is the same file")
