"""Setting feeds aside: a fifth, at least one, never one that range-finding saw unless there is only one."""

from collections.abc import Iterator

import numpy as np
import pytest

from qcompiler.calibration.readers import as_feed_source
from qcompiler.engine import Feeds, TensorInfo

OPEN = TensorInfo("x", np.dtype(np.float32), ("batch", 2))
FIXED = TensorInfo("x", np.dtype(np.float32), (4, 2))
RATE = TensorInfo("rate", np.dtype(np.int64), ())


def numbered(count: int, rows: int = 4) -> list[Feeds]:
    return [{"x": np.full((rows, 2), index, np.float32)} for index in range(count)]


def first_numbers(feeds: object) -> list[int]:
    return [int(f["x"][0, 0]) for f in feeds]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("count", "aside"), [(2, [1]), (3, [2]), (4, [3]), (5, [4]), (9, [4]), (10, [4, 9]), (16, [4, 9, 14])]
)
def test_every_fifth_feed_is_set_aside_and_at_least_one(count: int, aside: list[int]) -> None:
    split = as_feed_source(numbered(count), [FIXED]).split()
    assert first_numbers(split.held_out) == aside
    assert sorted(first_numbers(split.ranges) + aside) == list(range(count))
    assert not split.shared


def test_no_more_is_read_than_is_needed_to_split() -> None:
    read: list[int] = []

    def generate() -> Iterator[Feeds]:
        for index, feed in enumerate(numbered(50)):
            read.append(index)
            yield feed

    as_feed_source(generate, [FIXED]).split()
    assert read == [0, 1, 2, 3, 4]


def test_another_share_can_be_asked_for() -> None:
    split = as_feed_source(numbered(6), [FIXED]).split(holdout=0.5)
    assert first_numbers(split.ranges) == [0, 2, 4]
    assert first_numbers(split.held_out) == [1, 3, 5]


def test_both_parts_can_be_read_again_and_counted() -> None:
    split = as_feed_source(iter(numbered(6)), [FIXED]).split()
    assert [first_numbers(split.ranges) for _ in range(2)] == [[0, 1, 2, 3, 5]] * 2
    assert first_numbers(split.held_out) == [4]
    assert (len(split.ranges), len(split.held_out)) == (5, 1)


@pytest.mark.parametrize(("rows", "kept"), [(2, 1), (4, 3), (10, 8), (32, 26)])
def test_a_single_feed_is_cut_along_its_open_batch(rows: int, kept: int) -> None:
    array = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    split = as_feed_source([{"x": array, "rate": np.int64(7)}], [OPEN, RATE]).split()
    ((head,), (tail,)) = (list(split.ranges), list(split.held_out))
    assert not split.shared
    assert len(head["x"]) == kept
    np.testing.assert_array_equal(np.concatenate([head["x"], tail["x"]]), array)
    assert int(head["rate"]) == int(tail["rate"]) == 7


@pytest.mark.parametrize(
    ("feed", "inputs"),
    [
        ({"x": np.zeros((4, 2), np.float32)}, [FIXED]),
        ({"x": np.zeros((1, 2), np.float32)}, [OPEN]),
        (
            {"x": np.zeros((4, 2), np.float32), "y": np.zeros((3, 2), np.float32)},
            [OPEN, TensorInfo("y", np.dtype(np.float32), ("batch", 2))],
        ),
        (
            {"x": np.zeros((4, 2), np.float32), "y": np.zeros((4, 2), np.float32)},
            [OPEN, TensorInfo("y", np.dtype(np.float32), ("other", 2))],
        ),
        ({"rate": np.int64(7)}, [RATE]),
    ],
    ids=["fixed batch", "one row", "lengths differ", "equal by chance", "scalars only"],
)
def test_a_single_feed_that_cannot_be_cut_serves_both_and_says_so(feed: Feeds, inputs: list[TensorInfo]) -> None:
    split = as_feed_source([feed], inputs).split()
    assert split.shared
    assert len(list(split.ranges)) == len(list(split.held_out)) == 1
