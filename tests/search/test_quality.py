"""Exact figures of closeness: SQNR, agreement, differing elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from qcompiler.engine import Array, EngineOptions, Feeds, ModelLike, Profile, TensorInfo
from qcompiler.search.quality import CEILING, Judge, Quality, carried_states, class_like_outputs, sqnr_db
from tests.search.nets import net

F = np.float32


@dataclass(frozen=True)
class Fixed:
    """Answers the given outputs, feed after feed: a feed says by ``i`` which."""

    answers: Sequence[Mapping[str, Array]]
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        return dict(self.answers[int(feeds["i"])])


@dataclass(frozen=True)
class Shelf:
    """An engine whose models are names of prepared answers."""

    models: Mapping[str, Sequence[Mapping[str, Array]]]
    name: str = "shelf"
    version: str = "1"

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> Fixed:
        return Fixed(self.models[str(model)])

    def profile(self, model: ModelLike, feeds: Feeds, options: EngineOptions, rounds: int) -> Profile:
        raise NotImplementedError

    def optimized_graph(self, model: ModelLike, options: EngineOptions) -> object:
        raise NotImplementedError


def feeds(count: int) -> list[Feeds]:
    return [{"i": np.asarray(i)} for i in range(count)]


def judged(
    wanted: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]], classes: Sequence[str] = ()
) -> Quality:
    judge = Judge(Shelf({"float": wanted, "int8": actual}), "float", feeds(len(wanted)), classes)  # type: ignore[arg-type]
    return judge("int8")


def test_sqnr_is_that_of_the_definition() -> None:
    assert sqnr_db(np.asarray([3.0, 4.0], F), np.asarray([3.0, 3.5], F)) == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr_db(np.asarray([1.0], F), np.asarray([0.0], F)) == 0.0
    assert sqnr_db(np.asarray([1.0], F), np.asarray([11.0], F)) == pytest.approx(-20.0)


def test_equal_outputs_reach_the_ceiling() -> None:
    assert sqnr_db(np.asarray([1.0, -2.0], F), np.asarray([1.0, -2.0], F)) == CEILING
    assert sqnr_db(np.zeros(3, F), np.zeros(3, F)) == CEILING


def test_no_signal_and_some_noise_reaches_the_floor() -> None:
    assert sqnr_db(np.zeros(2, F), np.ones(2, F)) == -CEILING


def test_powers_are_summed_over_feeds_not_decibels() -> None:
    wanted = [{"y": np.asarray([10.0], F)}, {"y": np.asarray([1.0], F)}]
    actual = [{"y": np.asarray([10.0], F)}, {"y": np.asarray([0.0], F)}]
    assert judged(wanted, actual).sqnr_db == {"y": pytest.approx(10 * math.log10(101 / 1))}


def test_outputs_are_never_pooled() -> None:
    wanted = [{"big": np.asarray([1000.0], F), "small": np.asarray([1.0], F)}]
    actual = [{"big": np.asarray([1001.0], F), "small": np.asarray([0.9], F)}]
    found = judged(wanted, actual)
    assert found.sqnr_db == {"big": pytest.approx(60.0, abs=1e-3), "small": pytest.approx(20.0, abs=1e-3)}
    assert found.worst == found.sqnr_db["small"]


def test_an_output_without_signal_and_noise_says_nothing() -> None:
    found = judged([{"y": np.zeros(3, F)}], [{"y": np.zeros(3, F)}])
    assert found.sqnr_db == {}
    assert found.worst == CEILING


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_in_the_candidate_alone_fails_every_bound(broken: float) -> None:
    found = judged([{"y": np.asarray([1.0, 2.0], F)}], [{"y": np.asarray([1.0, broken], F)}])
    assert found.worst == -CEILING


def test_where_float_itself_is_not_finite_nothing_is_compared() -> None:
    wanted = np.asarray([3.0, 4.0, np.inf, -np.inf, np.nan], F)
    for rest in ([np.inf, -np.inf, np.nan], [0.0, 7.0, 8.0]):
        found = judged([{"y": wanted}], [{"y": np.asarray([3.0, 3.5, *rest], F)}])
        assert found.sqnr_db == {"y": pytest.approx(20.0)}


def test_agreement_is_the_share_of_rows_with_the_same_largest_score() -> None:
    wanted = np.asarray([[1, 2, 3], [3, 2, 1], [0, 5, 1], [9, 0, 0]], F)
    actual = np.asarray([[1, 2, 4], [2, 3, 1], [0, 9, 9], [9, 0, 0]], F)
    found = judged([{"y": wanted, "z": wanted}], [{"y": actual, "z": actual}], ["y"])
    assert found.agreement == {"y": 0.75}  # a tie goes to the first, in NumPy and in ONNX
    assert found.rows == {"y": 4}


def test_agreement_counts_rows_of_every_feed_and_all_leading_axes() -> None:
    rows = np.eye(4, dtype=F)
    wanted = [{"y": rows.reshape(2, 2, 4)}, {"y": rows[:2]}]
    actual = [{"y": rows.reshape(2, 2, 4)}, {"y": rows[[1, 1]]}]
    assert judged(wanted, actual, ["y"]).agreement == {"y": pytest.approx(5 / 6)}


@pytest.mark.parametrize(
    ("share", "rows", "missing"),
    [
        (1.0, 10, 0.0),
        (0.9, 10, 0.0),  # one row of ten may differ
        (0.8, 10, 0.1),
        (0.96, 1000, 0.01),
        (0.0, 1, 0.0),
    ],
)
def test_one_differing_row_is_always_allowed(share: float, rows: int, missing: float) -> None:
    found = Quality(agreement={"y": share}, rows={"y": rows}).disagreement(0.97)
    assert max(0.0, found) == pytest.approx(missing)


def test_what_is_expected_on_other_data_counts_where_it_is_known() -> None:
    found = Quality(agreement={"y": 0.9, "z": 0.96}, rows={"y": 80, "z": 80}, likely={"y": 0.98})
    assert found.disagreement(0.97) == pytest.approx(0.01)  # that of z
    assert found.least_agreement == 0.96


def test_a_tie_among_few_rows_is_no_disagreement() -> None:
    """Nine rows are decided by far; the tenth flips by the same small error."""
    wanted = np.zeros((10, 3), F)
    wanted[:, :2] = [5.0, 1.0]
    wanted[9] = [1.0, 0.99, 0.0]
    actual = wanted + np.asarray([-0.01, 0.01, 0.0], F)
    found = judged([{"y": wanted}], [{"y": actual}], ["y"])
    assert found.agreement == {"y": 0.9}
    assert found.likely["y"] == pytest.approx((9 + 200 * 9.69146 / 10) / 210, abs=1e-3)  # Phi(0.01 / 0.02)
    assert found.disagreement(0.97) < 0


def test_the_worst_class_like_output_counts() -> None:
    found = Quality(agreement={"y": 0.99, "z": 0.9}, rows={"y": 100, "z": 100})
    assert found.disagreement(0.97) == pytest.approx(0.07)
    assert Quality().disagreement(0.97) == 0.0


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_score_has_no_arg_max(shape: tuple[int, ...]) -> None:
    found = judged([{"y": np.ones(shape, F)}], [{"y": np.ones(shape, F)}], ["y"])
    assert found.agreement == {}
    assert found.least_agreement == 1.0


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_])
def test_other_outputs_are_compared_element_by_element(dtype: type) -> None:
    found = judged([{"k": np.asarray([0, 1, 1, 0], dtype)}], [{"k": np.asarray([0, 1, 0, 0], dtype)}])
    assert found.differing == {"k": 0.25}
    assert found.sqnr_db == {}
    assert found.worst == CEILING


def test_another_number_of_boxes_differs_altogether() -> None:
    wanted, actual = np.arange(4, dtype=np.int64), np.arange(3, dtype=np.int64)
    assert judged([{"k": wanted}], [{"k": actual}]).differing == {"k": 1.0}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantized_outputs_have_an_sqnr(dtype: type) -> None:
    found = judged([{"q": np.asarray([30, 40], dtype)}], [{"q": np.asarray([30, 35], dtype)}])
    assert found.sqnr_db == {"q": pytest.approx(20.0)}


def test_half_precision_is_compared_in_double() -> None:
    wanted = np.full(3, 60000, np.float16)  # its square overflows float16
    found = judged([{"y": wanted}], [{"y": np.full(3, 54016, np.float16)}])
    assert found.sqnr_db == {"y": pytest.approx(20 * math.log10(60000 / 5984))}


def test_bfloat16_is_compared_as_the_numbers_it_holds() -> None:
    import ml_dtypes

    wanted, actual = np.asarray([3.0, 4.0], ml_dtypes.bfloat16), np.asarray([3.0, 3.5], ml_dtypes.bfloat16)
    found = judged([{"y": wanted}], [{"y": actual}])
    assert found.sqnr_db == {"y": pytest.approx(20.0)}
    assert found.differing == {}


def test_the_metric_runs_on_its_own_feeds_for_both_models() -> None:
    answers = {"float": [{"y": np.asarray([1.0], F)}, {"y": np.asarray([2.0], F)}],
               "int8": [{"y": np.asarray([1.0], F)}, {"y": np.asarray([1.5], F)}]}  # fmt: skip
    seen: list[int] = []

    def metric(outputs: Sequence[Mapping[str, Array]], given: Sequence[Feeds]) -> float:
        seen.append(len(given))
        return float(sum(o["y"][0] for o in outputs))

    judge = Judge(Shelf(answers), "float", feeds(1), metric=metric, metric_feeds=feeds(2))  # type: ignore[arg-type]
    assert judge.reference_metric == 3.0
    assert judge("int8").metric == 2.5
    assert judge("int8").sqnr_db == {"y": CEILING}  # measured on the set-aside feed, which is equal
    assert seen == [2, 2, 2]


# ---- which outputs are scores or states ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = MatMul(x, m)", True),
        ("t = MatMul(x, m) y = Add(t, m)", True),
        ("t = MatMul(x, m) y = Softmax(t)", True),
        ("t = MatMul(x, m) y = Identity(t)", True),
        ("t = MatMul(x, m) y = Relu(t)", False),
        ("y = Tanh(x)", False),
        ("t = LayerNormalization(x, v) y = Identity(t)", False),
    ],
)
def test_scores_are_known_by_what_computes_them(body: str, expected: bool) -> None:
    model, _ = net(body, inputs="float[64,64] x, float[64] v")
    assert class_like_outputs(model) == (("y",) if expected else ())


def state(*shape: int, dtype: type = F) -> Array:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ({"x": state(1, 8), "h0": state(2, 4)}, {"y": state(1, 8), "hn": state(2, 4)}, ("hn",)),
        ({"x": state(1, 8), "state": state(2, 4)}, {"y": state(1, 8), "stateN": state(2, 4)}, ("stateN",)),
        ({"x": state(1, 8), "cache_in": state(2, 4)}, {"cache_out": state(2, 4)}, ("cache_out",)),
        ({"x": state(1, 8), "h0": state(2, 4)}, {"hn": state(1, 4)}, ()),  # another shape
        ({"x": state(1, 8), "h0": state(2, 4)}, {"hn": state(2, 4, dtype=np.float64)}, ()),  # another type
        ({"x": state(1, 8), "k": state(4, dtype=np.int64)}, {"kn": state(4, dtype=np.int64)}, ()),  # no numbers
        ({"x": state(1, 8)}, {"xn": state(1, 8)}, ()),  # the only input is no state
    ],
)
def test_states_are_known_by_name_shape_and_type(
    inputs: dict[str, Array], outputs: dict[str, Array], expected: tuple[str, ...]
) -> None:
    assert tuple(carried_states(inputs, outputs)) == expected


def test_an_input_is_the_state_of_one_output_only() -> None:
    outputs = {"h_last": state(2, 4), "h_mean": state(2, 4)}
    assert carried_states({"x": state(1, 8), "h": state(2, 4)}, outputs) == {"h_last": "h"}


@dataclass(frozen=True)
class Leaky:
    """A unit with a state: h' = keep h + x, y = h'."""

    keep: float
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        h = (self.keep * feeds["h"].astype(np.float64) + feeds["x"]).astype(F)
        return {"y": h, "hN": h}


class Units:
    """An engine whose models are numbers: what the unit keeps."""

    def load(self, model: ModelLike, options: EngineOptions = EngineOptions()) -> Leaky:
        return Leaky(float(str(model)))


def test_a_state_is_judged_in_a_loop_where_its_errors_add_up() -> None:
    steps, keep, off = 6, 1.0, 0.9
    given: list[Feeds] = [{"x": np.full(3, 1.0, F), "h": np.full(3, 1.0, F)} for _ in range(steps)]
    judge = Judge(Units(), str(keep), given)  # type: ignore[arg-type]
    assert judge.carried == ("hN",)
    wanted, actual = [1.0], [1.0]
    for _ in range(steps):
        wanted.append(keep * wanted[-1] + 1.0)
        actual.append(off * actual[-1] + 1.0)
    true, found = np.asarray(wanted[1:]), np.asarray(actual[1:])
    expected = 10.0 * math.log10(float(np.square(true).sum() / np.square(true - found).sum()))
    assert judge(str(off)).sqnr_db == pytest.approx({"y": expected, "hN": expected}, abs=1e-4)
    one_step = 20.0 * math.log10(2.0 / 0.1)  # as if the state were given anew at every step
    assert expected < one_step - 10.0
    assert judge(str(keep)).sqnr_db == {"y": CEILING, "hN": CEILING}


def test_a_feed_of_another_batch_brings_its_own_state() -> None:
    given: list[Feeds] = [{"x": np.ones(n, F), "h": np.zeros(n, F)} for n in (3, 2, 2)]
    judge = Judge(Units(), "0.5", given)  # type: ignore[arg-type]
    assert [list(e["y"]) for e in judge.expected] == [[1.0] * 3, [1.0] * 2, [1.5] * 2]
