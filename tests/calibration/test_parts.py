"""Statistics per channel and per block."""

import numpy as np
import pytest

import qcompiler
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.observe import Observer, blank
from qcompiler.calibration.statistics import Parts
from qcompiler.errors import CalibrationError
from qcompiler.ir.text import parse_text

MODEL = '<ir_version: 10, opset_import: ["" : 21]>\nmain (float[N,6,2] x) => (float[N,6,2] y) { [a] y = Neg(x) }'
FEEDS = [{"x": np.random.default_rng(i).standard_normal((4, 6, 2)).astype(np.float32) * (i + 1)} for i in range(3)]


@pytest.mark.parametrize(("axis", "block", "parts"), [(1, 1, 6), (1, 4, 2), (-1, 1, 2), (2, 2, 1)])
def test_every_part_has_the_range_of_its_own_numbers(axis: int, block: int, parts: int) -> None:
    observer = Observer(parse_text(MODEL), ["y"], OrtEngine(), parts={"y": Parts(axis, block)})
    found = blank(["y"])
    for index, feed in enumerate(FEEDS):
        observer.observe(feed, index, found)
    whole = np.moveaxis(-np.concatenate([f["x"] for f in FEEDS]), axis, 0)
    cut = [whole[i : i + block] for i in range(0, len(whole), block)]
    low, high = found.ranges("y")
    assert len(cut) == parts
    assert low.tolist() == [float(c.min()) for c in cut]
    assert high.tolist() == [float(c.max()) for c in cut]
    assert found.range("y") == (float(whole.min()), float(whole.max()))
    _, clipped = found.ranges("y", "percentile:90")
    assert (clipped <= high).all()


def test_parts_that_do_not_exist() -> None:
    observer = Observer(parse_text(MODEL), ["y"], OrtEngine(), parts={"y": Parts(3)})
    with pytest.raises(CalibrationError, match="y has 3 axes; there is no axis 3"):
        observer.observe(FEEDS[0], 0, blank(["y"]))
    with pytest.raises(CalibrationError, match="was not observed per channel"):
        blank(["y"]).ranges("y")
    model = parse_text(MODEL.replace("Neg(x)", "Relu(x)"))
    with pytest.raises(CalibrationError, match="'nothing' is not among the observed values"):
        qcompiler.calibrate(model, FEEDS, parts={"nothing": Parts(1)})
