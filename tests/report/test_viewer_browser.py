"""The page in a real browser: what it draws, what a click and a key do, and how soon it is there."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler.report.dumps import load_dump
from qcompiler.report.viewer import write_page
from tests.report.browser import Page, find_browser, open_browser
from tests.report.viewer_dumps import large_dump, quantized_dump

pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs a Chromium on the path to show the page in")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Return a tab that all tests use in turn."""
    profile = tmp_path_factory.mktemp("profile")
    with open_browser(profile) as page:
        yield page
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a small network on its way to int8."""
    folder = tmp_path_factory.mktemp("quantized")
    return write_page(load_dump(quantized_dump(folder / "dump")), folder / "page.html")


@pytest.fixture
def page(browser: Page, quantized: Path) -> Iterator[Page]:
    """Return the tab with that page freshly loaded; at the end its console must be clean."""
    browser.errors.clear()
    browser.open(quantized)
    yield browser
    assert browser.errors == []


def panel(page: Page) -> str:
    return str(page.run("document.getElementById('panel').innerText"))


def stage(page: Page, title: str) -> int:
    """Show the stage of a pass and return its number."""
    rows = page.run("[...document.querySelectorAll('#timeline .name')].map(e => e.innerText)")
    number = int(rows.index(title))
    page.run(f"document.querySelectorAll('#timeline .pass')[{number}].click()")
    page.settle()
    return number


def test_the_page_draws_the_last_stage_and_lists_the_passes(page: Page) -> None:
    state = page.run("qcompilerViewer.state()")
    assert state["drawn"]["nodes"] == state["nodes"] == 9
    assert state["drawn"]["edges"] == 8
    names = page.run("[...document.querySelectorAll('#timeline .name')].map(e => e.innerText)")
    assert names == ["import", "canonicalize", "plan-quantization", "insert-qdq", "fuse-qdq", "lower-onnxruntime"]
    deltas = page.run("[...document.querySelectorAll('#timeline .more')].map(e => e.innerText)")
    assert deltas[3].split()[:4] == ["+6", "~2", "9", "nodes"]
    pixels = """(() => {
      const c = document.getElementById('graph'), found = new Set();
      const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      for (let i = 0; i < data.length; i += 4) found.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
      return found.size;
    })()"""
    assert page.run(pixels) > 20, "boxes, text and lines are on the canvas"


def test_a_search_finds_nodes_by_name_operator_and_value(page: Page) -> None:
    stage(page, "insert-qdq")
    assert page.run("qcompilerViewer.search('op:dequantize')") == [
        "up/DequantizeLinear", "up/DequantizeLinear_1", "down/DequantizeLinear", "down/DequantizeLinear_1"
    ]  # fmt: skip
    assert page.run("qcompilerViewer.search('value:b:q')") == ["b/QuantizeLinear", "down/DequantizeLinear"]
    page.press("Escape")
    page.run("document.getElementById('graph').focus()")
    page.press("/")
    page.type("act")
    assert page.run("document.getElementById('count').innerText") == "1"
    page.press("Enter")
    assert page.run("qcompilerViewer.state().selected") == "act"
    assert panel(page).startswith("act")
    page.type("no such node")
    assert page.run("document.getElementById('count').innerText") == "0"


def test_a_click_shows_the_history_of_a_node(page: Page) -> None:
    fused = stage(page, "fuse-qdq")
    x, y = page.run("qcompilerViewer.position('up')")
    page.click(x, y)
    assert page.run("qcompilerViewer.state().selected") == "up"
    text = panel(page)
    assert text.startswith("up\n")
    assert "qcompiler::QMatMul" in text
    # Scales with where they come from, and the histogram of what was seen.
    assert "observed, estimator" in text
    assert "zero point" in text
    assert page.run("document.querySelectorAll('#panel canvas.histogram').length") >= 2
    # Every pass and rule that touched it.
    history = text[text.index("History") :]
    assert "in the model as imported" in history
    assert f"{fused} fuse-qdq" in history
    assert "rule dq-matmul" in history
    assert history.count("changed") >= 2
    # A link in the history leads to the stage.
    page.run("[...document.querySelectorAll('#panel .event a.go')].find(a => a.innerText === '0 import').click()")
    page.settle()
    state = page.run("qcompilerViewer.state()")
    assert (state["stage"], state["selected"]) == (0, "up")
    x, y = page.run("qcompilerViewer.position('act')")
    page.click(x + 300, y)
    assert page.run("qcompilerViewer.state().selected") is None


def test_the_error_colours_nodes(page: Page) -> None:
    stage(page, "lower-onnxruntime")
    assert page.run("qcompilerViewer.colour('down')") == "#25a37a", "int8"
    page.run("document.querySelector('#modes [data-mode=error]').click()")
    page.settle()
    colour = page.run("qcompilerViewer.colour('down')")
    red, green, _ = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert green > red, f"about 40 dB is green or bluer, found {colour}"
    assert page.run("qcompilerViewer.colour('y')") is None, "an output computes nothing"
    assert "40 dB" in page.run("document.getElementById('legend').innerText")
    page.run("qcompilerViewer.select('down')")
    assert "Error each pass made here" in panel(page)


def test_what_a_pass_changed_is_listed_before_and_after(page: Page) -> None:
    number = stage(page, "fuse-qdq")
    page.press("2")
    text = panel(page)
    assert text.startswith(f"{number} fuse-qdq")
    assert "0 added 2 changed 7 removed" not in text
    removed, added = (page.run(f"document.querySelectorAll('#panel .line.{kind}').length") for kind in ("del", "add"))
    assert (removed, added) == (8, 2)
    page.press("b")
    assert page.run("qcompilerViewer.state().before") is True
    assert "removed here" in page.run("document.getElementById('legend').innerText")
    assert page.run("qcompilerViewer.state().nodes") == 11
    page.press("b")
    assert page.run("qcompilerViewer.state().nodes") == 5


def test_keys_move_between_passes_modes_and_places(page: Page) -> None:
    last = page.run("qcompilerViewer.state().stage")
    page.press("[")
    assert page.run("qcompilerViewer.state().stage") == last - 1
    page.press("]")
    page.press("c")
    assert page.run("qcompilerViewer.state().mode") == "error"
    before = page.run("qcompilerViewer.state().view")
    page.press("+")
    assert page.run("qcompilerViewer.state().view.k") == pytest.approx(before["k"] * 1.25)
    page.press("f")
    page.run("qcompilerViewer.select('up')")
    page.press("j")
    assert page.run("qcompilerViewer.state().selected") == "up/Relu"
    page.press("u")
    assert page.run("qcompilerViewer.state().selected") == "up"
    page.press("?")
    assert page.run("document.getElementById('keys').hidden") is False
    page.press("Escape")
    assert page.run("qcompilerViewer.state().selected") is None


def test_the_wheel_zooms_about_the_pointer(page: Page) -> None:
    x, y = page.run("qcompilerViewer.position('up')")
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-200)
    page.settle()
    nx, ny = page.run("qcompilerViewer.position('up')")
    assert page.run("qcompilerViewer.state().view.k") > 1
    assert (nx, ny) == (pytest.approx(x, abs=0.5), pytest.approx(y, abs=0.5))


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_light_and_dark(browser: Page, quantized: Path, dark: bool) -> None:
    browser.open(quantized, dark=dark)
    assert browser.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize(("nodes", "milliseconds"), [(500, 1000), (3000, 3000)])
def test_a_large_graph_is_there_soon_and_only_the_viewport_is_drawn(
    browser: Page, tmp_path: Path, nodes: int, milliseconds: int
) -> None:
    file = write_page(load_dump(large_dump(tmp_path / "dump", nodes)), tmp_path / "page.html")
    browser.errors.clear()
    browser.open(file)
    state = browser.run("qcompilerViewer.state()")
    assert state["nodes"] == nodes + 2, "and the input and the output"
    assert 10 < state["drawn"]["nodes"] < 250
    # The promise to users; on an idle machine it takes a tenth of it.
    assert float(browser.run("document.documentElement.dataset.firstPaint")) < milliseconds
    browser.press("f")
    browser.settle()
    assert browser.run("qcompilerViewer.state().drawn.nodes") == nodes + 2
    assert browser.errors == []
