"""Which groups the accuracy guard returns together, and in which order."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.calibration.statistics import Statistics, TensorStatistics
from qcompiler.quant.plan import Form
from qcompiler.search.candidates import candidate_sets
from tests.search.nets import SAME, chain, net


def sets(body: str, statistics: Statistics | None = None, **forms: Form) -> list[tuple[str, ...]]:
    groups = net(body)[1]
    return candidate_sets(list(groups.values()), {n: forms.get(n, "static") for n in groups}, statistics)


def test_both_ends_come_first_in_growing_lengths_then_single_groups() -> None:
    assert sets(chain(*["Conv"] * 5)) == [
        ("c0",), ("c4",), ("c0", "c1"), ("c3", "c4"), ("c0", "c1", "c2"), ("c2", "c3", "c4"),
        ("c0", "c1", "c2", "c3"), ("c1", "c2", "c3", "c4"), ("c1",), ("c2",), ("c3",),
    ]  # fmt: skip


def test_the_whole_model_is_no_candidate_set() -> None:
    assert sets(chain("Conv")) == [("c0",)]
    assert ("c0", "c1") not in sets(chain("Conv", "Conv"))


def test_groups_in_float_already_are_left_out() -> None:
    assert sets(chain("Conv", "Conv", "Conv"), c1="float") == [("c0",), ("c2",)]
    assert sets(chain("Conv", "Conv"), c0="float", c1="float") == []


RESIDUAL = (
    f"[a] p = Conv{SAME}(x, w) [s] q = Sigmoid(p) [m] r = Mul(p, q)"
    f" [b] t = Conv{SAME}(r, v) [add] z = Add(r, t) [n] y = Neg(z)"
)


def test_a_convolution_takes_along_the_arithmetic_that_it_alone_feeds() -> None:
    found = sets(RESIDUAL)
    assert ("a", "s", "m") in found  # SiLU behind the first convolution
    assert ("b",) in found  # the residual Add reads something else, too
    assert ("add",) in found
    assert ("a", "s", "m", "add") not in found


def test_an_end_takes_along_what_lies_between() -> None:
    found = sets(RESIDUAL)
    assert found[0] == ("a", "s", "m")
    assert found[1] == ("b", "add")


def test_arithmetic_in_float_is_not_taken_along() -> None:
    assert ("a", "s") in sets(RESIDUAL, m="float")


def uniform(outlier: float = 1.0) -> TensorStatistics:
    made = TensorStatistics()
    made.add(np.asarray([*np.linspace(-1, 1, 10_000), outlier], np.float32))
    return made


@pytest.mark.parametrize(("loud", "order"), [("v2", ["c2", "c3", "c1"]), ("v1", ["c1", "c2", "c3"])])
def test_the_group_with_the_worst_ratio_of_step_to_power_is_tried_first(loud: str, order: list[str]) -> None:
    """An outlier widens the step of what one group writes and the next reads, and hardly adds to its power."""
    tensors = {name: uniform(20.0 if name == loud else 1.0) for name in ("x", "v0", "v1", "v2", "v3", "y")}
    found = sets(chain(*["Conv"] * 5), Statistics(tensors, 1))
    assert [s[0] for s in found if len(s) == 1 and s[0] not in ("c0", "c4")] == order


def test_what_was_never_observed_makes_no_noise() -> None:
    assert sets(chain(*["Conv"] * 5), Statistics({"v2": uniform()}, 1))[-3:] == [("c2",), ("c3",), ("c1",)]
