"""eliminate-identity, fold-casts, fold-reshapes, cancel-transposes."""

import numpy as np
import pytest

from qcompiler.passes.cancel_transposes import CancelTransposes
from qcompiler.passes.eliminate_identity import EliminateIdentity
from qcompiler.passes.fold_casts import FoldCasts
from qcompiler.passes.fold_reshapes import FoldReshapes

_FAR = np.array([2**63 - 1])


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Identity(x)", {}),
        ("a = Dropout(x)", {}),
        ("a, mask = Dropout(x, ratio, train)", {"ratio": np.float32([0.5])[0:1].reshape(()), "train": np.array(False)}),
        ("a = Cast<to=1>(x)", {}),
        ("a = CastLike(x, c)", {"c": np.float32([1])}),
        ("a = Reshape(x, s)", {"s": ints(0, -1)}),
        ("a = Reshape(x, s)", {"s": ints(-1, 4)}),
        ("a = Flatten(x)", {}),
        ("a = Transpose<perm=[0,1]>(x)", {}),
        ("a = Slice(x, z, far, one)", {"z": ints(0), "far": _FAR, "one": ints(1)}),
        ("a = Slice(x, z, e, one)", {"z": ints(-4), "e": ints(9), "one": ints(-1)}),
        ("a = Pad(x, p)", {"p": ints(0, 0, 0, 0)}),
        ("a = Concat<axis=1>(x)", {}),
        ("a = Sum(x)", {}),
        ("a = Mul(x, c)", {"c": np.float32([1])}),
        ("a = Mul(c, x)", {"c": np.float32(1)}),
        ("a = Div(x, c)", {"c": np.float32(1)}),
        ("a = Add(x, c)", {"c": np.float32([[0]])}),
        ("a = Sub(x, c)", {"c": np.float32(0)}),
        ("a = Pow(x, c)", {"c": np.float32(1)}),
        ("a = Expand(x, s)", {"s": ints(1, 4)}),
    ],
)  # fmt: skip
def test_operator_that_returns_its_input_goes(run, text, body, weights):
    found = run(EliminateIdentity(), text("float[n,4] x", "float[n,4] y", f"{body} y = Relu(a)", weights))
    assert found.ops == {"Relu": 1}
    assert found.changes == 1


@pytest.mark.parametrize(
    ("body", "weights", "ops"),
    [
        ("a = Cast<to=10>(x) b = Cast<to=1>(a) y = Relu(b)", {}, {"Cast": 2, "Relu": 1}),
        ("a = Reshape(x, s) y = Reshape(a, t)", {"s": ints(-1, 2), "t": ints(-1, 4)}, {"Reshape": 2}),
        ("a = Transpose<perm=[1,0]>(x) b = Relu(a) y = Transpose<perm=[1,0]>(b)", {}, {"Transpose": 2, "Relu": 1}),
        ("a = Slice(x, z, e, one) b = Relu(a) y = Concat<axis=1>(b, b)",
         {"z": ints(0), "e": ints(2), "one": ints(1)}, {"Slice": 1, "Relu": 1, "Concat": 1}),
        ("a = Slice(x, z, e, one, step) y = Concat<axis=1>(a, a)",
         {"z": ints(0), "e": ints(4), "one": ints(1), "step": ints(2)}, {"Slice": 1, "Concat": 1}),
        ("a = Mul(x, c) y = Relu(a)", {"c": np.float32([1.0000001, 1, 1, 1])}, {"Mul": 1, "Relu": 1}),
        ("a = Sub(c, x) y = Relu(a)", {"c": np.float32(0)}, {"Sub": 1, "Relu": 1}),
    ],
)  # fmt: skip
def test_operator_that_does_something_stays(run, text, body, weights, ops):
    found = run(EliminateIdentity(), text("float[n,4] x", "float[n,4] y", body, weights))
    assert found.changes == 0
    assert found.ops == ops


def test_neutral_operand_of_higher_rank_adds_an_axis_and_stays(run, text):
    found = run(EliminateIdentity(), text("float[4] x", "float[1,4] y", "y = Mul(x, c)", {"c": np.float32([[1]])}))
    assert found.ops == {"Mul": 1}


def test_reshape_with_two_unknown_axes_stays(run, text):
    body = "a = Reshape(x, s) y = Relu(a)"
    found = run(EliminateIdentity(), text("float[n,m] x", "float[p,q] y", body, {"s": ints(2, -1)}), compare=False)
    assert found.ops == {"Reshape": 1, "Relu": 1}


def test_dropout_whose_mask_is_read_stays(run, text):
    found = run(EliminateIdentity(), text("float[4] x", "float[4] y, bool[4] m", "y, m = Dropout(x)"))
    assert found.reason("dropout-in-inference") == "mask-used"


def test_dropout_in_training_stays(run, text):
    weights = {"r": np.float32(0.5), "t": np.array(True)}
    found = run(EliminateIdentity(), text("float[4] x", "float[4] y", "y = Dropout(x, r, t)", weights), compare=False)
    assert found.reason("dropout-in-inference") == "training"


def test_identity_between_input_and_output_stays(run, text):
    found = run(EliminateIdentity(), text("float[4] x", "float[4] y", "y = Identity(x)"))
    assert found.reason("identity") == "graph-output"


def test_identity_in_front_of_an_output_hands_over_the_name(run, text):
    found = run(EliminateIdentity(), text("float[4] x", "float[4] y", "a = Relu(x) y = Identity(a)"))
    assert found.ops == {"Relu": 1}


def test_value_read_twice_is_read_directly_by_both(run, text):
    found = run(EliminateIdentity(), text("float[4] x", "float[4] y", "a = Identity(x) b = Relu(a) y = Add(a, b)"))
    assert found.ops == {"Relu": 1, "Add": 1}


def test_bodies_of_if_and_loop_are_cleaned(run, text):
    body = """
    y = If(c) <then_branch = t () => (float[4] p) { q = Identity(x) p = Relu(q) },
               else_branch = e () => (float[4] r) { r = Neg(x) }>
    """
    found = run(EliminateIdentity(), text("bool c, float[4] x", "float[4] y", body))
    assert found.ops == {"If": 1, "Relu": 1, "Neg": 1}
    loop = """
    y = Loop(n, c, x) <body = b (int64 i, bool g, float[4] v) => (bool h, float[4] w)
        { h = Identity(g) u = Identity(v) w = Relu(u) }>
    """
    found = run(EliminateIdentity(), text("int64 n, bool c, float[4] x", "float[4] y", loop))
    assert found.ops == {"Loop": 1, "Identity": 1, "Relu": 1}  # an input of a body cannot be its output


@pytest.mark.parametrize(
    ("source", "first", "second", "ops"),
    [
        ("float16", 1, 11, {"Cast": 1}),  # through float
        ("int32", 7, 1, {"Cast": 1}),  # through int64
        ("bool", 7, 1, {"Cast": 1}),
        ("float", 10, 1, {"Cast": 2}),  # float16 loses bits
        ("int64", 1, 7, {"Cast": 2}),  # float has 24 bits
        ("float", 7, 6, {"Cast": 2}),
    ],
)
def test_cast_chain(run, text, source, first, second, ops):
    names = {1: "float", 6: "int32", 7: "int64", 10: "float16", 11: "double"}
    body = f"a = Cast<to={first}>(x) y = Cast<to={second}>(a)"
    found = run(FoldCasts(), text(f"{source}[n] x", f"{names[second]}[n] y", body))
    assert found.ops == ops
    if ops["Cast"] == 2:
        assert found.reason("cast-of-widening-cast") == "lossy"


def test_cast_whose_middle_is_read_elsewhere_keeps_the_middle(run, text):
    body = "a = Cast<to=1>(x) b = Relu(a) c = Cast<to=11>(a) y = Cast<to=11>(b) z = Abs(c)"
    found = run(FoldCasts(), text("float16[n] x", "double[n] y, double[n] z", body))
    assert found.ops == {"Cast": 3, "Relu": 1, "Abs": 1}
    assert found.changes == 1


@pytest.mark.parametrize(
    ("body", "weights", "ops"),
    [
        ("a = Reshape(x, s) y = Reshape(a, t)", {"s": ints(-1), "t": ints(2, -1)}, {"Reshape": 1}),
        ("a = Flatten(x) y = Reshape(a, t)", {"t": ints(2, -1)}, {"Reshape": 1}),
        ("a = Unsqueeze(x, s) y = Reshape(a, t)", {"s": ints(0), "t": ints(2, -1)}, {"Reshape": 1}),
        ("a = Reshape(x, s) y = Reshape(a, t)", {"s": ints(0, 2, 2), "t": ints(0, -1)}, {"Reshape": 1}),
        ("a = Unsqueeze(x, s) b = Relu(a) y = Squeeze(b, s)", {"s": ints(0)},
         {"Unsqueeze": 1, "Relu": 1, "Squeeze": 1}),
        ("a = Unsqueeze(x, s) b = Squeeze(a, s) y = Relu(b)", {"s": ints(-1)}, {"Relu": 1}),
        ("a = Unsqueeze(x, s) b = Squeeze(a, t) y = Relu(b)", {"s": ints(0), "t": ints(-3)}, {"Relu": 1}),
        ("a = Unsqueeze(x, s) b = Unsqueeze(a, t) y = Reshape(b, u)",
         {"s": ints(1), "t": ints(0), "u": ints(2, -1)}, {"Reshape": 1}),
    ],
)  # fmt: skip
def test_reshape_chain(run, text, body, weights, ops):
    found = run(FoldReshapes(), text("float[n,4] x", "float[p,q] y", body, weights), sizes=(2, 4))
    assert found.ops == ops


@pytest.mark.parametrize(
    ("kind", "first", "second", "merged"),
    [
        ("Unsqueeze", (0,), (2,), [0, 2]),
        ("Unsqueeze", (1,), (1,), [1, 2]),
        ("Unsqueeze", (-1,), (0,), [0, 3]),
        ("Unsqueeze", (0, 2), (1, -1), [0, 1, 3, 5]),
    ],
)
def test_two_unsqueezes_become_one(run, text, kind, first, second, merged):
    rank = 2 + len(first) + len(second)
    shape = ",".join("abcdefg"[:rank])
    body = f"a = {kind}(x, s) y = {kind}(a, t)"
    found = run(
        FoldReshapes(), text("float[3,4] x", f"float[{shape}] y", body, {"s": ints(*first), "t": ints(*second)})
    )
    assert found.ops == {kind: 1}
    assert found.node(kind).inputs[1].const_value.numpy().tolist() == merged


def test_two_squeezes_become_one(run, text):
    body = "a = Squeeze(x, s) y = Squeeze(a, t)"
    found = run(FoldReshapes(), text("float[1,3,1,4] x", "float[3,4] y", body, {"s": ints(0), "t": ints(1)}))
    assert found.node("Squeeze").inputs[1].const_value.numpy().tolist() == [0, 2]


def test_copied_axis_of_unknown_length_keeps_the_inner_reshape(run, text):
    body = "a = Reshape(x, s) y = Reshape(a, t)"
    weights = {"s": ints(-1, 2), "t": ints(0, 1, 2)}
    found = run(FoldReshapes(), text("float[n,4] x", "float[p,1,2] y", body, weights))
    assert found.reason("reshape-of-reshape") == "copied-axis"


def test_computed_target_keeps_the_inner_reshape(run, text):
    body = "a = Reshape(x, s) y = Reshape(a, t)"
    found = run(FoldReshapes(), text("float[n,4] x, int64[1] t", "float[p] y", body, {"s": ints(-1)}), compare=False)
    assert found.reason("reshape-of-reshape") == "not-constant"


def test_inner_reshape_that_is_a_graph_output_stays(run, text):
    body = "a = Reshape(x, s) y = Reshape(a, t)"
    weights = {"s": ints(-1), "t": ints(2, -1)}
    found = run(FoldReshapes(), text("float[n,4] x", "float[p] a, float[2,q] y", body, weights), sizes=(2,))
    assert found.ops == {"Reshape": 2}
    assert found.changes == 1


def test_transposes_that_undo_each_other_go(run, text):
    body = "a = Transpose<perm=[1,2,0]>(x) b = Transpose<perm=[2,0,1]>(a) y = Relu(b)"
    assert run(CancelTransposes(), text("float[n,3,4] x", "float[n,3,4] y", body)).ops == {"Relu": 1}


def test_transposes_in_a_row_become_one(run, text):
    body = "a = Transpose<perm=[1,2,0]>(x) y = Transpose<perm=[1,2,0]>(a)"
    found = run(CancelTransposes(), text("float[n,3,4] x", "float[p,q,r] y", body))
    assert tuple(found.node("Transpose").attributes["perm"].as_ints()) == (2, 0, 1)


def test_transposes_without_perm_reverse_the_axes(run, text):
    body = "a = Transpose(x) b = Transpose(a) y = Relu(b)"
    assert run(CancelTransposes(), text("float[n,3,4] x", "float[n,3,4] y", body)).ops == {"Relu": 1}


def test_elementwise_region_between_transposes(run, text, rng):
    body = """
    a = Transpose<perm=[0,2,3,1]>(x) b = Transpose<perm=[0,2,3,1]>(z)
    c = Add(a, b) d = Sigmoid(c) e = Mul(c, d) f = Mul(e, k) g = Clip(f, lo, hi) h = Mul(g, s)
    y = Transpose<perm=[0,3,1,2]>(h)
    """
    weights = {
        "k": rng.normal(size=3).astype(np.float32),
        "lo": np.float32(-1),
        "hi": np.float32(6),
        "s": np.float32(0.5),
    }
    shape = "float[n,3,5,4]"
    found = run(CancelTransposes(), text(f"{shape} x, {shape} z", f"{shape} y", body, weights))
    assert found.ops == {"Add": 1, "Sigmoid": 1, "Mul": 3, "Clip": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Transpose<perm=[0,2,1]>(x) b = Relu(a) y = Transpose<perm=[1,0,2]>(b)", "permutation"),
        ("b = Relu(x) y = Transpose<perm=[0,2,1]>(b)", "no-transpose"),
        ("a = Transpose<perm=[0,2,1]>(x) c = Softmax<axis=1>(a) b = Relu(c) y = Transpose<perm=[0,2,1]>(b)",
         "no-transpose"),
    ],
)  # fmt: skip
def test_region_that_does_not_cancel(run, text, body, reason):
    found = run(CancelTransposes(), text("float[2,3,4] x", "float[p,q,r] y", body))
    assert found.changes == 0
    assert found.reason("cancel-transposes-through") == reason


def test_region_whose_inside_is_read_elsewhere_stays(run, text):
    body = "a = Transpose<perm=[0,2,1]>(x) b = Relu(a) y = Transpose<perm=[0,2,1]>(b) z = Neg(b)"
    found = run(CancelTransposes(), text("float[2,3,4] x", "float[2,3,4] y, float[2,4,3] z", body))
    assert found.reason("cancel-transposes-through") == "interior-used-elsewhere"
