"""Sections of outputs that join quantities of different scale."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.engine import Array
from qcompiler.search.quality import CEILING, Judge
from qcompiler.search.scores import ScoreErrors
from qcompiler.search.sections import MOST_SECTIONS, Section, cut, find_sections
from tests.passes.quantize.lab import ENGINE, import_exactly, model_of, normal
from tests.search.test_quality import Shelf, feeds

HEADS = (
    "box = Conv(x, wb) obj = Conv(x, wo) cls = Conv(x, wc) p = Sigmoid(obj) q = Sigmoid(cls) "
    "one = Concat<axis=1>(box, p, q) flat1 = Reshape(one, flat) two = Concat<axis=1>(box, p, q) "
    "flat2 = Reshape(two, flat) all = Concat<axis=2>(flat1, flat2) y = Transpose<perm=[0,2,1]>(all)"
)
WEIGHTS = {
    "wb": 100 * normal(1, 4, 3, 1, 1), "wo": normal(2, 1, 3, 1, 1), "wc": normal(3, 6, 3, 1, 1),
    "flat": np.asarray([0, 11, -1], np.int64),
}  # fmt: skip


def results(body: str, inputs: str = "float[1,3,4,4] x") -> tuple[object, list[dict[str, Array]]]:
    model = import_exactly(model_of(inputs, "float[] y", body, WEIGHTS))
    feed = {"x": normal(7, 1, 3, 4, 4)}
    return model, [ENGINE.load(model).run(feed)]


def sections_of(body: str) -> list[str]:
    model, found = results(body)
    return [s.name for parts in find_sections(model, found).values() for s in parts]  # type: ignore[arg-type]


def test_a_section_is_named_as_numpy_slices_it() -> None:
    section = Section("y", 2, 4, 5)
    assert section.name == "y[:, :, 4:5]"
    array = np.arange(24.0).reshape(2, 2, 6)
    np.testing.assert_array_equal(section.of(array), array[:, :, 4:5])
    assert Section("y", 0, 0, 3).name == "y[0:3]"


def test_a_detectors_head_is_parted_by_quantity_not_by_scale() -> None:
    assert sections_of(HEADS) == ["y[:, :, 0:4]", "y[:, :, 4:5]", "y[:, :, 5:11]"]


def test_a_concat_at_the_output_is_parted() -> None:
    assert sections_of("a = Conv(x, wb) b = Conv(x, wo) y = Concat<axis=1>(a, b)") == ["y[:, 0:4]", "y[:, 4:5]"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("a = Conv(x, wo) b = Tanh(x) y = Concat<axis=1>(a, b)", id="like scales"),
        pytest.param("a = Conv(x, wb) b = Sub(x, x) y = Concat<axis=1>(a, b)", id="a section of zeros"),
        pytest.param("a = Conv(x, wb) b = Conv(x, wo) c = Concat<axis=1>(a, b) y = Flatten(c)", id="axis merged"),
        pytest.param("a = Conv(x, wb) b = Conv(x, wo) c = Concat<axis=1>(a, b) y = ReduceMax(c)", id="axis gone"),
        pytest.param(f"a = Conv(x, wb) y = Concat<axis=1>({', '.join(['a'] + ['x'] * MOST_SECTIONS)})", id="too many"),
    ],
)  # fmt: skip
def test_what_is_judged_as_a_whole(body: str) -> None:
    assert sections_of(body) == []


def test_cut_replaces_outputs_by_their_sections() -> None:
    parts = {"y": (Section("y", 1, 0, 1), Section("y", 1, 1, 3))}
    y, z = np.arange(6.0).reshape(2, 3), np.ones(2)
    found = cut({"y": y, "z": z}, parts)
    assert list(found) == ["y[:, 0:1]", "y[:, 1:3]", "z"]
    np.testing.assert_array_equal(found["y[:, 1:3]"], y[:, 1:])


def test_lost_probabilities_do_not_hide_behind_exact_boxes() -> None:
    model, wanted = results(HEADS)
    boxes = wanted[0]["y"].copy()
    boxes[:, :, 4:] = 0
    shelf = Shelf({"float": wanted, "int8": [{"y": boxes}]})
    whole = Judge(shelf, "float", feeds(1))("int8")  # type: ignore[arg-type]
    assert whole.worst > 40
    found = Judge(shelf, "float", feeds(1), graph=model)("int8")  # type: ignore[arg-type]
    assert found.sqnr_db == {"y[:, :, 0:4]": CEILING, "y[:, :, 4:5]": 0.0, "y[:, :, 5:11]": 0.0}


def test_class_scores_and_whole_outputs_keep_their_names() -> None:
    model, wanted = results("a = Conv(x, wb) b = Conv(x, wo) y = Concat<axis=1>(a, b)")
    shelf = Shelf({"float": wanted})
    assert Judge(shelf, "float", feeds(1), ["y"], graph=model).outputs == ("y",)  # type: ignore[arg-type]


def test_candidates_are_compared_section_by_section() -> None:
    """The error that a treatment is judged by: one section wholly lost is an error of one, however small its values."""
    model, _ = results(HEADS)
    lost = import_exactly(
        model_of("float[1,3,4,4] x", "float[] y", HEADS.replace("q = Sigmoid(cls)", "q = Sub(cls, cls)"), WEIGHTS)
    )
    judge = ScoreErrors(ENGINE, model, [{"x": normal(7, 1, 3, 4, 4)}])  # type: ignore[arg-type]
    assert judge(model).sum() == 0.0  # type: ignore[arg-type]
    assert judge(lost).sum() == pytest.approx(1.0)
