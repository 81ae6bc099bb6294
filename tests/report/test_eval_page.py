"""The evaluation page: values, order, escaping; and in a real browser: figures, sorting, searching, light and dark."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler.errors import ModelError
from qcompiler.evaluating.evaluate import evaluate
from qcompiler.evaluating.page_sections import evaluation_sections, profile_sections
from qcompiler.evaluating.profiling import profile_models
from qcompiler.report.eval_page import Cell, Fact, Section, Summary, Table, page, write_page
from qcompiler.report.eval_page_figures import LayerErrors, LayerPoint, Pareto, ParetoPoint, Step, Waterfall
from qcompiler.report.eval_page_histograms import Histograms, ValueHistogram
from tests.evaluating.pairs import write
from tests.report.browser import Page, find_browser, open_browser

EVIL = '<script>alert("x")</script>&amp; "quoted"'

LAYERS = (LayerPoint("stem", 42.0, 42.0), LayerPoint(EVIL, 18.5, 18.0), LayerPoint("head", 200.0, 17.0))
POINTS = (
    ParetoPoint("float", 100.0, 60.0), ParetoPoint("static", 30.0, 35.0, chosen=True), ParetoPoint("worse", 40.0, 30.0),
    ParetoPoint("mixed", 50.0, 45.0),
)  # fmt: skip


def sections() -> list[Section]:
    rows = tuple((Cell(name), Cell(f"{us:.1f}", us), Cell(why)) for name, us, why in (
        ("b/Conv", 12.0, "measured"), ("a/Conv", 3.0, EVIL), ("c/Add", 100.0, "too small"),
    ))  # fmt: skip
    return [
        Summary((Fact("metric", "0.97 -> 0.96, 95 % within -0.02 .. +0.00", "bad"), Fact(EVIL, EVIL)), (EVIL,)),
        Waterfall(100.0, (Step("gain", -60.0), Step(EVIL, 10.0), Step("small", -1.0)), 45.0, "from float on"),
        LayerErrors(LAYERS, "along", "layer"),
        Table("Layers", ("layer", "us", "why"), rows, "about", frozenset({"us"}), "layer"),
        Histograms((ValueHistogram(EVIL, (0.0, 1.0, 2.0, 3.0), (5, 0, 7), (5, 7, 0), (0.0, 2.0), "7 beyond"),)),
        Pareto(POINTS),
    ]


def test_nothing_is_loaded_from_elsewhere_and_texts_are_escaped() -> None:
    text = page(sections(), EVIL)
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "alert(" in text
    assert "<script>alert" not in text
    assert text.count("<script>") == 1


def test_a_page_is_the_same_each_time_and_needs_a_folder_it_can_make(tmp_path: Path) -> None:
    first = write_page(tmp_path / "new" / "a.html", sections(), title="A").read_bytes()
    assert first == write_page(tmp_path / "b.html", sections(), title="A").read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write"):
        write_page(tmp_path / "file" / "a.html", sections())


def test_a_waterfall_ends_where_the_compiled_model_is() -> None:
    rows = Waterfall(100.0, (Step("gain", -60.0), Step("loss", 10.0)), 45.0).rows()
    assert [(r.name, r.microseconds) for r in rows] == [("gain", -60.0), ("loss", 10.0), ("not of any group", -5.0)]
    many = Waterfall(100.0, tuple(Step(f"s{i}", -1.0) for i in range(40)), 60.0).rows()
    assert many[-1].name == "22 others"
    assert 100.0 + sum(r.microseconds for r in many) == pytest.approx(60.0)


def test_the_front_holds_what_no_other_build_beats() -> None:
    assert [p.name for p in Pareto(POINTS).front()] == ["static", "mixed", "float"]
    assert "No build was measured" in Pareto(()).body()
    single = Pareto((ParetoPoint("one", 1.0, 1.0),)).body()
    assert "nan" not in single.lower()


def test_empty_sections_say_so() -> None:
    assert "No layer was measured" in LayerErrors(()).body()
    assert "No tensor is stored" in Histograms(()).body()
    assert "Nothing to show" in Table("T", ("a",), ()).body()
    flat = LayerErrors((LayerPoint("only", 200.0, 200.0),)).body()
    assert "nan" not in flat.lower()


# ---- in a browser ---------------------------------------------------------------------------------------------------

browser_only = pytest.mark.skipif(find_browser() is None, reason="needs a Chromium on the path to show the page in")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    profile = tmp_path_factory.mktemp("profile")
    with open_browser(profile) as made:
        yield made
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "page.html", sections(), title="m.int8 against m")


@pytest.fixture
def tab(browser: Page, file: Path) -> Iterator[Page]:
    browser.errors.clear()
    browser.open(file)
    yield browser
    assert browser.errors == []


def column(tab: Page, number: int) -> list[str]:
    rows = "[...document.querySelectorAll('#layers tbody tr')].filter(row => !row.hidden)"
    return list(tab.run(f"{rows}.map(row => row.cells[{number}].innerText)"))


@browser_only
def test_every_section_is_there_with_its_figure(tab: Page) -> None:
    assert tab.run("[...document.querySelectorAll('h2')].map(e => e.innerText)") == [
        "Summary", "Latency", "Error along the network", "Layers", "Values of the worst tensors", "Cost against quality"
    ]  # fmt: skip
    assert tab.run("document.title") == "m.int8 against m - qcompiler"
    assert tab.run("document.querySelectorAll('svg.waterfall g.step').length") == 6
    assert tab.run("[...document.querySelectorAll('svg.waterfall rect')].map(e => e.getAttribute('class'))") == [
        "bar-total", "bar-gain", "bar-gain", "bar-loss", "bar-gain", "bar-end"
    ], "the last step is what no group explains"  # fmt: skip
    assert tab.run("document.querySelectorAll('svg.layers circle.born').length") == 3
    assert tab.run("document.querySelectorAll('svg.values path.float-values').length") == 1
    assert tab.run("document.querySelectorAll('svg.pareto g.build').length") == 4
    # Every drawing has a size, and nothing hangs over the page's edge.
    sizes = tab.run("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)")
    assert min(sizes) > 80
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.run("document.querySelector('dd.bad').innerText") == "0.97 -> 0.96, 95 % within -0.02 .. +0.00"


@browser_only
def test_bars_are_as_long_as_their_times(tab: Page) -> None:
    total, end = (
        tab.run(f"document.querySelector('svg.waterfall .{k}').getBBox().width") for k in ("bar-total", "bar-end")
    )
    assert end / total == pytest.approx(0.45, abs=0.01)
    gain = tab.run("document.querySelector('svg.waterfall .bar-gain').getBBox().width")
    assert gain / total == pytest.approx(0.60, abs=0.01)
    born = tab.run("[...document.querySelectorAll('svg.layers circle.born')].map(e => e.cy.baseVal.value)")
    assert born[1] > born[0] > born[2], "less SQNR is lower"


@browser_only
def test_tables_sort_by_number_and_text_and_are_searched(tab: Page) -> None:
    assert column(tab, 0) == ["b/Conv", "a/Conv", "c/Add"]
    tab.run("document.querySelectorAll('#layers th button')[1].click()")
    assert column(tab, 1) == ["100.0", "12.0", "3.0"]
    tab.run("document.querySelectorAll('#layers th button')[1].click()")
    assert column(tab, 1) == ["3.0", "12.0", "100.0"]
    tab.run("document.querySelectorAll('#layers th button')[0].click()")
    assert column(tab, 0) == ["a/Conv", "b/Conv", "c/Add"]
    assert tab.run("document.querySelector('#layers th').getAttribute('aria-sort')") == "ascending"
    tab.run("document.querySelector('#layers input').focus()")
    tab.type("conv meas")
    assert column(tab, 0) == ["b/Conv"]
    assert tab.run("document.querySelector('#layers .shown').innerText") == "1 of 3"


@browser_only
def test_a_point_leads_to_its_row(tab: Page) -> None:
    tab.run("document.querySelectorAll('svg.layers a')[1].dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    tab.settle()
    assert tab.run("location.hash") == "#layer-1"
    assert tab.run("document.querySelector('tr:target').cells[0].innerText") == "a/Conv"


@browser_only
def test_the_page_of_a_real_evaluation_shows_its_figures(browser: Page, tmp_path: Path) -> None:
    files = write(tmp_path, broken=1, factor=20.0)
    found = evaluate(str(files.model), files.compiled, str(files.feeds))
    profile = profile_models(str(files.model), files.compiled, rounds=2, seconds=0.01)
    sections = [*evaluation_sections(found), *profile_sections(profile)]
    browser.errors.clear()
    browser.open(write_page(tmp_path / "real.html", sections))
    assert browser.errors == []
    points = browser.run("[...document.querySelectorAll('svg.layers a')].map(e => e.querySelector('title').innerHTML)")
    wanted = [f"{f.name}: born {f.own_db:.1f} dB" for f in found.layers.layers if f.own_db < 100]
    assert [p.partition(",")[0] for p in points][: len(wanted)] == wanted
    rows = browser.run("[...document.querySelectorAll('#layers tbody tr')].map(r => r.cells[3].innerText)")
    assert rows[:2] == [f"{f.own_db:.1f} dB" for f in found.layers.layers[:2]]
    assert browser.run("document.querySelectorAll('svg.values').length") == len(found.layers.histograms) == 4
    ends = browser.run("[...document.querySelectorAll('svg.waterfall text')].map(e => e.textContent)")
    assert f"{profile.models[0].total:,.1f}" in ends
    assert f"{profile.models[1].total:,.1f}" in ends
    summary = browser.run("document.getElementById('summary').innerText")
    assert f"{found.closeness.outputs[0].sqnr_db:.1f} dB SQNR" in summary


@browser_only
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_light_and_dark(browser: Page, file: Path, dark: bool) -> None:
    browser.errors.clear()
    browser.open(file, dark=dark)
    paper = "rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == paper
    ink = browser.run("getComputedStyle(document.querySelector('svg .step text')).fill")
    assert ink == ("rgb(221, 227, 234)" if dark else "rgb(29, 35, 43)")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("document.documentElement.dataset.theme") == ("light" if dark else "dark")
    assert browser.errors == []
