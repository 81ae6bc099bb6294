"""Comparing candidates by the scores in front of a final Softmax."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import EngineOptions
from qcompiler.ir.reader import read_model
from qcompiler.search import scores
from qcompiler.search.scores import ScoreErrors, expose_scores

PLAIN = EngineOptions(threads=1, optimize=False)
CLASSIFIER = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N, 3] x) => (float[N, 3] p, float[N, 3] y) {
  half = Constant <value = float {0.5}> ()
  y = Mul (x, half)
  s = Softmax (y)
  p = Identity (s)
}
"""


def model(text: str) -> ir.Model:
    return ir.from_onnx_text(text)


def run(given: ir.Model, x: np.ndarray) -> dict[str, np.ndarray]:
    return OrtEngine().load(given, PLAIN).run({"x": x})


def test_an_output_behind_a_softmax_gives_its_scores_and_others_stay() -> None:
    given = model(CLASSIFIER)
    exposed = expose_scores(given)
    x = np.array([[1, 2, 3], [4, 0, 0]], np.float32)
    assert [o.name for o in exposed.graph.outputs] == ["p", "y"]
    for name, array in run(exposed, x).items():
        np.testing.assert_array_equal(array, x / 2, err_msg=name)
    np.testing.assert_allclose(run(given, x)["p"].sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("operator", ["Sigmoid", "Tanh", "LogSoftmax"])
def test_other_saturating_operators_come_off_as_well(operator: str) -> None:
    text = CLASSIFIER.replace("Softmax", operator)
    x = np.array([[1, 2, 3]], np.float32)
    np.testing.assert_array_equal(run(expose_scores(model(text)), x)["p"], x / 2)


def test_a_softmax_inside_stays() -> None:
    text = CLASSIFIER.replace("p = Identity (s)", "p = Mul (s, s)")
    x = np.array([[1, 2, 3]], np.float32)
    np.testing.assert_array_equal(run(expose_scores(model(text)), x)["p"], run(model(text), x)["p"])


def test_two_outputs_of_one_softmax() -> None:
    text = CLASSIFIER.replace("float[N, 3] y)", "float[N, 3] s)")
    x = np.array([[1, 2, 3]], np.float32)
    results = run(expose_scores(model(text)), x)
    np.testing.assert_array_equal(results["p"], x / 2)
    np.testing.assert_array_equal(results["s"], x / 2)


def test_errors_are_per_row_and_relative_to_the_signal() -> None:
    given = model(CLASSIFIER)
    other = model(CLASSIFIER.replace("float {0.5}", "float {0.25}"))
    feeds = [{"x": np.array([[2, 0, 0], [0, 4, 0]], np.float32)}]
    errors = ScoreErrors(OrtEngine(), given, feeds, options=PLAIN)
    # p and y alike: a quarter of 2 and of 4 is missing of 1 and 2.
    np.testing.assert_allclose(errors(other), [0.25 / 5, 1.0 / 5] * 2, rtol=1e-6)
    np.testing.assert_array_equal(errors(given), np.zeros(4))


def test_a_lost_number_is_an_error_without_bound() -> None:
    broken = model(CLASSIFIER.replace("Mul (x, half)", "Sqrt (x)"))
    feeds = [{"x": np.array([[-2, 1, 1], [0, 4, 0]], np.float32)}]
    errors = ScoreErrors(OrtEngine(), model(CLASSIFIER), feeds, options=PLAIN)(broken)
    assert np.isinf(errors[0])
    assert np.isfinite(errors[1])


def test_more_feeds_are_added_while_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"x": np.full((1, 3), i, np.float32)} for i in range(1, 120)]

    def counted(held_out: int) -> int:
        return len(ScoreErrors(OrtEngine(), model(CLASSIFIER), feeds[:held_out], feeds[held_out:], PLAIN).feeds)

    assert counted(1) == counted(80) == scores.MOST_FEEDS
    monkeypatch.setattr(scores, "FAIR_SAMPLE", 30)
    assert counted(1) == 5  # six elements each
    assert counted(10) == 10
    monkeypatch.setattr(scores, "FAIR_SAMPLE", 0)
    assert counted(1) == scores.LEAST_FEEDS


def test_reading_a_model_from_text_agrees_with_the_reader() -> None:
    assert [o.name for o in read_model(model(CLASSIFIER)).graph.outputs] == ["p", "y"]
