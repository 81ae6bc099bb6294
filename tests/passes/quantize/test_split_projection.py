"""avoid-engine-traps, merged-projection: a product that is taken apart becomes one per part, of the same columns."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qcompiler.ir.graph import all_nodes, origins
from qcompiler.ir.text import print_model
from tests.filecheck import file_check
from tests.passes.quantize.lab import ENGINE, OPTIMIZED, normal, ops
from tests.passes.quantize.traps_lab import avoid_in, changes, why

F = np.float32
NUMBERS = {
    "w": normal(1, 6, 24), "b": normal(2, 24),
    "s5": np.asarray([0, 0, 3, 2, 4]), "h5": np.asarray([0, 0, 2, 3, 4]),
    "s4": np.asarray([0, 0, 3, 8]), "one": np.asarray([0]), "ones": np.asarray([1, 1, 1]),
    "i0": np.asarray(0), "i1": np.asarray(1), "i2": np.asarray(-1), "third": np.asarray([8, 8, 8]),
    "uneven": np.asarray([12, 8, 4]), "p0": np.asarray([0]), "p8": np.asarray([8]), "p16": np.asarray([16]),
    "p99": np.asarray([99]), "last": np.asarray([-1]),
}  # fmt: skip
HEADS = ", ".join(f"float[n,2,5,4] {name}" for name in ("q", "k", "v"))
THIRDS = ", ".join(f"float[n,5,8] {name}" for name in ("q", "k", "v"))
SPLIT_HEADS = "h = Reshape(a, s5) t = Transpose<perm=[2,0,3,1,4]>(h) c, d, e = Split<axis=0>(t, ones) "
SQUEEZE = "q = Squeeze(c, one) k = Squeeze(d, one) v = Squeeze(e, one)"


def avoid(body, result=THIRDS, inputs="float[n,5,6] x", **more):
    used = {name: a for name, a in NUMBERS.items() if re.search(rf"\b{name}\b", body)}
    return avoid_in(body, "merged-projection", inputs, result, used, **more)


def test_heads_of_a_vision_transformer():
    state = avoid("p = MatMul(x, w) a = Add(p, b) " + SPLIT_HEADS + SQUEEZE, HEADS)
    assert ops(state.model) == {"MatMul": 3, "Add": 3, "Reshape": 3, "Transpose": 3}
    file_check(
        print_model(state.model),
        """
        # CHECK: MatMul_0: %[[P:[^ ]+]]: f32 nx5x8 = MatMul(%x, const<f32 6x8
        # CHECK: %[[A:[^ ]+]]: f32 nx5x8 = Add(%[[P]], const<f32 8
        # CHECK: %[[H:[^ ]+]]: f32 nx5x2x4 = Reshape(%[[A]], const<i64 4 [0, 0, 2, 4]>)
        # CHECK: %q: f32 nx2x5x4 = Transpose(%[[H]]) {perm=[0, 2, 1, 3]}
        """,
    )
    products = [n for n in all_nodes(state.model) if n.op_type == "MatMul"]
    assert [n.name for n in products] == ["MatMul_0", "MatMul_0_out1", "MatMul_0_out2"]
    assert {origins(n) for n in products} == {("MatMul_0",)}


TAKEN = {
    "elements": "h = Reshape(a, s5) t = Transpose<perm=[2,0,3,1,4]>(h) "
    "q = Gather<axis=0>(t, i0) k = Gather<axis=0>(t, i1) v = Gather<axis=0>(t, i2)",
    "behind the heads": "h = Reshape(a, h5) t = Transpose<perm=[0,2,1,3,4]>(h) "
    "q = Gather<axis=3>(t, i0) k = Gather<axis=-2>(t, i1) v = Gather<axis=3>(t, i2)",
    "axis 2": "h = Reshape(a, s5) t = Transpose<perm=[0,3,2,1,4]>(h) c, d, e = Split<axis=2>(t, ones) "
    "ax = Constant<value_ints=[2]>() q = Squeeze(c, ax) k = Squeeze(d, ax) v = Squeeze(e, ax)",
}


@pytest.mark.parametrize("form", TAKEN)
def test_heads_taken_in_other_ways(form):
    state = avoid("a = MatMul(x, w) " + TAKEN[form], HEADS)
    assert ops(state.model) == {"MatMul": 3, "Reshape": 3, "Transpose": 3}


def test_an_axis_without_a_transpose():
    state = avoid("a = MatMul(x, w) h = Reshape(a, s4) q = Gather<axis=2>(h, i0) k = Gather<axis=2>(h, i1)",
                  "float[n,5,8] q, float[n,5,8] k")  # fmt: skip
    assert ops(state.model) == {"MatMul": 2, "Reshape": 2}


PLAIN = {
    "split": "q, k, v = Split<axis=-1>(a, third)",
    "counted": "q, k, v = Split<axis=2, num_outputs=3>(a)",
    "slices": "q = Slice(a, p0, p8, last) v = Slice(a, p16, p99, last) k = Slice(a, p8, p16, last)",
}


@pytest.mark.parametrize("form", PLAIN)
def test_parts_of_the_last_axis(form):
    state = avoid("a = MatMul(x, w) " + PLAIN[form])
    assert ops(state.model) == {"MatMul": 3}


def test_parts_of_different_sizes():
    state = avoid("a = MatMul(x, w) q, k, v = Split<axis=-1>(a, uneven)",
                  "float[n,5,12] q, float[n,5,8] k, float[n,5,4] v")  # fmt: skip
    assert ops(state.model) == {"MatMul": 3}


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_its_bias(transposed):
    weight = NUMBERS["w"].T.copy() if transposed else NUMBERS["w"]
    body = f"a = Gemm<transB={transposed}>(x, w, b) q, k, v = Split<axis=-1>(a, third)"
    result = ", ".join(f"float[n,8] {name}" for name in ("q", "k", "v"))
    used = {"w": weight, "b": NUMBERS["b"], "third": NUMBERS["third"]}
    state = avoid_in(body, "merged-projection", "float[n,6] x", result, used)
    assert ops(state.model) == {"Gemm": 3}


def test_rows_that_are_laid_out_anew_before_the_split():
    used = {"w": NUMBERS["w"], "b": NUMBERS["b"], "third": NUMBERS["third"], "rows": np.asarray([-1, 5, 24])}
    body = "g = Gemm(x, w, b) a = Reshape(g, rows) q, k, v = Split<axis=2>(a, third)"
    feeds = [{"x": normal(8, 10, 6)}]
    state = avoid_in(body, "merged-projection", "float[n,6] x", THIRDS.replace("n,5", "m,5"), used, feeds=feeds)
    assert ops(state.model) == {"Gemm": 3, "Reshape": 3}


def test_rows_that_take_columns_along_keep_the_product_whole():
    used = {"w": NUMBERS["w"], "rows": np.asarray([0, 10, 12])}
    state = avoid_in("g = MatMul(x, w) a = Reshape(g, rows) q, k = Split<axis=2, num_outputs=2>(a)",
                     "merged-projection", "float[n,5,6] x", "float[n,10,6] q, float[n,10,6] k", used)  # fmt: skip
    assert changes(state) == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_integer_product_quantizes_its_input_once(dynamic):
    rng = np.random.default_rng(5)
    numbers = {
        "w": rng.integers(-127, 128, (6, 24)).astype(np.int8), "ws": rng.uniform(0.01, 0.1, 24).astype(F),
        "wz": np.zeros(24, np.int8), "b": NUMBERS["b"], "third": NUMBERS["third"],
        **({} if dynamic else {"s": np.asarray(0.03, F), "z": np.asarray(120, np.uint8)}),
    }  # fmt: skip
    first = "r, s, z = DynamicQuantizeLinear(x) " if dynamic else "r = QuantizeLinear(x, s, z) "
    body = first + "a = com.microsoft.MatMulIntegerToFloat(r, w, s, ws, z, wz, b) q, k, v = Split<axis=-1>(a, third)"
    state = avoid_in(body, "merged-projection", "float[n,5,6] x", THIRDS, numbers)
    quantizer = "DynamicQuantizeLinear" if dynamic else "QuantizeLinear"
    assert ops(state.model) == {quantizer: 1, "MatMulIntegerToFloat": 3}
    executed = ops(ENGINE.optimized_graph(state.model, OPTIMIZED))
    assert executed == {quantizer: 1, "MatMulIntegerToFloat": 3}
    scales = [n.inputs[3].const_value.numpy() for n in all_nodes(state.model) if n.op_type.startswith("MatMul")]
    np.testing.assert_array_equal(np.concatenate(scales), numbers["ws"])


@pytest.mark.parametrize(
    ("body", "result", "reasons"),
    [
        ("a = MatMul(x, w) y = MatMul(x, w) q, k, v = Split<axis=-1>(a, third)", THIRDS + ", float[n,5,24] y",
         ["shared-constant"]),
        ("a = MatMul(x, w) q, k, v = Split<axis=-1>(a, third)", THIRDS + ", float[n,5,24] a", []),
        ("a = MatMul(x, w) y = Exp(a) q, k, v = Split<axis=-1>(a, third)", THIRDS + ", float[n,5,24] y", []),
        ("a = MatMul(x, w) q, k = Split<axis=1, num_outputs=2>(a)", "float[n,3,24] q, float[n,2,24] k", []),
        ("a = MatMul(x, w) q = Slice(a, p0, p8, last) k = Slice(a, p16, p99, last)",
         "float[n,5,8] q, float[n,5,8] k", []),
        ("a = MatMul(x, w) " + SPLIT_HEADS + "q = Squeeze(c, one) k = Squeeze(d, one) v = Exp(e)",
         "float[n,2,5,4] q, float[n,2,5,4] k, float[1,n,2,5,4] v", []),
        ("a = MatMul(x, w) h = Reshape(a, s5) q = Gather<axis=3>(h, i0) k = Gather<axis=2>(h, i1)",
         "float[n,5,3,4] q, float[n,5,2,4] k", []),
        ("a = MatMul(x, w) h = Reshape(a, s4) q = Gather<axis=2>(h, i0) k = Gather<axis=2>(h, i0)",
         "float[n,5,8] q, float[n,5,8] k", []),
    ],
)  # fmt: skip
def test_products_that_stay_whole(body, result, reasons):
    state = avoid(body, result)
    assert (changes(state), why(state, "split-projection")) == (0, reasons)


def test_a_bias_that_is_no_row_keeps_the_product_whole():
    bias = {"b": normal(6, 5, 24), "w": NUMBERS["w"], "third": NUMBERS["third"]}
    body = "p = MatMul(x, w) a = Add(p, b) q, k, v = Split<axis=-1>(a, third)"
    state = avoid_in(body, "merged-projection", "float[n,5,6] x", THIRDS, bias)
    assert (changes(state), why(state, "split-projection")) == (0, ["bias-shape"])


def test_a_computed_weight_keeps_the_product_whole():
    state = avoid("a = MatMul(x, m) q, k, v = Split<axis=-1>(a, third)", inputs="float[n,5,6] x, float[6,24] m")
    assert (changes(state), why(state, "split-projection")) == (0, [])
