from dataclasses import dataclass, field

import pytest

from qcompiler.errors import CalibrationError, PassError
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.pipeline.contract import Exact, Reassociates
from qcompiler.pipeline.instruments.timing import PassTime, TimeInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline, Step, StepResult
from qcompiler.pipeline.registry import PassRegistry
from qcompiler.pipeline.state import ChangeLog, CompileState
from qcompiler.plugins import PASSES, Offer
from tests.pipeline.sample_passes import REGISTRY, BreakGraph, DropIdentity, ManyOptions, chain_state, node_of


@dataclass
class Listener:
    """Writes down what it is told."""

    name: str
    log: list[str]
    fail_after: str = ""
    steps: list[Step] = field(default_factory=list)

    def before_pass(self, state: CompileState, step: Step) -> None:
        self.log.append(f"{self.name} before {step.text}")
        self.steps.append(step)

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        self.log.append(f"{self.name} after {step.text} {changes}")
        if self.fail_after == step.name:
            raise PassError("told to fail")

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        self.log.append(f"{self.name} failure {step.text}: {type(error).__name__}")


def parse(text: str) -> Pipeline:
    return Pipeline.parse(text, REGISTRY)


# ---- order --------------------------------------------------------------------------------------------------------


def test_an_illegal_order_is_refused_before_any_work() -> None:
    state = chain_state()
    before = print_model(state.model)
    message = r"pass 3 \(insert-nothing\) needs phase PLANNED, but pass 2 \(insert-nothing\) gives phase QDQ; reorder"
    with pytest.raises(PassError, match=message):
        parse("plan-nothing,insert-nothing,insert-nothing,drop-identity").run(state)
    assert print_model(state.model) == before
    assert state.phase is Phase.FLOAT


def test_a_wrong_start_names_the_phase_of_the_graph() -> None:
    with pytest.raises(PassError, match=r"pass 1 \(insert-nothing\) needs phase PLANNED, but the graph given is in"):
        parse("insert-nothing").run(chain_state())
    with pytest.raises(PassError, match=r"needs phase FLOAT or PLANNED, but pass 2 \(insert-nothing\) gives phase QDQ"):
        parse("plan-nothing,insert-nothing,ask-range").phase_after(Phase.FLOAT)


def test_phases_follow_the_passes() -> None:
    state = chain_state()
    results = parse("drop-identity,plan-nothing,insert-nothing").run(state)
    assert state.phase is Phase.QDQ
    assert [r.text for r in results] == ["drop-identity", "plan-nothing", "insert-nothing"]
    assert [r.changes > 0 for r in results] == [True, False, False]


def test_pipelines_are_joined() -> None:
    joined = parse("drop-identity") + parse("many{count=1}")
    assert joined == parse("drop-identity,many{count=1}")
    assert (len(joined), list(joined)) == (2, [DropIdentity(), ManyOptions(count=1)])


# ---- failures and instruments -------------------------------------------------------------------------------------


def test_instruments_nest_and_are_told_of_failures() -> None:
    log: list[str] = []
    state = chain_state()
    with pytest.raises(PassError, match=r"^told to fail$"):
        parse("many,many{count=4},many").run(state, (Listener("out", log), Listener("in", log, fail_after="many")))
    assert log == [
        "out before many",
        "in before many",
        "in after many 0",
        "in failure many: PassError",
        "out failure many: PassError",
    ]
    log.clear()
    assert parse("many{count=4}").run(state, (Listener("out", log), Listener("in", log))) == (
        StepResult("many{count=4}", 0),
    )
    assert [entry.split()[:2] for entry in log] == [
        ["out", "before"],
        ["in", "before"],
        ["in", "after"],
        ["out", "after"],
    ]


def test_an_unexpected_error_becomes_a_pass_error() -> None:
    state = chain_state()
    with pytest.raises(PassError, match=r"pass 2 \(ask-range\{value=q\}\) failed: AssertionError") as caught:
        parse("drop-identity,ask-range{value=q}").run(state)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_an_error_that_the_user_can_mend_goes_through() -> None:
    @dataclass(frozen=True)
    class NoData(DropIdentity):
        def run(self, state: CompileState) -> int:
            raise CalibrationError("no data")

    with pytest.raises(CalibrationError, match=r"^no data$"):
        Pipeline((NoData(),)).run(chain_state())


def test_a_second_error_does_not_hide_the_first() -> None:
    class Clumsy(Listener):
        def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
            raise OSError("disk full")

    with pytest.raises(PassError, match=r"^told to fail") as caught:
        parse("many").run(chain_state(), (Clumsy("c", [], fail_after="many"),))
    assert caught.value.__notes__ == ["Clumsy could not record the failure: disk full"]


def test_verify_blames_the_pass_that_broke_the_graph() -> None:
    with pytest.raises(PassError, match=r"pass 2 \(break-graph\) failed: .*MatMul_0"):
        parse("drop-identity,break-graph,many").run(chain_state(), (VerifyInstrument(),))


def test_verify_blames_no_pass_for_what_it_was_given() -> None:
    state = chain_state()
    BreakGraph().run(state)
    log: list[str] = []
    with pytest.raises(PassError, match="MatMul_0"):
        parse("many").run(state, (VerifyInstrument(), Listener("l", log)))
    assert log == ["l failure many: VerifyError"]


def test_times_come_from_the_clock() -> None:
    ticks = iter((1.0, 3.5, 10.0, 10.25, 20.0, 21.0))
    times = TimeInstrument(lambda: next(ticks))
    state = chain_state()
    with pytest.raises(PassError):
        parse("drop-identity,many,ask-range").run(state, (times,))
    assert [(t.text, t.seconds, t.failed) for t in times.times] == [
        ("drop-identity", 2.5, False), ("many", 0.25, False), ("ask-range", 1.0, True)
    ]  # fmt: skip
    assert times.times[1] == PassTime("many", 0.25, 0)
    assert times.total == 3.75


def test_a_failed_check_does_not_add_a_second_time() -> None:
    ticks = iter(range(10))
    times = TimeInstrument(lambda: next(ticks))
    with pytest.raises(PassError):
        parse("many").run(chain_state(), (Listener("l", [], fail_after="many"), times))
    assert times.times == [PassTime("many", 1, 0)]


# ---- the change log -----------------------------------------------------------------------------------------------


def test_a_limit_stops_a_pass_half_way() -> None:
    state = chain_state()
    state.changes = ChangeLog(limit=2)
    before = [node_of(state.model, name).inputs[1] for name in ("c", "e", "y")]
    parse("scale-factors{factor=2.0}").run(state)
    after = [node_of(state.model, name).inputs[1] for name in ("c", "e", "y")]
    assert [a is not b for a, b in zip(after, before, strict=True)] == [True, True, False]
    assert [(c.rule, c.node) for c in state.changes.applied] == [("scale-factor", "Mul_2"), ("scale-factor", "Mul_4")]
    assert state.changes.applied[0].origins == ("Mul_2",)


# ---- registry -----------------------------------------------------------------------------------------------------


def test_the_registry_describes_its_passes() -> None:
    infos = {info.name: info for info in REGISTRY.infos()}
    assert tuple(infos) == REGISTRY.names() == tuple(sorted(infos))
    assert infos["drop-identity"].doc == "Remove Identity."
    assert infos["ask-range"].needs == (Phase.FLOAT, Phase.PLANNED)
    assert infos["plan-nothing"].gives is Phase.PLANNED
    assert infos["drop-identity"].numerics == Exact()
    assert infos["scale-factors"].numerics == Reassociates(1e-5)
    assert [o.name for o in infos["scale-factors"].options] == ["factor", "only"]
    assert "drop-identity" in REGISTRY
    assert "drop" not in REGISTRY


def test_two_passes_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Other(DropIdentity):
        pass_name = "drop-identity"

    with pytest.raises(PassError, match=r"two passes are named drop-identity: .*DropIdentity and .*Other; rename one"):
        PassRegistry((DropIdentity, Other))
    assert PassRegistry((DropIdentity, DropIdentity)).names() == ("drop-identity",)


def test_entry_points_are_loaded_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def offer(name: str, value: str) -> None:
        made = Offer(PASSES, name, value, "their-passes", "1.0")
        monkeypatch.setattr("qcompiler.pipeline.registry.offers", lambda group: (made,))

    registry = PassRegistry((DropIdentity,))
    assert registry.names() == ("drop-identity",)
    offer("many", f"{ManyOptions.__module__}:ManyOptions")
    found = registry.with_entry_points()
    assert found.names() == ("drop-identity", "many")
    assert found.get("many") is ManyOptions
    assert found.owner("many") == "their-passes 1.0"
    assert found.owner("drop-identity") == ""
    offer("bad", "no_such_module:Thing")
    found = registry.with_entry_points()
    assert found.get("drop-identity") is DropIdentity
    assert list(found) == [DropIdentity]
    with pytest.raises(PassError, match=r"entry point bad of their-passes 1.0 .* cannot be loaded: ModuleNotFound"):
        found.get("bad")
    offer("bad", "math:pi")
    with pytest.raises(PassError, match=r"entry point bad of their-passes 1.0 .* is not a pass class"):
        registry.with_entry_points().get("bad")
    offer("other", f"{ManyOptions.__module__}:ManyOptions")
    with pytest.raises(PassError, match="offers the pass many: the two names must be the same"):
        registry.with_entry_points().get("other")
