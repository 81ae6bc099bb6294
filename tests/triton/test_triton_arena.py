from hypothesis import given
from hypothesis import strategies as st

from qcompiler.backends.triton.arena import ALIGNMENT, Lifetime, aligned, assign_offsets, find_lifetimes, peak_bytes


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime("a", 256, 0, 1), Lifetime("b", 256, 1, 2), Lifetime("c", 256, 2, 3)]
    offsets, size = assign_offsets(chain)
    assert offsets == {"a": 0, "b": 256, "c": 0}
    assert size == peak_bytes(chain) == 512


def test_the_largest_is_placed_first_and_gaps_are_used() -> None:
    offsets, size = assign_offsets([Lifetime("s", 10, 0, 2), Lifetime("l", 1000, 0, 1), Lifetime("m", 700, 2, 3)])
    assert offsets == {"l": 0, "m": 0, "s": 1024}
    assert size == 1024 + ALIGNMENT


def test_lifetimes_run_from_the_writer_to_the_last_reader() -> None:
    found = find_lifetimes({"a": 4, "b": 8}, [["a"], ["b"], []], [[], ["a"], ["a"]], kept=["b"])
    assert found == [Lifetime("a", 4, 0, 2), Lifetime("b", 8, 1, 3)]


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=25))
def test_buffers_needed_at_once_never_overlap(drawn: list[tuple[int, int, int]]) -> None:
    buffers = [Lifetime(str(i), size, first, first + length) for i, (size, first, length) in enumerate(drawn)]
    offsets, arena = assign_offsets(buffers)
    assert arena >= peak_bytes(buffers)
    for a in buffers:
        assert offsets[a.name] % ALIGNMENT == 0
        assert offsets[a.name] + aligned(a.nbytes) <= arena
        for b in buffers:
            if a is not b and a.meets(b):
                apart = offsets[a.name] + a.nbytes <= offsets[b.name] or offsets[b.name] + b.nbytes <= offsets[a.name]
                assert apart
