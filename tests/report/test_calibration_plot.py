"""The picture of a calibration: what is drawn lies where the numbers say."""

import importlib.util
import math
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from qcompiler.calibration.statistics import ChannelExtremes, Statistics, TensorStatistics
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec, affine_params
from qcompiler.report.calibration_figures import (
    MOST_BARS,
    TensorFigure,
    bars,
    channel_figure,
    figures,
    outlier_ratio,
)
from qcompiler.report.calibration_page import colours
from qcompiler.report.calibration_plot import plot_calibration
from qcompiler.report.calibration_svg import (
    LEFT,
    RIGHT,
    Axis,
    Heights,
    channel_axes,
    channel_strip,
    heights,
    histogram,
    number,
    share,
    spark,
    value_axis,
)

ESTIMATORS = ("min-max", "percentile:99.9")
PLACE = 0.006
"""Places are written with two decimals."""


def tensor(values: npt.ArrayLike, axis: int | None = None) -> TensorStatistics:
    made = TensorStatistics()
    made.add(np.asarray(values, np.float32), 0, axis)
    return made


def outlying() -> Statistics:
    """Return three tensors: 20,000 values up to 1 and one of 100; per channel, number 5 at 12; and only zeros."""
    generator = np.random.default_rng(0)
    tail = np.concatenate([np.linspace(-1, 1, 20_000), np.zeros(5_000), [100.0]])
    spread = np.clip(generator.standard_normal((500, 8)), -2, 2)
    spread[0] = 1.0
    spread[:, 5] *= 12.0
    return Statistics(
        {
            "never": TensorStatistics(),
            "zero": tensor(np.zeros((2, 3)), -1),
            "tail": tensor(tail),
            "ch<a>nnel & \"5'": tensor(spread, -1),
        },
        feeds=1,
    )


def one(statistics: Statistics, name: str) -> TensorFigure:
    (found,) = figures(statistics, ESTIMATORS, [name])
    return found


def svg(text: str) -> ET.Element:
    return ET.fromstring(text)


def found(root: ET.Element, tag: str, kind: str) -> Iterator[dict[str, str]]:
    return (dict(e.attrib) for e in root.iter(tag) if kind in e.attrib.get("class", "").split())


# ---- figures -------------------------------------------------------------------------------------------------------


def test_the_outlier_ratio_is_that_of_numpy_within_a_bin() -> None:
    generator = np.random.default_rng(1)
    for values in (generator.standard_normal(50_000), generator.standard_t(2, 50_000), np.linspace(-7, 3, 30_000)):
        made = tensor(values)
        magnitudes = np.abs(values.astype(np.float32))
        at = float(np.quantile(magnitudes, 0.9999, method="inverted_cdf"))
        assert made.width < 0.02 * at
        expected = float(magnitudes.max()) / at
        assert expected / (1 + made.width / at) <= outlier_ratio(made) <= expected * (1 + 1e-6)


def test_an_outlier_makes_the_ratio_and_a_constant_does_not() -> None:
    made = outlying().tensors
    assert outlier_ratio(made["tail"]) == pytest.approx(100.0, rel=made["tail"].width)
    assert outlier_ratio(made["zero"]) == 1.0
    assert outlier_ratio(tensor(np.full(9, -2.5))) == 1.0


def test_bars_hold_every_element_but_zeros_and_none_has_both_signs() -> None:
    made = outlying().tensors["tail"]
    drawn = bars(made)
    assert sum(count for _, _, count in drawn) == made.count - made.zeros == 20_001
    assert len(drawn) <= MOST_BARS + 2
    assert all(right <= 0 or left >= 0 for left, right, _ in drawn)
    assert drawn[0][0] <= -1.0
    assert drawn[-1][0] <= 100.0 <= drawn[-1][1]
    assert drawn[-1][2] == 1
    widths = {right - left for left, right, _ in drawn}
    assert max(widths) == pytest.approx(min(widths), rel=1e-12)
    assert bars(tensor(np.zeros(4))) == ()


def test_channels_beyond_six_medians_are_outliers() -> None:
    low = np.array([-1, 0, -2, -6.5, 0, 0], np.float32)
    high = np.array([1, 1, 1, 1, 12, 0], np.float32)
    made = channel_figure(ChannelExtremes(-1, low, high))
    # Reaches 1, 1, 2, 6.5, 12 and a channel that is always zero, which does not count: the median is 2.
    assert made.median == 2.0
    assert made.outliers == ()
    low[2], high[4] = -1, 12.5
    made = channel_figure(ChannelExtremes(-1, low, high))
    assert (made.median, made.outliers) == (1.0, ((4, 12.5), (3, 6.5)))
    dead = channel_figure(ChannelExtremes(-1, np.zeros(3, np.float32), np.zeros(3, np.float32)))
    assert (dead.median, dead.outliers) == (0.0, ())


def test_a_channel_without_finite_values_is_no_outlier() -> None:
    low = np.array([-1, np.inf, -1], np.float32)
    high = np.array([1, -np.inf, 1], np.float32)
    made = channel_figure(ChannelExtremes(-1, low, high))
    assert (made.median, made.outliers) == (1.0, ())


@pytest.mark.parametrize("spec", [QuantSpec("uint8"), QuantSpec("int8", symmetric=True), QuantSpec("uint4")])
def test_the_expected_sqnr_is_that_of_quantizing_the_values(spec: QuantSpec) -> None:
    values = np.random.default_rng(2).standard_normal(200_000).astype(np.float32)
    statistics = Statistics({"x": tensor(values)}, feeds=1)
    (figure,) = figures(statistics, ("min-max", "percentile:99.5"), spec=spec)
    for at in figure.ranges:
        params = affine_params(spec, at.low, at.high)
        scale, zero = float(params.scale), float(params.zero_point)
        back = (np.clip(np.rint(values / scale) + zero, *spec.limits) - zero) * scale
        exact = 10 * math.log10(np.square(values, dtype=np.float64).sum() / np.square(values - back).sum())
        assert at.sqnr_db == pytest.approx(exact, abs=0.1)
        outside = np.mean((values < at.low) | (values > at.high))
        assert at.clipped == pytest.approx(outside, abs=2 * np.mean(np.abs(values - at.high) < figure.tensor.width))
    assert figure.best in figure.ranges


def test_16_bits_are_not_judged_by_the_width_of_bins() -> None:
    values = np.random.default_rng(2).uniform(-1, 1, 100_000).astype(np.float32)
    (figure,) = figures(Statistics({"x": tensor(values)}, feeds=1), ("min-max",), spec=QuantSpec("uint16"))
    # A uniform distribution over the range: 20 log10(2^16 - 1).
    assert figure.ranges[0].sqnr_db == pytest.approx(20 * math.log10(65535), abs=0.1)


def test_what_loses_nothing_has_no_sqnr() -> None:
    figure = one(outlying(), "zero")
    assert [r.sqnr_db for r in figure.ranges] == [None, None]
    assert figure.best is None


def test_the_most_outlying_comes_first_and_the_rest_in_order() -> None:
    assert next(f.name for f in figures(outlying(), ESTIMATORS)) == "tail"
    same = Statistics({n: tensor(np.ones(4)) for n in ("b", "a", "c")}, feeds=1)
    assert [f.name for f in figures(same, ESTIMATORS)] == ["b", "a", "c"]


# ---- scales --------------------------------------------------------------------------------------------------------


def test_scales() -> None:
    axis = Axis(-1.0, 3.0, 100.0, 500.0)
    assert [axis.position(v) for v in (-1.0, 0.0, 3.0)] == [100.0, 200.0, 500.0]
    assert axis.ticks(4) == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert Axis(0.0, 0.07, 0.0, 1.0).ticks(7) == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07])
    up = Heights(10_000, 100.0, 10.0)
    assert up.position(10_000) == 10.0
    assert up.position(1) < 100.0, "a single element is seen"
    steps = np.diff([up.position(10**d) for d in range(5)])
    assert steps == pytest.approx(np.full(4, steps[0])), "each decade is as high"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 %"), (1e-6, "&lt; 0.01 %"), (0.00051, "0.051 %"), (0.99999, "99.99 %"), (1.0, "100 %")]
)
def test_shares_do_not_round_a_little_to_nothing(value: float, text: str) -> None:
    assert share(value) == text


# ---- drawings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tail", "ch<a>nnel & \"5'", "zero"])
def test_ranges_are_drawn_where_the_scale_puts_them(name: str) -> None:
    statistics = outlying()
    figure = one(statistics, name)
    root = svg(histogram(figure, colours(ESTIMATORS)))
    axis = value_axis(figure)
    assert LEFT < axis.position(figure.tensor.minimum) <= axis.position(figure.tensor.maximum) < RIGHT
    lines = {(e["data-estimator"], e["data-end"]): e for e in found(root, "line", "range")}
    lanes = list(found(root, "rect", "lane"))
    assert len(lines) == 2 * len(ESTIMATORS)
    for estimator, lane in zip(ESTIMATORS, lanes, strict=True):
        low, high = statistics.range(name, estimator)
        for end, value in (("low", low), ("high", high)):
            line = lines[estimator, end]
            assert line["x1"] == line["x2"]
            assert float(line["x1"]) == pytest.approx(axis.position(value), abs=PLACE)
            assert line["stroke"] == lane["fill"] == colours(ESTIMATORS)[estimator]
        assert float(lane["x"]) == pytest.approx(axis.position(low), abs=PLACE)
        width = max(axis.position(high) - axis.position(low), 1.0)
        assert float(lane["width"]) == pytest.approx(width, abs=PLACE)
    texts = "".join(root.itertext())
    assert f"{number(low)} … {number(high)}" in texts
    assert all(estimator in texts for estimator in ESTIMATORS)


def test_bars_are_as_high_as_the_logarithm_of_their_count() -> None:
    figure = one(outlying(), "tail")
    (path,) = found(svg(histogram(figure, colours(ESTIMATORS))), "path", "bars")
    drawn = [[float(v) for v in re.findall(r"-?[\d.]+", part)] for part in path["d"].split("z")[:-1]]
    axis, up = value_axis(figure), heights(figure)
    assert len(drawn) == len(figure.bars)
    for (x, base, top, right, bottom), (left, end, count) in zip(drawn, figure.bars, strict=True):
        assert base == bottom == up.base
        assert x == pytest.approx(axis.position(left), abs=PLACE)
        assert right == pytest.approx(max(axis.position(end), axis.position(left) + 0.5), abs=PLACE)
        assert top == pytest.approx(up.position(count), abs=PLACE)


def test_exact_zeros_are_a_pin_at_zero() -> None:
    figure = one(outlying(), "tail")
    root = svg(histogram(figure, colours(ESTIMATORS)))
    (pin,) = found(root, "circle", "zeros")
    assert float(pin["cx"]) == pytest.approx(value_axis(figure).position(0.0), abs=PLACE)
    assert float(pin["cy"]) == pytest.approx(heights(figure).position(5_000), abs=PLACE)
    assert "5,000 exact zeros, 20 %" in "".join(root.itertext())
    none = Statistics({"x": tensor([1.0, 2.0])}, feeds=1)
    assert not list(found(svg(histogram(one(none, "x"), colours(ESTIMATORS))), "circle", "zeros"))


def test_a_range_that_could_not_be_estimated_says_why() -> None:
    figure = one(outlying(), "tail")
    broken = replace(figure, ranges=(figure.ranges[0], replace(figure.ranges[1], problem="too <few> values")))
    root = svg(histogram(broken, colours(ESTIMATORS)))
    assert len(list(found(root, "line", "range"))) == 2
    assert "too <few> values" in "".join(root.itertext())
    assert len(list(svg(spark(broken, colours(ESTIMATORS))).iter("rect"))) == 1


def test_small_drawings_have_the_same_ranges() -> None:
    figure = one(outlying(), "tail")
    text = spark(figure, colours(ESTIMATORS))
    axis = value_axis(figure, 0.0, 180.0)
    rects = [e.attrib for e in svg(text).iter("rect")]
    for rect, at in zip(rects, figure.ranges, strict=True):
        assert float(rect["x"]) == pytest.approx(axis.position(at.low), abs=PLACE)
        assert float(rect["width"]) == pytest.approx(max(axis.position(at.high) - axis.position(at.low), 1), abs=PLACE)


def test_outlier_channels_are_flagged_where_they_are() -> None:
    channels = one(outlying(), "ch<a>nnel & \"5'").channels
    assert channels is not None
    root = svg(channel_strip(channels))
    (outlier,) = found(root, "rect", "outlier")
    across, up = channel_axes(channels)
    assert outlier["data-channel"] == "5"
    assert float(outlier["x"]) == pytest.approx(across.position(5), abs=PLACE)
    assert float(outlier["y"]) == pytest.approx(up.position(24.0), abs=PLACE)
    assert float(outlier["height"]) == pytest.approx(up.position(-24.0) - up.position(24.0), abs=2 * PLACE)
    bounds = sorted(float(e["y1"]) for e in found(root, "line", "bound"))
    assert bounds == pytest.approx([up.position(12.0), up.position(-12.0)], abs=PLACE)
    texts = "".join(root.itertext())
    assert "8 channels, axis -1" in texts
    assert "farthest: 5, 12.0 × the median" in texts
    (others,) = found(root, "path", "channel")
    assert others["d"].count("M") == 7


def test_many_channels_share_columns_and_outliers_do_not() -> None:
    high = np.ones(10_000, np.float32)
    high[[123, 9_999]] = 50.0
    made = channel_figure(ChannelExtremes(-1, -high, high))
    text = channel_strip(made)
    root = svg(text)
    assert [e["data-channel"] for e in found(root, "rect", "outlier")] == ["123", "9999"]
    (others,) = found(root, "path", "channel")
    assert others["d"].count("M") <= RIGHT - LEFT
    assert len(text) < 40_000


def test_all_channels_may_be_zero() -> None:
    channels = one(outlying(), "zero").channels
    assert channels is not None
    root = svg(channel_strip(channels))
    assert "none is an outlier" in "".join(root.itertext())
    assert not list(found(root, "line", "bound"))


# ---- pages ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Rows of a page, its texts, and whatever would need the network."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "details":
            self.rows.append(dict(attrs))
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_has_a_row_per_tensor_with_its_figures(tmp_path: Path) -> None:
    statistics = outlying()
    assert plot_calibration(statistics, tmp_path / "p.html", ESTIMATORS) == (tmp_path / "p.html",)
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert page.open == [], "every element is closed"
    rows = {row["data-name"]: row for row in page.rows}
    assert next(iter(rows)) == "tail", "the most outlying first"
    assert set(rows) == {"tail", "zero", "ch<a>nnel & \"5'"}
    tail = rows["tail"]
    assert (tail["data-count"], tail["data-min"], tail["data-max"]) == ("25001", "-1.0", "100.0")
    assert float(tail["data-zeros"] or "") == pytest.approx(5_000 / 25_001)
    assert float(tail["data-std"] or "") == statistics.tensors["tail"].std
    assert (tail["data-marked"], rows["zero"]["data-marked"]) == ("1", "0")
    assert rows["ch<a>nnel & \"5'"]["data-channels"] == "1"
    text = " ".join(page.texts)
    assert "Never executed during calibration, so without ranges (1): never" in text
    assert "reaches farther than 6 × the median" in text, "the rule is on the page"
    assert "99.99 % of the elements stay below" in text


def test_a_page_needs_no_network_and_is_the_same_each_time(tmp_path: Path) -> None:
    plot_calibration(outlying(), tmp_path / "p.html", ESTIMATORS)
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert Page(text).links == []
    assert not re.search(r"https?:|@import|url\(", text)
    plot_calibration(outlying(), tmp_path / "q.html", ESTIMATORS)
    assert (tmp_path / "q.html").read_text(encoding="utf-8") == text


def test_synthetic_feeds_are_marked(tmp_path: Path) -> None:
    statistics = outlying()
    statistics.synthetic = "standard normal"
    plot_calibration(statistics, tmp_path / "p.html", ESTIMATORS)
    assert "Synthetic feeds: standard normal" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_names_choose_tensors(tmp_path: Path) -> None:
    plot_calibration(outlying(), tmp_path / "p.html", ESTIMATORS, names=["zero", "never", "zero"])
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert [row["data-name"] for row in page.rows] == ["zero"]


def test_a_page_of_500_tensors_stays_small(tmp_path: Path) -> None:
    made = outlying().tensors
    many = Statistics({f"{name}/{i}": made[name] for i in range(167) for name in ("tail", "zero", "ch<a>nnel & \"5'")})
    plot_calibration(many, tmp_path / "p.html", ESTIMATORS)
    assert (tmp_path / "p.html").stat().st_size < 501 * 20_000
    assert (tmp_path / "p.html").read_text(encoding="utf-8").count("<details ") == 501


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"a picture is an \.html or a \.png file, not 'p.svg'"):
        plot_calibration(outlying(), tmp_path / "p.svg")
    with pytest.raises(CalibrationError, match="no statistics of 'x'"):
        plot_calibration(outlying(), tmp_path / "p.html", names=["x"])
    with pytest.raises(CalibrationError, match="nothing to draw"):
        plot_calibration(outlying(), tmp_path / "p.html", names=["never"])
    with pytest.raises(CalibrationError, match="median"):
        plot_calibration(outlying(), tmp_path / "p.html", ("min-max", "median"))
    with pytest.raises(CalibrationError, match=r"cannot write .*No such file"):
        plot_calibration(outlying(), tmp_path / "none" / "p.html", ESTIMATORS)
    assert list(tmp_path.iterdir()) == []


# ---- PNG -----------------------------------------------------------------------------------------------------------


def test_png_pages_hold_six_tensors_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from qcompiler.report import calibration_png

    made = outlying().tensors
    statistics = Statistics({"$tail_{x}": made["tail"], "通道 5": made["ch<a>nnel & \"5'"]}, feeds=1)
    monkeypatch.setattr(calibration_png, "PER_FILE", 1)
    written = plot_calibration(statistics, tmp_path / "p.png", ESTIMATORS)
    assert [p.name for p in written] == ["p.png", "p-2.png"]
    for path in written:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == 825
        assert height == pytest.approx(473, abs=1)


def test_png_draws_ranges_and_flags_channels() -> None:
    pytest.importorskip("matplotlib")
    from qcompiler.report.calibration_png import sheet

    statistics = outlying()
    name = "ch<a>nnel & \"5'"
    drawn = sheet([one(statistics, name)], ESTIMATORS)
    upper, lower = drawn.axes
    at = [float(np.asarray(line.get_xdata())[0]) for line in upper.lines]
    expected = [v for e in ESTIMATORS for v in statistics.range(name, e)]
    assert at == pytest.approx(expected)
    assert upper.get_yscale() == "log"
    assert [text.get_text() for text in lower.texts] == ["5"]
    assert sum(patch.get_height() for patch in upper.patches) == 4_000  # type: ignore[attr-defined]


def test_png_without_matplotlib_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"pip install 'qcompiler\[plot\]', or name an \.html file"):
        plot_calibration(outlying(), tmp_path / "p.png", ESTIMATORS)


def test_html_loads_no_matplotlib() -> None:
    code = "import qcompiler.report.calibration_plot, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
