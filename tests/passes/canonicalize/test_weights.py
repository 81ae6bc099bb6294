"""fuse-batch-norm, fold-mul-add-into-weights, normalize-gemm, fuse-matmul-add, order-operands, fuse-pad."""

import numpy as np
import pytest

from qcompiler.passes.fold_mul_add_into_weights import FoldMulAddIntoWeights
from qcompiler.passes.fuse_batch_norm import FuseBatchNorm
from qcompiler.passes.fuse_matmul_add import FuseMatmulAdd
from qcompiler.passes.fuse_pad import FusePad
from qcompiler.passes.normalize_gemm import NormalizeGemm
from qcompiler.passes.order_operands import OrderOperands

_F = np.float32
_BN = "BatchNormalization<epsilon=0.001>"


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(_F)


def norm_weights(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    return {n: normal(rng, count) for n in ("s", "o", "m")} | {"v": rng.uniform(0.5, 2, count).astype(_F)}


@pytest.mark.parametrize(
    ("node", "weight", "count", "bias"),
    [
        ("Conv<pads=[1,1,1,1]>", (6, 4, 3, 3), 6, False),
        ("Conv<pads=[1,1,1,1]>", (6, 4, 3, 3), 6, True),
        ("Conv<group=2, strides=[2,2]>", (6, 2, 3, 3), 6, True),
        ("ConvTranspose<strides=[2,2]>", (4, 3, 2, 2), 3, False),
        ("ConvTranspose<group=2>", (4, 3, 2, 2), 6, True),
    ],
)
def test_batch_norm_behind_a_convolution(run, text, rng, node, weight, count, bias):
    weights = {"w": normal(rng, *weight), **norm_weights(rng, count)}
    if bias:
        weights["b"] = normal(rng, count)
    body = f"a = {node}(x, w{', b' if bias else ''}) y = {_BN}(a, s, o, m, v)"
    found = run(FuseBatchNorm(), text("float[n,4,7,5] x", f"float[n,{count},p,q] y", body, weights))
    assert found.ops == {node.split("<")[0]: 1}


@pytest.mark.parametrize(("node", "shape"), [("Gemm<transB=1, alpha=0.5>", (6, 4)), ("MatMul", (4, 6))])
def test_batch_norm_behind_a_matrix_product(run, text, rng, node, shape):
    weights = {"w": normal(rng, *shape), **norm_weights(rng, 6)}
    body = f"a = {node}(x, w) y = {_BN}(a, s, o, m, v)"
    found = run(FuseBatchNorm(), text("float[n,4] x", "float[n,6] y", body, weights))
    assert found.ops == {"Gemm": 1}


def test_batch_norm_in_front_of_an_unpadded_convolution(run, text, rng):
    weights = {"w": normal(rng, 6, 2, 3, 3), "b": normal(rng, 6), **norm_weights(rng, 4)}
    body = f"a = {_BN}(x, s, o, m, v) y = Conv<group=2>(a, w, b)"
    assert run(FuseBatchNorm(), text("float[n,4,7,5] x", "float[n,6,p,q] y", body, weights)).ops == {"Conv": 1}


def test_batch_norm_in_half_precision(run, text, rng):
    weights = {"w": normal(rng, 6, 4, 1, 1), **norm_weights(rng, 6)}
    weights = {name: array.astype(np.float16) for name, array in weights.items()}
    body = f"a = Conv(x, w) y = {_BN}(a, s, o, m, v)"
    found = run(FuseBatchNorm(), text("float16[n,4,2,2] x", "float16[n,6,2,2] y", body, weights), compare=False)
    assert found.ops == {"Conv": 1}
    assert found.node("Conv").inputs[1].const_value.numpy().dtype == np.float16


@pytest.mark.parametrize(
    ("body", "rule", "reason"),
    [
        (f"a = {_BN}(x, s, o, m, v) y = Conv<pads=[1,1,1,1]>(a, w)", "batch-norm-before", "padded"),
        (f"a = Conv(x, w) b = {_BN}(a, s, o, m, v) y = Add(a, b)", "batch-norm-after", "interior-used-elsewhere"),
        (f"a = Conv(x, w) b = {_BN}(a, s, o, m, v) c = Conv(x, w) y = Add(b, c)", "batch-norm-after",
         "shared-constant"),
    ],
)  # fmt: skip
def test_batch_norm_that_stays(run, text, rng, body, rule, reason):
    weights = {"w": normal(rng, 4, 4, 3, 3), **norm_weights(rng, 4)}
    found = run(FuseBatchNorm(), text("float[n,4,7,5] x", "float[n,4,p,q] y", body, weights))
    assert (found.changes, found.reason(rule)) == (0, reason)


def test_batch_norm_behind_a_computed_weight_stays(run, text, rng):
    body = f"a = Conv(x, w) y = {_BN}(a, s, o, m, v)"
    head = "float[n,4,7,5] x, float[4,4,3,3] w"
    found = run(FuseBatchNorm(), text(head, "float[n,4,p,q] y", body, norm_weights(rng, 4)))
    assert found.reason("batch-norm-after") == "not-constant"


def test_batch_norm_behind_a_matmul_of_rank_3_works_on_another_axis(run, text, rng):
    weights = {"w": normal(rng, 4, 5), **norm_weights(rng, 3)}
    body = f"a = MatMul(x, w) y = {_BN}(a, s, o, m, v)"
    found = run(FuseBatchNorm(), text("float[n,3,4] x", "float[n,3,5] y", body, weights))
    assert found.reason("batch-norm-after") == "axis"


def test_batch_norm_whose_result_does_not_fit_half_precision(run, text):
    weights = {"w": np.full((1, 1, 1, 1), 60000), "s": [4.0], "o": [0.0], "m": [0.0], "v": [1.0]}
    halves = {name: np.asarray(array, np.float16) for name, array in weights.items()}
    body = f"a = Conv(x, w) y = {_BN}(a, s, o, m, v)"
    found = run(FuseBatchNorm(), text("float16[1,1,2,2] x", "float16[1,1,2,2] y", body, halves), compare=False)
    assert found.reason("batch-norm-after") == "overflow"


@pytest.mark.parametrize(
    ("node", "weight", "data"),
    [
        ("Conv<pads=[1,1,1,1]>", (6, 4, 3, 3), "n,4,7,5"),
        ("Conv<group=2>", (6, 2, 3, 3), "n,4,7,5"),
        ("ConvTranspose<group=2>", (4, 3, 2, 2), "n,4,7,5"),
        ("Gemm", (4, 6), "n,4"),
        ("Gemm<transB=1, alpha=2.0>", (6, 4), "n,4"),
        ("MatMul", (4, 6), "n,3,4"),
    ],
)
@pytest.mark.parametrize("scalar", [False, True])
def test_factors_on_both_sides(run, text, rng, node, weight, data, scalar):
    spatial = (1, 1) if len(weight) == 4 else ()
    before = _F(0.3) if scalar else normal(rng, 4, *spatial)
    after = rng.uniform(0.5, 2, (1,) if scalar else (6, *spatial)).astype(_F)
    weights = {"w": normal(rng, *weight), "c": before, "k": after}
    body = f"a = Mul(c, x) b = {node}(a, w) y = Div(b, k)"
    rank = data.count(",") + 1
    shape = ",".join("npqr"[:rank])
    found = run(FoldMulAddIntoWeights(), text(f"float[{data}] x", f"float[{shape}] y", body, weights))
    assert found.ops == {node.split("<")[0]: 1}


def test_offsets_go_into_the_bias(run, text, rng):
    weights = {"w": normal(rng, 6, 4, 3, 3), "c": normal(rng, 4, 1, 1), "k": normal(rng, 1, 6, 1, 1)}
    body = "a = Sub(x, c) b = Conv(a, w) y = Add(k, b)"
    found = run(FoldMulAddIntoWeights(), text("float[n,4,7,5] x", "float[n,6,p,q] y", body, weights))
    assert found.ops == {"Conv": 1}
    assert len(found.node("Conv").inputs) == 3


def test_factor_behind_a_matmul_with_bias(run, text, rng):
    weights = {"w": normal(rng, 4, 6), "t": normal(rng, 6), "k": _F(0.125)}
    body = "a = MatMul(x, w) b = Add(a, t) y = Mul(b, k)"
    found = run(FoldMulAddIntoWeights(), text("float[n,3,4] x", "float[n,3,6] y", body, weights))
    assert found.ops == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize(
    ("body", "shape", "rule", "reason"),
    [
        ("b = Conv(x, w) y = Mul(b, k)", (3, 3), "factor-after", "not-per-channel"),
        ("b = Conv(x, w) y = Mul(b, k)", (1, 1, 4, 1, 1), "factor-after", "not-per-channel"),
        ("b = Conv(x, w) c = Relu(b) d = Mul(b, k) y = Add(c, d)", (), "factor-after", "interior-used-elsewhere"),
        ("a = Add(x, k) y = Conv<pads=[1,1,1,1]>(a, w)", (4, 1, 1), "factor-before", "padded"),
    ],
)
def test_factors_that_stay(run, text, rng, body, shape, rule, reason):
    weights = {"w": normal(rng, 4, 4, 3, 3), "k": np.asarray(rng.normal(size=shape), _F)}
    rank = 5 if len(shape) == 5 else 4
    found = run(
        FoldMulAddIntoWeights(), text("float[n,4,5,5] x", f"float[{','.join('npqrs'[:rank])}] y", body, weights)
    )
    assert (found.changes, found.reason(rule)) == (0, reason)


def test_factor_that_widens_its_input_stays(run, text, rng):
    weights = {"w": normal(rng, 6, 4, 1, 1), "k": normal(rng, 4, 1, 1)}
    found = run(
        FoldMulAddIntoWeights(),
        text("float[n,1,5,5] x", "float[n,6,5,5] y", "a = Mul(x, k) y = Conv(a, w)", weights),
    )
    assert found.reason("factor-before") == "unknown-shape"


def test_offset_behind_a_matmul_of_rank_3_stays(run, text, rng):
    weights = {"w": normal(rng, 4, 6), "k": normal(rng, 6)}
    body = "a = MatMul(x, w) y = Add(a, k)"
    found = run(FoldMulAddIntoWeights(), text("float[n,3,4] x", "float[n,3,6] y", body, weights))
    assert found.reason("factor-after") == "no-bias"


@pytest.mark.parametrize(
    ("attributes", "weight", "bias"),
    [
        ("transB=1", (6, 4), (6,)),
        ("alpha=0.5, beta=2.0", (4, 6), (6,)),
        ("alpha=0.5, transB=1, beta=0.25", (6, 4), (1, 6)),
        ("beta=0.5", (4, 6), ()),
        ("transB=1", (6, 4), None),
        ("alpha=3.0, beta=2.0", (4, 6), None),
    ],
)
def test_normal_form_of_gemm(run, text, rng, attributes, weight, bias):
    weights = {"w": normal(rng, *weight)}
    if bias is not None:
        weights["b"] = np.asarray(rng.normal(size=bias), _F)
    body = f"y = Gemm<{attributes}>(x, w{', b' if bias is not None else ''})"
    found = run(NormalizeGemm(), text("float[n,4] x", "float[n,6] y", body, weights))
    node = found.node("Gemm")
    assert not node.attributes
    assert tuple(node.inputs[1].shape.numpy()) == (4, 6)
    if bias is not None:
        assert tuple(node.inputs[2].shape.numpy()) == (6,)


def test_gemm_with_a_shared_weight_keeps_its_attribute(run, text, rng):
    body = "y = Gemm<transB=1>(x, w) z = Gather(w, i)"
    head, results = "float[n,4] x, int64[2] i", "float[n,6] y, float[2,4] z"
    found = run(NormalizeGemm(), text(head, results, body, {"w": normal(rng, 6, 4)}))
    assert (found.changes, found.reason("gemm-normal-form")) == (0, "shared-constant")


def test_gemm_on_computed_matrices_keeps_its_attributes(run, text):
    head = "float[n,4] x, float[6,4] w"
    found = run(NormalizeGemm(), text(head, "float[n,6] y", "y = Gemm<transB=1, alpha=0.5>(x, w)"))
    assert found.changes == 0


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), ()])
def test_matmul_with_a_bias_becomes_gemm(run, text, rng, shape):
    weights = {"w": normal(rng, 4, 6), "b": np.asarray(rng.normal(size=shape), _F)}
    found = run(FuseMatmulAdd(), text("float[n,4] x", "float[n,6] y", "a = MatMul(x, w) y = Add(b, a)", weights))
    assert found.ops == {"Gemm": 1}
    assert tuple(found.node("Gemm").inputs[2].shape.numpy()) == (6,)


@pytest.mark.parametrize(
    ("data", "results", "shape", "reason"),
    [
        ("float[n,3,4] x", "float[n,3,6] y", (6,), "rank"),
        ("float[n,4] x", "float[2,n,6] y", (2, 1, 6), "not-per-channel"),
        ("float[3,4] x", "float[3,6] y", (3, 1), "not-per-channel"),
    ],
)
def test_matmul_that_is_no_gemm(run, text, rng, data, results, shape, reason):
    weights = {"w": normal(rng, 4, 6), "b": normal(rng, *shape)}
    found = run(FuseMatmulAdd(), text(data, results, "a = MatMul(x, w) y = Add(a, b)", weights))
    assert (found.changes, found.reason("matmul-add-to-gemm")) == (0, reason)


def test_matmul_result_that_is_read_twice_stays(run, text, rng):
    weights = {"w": normal(rng, 4, 6), "b": normal(rng, 6)}
    body = "a = MatMul(x, w) b1 = Add(a, b) y = Mul(a, b1)"
    found = run(FuseMatmulAdd(), text("float[n,4] x", "float[n,6] y", body, weights))
    assert found.reason("matmul-add-to-gemm") == "interior-used-elsewhere"


def test_constant_operand_goes_second(run, text, rng):
    body = "a = Add(c, x) b = Mul(c, a) y = Sub(c, b)"
    found = run(OrderOperands(), text("float[n,4] x", "float[n,4] y", body, {"c": normal(rng, 4)}))
    assert found.changes == 2
    assert [found.node(op).inputs[1].name for op in ("Add", "Mul")] == ["c", "c"]
    assert found.node("Sub").inputs[0].name == "c"


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("pad", "weights", "pads"),
    [
        ("Pad(x, p)", {"p": ints(0, 0, 1, 0, 0, 0, 2, 3)}, [1, 0, 2, 3]),
        ("Pad(x, p, z)", {"p": ints(0, 0, 1, 0, 0, 0, 2, 3), "z": _F(0)}, [1, 0, 2, 3]),
        ("Pad(x, p, z, ax)", {"p": ints(1, 2), "z": _F(0), "ax": ints(-1)}, [0, 1, 0, 2]),
    ],
)
def test_pad_goes_into_a_convolution(run, text, rng, pad, weights, pads):
    weights = {"w": normal(rng, 6, 4, 3, 3), **weights}
    body = f"a = {pad} y = Conv<pads=[1,1,1,1], strides=[2,2]>(a, w)"
    found = run(FusePad(), text("float[n,4,7,5] x", "float[n,6,p,q] y", body, weights))
    assert found.ops == {"Conv": 1}
    assert list(found.node("Conv").attributes["pads"].as_ints()) == [a + 1 for a in pads]


def test_pad_for_two_convolutions_goes_into_both(run, text, rng):
    weights = {"w": normal(rng, 6, 4, 3, 3), "p": ints(0, 0, 1, 1, 0, 0, 1, 1)}
    body = "a = Pad(x, p) b = Conv(a, w) c = Conv(a, w) y = Add(b, c)"
    found = run(FusePad(), text("float[n,4,7,5] x", "float[n,6,7,5] y", body, weights))
    assert found.ops == {"Conv": 2, "Add": 1}


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Pad(x, p) y = AveragePool<kernel_shape=[3,3]>(a)", {}),
        ("a = Pad(x, p) y = AveragePool<kernel_shape=[3,3], count_include_pad=1, pads=[1,1,1,1]>(a)", {}),
        ("r = Relu(x) a = Pad(r, p) y = MaxPool<kernel_shape=[3,3]>(a)", {}),
        ("a = Pad(x, p, z) y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)", {"z": np.finfo(_F).min}),
    ],
)
def test_pad_goes_into_pooling(run, text, body, weights):
    weights = {"p": ints(0, 0, 1, 0, 0, 0, 1, 1), **weights}
    found = run(FusePad(), text("float[n,4,7,5] x", "float[n,4,p,q] y", body, weights))
    assert "Pad" not in found.ops


@pytest.mark.parametrize(
    ("body", "pads", "rule", "reason"),
    [
        ('a = Pad<mode="reflect">(x, p) y = Conv(a, w)', (0, 0, 1, 1, 0, 0, 1, 1), "pad-into-conv", "pad-mode"),
        ("a = Pad(x, p, c) y = Conv(a, w)", (0, 0, 1, 1, 0, 0, 1, 1), "pad-into-conv", "pad-value"),
        ("a = Pad(x, p) y = Conv(a, w)", (0, 0, -1, 1, 0, 0, 1, 1), "pad-into-conv", "pad-crops"),
        ("a = Pad(x, p) y = Conv(a, w)", (1, 0, 1, 1, 0, 0, 1, 1), "pad-into-conv", "pad-axes"),
        ('a = Pad(x, p) y = Conv<auto_pad="SAME_UPPER">(a, w)', (0, 0, 1, 1, 0, 0, 1, 1), "pad-into-conv", "auto-pad"),
        ("a = Pad(x, p) y = MaxPool<kernel_shape=[3,3]>(a)", (0, 0, 1, 1, 0, 0, 1, 1), "pad-into-max-pool",
         "pad-value"),
        ("a = Pad(x, p) y = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(a)", (0, 0, 1, 1, 0, 0, 1, 1),
         "pad-into-average-pool", "count"),
        ("a = Pad(x, p) y = AveragePool<kernel_shape=[2,2]>(a)", (0, 0, 2, 1, 0, 0, 1, 1), "pad-into-average-pool",
         "pad-width"),
        ("a = Pad(x, p) y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(a)", (0, 0, 1, 1, 0, 0, 1, 1),
         "pad-into-average-pool", "ceil-mode"),
    ],
)  # fmt: skip
def test_pad_that_stays(run, text, rng, body, pads, rule, reason):
    weights = {"w": normal(rng, 4, 4, 3, 3), "c": _F(1), "p": ints(*pads)}
    found = run(FusePad(), text("float[n,4,7,5] x", "float[m,4,q,r] y", body, weights))
    assert (found.changes, found.reason(rule)) == (0, reason)


def test_pad_by_computed_widths_stays(run, text, rng):
    head = "float[n,4,7,5] x, int64[8] p"
    body = "a = Pad(x, p) y = Conv(a, w)"
    found = run(FusePad(), text(head, "float[n,4,q,r] y", body, {"w": normal(rng, 4, 4, 3, 3)}), compare=False)
    assert found.reason("pad-into-conv") == "not-constant"
