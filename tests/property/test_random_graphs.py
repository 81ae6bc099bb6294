"""Random models through the whole compiler: nothing crashes, nothing moves further than it may, nothing goes unsaid."""

from __future__ import annotations

import os

import numpy as np
import pytest

from qcompiler.backends.reference import integer_gaps
from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.passes.canonicalize import CANONICALIZE
from qcompiler.passes.catalog import shipped_passes
from qcompiler.pipeline.instruments.numerics import NumericsInstrument
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target
from tests.property.examine import ENGINE, BrokenPromiseError, build_once, examine
from tests.property.families import FAMILIES, make_case

SEEDS = int(os.environ.get("QCOMPILER_SEEDS", "100"))
"""How many random models are tried; raise it to look further."""
UNASKED = 7
"""A seed whose float ConvTranspose lies between integer convolutions."""
SAMPLE = range(0, SEEDS, 9)
"""Seeds for the slower checks; 9 has no factor with the number of families, so that all families come up."""


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whole_pipeline(seed: int) -> None:
    outcomes = examine(make_case(seed), ("static", "dynamic", "patchy"))
    assert all(outcome.steps <= 1.01 for outcome in outcomes.values())
    assert outcomes["static"].integer_groups >= outcomes["patchy"].integer_groups


@pytest.mark.parametrize("seed", SAMPLE)
def test_each_canonical_pass_keeps_its_contract(seed: int) -> None:
    case = make_case(seed)
    state = CompileState(import_model(case.model), load_target("ort-x86"))
    numerics = NumericsInstrument(ENGINE, case.feeds(2))
    Pipeline.parse(CANONICALIZE, shipped_passes()).run(state, [numerics, VerifyInstrument()])
    assert not [r for r in numerics.results if r.violations or r.unchecked]


@pytest.mark.parametrize("seed", SAMPLE)
def test_fused_calls_compute_what_their_bodies_say(seed: int) -> None:
    case = make_case(seed)
    models, feeds = build_once(case, "static")
    with np.errstate(all="ignore"):  # the evaluator's own kernels overflow and divide by zero on the way
        gaps = [g for g in integer_gaps(models[Phase.FUSED], feeds[:1]) if g.kind != "LSTM"]
    assert all(g.steps <= 1 for g in gaps), max(gaps, key=lambda g: g.steps)


def test_a_seed_gives_the_same_model_and_feeds() -> None:
    for seed in range(2 * len(FAMILIES)):
        first, second = make_case(seed), make_case(seed)
        assert first.model.SerializeToString() == second.model.SerializeToString()
        for one, other in zip(first.feeds(2), second.feeds(2), strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_models_are_varied() -> None:
    cases = [make_case(seed) for seed in range(100)]
    kinds = {n.op_type for c in cases for n in c.model.graph.node}
    kinds |= {n.op_type for c in cases for m in c.model.graph.node for a in m.attribute for n in a.g.node}
    assert kinds >= {
        "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv", "ConvTranspose", "DepthToSpace", "Erf",
        "Flatten", "Gather", "Gemm", "GlobalAveragePool", "If", "LSTM", "LayerNormalization", "LeakyRelu", "Loop",
        "MatMul", "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize", "Scan", "Sigmoid", "Slice", "Softmax", "Split",
        "Squeeze",
        "Tanh", "Transpose", "Where",
    }  # fmt: skip
    assert {c.model.opset_import[0].version for c in cases} == set(range(13, 22))
    assert max(len(c.model.graph.node) for c in cases) <= 100


def test_a_weight_that_the_engine_quantizes_unasked_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AvoidEngineTraps, "rules", ())
    with pytest.raises(BrokenPromiseError, match="engine holds"):
        examine(make_case(UNASKED), ("static",))
