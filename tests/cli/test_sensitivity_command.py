"""``qcompiler sensitivity``: its table, its files, its errors."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Call, Place

TARGET = ("--target", "ort-x86")


def test_rows_are_sorted_by_share_and_name_their_points(place: Place, call: Call) -> None:
    file = place.folder / "noise.json"
    done = call("sensitivity", place.model, "--calibration", place.feeds, *TARGET, "--json", file)
    assert done.code == 0, done.stderr
    data = json.loads(file.read_text())
    rows = data["groups"]
    shares = [max(row["share"].values()) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert {row["group"] for row in rows} == {"/first/Add/Gemm", "/second/MatMul"}
    dynamic = [row for row in rows if row["variant"] == "dynamic"]
    assert sum(row["share"]["y"] for row in dynamic) == pytest.approx(1.0, abs=0.01)
    assert all(f"weight:{row['group']}" in row["points"] for row in rows)
    assert data["evaluations"] < 25
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["group", "operator", "form", "alone", "dB", "share", "from"]
    assert f"wrote {file}" in lines


def test_top_cuts_the_table_and_says_so(place: Place, call: Call) -> None:
    done = call("sensitivity", place.model, "--calibration", place.feeds, *TARGET, "--top", 1)
    assert done.code == 0, done.stderr
    assert "--top 0 shows all" in done.stdout


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_plot_is_a_picture_and_the_same_each_time(place: Place, call: Call, suffix: str, head: bytes) -> None:
    pytest.importorskip("matplotlib")
    files = [place.folder / f"{name}{suffix}" for name in ("a", "b")]
    for file in files:
        done = call("sensitivity", place.model, "--calibration", place.feeds, *TARGET, "-q", "--plot", file)
        assert (done.code, done.stdout) == (0, ""), done.stderr
    assert files[0].read_bytes().startswith(head)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bad_input_is_one_line_and_exit_code_2(place: Place, call: Call) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        ((place.model, *TARGET), "sensitivity is measured on feeds, and there are none"),
        ((place.model, "--calibration", place.feeds, "--plot", "x.jpg"), "expected a name that ends in .png or .svg"),
        ((place.folder / "no.onnx", "--calibration", place.feeds, *TARGET), "no.onnx"),
    ]
    for arguments, text in cases:
        done = call("sensitivity", *arguments)
        assert done.code == 2
        assert text in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
