"""keep-weight-float: the engine quantizes the weight of a float operator between Q and DQ, unless hidden from it."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.graph import all_graphs
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.plan_quantization import PlanQuantization
from tests.passes.quantize.lab import ENGINE, OPTIMIZED, Lab, lab, model_of, normal, ops, outputs

LOWER = (PlanQuantization(), InsertQdq(), FuseQdq(), LowerOnnxruntime())
_INT8 = (ir.DataType.INT8, ir.DataType.UINT8)


def between(middle: str, weight: np.ndarray) -> Lab:
    """Return two convolutions that run on integers around an operator that does not."""
    weights = {"u": normal(1, 8, 4, 3, 3, scale=0.2), "w": weight, "v": normal(2, 4, 8, 1, 1, scale=0.3)}
    body = f"a = Conv<pads=[1,1,1,1]>(x, u) {middle} y = Conv(m, v)"
    return lab(model_of("float[n,4,6,6] x", "float[n,4,p,q] y", body, weights))


def forms(given: Lab) -> dict[str, str]:
    first, *rest = [g for g in given.groups.values() if g.root.op_type == "Conv"]
    return {g.name: "float" for g in given.groups.values()} | {first.name: "static", rest[-1].name: "static"}


def int8_weights(model: ir.Model) -> int:
    held = (v.const_value for g in all_graphs(model) for v in g.initializers.values())
    return sum(t is not None and t.dtype in _INT8 and len(t.shape) > 1 for t in held)


MIDDLES = [
    ("m = Conv(a, w)", (8, 8, 1, 1)),
    ("b = Conv(a, w) m = Relu(b)", (8, 8, 1, 1)),
    ("m = ConvTranspose<strides=[2,2]>(a, w)", (8, 8, 2, 2)),
    ("t = Transpose<perm=[0,1,3,2]>(a) m = Conv(t, w)", (8, 8, 1, 1)),
]


@pytest.mark.parametrize(("middle", "shape"), MIDDLES)
def test_the_engine_leaves_the_weight_in_float(middle: str, shape: tuple[int, ...]) -> None:
    given = between(middle, normal(3, *shape, scale=0.3))
    plain = given.run(LOWER, forms(given))
    hidden = given.run((*LOWER, AvoidEngineTraps()), forms(given))
    assert int8_weights(plain.model) == int8_weights(hidden.model) == 2
    assert int8_weights(ENGINE.optimized_graph(plain.model, OPTIMIZED)) == 3  # the trap is there
    assert int8_weights(ENGINE.optimized_graph(hidden.model, OPTIMIZED)) == 2
    assert ops(hidden.model)["Sum"] == 1
    for feed in given.feeds:
        np.testing.assert_array_equal(outputs(hidden.model, feed)[0], outputs(plain.model, feed)[0])


def test_nothing_is_hidden_where_no_quantization_follows() -> None:
    given = between("b = Conv(a, w) m = Tanh(b)", normal(3, 8, 8, 1, 1, scale=0.3))
    state = given.run((*LOWER, AvoidEngineTraps()), forms(given))
    assert "Sum" not in ops(state.model)
    assert int8_weights(ENGINE.optimized_graph(state.model, OPTIMIZED)) == 2


def test_it_settles() -> None:
    given = between(MIDDLES[0][0], normal(3, *MIDDLES[0][1], scale=0.3))
    state = given.run((*LOWER, AvoidEngineTraps()), forms(given))
    assert AvoidEngineTraps().run(state) == 0
