"""The Q/DQ that OpenVINO gets: pairs that change nothing are gone, biases stand behind, numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.engine import Array
from qcompiler.errors import TargetError
from qcompiler.ir.graph import all_graphs, const_array
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_openvino import LowerOpenvino
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.search.quality import sqnr_db
from qcompiler.targets.target import load_target, parse_target
from tests.passes.quantize.lab import ENGINE, REFERENCE, Lab, lab, model_of, normal, ops

F = np.float32
TARGET = load_target("openvino")
IMAGE = "float[n,4,8,8] x"
W = {
    "w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "v": normal(3, 8, 8, 3, 3, scale=0.1),
    "m": normal(4, 64, 16, scale=0.1), "half": np.asarray([0], np.int64),
}  # fmt: skip
STEPS = (PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq())


def work(body: str, outputs: str = "float[] y", inputs: str = IMAGE, weights: dict[str, Array] | None = None) -> Lab:
    return lab(model_of(inputs, outputs, body, W if weights is None else weights), target=TARGET)


def lowered(of: Lab, **forms: str) -> ir.Model:
    return of.run((*STEPS, LowerOpenvino()), **forms).model  # type: ignore[arg-type]


def run(model: ir.Model, feed: dict[str, Array]) -> list[Array]:
    return list(ENGINE.load(model, REFERENCE).run(feed).values())


def same_numbers(of: Lab, **forms: str) -> ir.Model:
    """Lower, and compare with the fused form, bit by bit, on an engine that rewrites nothing."""
    model, fused = lowered(of, **forms), of.run(STEPS, **forms).model  # type: ignore[arg-type]
    for feed in of.feeds:
        for wanted, actual in zip(run(fused, feed), run(model, feed), strict=True):
            assert np.array_equal(wanted, actual)
    return model


# ---- the bias ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["static", "static-float"])
def test_the_bias_of_an_integer_convolution_becomes_an_addition(form: str) -> None:
    of = work("c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)")
    model = lowered(of, Conv=form)
    first = next(n for n in model.graph if n.op_type == "Conv")
    assert len([v for v in first.inputs if v is not None]) == 2
    assert first.name == "Conv_0"
    (add,) = first.outputs[0].uses()
    assert add.node.op_type == "Add"
    assert add.node.name == "Conv_0/Add"
    numbers = const_array(add.node.inputs[1])
    assert numbers is not None
    assert numbers.shape == (8, 1, 1)
    # An int32 bias is rounded to the product of the scales: half a step of about 0.01 * 0.002.
    assert np.abs(numbers.reshape(-1) - W["b"]).max() < 1e-4
    assert not any(name.startswith("b") and name != "b" and ":behind" not in name for name in model.graph.initializers)


@pytest.mark.parametrize(
    ("inputs", "weight"),
    [("float[n,4,9] x", (6, 4, 3)), (IMAGE, (6, 4, 3, 3)), ("float[n,4,5,5,5] x", (6, 4, 3, 3, 3))],
    ids=["1d", "2d", "3d"],
)
def test_the_addition_gives_the_bits_of_the_bias_in_any_rank(inputs: str, weight: tuple[int, ...]) -> None:
    # Numbers of few bits, so that sums in float32 are exact in any order; the input's ends make the scale 1/32.
    rng = np.random.default_rng(0)
    weights = {"w": rng.integers(-127, 128, weight).astype(F) / 128, "b": rng.integers(-64, 64, 6).astype(F) / 16}
    weights["w"].reshape(6, -1)[:, 0] = 127 / 128
    proto = model_of(inputs, "float[] y", "c = Conv(x, w, b) y = Relu(c)", weights)
    size = [3 if d == "n" else int(d) for d in inputs[inputs.index("[") + 1 : inputs.index("]")].split(",")]
    x = rng.integers(-127, 128, size).astype(F) / 32
    x.reshape(-1)[:2] = (-127 / 32, 127 / 32)
    of = lab(proto, target=TARGET, feeds=[{"x": x}])
    model = same_numbers(of, Conv="static-float")
    assert ops(model)["Add"] == 1


def test_a_convolution_in_float_keeps_its_bias() -> None:
    of = work("c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)")
    model = lowered(of)
    assert ops(model) == {"Conv": 2, "Relu": 1}
    assert len(next(iter(model.graph)).inputs) == 3


def test_a_bias_that_two_convolutions_share_serves_both() -> None:
    of = work("c = Conv(x, w, b) d = Conv(x, u, b) y = Add(c, d)", weights={**W, "u": normal(9, 8, 4, 3, 3)})
    model = lowered(of, Conv="static-float")
    assert ops(model)["Add"] == 3
    assert "b" not in model.graph.initializers
    for feed in of.feeds:
        (wanted,), (actual,) = run(of.base.model, feed), run(model, feed)
        assert sqnr_db(wanted, actual) > 30


def test_gemm_keeps_its_bias() -> None:
    weights = {"w": normal(1, 64, 16, scale=0.1), "b": normal(2, 16)}
    of = work("y = Gemm(x, w, b)", inputs="float[n,64] x", weights=weights)
    model = same_numbers(of, Gemm="static-float")
    (gemm,) = [n for n in model.graph if n.op_type == "Gemm"]
    assert gemm.inputs[2] is not None
    assert "Add" not in ops(model)


# ---- pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mover",
    [
        "MaxPool<kernel_shape=[2,2],strides=[2,2],pads=[0,1,0,1]>(c)",
        "Transpose<perm=[0,1,3,2]>(c)",
        "Slice(c, half, one, three)",
        "Reshape(c, shape)",
        "Gather<axis=3>(c, picks)",
    ],
    ids=lambda text: text.replace("<", "(").partition("(")[0],
)
def test_a_pair_behind_what_only_moves_is_dropped(mover: str) -> None:
    weights = {
        **W, "one": np.asarray([6], np.int64), "three": np.asarray([3], np.int64),
        "shape": np.asarray([0, 8, 4, 9], np.int64), "picks": np.asarray([5, 1, 2, 2], np.int64),
    }  # fmt: skip
    kind = mover.replace("<", "(").partition("(")[0]
    of = work(f"c = Conv(x, w) p = {mover} y = Conv(p, v)", weights=weights)
    plain = of.run(STEPS, Conv="static", **{kind: "static"}).model  # type: ignore[arg-type]
    model = same_numbers(of, Conv="static", **{kind: "static"})
    before = sum(n.op_type == "QuantizeLinear" for f in plain.functions.values() for n in f)
    assert before + ops(plain).get("QuantizeLinear", 0) >= 3
    assert ops(model)["QuantizeLinear"] == 2  # of the input, and of the first convolution's result
    (moved,) = [n for n in model.graph if n.op_type == kind]
    assert [u.node.op_type for u in moved.outputs[0].uses()] == ["Conv"]


def test_all_results_of_a_split_lose_their_pairs() -> None:
    body = "c = Conv(x, w) p, q = Split<axis=1,num_outputs=2>(c) d = Conv(p, u) e = Conv(q, u) y = Add(d, e)"
    of = work(body, weights={**W, "u": normal(9, 4, 4, 1, 1)})
    model = same_numbers(of, Conv="static", Split="static")
    (split,) = [n for n in model.graph if n.op_type == "Split"]
    assert [[u.node.op_type for u in v.uses()] for v in split.outputs] == [["Conv"], ["Conv"]]


def test_a_pair_whose_numbers_differ_stays() -> None:
    # A pool averages: what it gives is on no grid yet.
    of = work("c = Conv(x, w) p = AveragePool<kernel_shape=[2,2]>(c) y = Conv(p, v)")
    model = lowered(of, Conv="static", AveragePool="static")
    assert ops(model)["QuantizeLinear"] == 3


def test_a_concat_of_one_grid_loses_its_pair_and_one_of_several_keeps_it() -> None:
    body = "c = Conv(x, w) d = Conv(x, u) p = Concat<axis=1>(c, d) y = Conv(p, t)"
    weights = {**W, "u": normal(9, 8, 4, 3, 3, scale=0.2), "t": normal(8, 4, 16, 1, 1)}
    shared = same_numbers(work(body, weights=weights), Conv="static", Concat="static")
    (concat,) = [n for n in shared.graph if n.op_type == "Concat"]
    assert [u.node.op_type for u in concat.outputs[0].uses()] == ["Conv"]
    # Another reader keeps the first convolution's own scale.
    apart = work(body + " z = Conv(c, v)", "float[] y, float[] z", weights=weights)
    (concat,) = [n for n in same_numbers(apart, Conv="static", Concat="static").graph if n.op_type == "Concat"]
    assert [u.node.op_type for u in concat.outputs[0].uses()] == ["QuantizeLinear"]


def test_a_pair_whose_integers_leave_or_whose_reader_is_an_output_stays() -> None:
    of = work("c = Conv(x, w) y = Transpose<perm=[0,1,3,2]>(c)")
    model = same_numbers(of, Conv="static", Transpose="static")
    assert model.graph.outputs[0].name == "y"


# ---- formats -------------------------------------------------------------------------------------------------------


def zero_points(model: ir.Model) -> dict[str, tuple[str, int]]:
    """Return the type and the number of every QuantizeLinear's zero point, by its operator's name."""
    found = {}
    for graph in all_graphs(model):
        for node in graph:
            if node.op_type == "QuantizeLinear":
                zero = const_array(node.inputs[2])
                assert zero is not None
                found[str(node.name)] = (zero.dtype.name, int(zero))
    return found


def test_unsigned_without_zero_point_where_nothing_is_negative_else_signed_without_one() -> None:
    of = work("c = Conv(x, w) r = Relu(c) d = Conv(r, v) y = Conv(d, u)", weights={**W, "u": normal(9, 4, 8, 1, 1)})
    found = zero_points(lowered(of, Conv="static"))
    assert found == {
        "x/QuantizeLinear": ("int8", 0),
        "Conv_0/QuantizeLinear": ("uint8", 0),
        "Conv_2/QuantizeLinear": ("int8", 0),
    }


def test_unsigned_with_a_zero_point_where_little_is_negative() -> None:
    # Gelu ends at -0.17: signed numbers would leave half of their range unused.
    weights = {"w": normal(1, 64, 64, scale=0.2), "v": normal(2, 64, 16)}
    of = work("a = MatMul(x, w) g = Gelu(a) y = MatMul(g, v)", inputs="float[n,64] x", weights=weights)
    kind, zero = zero_points(lowered(of, MatMul="static-float"))["g/QuantizeLinear"]
    assert kind == "uint8"
    assert 0 < zero < 20


def test_a_convolution_whose_result_is_read_in_float_writes_float() -> None:
    # SiLU: a pair between the convolution and its activation would cost a pass over the data.
    of = work("c = Conv(x, w, b) s = Sigmoid(c) a = Mul(c, s) y = Conv(a, v)")
    state = of.run((*STEPS, LowerOpenvino()), Conv="static")
    assert {name: choice.form for name, choice in state.plan.choices.items()} == {
        "Conv_0": "static-float",
        "Conv_3": "static-float",
    }
    assert sorted(zero_points(state.model)) == ["a/QuantizeLinear", "x/QuantizeLinear"]


# ---- rows of the table ---------------------------------------------------------------------------------------------


def test_the_table_has_the_forms_that_q_dq_can_write() -> None:
    assert {form for row in TARGET.rows for form in row.forms} == {"static", "static-float"}
    assert not any(row.emit for row in TARGET.rows)
    with pytest.raises(TargetError, match="unknown format 'int7' for signed"):
        parse_target('[target]\nengine = "openvino"\nsigned = "int7"', "bad")
