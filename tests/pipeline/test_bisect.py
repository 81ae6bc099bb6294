from dataclasses import dataclass, field

import pytest

from qcompiler.errors import PassError
from qcompiler.ir.text import print_model
from qcompiler.pipeline.bisect import _first_bad, bisect
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from tests.pipeline.sample_passes import REGISTRY, ScaleFactors, chain_feeds, chain_state, engine

ENGINE = engine()
FEEDS = chain_feeds()


def parse(text: str) -> Pipeline:
    return Pipeline.parse(text, REGISTRY)


def test_a_broken_pass_is_found_with_rule_and_node_by_its_contract() -> None:
    state = chain_state()
    before = print_model(state.model)
    found = bisect(state, parse("drop-identity,scale-factors,scale-factors{factor=1.5,only=e},many"), ENGINE, FEEDS)
    assert found is not None
    assert (found.index, found.pass_text) == (2, "scale-factors{factor=1.5,only=e}")
    assert (found.rule, found.node, found.origins) == ("scale-factor", "Mul_4", ("Mul_4",))
    assert (found.application, found.applications) == (2, 3)
    assert (found.before, found.after) == (0.0, pytest.approx(0.5 / 1e-5, rel=1e-4))
    assert [v.value for v in found.values if v.exceeded] == ["e"]
    assert str(found).endswith("rule scale-factor, application 2 of 3; node Mul_4 (origin Mul_4)")
    assert print_model(state.model) == before


def test_a_broken_pass_is_found_by_the_output_error() -> None:
    text = "many,drop-identity,many,scale-factors,scale-factors{factor=8.0,only=e},scale-factors,many,many"
    found = bisect(chain_state(), parse(text), ENGINE, FEEDS, 60.0)
    assert found is not None
    assert (found.index, found.node, found.application) == (4, "Mul_4", 2)
    assert found.before > 60 > found.after
    assert (found.bound, found.criterion) == (60.0, "output SQNR in dB")


def test_a_pass_that_counts_nothing_is_narrowed_by_its_values() -> None:
    found = bisect(chain_state(), parse("drop-identity,silently-scale,scale-factors"), ENGINE, FEEDS, 60.0)
    assert found is not None
    assert (found.index, found.pass_text, found.rule, found.applications) == (1, "silently-scale", "", 0)
    assert (found.node, found.origins) == ("Mul_4", ("Mul_4",))


def test_a_pass_that_cannot_stop_half_way_is_narrowed_by_its_values() -> None:
    @dataclass(frozen=True)
    class AllOrNothing(ScaleFactors):
        """Fail unless every Mul was changed."""

        def run(self, state: CompileState) -> int:
            made = super().run(state)
            if made < 3:
                raise ValueError("the graph is half-way")
            return made

    pipeline = parse("drop-identity") + Pipeline((AllOrNothing(factor=1.5, only="e"),))
    found = bisect(chain_state(), pipeline, ENGINE, FEEDS)
    assert found is not None
    assert (found.index, found.rule, found.application, found.applications) == (1, "", 0, 3)
    assert (found.node, found.origins) == ("Mul_4", ("Mul_4",))


def test_lossy_passes_have_no_contract_to_break() -> None:
    assert bisect(chain_state(), parse("silently-scale"), ENGINE, FEEDS) is None


def test_a_pipeline_within_the_bound_has_no_culprit() -> None:
    assert bisect(chain_state(), parse("drop-identity,scale-factors,many"), ENGINE, FEEDS) is None
    assert bisect(chain_state(), parse("drop-identity,scale-factors,many"), ENGINE, FEEDS, 200.0) is None
    assert bisect(chain_state(), Pipeline(), ENGINE, FEEDS, 200.0) is None


def test_an_error_that_goes_and_comes_back_is_found_where_it_first_came() -> None:
    double, halve = "scale-factors{factor=2.0,only=e}", "scale-factors{factor=0.5,only=e}"
    text = f"many,{double},many,many,{halve},many,many,scale-factors{{factor=4.0,only=e}}"
    found = bisect(chain_state(), parse(text), ENGINE, FEEDS, 60.0)
    assert found is not None
    assert found.index == 1


def test_thorough_finds_what_a_search_steps_over() -> None:
    """The error of the second pass is undone by the third before any probe looks."""
    text = "many,scale-factors{factor=2.0,only=e},scale-factors{factor=0.5,only=e},many,many,many,many,silently-scale"
    quick = bisect(chain_state(), parse(text), ENGINE, FEEDS, 60.0)
    assert quick is not None
    assert (quick.index, quick.node) == (7, "Mul_4")
    found = bisect(chain_state(), parse(text), ENGINE, FEEDS, 60.0, thorough=True)
    assert found is not None
    assert (found.index, found.node, found.application) == (1, "Mul_4", 2)


def test_an_illegal_pipeline_fails_before_bisecting() -> None:
    with pytest.raises(PassError, match="needs phase PLANNED"):
        bisect(chain_state(), parse("insert-nothing"), ENGINE, FEEDS)


@dataclass
class Figures:
    values: list[float]
    asked: list[int] = field(default_factory=list)

    def __call__(self, index: int) -> float:
        self.asked.append(index)
        return self.values[index]


def first_bad(values: list[float]) -> tuple[int | None, int]:
    figures = Figures(values)
    found = _first_bad(len(values) - 1, figures, lambda figure: figure < 50)
    return found, len(figures.asked)


def test_steady_errors_take_a_binary_search() -> None:
    assert first_bad([99.0] * 40 + [10.0] * 60) == (40, 7)
    assert first_bad([99.0, 10.0]) == (1, 1)
    assert first_bad([99.0] * 5) == (None, 1)
    assert first_bad([99.0]) == (None, 1)


def test_unsteady_errors_are_looked_for_in_order() -> None:
    """The probes at 4, 6 and 7 see a figure that rises, so the crossing at 2 is looked for and found."""
    assert first_bad([99.0, 98.0, 10.0, 60.0, 70.0, 70.0, 80.0, 10.0, 10.0])[0] == 2
