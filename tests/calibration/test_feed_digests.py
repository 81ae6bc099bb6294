"""Digests of feeds by number: a mapping of eight bytes for each."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.calibration.feed_digests import FeedDigests

digests = st.dictionaries(st.integers(0, 10_000), st.integers(0, 2**64 - 1).map(lambda n: f"{n:016x}"), max_size=20)


@given(digests)
def test_it_is_the_mapping_that_it_was_made_of(wanted: dict[int, str]) -> None:
    made = FeedDigests(wanted)
    assert made == wanted
    assert list(made) == sorted(wanted)
    assert FeedDigests(made) == made
    text = "".join(f"{index}:{wanted[index]};" for index in sorted(wanted))
    assert made.together == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def test_a_feed_that_is_noted_again_counts_once() -> None:
    made = FeedDigests({3: "0" * 16})
    made.note(3, "f" * 16)
    assert (len(made), made[3]) == (1, "f" * 16)


@pytest.mark.parametrize("index", [-1, 0, 4, 5_000_000])
def test_what_was_not_noted_is_not_there(index: int) -> None:
    made = FeedDigests({3: "0" * 16})
    assert index not in made
    with pytest.raises(KeyError):
        made[index]


def test_what_is_no_digest_is_an_error() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        FeedDigests({0: "text"})
    with pytest.raises(ValueError, match="feeds are numbered from 0, found -1"):
        FeedDigests({-1: "0" * 16})
    assert "3" not in FeedDigests({3: "0" * 16})
