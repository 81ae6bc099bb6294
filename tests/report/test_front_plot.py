"""The picture of Pareto fronts."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.errors import BudgetError
from qcompiler.report.front_plot import plot_fronts, sheet
from qcompiler.search.front import Front, choose_knee, front
from qcompiler.search.problem import Limits
from tests.search.problems import chain

PROBLEM = chain(6, g0=14.0, g3=3.0, g5=12.0)


@pytest.fixture(scope="module")
def fronts() -> list[Front]:
    return [front(PROBLEM, Limits(), steps=8), front(PROBLEM, Limits(), "bytes", pinned={"g3": "float"}, steps=8)]


def test_what_is_drawn_lies_where_the_numbers_say(fronts: list[Front]) -> None:
    pytest.importorskip("matplotlib")
    noise, sizes = fronts
    chosen = choose_knee(noise)
    left, right = (a for a in sheet(fronts, chosen, "six").axes if a.get_xlabel() == "predicted latency (us)")
    assert left.get_ylabel() == "least SQNR over the outputs (dB)"
    assert right.get_ylabel() == "size (kB)"
    drawn, float_, star = left.lines
    finite = [p.worst_db for p in noise.points if p.worst_db < 200.0]
    assert list(drawn.get_xdata()) == [p.cost_us for p in noise.points]
    assert list(drawn.get_ydata())[: len(finite)] == finite
    assert float_.get_xdata()[0] == noise.all_float.cost_us == 123.0
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (chosen.cost_us, chosen.worst_db)
    assert list(right.lines[0].get_ydata()) == [p.bytes / 1000 for p in sizes.points]
    assert star.get_label() == f"chosen: {chosen.cost_us:.4g} us, {chosen.worst_db:.1f} dB"


def test_points_without_noise_are_called_exact_and_not_a_number_of_decibels(fronts: list[Front]) -> None:
    pytest.importorskip("matplotlib")
    noise = fronts[0]
    assert noise.points[-1].worst_db == 200.0
    (axes,) = (a for a in sheet([noise], None, "").axes if a.get_ylabel())
    height = axes.lines[0].get_ydata()[-1]
    assert max(p.worst_db for p in noise.points[:-1]) < height < 60.0
    ticks = axes.yaxis.get_major_locator()()
    assert [axes.yaxis.get_major_formatter()(t) for t in ticks][-1] == "exact"
    assert ticks[-1] == height


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_fronts_give_the_same_file(fronts: list[Front], tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    one = plot_fronts(fronts, tmp_path / f"a{suffix}", choose_knee(fronts[0]), "é model")
    two = plot_fronts(fronts, tmp_path / f"b{suffix}", choose_knee(fronts[0]), "é model")
    assert one.read_bytes() == two.read_bytes()
    if suffix == ".png":
        assert one.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    else:
        text = one.read_text()
        assert "share of all float" in text
        assert not re.search(r"<dc:date>|Matplotlib v", text)


def test_other_files_and_nothing_to_draw_are_refused(fronts: list[Front], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"is a \.png or an \.svg file, not 'a\.pdf'"):
        plot_fronts(fronts, tmp_path / "a.pdf")
    with pytest.raises(BudgetError, match="there is no front to draw"):
        plot_fronts([], tmp_path / "a.png")


def test_without_matplotlib_the_error_names_the_extra(
    fronts: list[Front], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BudgetError, match=r"pip install 'qcompiler\[plot\]'"):
        plot_fronts(fronts, tmp_path / "a.svg")


def test_importing_the_plot_loads_no_matplotlib() -> None:
    code = "import qcompiler.report.front_plot, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
