"""Extremes feed by feed: the same in any order, and in arrays whose size does not depend on the number of feeds."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.calibration import recent_extremes
from qcompiler.calibration.recent_extremes import RECENT, RecentExtremes

Notes = list[tuple[int, float, float]]

untimed = settings(deadline=None)
floats = st.floats(-8, 8, width=32).map(lambda x: x + 0.0)
notes = st.lists(st.tuples(st.integers(0, 30), floats, floats).map(lambda n: (n[0], min(n[1:]), max(n[1:]))))


def noted(given_notes: Notes) -> RecentExtremes:
    made = RecentExtremes()
    for feed, low, high in given_notes:
        made.note(feed, low, high)
    return made


def expected(given_notes: Notes, window: int) -> RecentExtremes:
    wide: dict[int, tuple[float, float]] = {}
    for feed, low, high in given_notes:
        before = wide.get(feed, (low, high))
        wide[feed] = min(low, before[0]), max(high, before[1])
    order = sorted(wide)
    early, late = order[:-window], order[-window:]
    lows, highs = [wide[f][0] for f in early], [wide[f][1] for f in early]
    values = np.array([wide[f] for f in late], np.float32).reshape(-1, 2)
    return RecentExtremes(
        np.array(late, np.int64), values, (min(lows, default=math.inf), max(highs, default=-math.inf))
    )


@untimed
@given(notes, st.sampled_from([1, 2, 5, 40]), st.randoms(use_true_random=False), st.integers(1, 4))
def test_shards_in_any_order_keep_the_latest_feeds(
    given_notes: Notes, window: int, shuffle: random.Random, shards: int
) -> None:
    # A shard has all of a feed: its executions follow each other in one tensor's statistics.
    given_notes.sort(key=lambda n: n[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent_extremes, "RECENT", window)
        parts = [noted([n for n in given_notes if n[0] % shards == s]) for s in range(shards)]
        shuffle.shuffle(parts)
        whole = RecentExtremes()
        for part in parts:
            before = part.copy()
            whole.take_in(part)
            assert part == before
        assert whole == noted(given_notes) == expected(given_notes, window)


def test_feeds_that_come_late_find_their_place() -> None:
    made = noted([(4, 0.0, 1.0), (9, -1.0, 2.0)])
    assert [made.note(6, -3.0, 0.0), made.note(9, 0.0, 5.0), made.note(12, 0.0, 0.0)] == [True, False, True]
    assert made.feeds.tolist() == [4, 6, 9, 12]
    assert made.values.tolist() == [[0, 1], [-3, 0], [-1, 5], [0, 0]]
    assert made.latest == 12
    assert RecentExtremes().latest == -1


def test_room_for_all_is_taken_at_the_first_merge() -> None:
    def room(of: RecentExtremes) -> int:
        return of._feeds.nbytes + of._values.nbytes

    whole, few = RecentExtremes(), noted([(i, -1.0, 1.0) for i in range(16)])
    assert room(few) == 16 * (8 + 8)
    whole.take_in(RecentExtremes())
    assert room(whole) == 0
    whole.take_in(few)
    full = room(whole)
    assert full == RECENT * (8 + 8)
    for start in range(16, 3 * RECENT, 16):
        whole.take_in(noted([(i, -1.0, 1.0) for i in range(start, start + 16)]))
    assert (room(whole), whole.feeds.size, whole.latest) == (full, RECENT, 3 * RECENT - 1)
    assert room(noted([(i, -1.0, 1.0) for i in range(17)])) == full
