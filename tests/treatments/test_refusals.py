"""What is refused or left alone, and the reason that is given for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from qcompiler.treatments import Case, Parameters, try_treatments
from qcompiler.treatments.channels import SplitOutliers
from qcompiler.treatments.rounding import RoundWeights
from tests.passes.quantize.lab import model_of
from tests.treatments.bench import Bench, bench, feeds_of, normal

F = np.float32


def product(independent: bool) -> Bench:
    mix = np.eye(64, dtype=F) if independent else normal(7, 64, 64) + 2
    feeds = [[{"x": f["x"] @ mix} for f in feeds_of(seed, 8, x=(16, 64))] for seed in (0, 1)]
    return bench(model_of("float[16,64] x", "float[] y", "[a] y = MatMul(x, m)", {"m": normal(1, 64, 48)}), *feeds)


def outcome(given: Bench, treatment: RoundWeights | SplitOutliers) -> tuple[bool, str]:
    lines: list[str] = []
    made = try_treatments(
        given.workshop, given.statistics, given.case.feeds, given.held_out, candidates=[treatment],
        say=lines.append,
    )  # fmt: skip
    assert bool(made.parameters) == (made.workshop is not given.workshop)
    return bool(made.parameters), lines[-1]


def test_rounding_that_gains_nothing_is_refused() -> None:
    """Inputs that have nothing in common leave every weight at its nearest."""
    kept, line = outcome(product(independent=True), RoundWeights())
    assert not kept
    assert "dB, refused: " in line


def test_rounding_by_what_other_data_have_in_common_hurts_and_is_refused() -> None:
    given = product(independent=True)
    other = [{"x": f["x"] @ normal(7, 64, 2) @ normal(8, 2, 64)} for f in feeds_of(5, 8, x=(16, 64))]

    class Misled(RoundWeights):
        def apply(self, case: Case, parameters: Parameters) -> Case:
            return super().apply(replace(case, feeds=other), parameters)

    kept, line = outcome(given, Misled())
    assert not kept
    assert line.endswith("refused: it gains nothing")


def test_a_gain_below_what_a_treatment_must_gain_is_refused_with_the_number() -> None:
    given = product(independent=False)
    assert outcome(given, RoundWeights())[0]
    kept, line = outcome(given, replace(RoundWeights(), least_gain_db=50.0))
    assert not kept
    assert line.endswith("refused: less than the 50.0 dB that it must gain")


def test_splitting_a_channel_that_is_no_outlier_is_refused() -> None:
    weights = {"w": normal(1, 16, 3, 3, 3), "v": normal(3, 8, 16, 1, 1)}
    body = "[a] p = Conv(x, w) r = Relu(p) [e] q = Conv(r, v) y = Relu(q)"
    shape = (2, 3, 10, 10)
    given = bench(
        model_of("float[2,3,10,10] x", "float[] y", body, weights), *(feeds_of(s, 4, x=shape) for s in (0, 1))
    )

    class Always(SplitOutliers):
        def choose(self, case: Case) -> Parameters:
            return {"p": [int(np.argmin(np.abs(weights["w"]).sum(axis=(1, 2, 3))))]}

    kept, line = outcome(given, Always())
    assert not kept
    assert line.startswith("split-outlier-channels: ")
    assert "refused: " in line


def reasons(given: Bench) -> dict[str, str]:
    treatment = RoundWeights()
    made = treatment.apply(given.case, treatment.choose(given.case))
    return {
        r.text.split(":", 1)[0]: r.text.split(": ", 1)[1]
        for r in made.workshop.base.remarks
        if r.reason == "left-at-nearest"
    }


def test_a_weight_that_two_products_read_is_left_alone() -> None:
    body = "[a] p = MatMul(x, m) r = Relu(p) [e] q = MatMul(r, m) y = Tanh(q)"
    given = bench(
        model_of("float[16,64] x", "float[] y", body, {"m": normal(1, 64, 64)}), feeds_of(0, 4, x=(16, 64)), []
    )
    assert RoundWeights().choose(given.case) == {}
    text = "2 operators read its weight; it cannot suit the inputs of all"
    assert reasons(given) == {"a": text, "e": text}


def test_a_weight_that_other_graphs_have_is_left_alone() -> None:
    given = product(independent=False)
    shared = replace(given, case=replace(given.case, shared=frozenset({"a"})))
    assert reasons(shared) == {"a": "other graphs of the build have its weight, too"}


def test_a_product_in_the_body_of_an_if_is_left_alone_with_a_reason() -> None:
    yes = onnx.parser.parse_graph("yes () => (float[16,48] u) { u = MatMul (x, n) }")
    no = onnx.parser.parse_graph("no () => (float[16,48] v) { v = Neg (z) }")
    proto = model_of("float[16,64] x, bool c", "float[16,48] y", "[a] z = MatMul(x, m) y = Add(z, z)", {
        "m": normal(1, 64, 48), "n": normal(2, 64, 48),
    })  # fmt: skip
    yes.node[0].name = "inner"
    branch = onnx.helper.make_node("If", ["c"], ["q"], name="if", then_branch=yes, else_branch=no)
    proto.graph.node.insert(1, branch)
    proto.graph.node[2].input[1] = "q"
    feeds = [{**f, "c": np.array(True)} for f in feeds_of(0, 4, x=(16, 64))]
    given = bench(proto, feeds, [])
    assert set(RoundWeights().choose(given.case)) == {"a"}
    assert reasons(given) == {
        "inner": "it lies in a body of If, Loop or Scan, whose inputs differ from one execution to the next"
    }
