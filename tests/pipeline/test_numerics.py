import math

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import PassError
from qcompiler.ir.text import parse_text
from qcompiler.pipeline.changed import Cuts, find_cuts
from qcompiler.pipeline.contract import Contract, Exact, Lossy, Reassociates, WithinStep
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.numerics import compare_changed, quantization_step, run_outputs, sqnr_db
from qcompiler.pipeline.pipeline import Pipeline
from tests.pipeline.sample_passes import CHAIN, REGISTRY, chain_feeds, chain_state, engine

ENGINE = engine()


def model(body: str, head: str = "(float[N,4] x) => (float[N,4] y)") -> ir.Model:
    return parse_text(f'<ir_version: 10, opset_import: ["" : 21]> g {head} {body}')


def feeds(*rows: list[float]) -> list[dict[str, np.ndarray]]:
    return [{"x": np.array([row], np.float32)} for row in rows]


# ---- SQNR ---------------------------------------------------------------------------------------------------------


def test_sqnr_is_pooled_over_feeds_but_not_over_outputs() -> None:
    wanted = [{"a": np.array([3.0, 4.0]), "b": np.array([1.0])}, {"a": np.array([0.0, 5.0]), "b": np.array([2.0])}]
    found = [{"a": np.array([3.0, 4.0]), "b": np.array([1.0])}, {"a": np.array([0.0, 5.5]), "b": np.array([2.0])}]
    assert sqnr_db(wanted, found) == {"a": pytest.approx(10 * math.log10(50 / 0.25)), "b": math.inf}


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([0.0, 0.0], [0.0, 1.0], -math.inf),
        ([1.0, math.nan], [1.0, math.nan], math.inf),
        ([1.0, 2.0], [1.0, math.nan], -math.inf),
        ([1.0, math.inf], [1.0, math.inf], math.inf),
        ([1.0], [1.0, 2.0], -math.inf),
    ],
)
def test_sqnr_at_the_edges(wanted: list[float], found: list[float], expected: float) -> None:
    assert sqnr_db([{"y": np.array(wanted)}], [{"y": np.array(found)}]) == {"y": expected}


# ---- what changed -------------------------------------------------------------------------------------------------


def test_equal_graphs_have_no_cut() -> None:
    first = parse_text(CHAIN)
    assert find_cuts(first, first.clone()) == Cuts(())


def test_a_changed_constant_cuts_behind_its_readers_only() -> None:
    first, second = parse_text(CHAIN), parse_text(CHAIN.replace("0.333", "0.334"))
    assert find_cuts(first, second) == Cuts(("e",))


def test_a_changed_attribute_or_body_cuts() -> None:
    first = model("{ y = LeakyRelu <alpha = 0.1> (x) }")
    assert find_cuts(first, model("{ y = LeakyRelu <alpha = 0.2> (x) }")).compared == ("y",)
    body = "{ c = Constant <value = bool {1}> () y = If (c) <then_branch = t () => (float[N,4] o) { o = %s (x) }, " \
           "else_branch = e () => (float[N,4] p) { p = Neg (x) }> }"  # fmt: skip
    assert find_cuts(model(body % "Neg"), model(body % "Abs")).compared == ("y",)
    assert find_cuts(model(body % "Neg"), model(body % "Neg")).compared == ()


def test_a_constant_captured_by_a_body_counts() -> None:
    body = "<float k = {%s}> { c = Constant <value = bool {1}> () y = If (c) <then_branch = t () => (float[N,4] o) " \
           "{ o = Mul (x, k) }, else_branch = e () => (float[N,4] p) { p = Neg (x) }> }"  # fmt: skip
    assert find_cuts(model(body % "1.0"), model(body % "2.0")).compared == ("y",)


def test_errors_are_measured_each_by_itself() -> None:
    """Both changed nodes see the inputs they had before, so the second's error is its own."""
    first = model("<float p = {2.0}, float q = {4.0}> { a = Mul (x, p) b = Relu (a) y = Mul (b, q) }")
    second = model("<float p = {2.5}, float q = {4.4}> { a = Mul (x, p) b = Relu (a) y = Mul (b, q) }")
    found = compare_changed(first, second, ENGINE, feeds([1, 2, 3, 4]), Reassociates(0.2))
    assert [(f.value, f.node, f.origins) for f in found] == [("a", "Mul_0", ("Mul_0",)), ("y", "Mul_2", ("Mul_2",))]
    assert [f.error for f in found] == pytest.approx([0.25, 0.1], rel=1e-5)
    assert [f.exceeded for f in found] == [True, False]


def test_random_values_are_fed_not_compared() -> None:
    body = "<float k = {%s}> { r = RandomNormalLike (x) a = Add (x, r) y = Mul (a, k) }"
    first, second = model(body % "1.0"), model(body % "1.0")
    assert find_cuts(first, model(body % "2.0")) == Cuts(("y",), ("r",))
    second.graph.node("Mul_2").attributes.clear()
    third = model("<float k = {1.0}> { r = RandomNormalLike (x) a = Add (r, x) y = Mul (a, k) }")
    (figure,) = compare_changed(first, third, ENGINE, feeds([1, 2, 3, 4]), Exact())
    assert (figure.value, figure.error) == ("a", 0.0)


def test_a_name_that_took_over_its_readers_meaning_is_not_blamed() -> None:
    """A Mul folded into the MatMul in front of it keeps the name ``a``, which now holds what ``b`` held."""
    body = "<float[4,4] w = {D,0,0,0, 0,D,0,0, 0,0,D,0, 0,0,0,D}, float k = {2.0}> "
    first = model(body.replace("D", "1") + "{ a = MatMul (x, w) b = Mul (a, k) c = Neg (b) y = Relu (c) }")
    folded = body + "{ a = MatMul (x, w) c = Neg (a) y = Relu (c) }"
    second = model(folded.replace("D", "2"))
    found = compare_changed(first, second, ENGINE, feeds([1, -2, 3, 4]), Reassociates(1e-6))
    assert not any(f.exceeded for f in found)
    found = compare_changed(first, model(folded.replace("D", "3")), ENGINE, feeds([1, -2, 3, 4]), Reassociates(1e-6))
    assert any(f.exceeded for f in found)


# ---- contracts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contract", "error", "exceeded"),
    [(Exact(), 4.0, True), (Reassociates(1e-4), 1e-5, False), (Reassociates(1e-6), 1e-5, True), (Lossy(), 4.0, False)],
)
def test_contracts_on_float(contract: Contract, error: float, exceeded: bool) -> None:
    first = model("<float k = {1.0}> { y = Mul (x, k) }")
    second = model("<float k = {1.00001}> { y = Mul (x, k) }")
    (figure,) = compare_changed(first, second, ENGINE, feeds([1, 2, 3, 4]), contract)
    assert figure.error == pytest.approx(error, rel=0.02)
    assert figure.exceeded is exceeded
    assert figure.sqnr_db == pytest.approx(100, abs=0.3)


def test_half_precision_may_round_by_its_own_type() -> None:
    head = "(float16[N,4] x) => (float16[N,4] y)"
    first = model("<float16 k = {15360}> { y = Mul (x, k) }", head)
    data = [{"x": np.array([[1, 2, 3, 4]], np.float16)}]  # 15360 and 15362 are the bits of 1 and of 1 + 2 * 2^-10
    (figure,) = compare_changed(
        first, model("<float16 k = {15362}> { y = Mul (x, k) }", head), ENGINE, data, Reassociates(1e-5)
    )
    assert (figure.error, figure.bound) == (2 * 2.0**-10, 4 * 2.0**-10)
    assert not figure.exceeded


QDQ = """<float s = {0.5}, uint8 z = {128}, float k = {%s}> {
  a = Mul (x, k)
  q = QuantizeLinear (a, s, z)
  y = DequantizeLinear (q, s, z)
}"""


def test_steps_are_those_of_the_scale_found_there() -> None:
    first = model(QDQ % "1.0")
    data = feeds([1.0, -3.0, 10.0, 4.0])
    (figure,) = compare_changed(first, model(QDQ % "1.05"), ENGINE, data, WithinStep(1))
    assert (figure.value, figure.error) == ("a", pytest.approx(0.5 / 0.5))
    assert not figure.exceeded
    (figure,) = compare_changed(first, model(QDQ % "1.11"), ENGINE, data, WithinStep(2))
    assert (figure.error, figure.exceeded) == (pytest.approx(1.1 / 0.5), True)


def test_stored_integers_differ_by_whole_steps() -> None:
    first = model(QDQ % "1.0")
    second = model((QDQ % "1.0").replace("z = {128}", "z = {130}"))
    found = {f.value: f for f in compare_changed(first, second, ENGINE, feeds([1, -3, 10, 4]), WithinStep(1))}
    assert (found["q"].error, found["q"].exceeded) == (2.0, True)


def test_a_value_without_scale_takes_the_step_of_eight_bits() -> None:
    first = model("<float k = {1.0}> { y = Mul (x, k) }")
    second = model("<float k = {1.01}> { y = Mul (x, k) }")
    (figure,) = compare_changed(first, second, ENGINE, feeds([-51.0, 0, 0, 204.0]), WithinStep(3))
    assert figure.error == pytest.approx(2.04, rel=1e-5)


def test_the_step_is_found_through_operators_that_keep_it() -> None:
    graph = model(
        "<float s = {0.25}, uint8 z = {0}, float[4] t = {1,2,3,4}, uint8[4] u = {0,0,0,0}> {"
        " q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) r = Relu (d) m = Neg (r)"
        " p = QuantizeLinear <axis = -1> (m, t, u) y = DequantizeLinear <axis = -1> (p, t, u) }"
    )
    steps = {name: quantization_step(name, graph) for name in ("d", "r", "m", "y")}
    assert [float(steps[n].scale) for n in ("d", "r")] == [0.25, 0.25]  # type: ignore[union-attr]
    for name in ("m", "y"):
        found = steps[name]
        assert found is not None
        assert found.over(np.zeros((2, 4))).tolist() == [[1, 2, 3, 4]]
    assert quantization_step("y", model("{ y = Neg (x) }")) is None


# ---- the instrument -----------------------------------------------------------------------------------------------


def test_a_kept_contract_is_recorded() -> None:
    state = chain_state()
    numerics = NumericsInstrument(ENGINE, chain_feeds())
    Pipeline.parse("drop-identity,many,scale-factors", REGISTRY).run(state, (numerics,))
    assert [(r.text, r.contract, r.sqnr_db) for r in numerics.results] == [
        ("drop-identity", Exact(), {"y": math.inf}),
        ("scale-factors", Reassociates(1e-5), {"y": math.inf}),
    ]
    assert [f.value for f in numerics.results[0].figures] == ["c", "g"]
    assert [f.error for f in numerics.results[0].figures] == [0, 0]


def test_a_broken_contract_fails_the_pass() -> None:
    numerics = NumericsInstrument(ENGINE, chain_feeds())
    message = (
        r"pass 2 \(scale-factors\{factor=1\.5,only=e\}\) breaks its contract Reassociates\(rel=1e-05\): "
        r"e of Mul 'Mul_4' \(origin Mul_4\) has error 0\.5, allowed 1e-05$"
    )
    with pytest.raises(PassError, match=message):
        Pipeline.parse("drop-identity,scale-factors{factor=1.5,only=e}", REGISTRY).run(chain_state(), (numerics,))
    assert [v.value for v in numerics.results[-1].violations] == ["e"]


def test_without_strict_the_violation_is_only_recorded() -> None:
    numerics = NumericsInstrument(ENGINE, chain_feeds(), strict=False)
    state = chain_state()
    Pipeline.parse("scale-factors{factor=1.5,only=e},silently-scale", REGISTRY).run(state, (numerics,))
    broken, lossy = numerics.results
    assert broken.worst is not None
    assert (broken.worst.value, len(broken.violations), len(lossy.violations)) == ("e", 1, 0)
    wanted = run_outputs(ENGINE, chain_state().model, chain_feeds())
    assert lossy.sqnr_db == sqnr_db(wanted, run_outputs(ENGINE, state.model, chain_feeds()))


def test_a_graph_that_cannot_run_fails_the_pass() -> None:
    from dataclasses import dataclass

    from qcompiler.ir.rewriter import Rewriter
    from qcompiler.pipeline.base import Pass
    from qcompiler.pipeline.state import CompileState
    from tests.pipeline.sample_passes import node_of

    @dataclass(frozen=True)
    class Misname(Pass):
        """Replace an operator by one that does not exist."""

        def run(self, state: CompileState) -> int:
            node_of(state.model, "d").op_type = "Reluu"
            return Rewriter(state.model).changes + 1

    numerics = NumericsInstrument(ENGINE, chain_feeds(1))
    with pytest.raises(PassError, match=r"pass 1 \(misname\): cannot run its result: .*Reluu"):
        Pipeline((Misname(),)).run(chain_state(), (numerics,))
    assert "Reluu" in numerics.results[0].unchecked
