import io
import json
import math
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qcompiler.cli import app
from qcompiler.cli_inspect import open_in_netron
from qcompiler.errors import PassError, QCompilerError
from qcompiler.ir.text import print_model
from qcompiler.pipeline.instruments.dump import DumpInstrument
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.timing import TimeInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import ChangeLog
from qcompiler.report.dumps import DumpError, load_dump
from qcompiler.report.dumps_text import (
    render,
    render_diff,
    render_remarks,
    render_side_by_side,
    render_stage,
    side_by_side,
)
from tests.pipeline.sample_passes import REGISTRY, chain_feeds, chain_state, engine

TEXT = "drop-identity,many,scale-factors{factor=1.5,only=e},plan-nothing"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a dump with times and figures."""
    ticks = iter(range(100))
    times = TimeInstrument(lambda: next(ticks) / 1000)
    numerics = NumericsInstrument(engine(), chain_feeds(), strict=False)
    dump = DumpInstrument(tmp_path, times, numerics)
    Pipeline.parse(TEXT, REGISTRY).run(chain_state(), (dump, numerics, times))
    return tmp_path


def console(color: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=200, force_terminal=color, color_system="standard" if color else None), out


def test_a_dump_is_read(folder: Path) -> None:
    dump = load_dump(folder)
    assert (dump.pipeline, dump.target, dump.failed) == (TEXT, "sample", None)
    assert [(s.number, s.text, s.changed, s.nodes) for s in dump.stages] == [
        (0, None, True, 8),
        (1, "drop-identity", True, 6),
        (2, "many", False, 6),
        (3, "scale-factors{factor=1.5,only=e}", True, 6),
        (4, "plan-nothing", False, 6),
    ]
    assert [s.seconds for s in dump.stages[:3]] == [None, pytest.approx(0.001), pytest.approx(0.001)]
    assert dump.ops_changed(dump.stages[1]) == {"Identity": -2}
    assert dump.ops_changed(dump.stages[0]) == dump.ops_changed(dump.stages[3]) == {}
    first, third = dump.stages[1].numerics, dump.stages[3].numerics
    assert first is not None
    assert third is not None
    assert (first.contract, first.compared, first.violations, first.least_sqnr_db) == ("Exact()", 2, (), math.inf)
    assert (third.violations, third.worst_value, third.worst_error) == (("e",), "e", pytest.approx(0.5, rel=1e-4))
    assert dump.stages[4].phase == "PLANNED"


def test_texts_of_unchanged_stages_are_those_of_the_last_change(folder: Path) -> None:
    dump = load_dump(folder)
    state = chain_state()
    assert dump.text(0) == print_model(state.model)
    Pipeline.parse("drop-identity", REGISTRY).run(state)
    assert dump.text(1) == dump.text(2) == print_model(state.model)
    assert dump.model_path(2) == folder / "001-drop-identity.onnx"
    assert dump.diff(2) == dump.diff(0) == ""
    assert dump.diff(1).startswith("--- 000-input\n+++ 001-drop-identity\n")
    assert [r["node"] for r in dump.remarks(1)] == ["Identity_1", "Identity_5"]
    assert dump.remarks(2) == []


def test_the_table_shows_every_pass(folder: Path) -> None:
    screen, out = console()
    render(load_dump(folder), screen)
    lines = out.getvalue().splitlines()
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line[:1].strip().isdigit()}
    assert rows["0"].startswith("0 (input) FLOAT")
    assert "8 72 B" in rows["0"]
    assert rows["0"].endswith("Mul 3 Identity 2 MatMul 1 Relu 1 Sigmoid 1")
    assert rows["1"].startswith("1 drop-identity FLOAT 1.0 ")
    assert "8 -> 6" in rows["1"]
    assert "equal Exact() Identity -2" in rows["1"]
    assert rows["1"].endswith("Identity -2")
    assert "Reassociates(rel=1e-05) broken at e" in rows["3"]
    assert rows["4"].startswith("4 plan-nothing PLANNED 1.0 0 6")
    assert f"pipeline {TEXT}" in out.getvalue()


def test_a_dump_without_figures_has_no_columns_for_them(tmp_path: Path) -> None:
    Pipeline.parse("drop-identity", REGISTRY).run(chain_state(), (DumpInstrument(tmp_path),))
    screen, out = console()
    render(load_dump(tmp_path), screen)
    assert "SQNR" not in out.getvalue()
    assert " ms " not in out.getvalue()


def test_a_diff_is_coloured(folder: Path) -> None:
    screen, out = console(color=True)
    render_diff(load_dump(folder), 1, screen)
    assert "\x1b[31m-  Identity_1: " in out.getvalue()
    assert "\x1b[32m+  " in out.getvalue()
    screen, out = console()
    render_diff(load_dump(folder), 2, screen)
    assert out.getvalue() == "stage 002-many changed nothing\n"


def test_a_diff_side_by_side_pairs_lines_by_their_node(folder: Path) -> None:
    before = "graph g {\n  a: %a = Relu(%x)\n  b: %b = Abs(%a)\n  c: %c = Neg(%b)\n  d: %d = Exp(%c)\n}\n"
    after = "graph g {\n  a: %a = Relu(%x)\n  q: %q = Cast(%a)\n  b: %b = Abs(%q)\n  d: %d = Exp(%b)\n}\n"
    assert list(side_by_side(before, after)) == [
        ("a: %a = Relu(%x)", "", "a: %a = Relu(%x)"),
        ("", ">", "q: %q = Cast(%a)"),
        ("b: %b = Abs(%a)", "|", "b: %b = Abs(%q)"),
        ("c: %c = Neg(%b)", "<", ""),
        ("d: %d = Exp(%c)", "|", "d: %d = Exp(%b)"),
        ("}", "", "}"),
    ]
    assert list(side_by_side(before, before)) == []
    far = "".join(f"  n{i}: %n{i} = Relu(%x)\n" for i in range(9))
    rows = list(side_by_side(f"{before}{far}z: 1\n", f"{after}{far}z: 2\n"))
    assert rows.count(("...", "~", "...")) == 1
    screen, out = console()
    render_side_by_side(load_dump(folder), 1, screen)
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["000-input", "001-drop-identity"]
    assert any("Identity_1: " in line and "<" in line for line in lines)
    screen, out = console()
    render_side_by_side(load_dump(folder), 2, screen)
    assert out.getvalue() == "stage 002-many changed nothing\n"


def test_rules_and_figures_are_read(folder: Path) -> None:
    dump = load_dump(folder)
    assert dump.rules(3)[0] == {"rule": "scale-factor", "node": "Mul_2", "origins": ["Mul_2"]}
    assert dump.rules(1) == []
    equal = {"error": 0.0, "sqnr_db": "inf"}
    assert dump.figures(1) == {"c": equal, "g": equal}
    assert dump.figures(3)["e"]["error"] == pytest.approx(0.5, rel=1e-4)
    assert (dump.plan(1), dump.points(1), dump.statistics()) == (None, {}, {})
    (folder / "003-scale-factors.rules.json").write_text("{")
    with pytest.raises(DumpError, match=r"003-scale-factors\.rules\.json is damaged"):
        dump.rules(3)
    (folder / "003-scale-factors.plan.json").write_text("{}")
    with pytest.raises(DumpError, match=r"003-scale-factors\.plan\.json is damaged: not a quantization plan"):
        dump.plan(3)


def test_a_pass_is_left_without_a_log_of_its_own(tmp_path: Path) -> None:
    state = chain_state()
    Pipeline.parse(TEXT, REGISTRY).run(state, (DumpInstrument(tmp_path / "a"),))
    assert state.changes is None
    mine = ChangeLog()
    state = chain_state()
    state.changes = mine
    Pipeline.parse(TEXT, REGISTRY).run(state, (DumpInstrument(tmp_path / "b"),))
    assert state.changes is mine
    assert [c.rule for c in mine.applied] == ["scale-factor"] * 3
    assert load_dump(tmp_path / "a").rules(3) == load_dump(tmp_path / "b").rules(3)


def test_the_command_shows_a_diff_side_by_side_writes_the_page_and_names_what_netron_needs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CliRunner().invoke
    page = tmp_path / "made" / "page.html"
    done = run(app, ["inspect", str(folder), "--html", str(page), "--diff", "1", "-y"])
    assert done.exit_code == 0
    assert "001-drop-identity" in done.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    done = run(app, ["inspect", str(folder), "--side-by-side"])
    assert (done.exit_code, done.stderr) == (2, "error: --side-by-side says how --diff N is shown: give both\n")
    monkeypatch.setitem(sys.modules, "netron", None)
    done = run(app, ["inspect", str(folder), "--netron", "2"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: netron is not installed: run 'pip install netron', or open ")
    assert "001-drop-identity.onnx at netron.app" in done.stderr
    (folder / "001-drop-identity.onnx").unlink()
    assert "the dump is incomplete: expected" in run(app, ["inspect", str(folder), "--netron", "2"]).stderr


def test_netron_is_started_on_the_file_of_the_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool] | str] = []
    netron = types.ModuleType("netron")
    netron.start = lambda file, browse: calls.append((file, browse))  # type: ignore[attr-defined]
    netron.wait = lambda: calls.append("wait")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "netron", netron)
    open_in_netron(load_dump(folder), 4)
    assert calls == [(str(folder / "003-scale-factors.onnx"), True), "wait"]


def test_a_stage_and_its_remarks_are_printed_as_they_are(folder: Path) -> None:
    screen, out = console()
    dump = load_dump(folder)
    render_stage(dump, 3, screen)
    assert out.getvalue() == dump.text(3)
    screen, out = console()
    render_remarks(dump, 1, screen)
    assert out.getvalue().splitlines()[0] == "done Identity_1 removed: an Identity does nothing"


def test_a_failed_pass_is_shown(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline.parse("drop-identity,break-graph", REGISTRY).run(
            chain_state(), (DumpInstrument(tmp_path), VerifyInstrument())
        )
    dump = load_dump(tmp_path)
    assert dump.failed is not None
    assert dump.failed.text == "break-graph"
    screen, out = console()
    render(dump, screen)
    assert "break-graph FAILED" in out.getvalue()
    assert out.getvalue().splitlines()[-1].startswith("failed: ")


def test_what_is_no_dump_says_so(folder: Path, tmp_path: Path) -> None:
    assert issubclass(DumpError, QCompilerError)
    with pytest.raises(DumpError, match=r"is not a dump: expected pipeline\.json in it; --dump DIR writes one"):
        load_dump(tmp_path / "nowhere")
    with pytest.raises(DumpError, match="has stages 0 to 4, found 5"):
        load_dump(folder).text(5)
    (folder / "001-drop-identity.diff").unlink()
    with pytest.raises(DumpError, match=r"the dump is incomplete: cannot read .*001-drop-identity\.diff: No such file"):
        load_dump(folder).diff(1)
    index = folder / "pipeline.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(DumpError, match="has dump format 99, this qcompiler reads 1"):
        load_dump(folder)
    for text in ("{", "[]", '{"format": 1}'):
        index.write_text(text)
        with pytest.raises(DumpError, match=r"pipeline\.json is damaged|holds no finished stage"):
            load_dump(folder)
    index.write_text("{}")
    with pytest.raises(DumpError, match="holds no finished stage"):
        load_dump(folder)
