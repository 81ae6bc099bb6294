"""fold-constants, fold-shapes, inline-constant-if, deduplicate, remove-unused, infer-shapes."""

import numpy as np
import pytest

from qcompiler.ir.graph import all_nodes, origins, shape_of
from qcompiler.ir.text import parse_text
from qcompiler.passes.deduplicate import Deduplicate
from qcompiler.passes.fold_constants import FoldConstants
from qcompiler.passes.fold_shapes import FoldShapes
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.inline_constant_if import InlineConstantIf
from qcompiler.passes.remove_unused import RemoveUnused
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target

_F = np.float32


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def constant(found, op_type: str, index: int) -> list:
    return found.node(op_type).inputs[index].const_value.numpy().tolist()


@pytest.mark.parametrize(
    ("body", "weights", "value"),
    [
        ("a = Add(c, c) b = Sqrt(a) y = Mul(x, b)", {"c": _F(8)}, 4.0),
        ("c = Constant<value_ints=[2,3]>() r = ReduceProd<keepdims=0>(c) b = Cast<to=1>(r) y = Mul(x, b)", {}, 6.0),
        ("c = Constant<value_float=3.0>() y = Mul(x, c)", {}, 3.0),
        ("a = ConstantOfShape(s) b = Exp(a) y = Mul(x, b)", {"s": ints(2)}, [1.0, 1.0]),
        ("a = Range(o, n, d) b = Cast<to=1>(a) y = Mul(x, b)", {"o": np.int64(1), "n": np.int64(3), "d": np.int64(1)},
         [1.0, 2.0]),
        ("a, b = Split<num_outputs=2>(c) d = Sub(b, a) y = Mul(x, d)", {"c": _F([1, 2, 3, 5])}, [2.0, 3.0]),
    ],
)  # fmt: skip
def test_nodes_on_constants_are_evaluated(run, text, body, weights, value):
    found = run(FoldConstants(), text("float[n,2] x", "float[n,2] y", body, weights))
    assert found.ops == {"Mul": 1}
    assert constant(found, "Mul", 1) == value


def test_quantized_weight_stays_quantized(run, text):
    body = (
        "a = Constant<value=int8[2] {3, -4}>() s = Constant<value_float=0.5>() d = DequantizeLinear(a, s) y = Mul(x, d)"
    )
    found = run(FoldConstants(), text("float[n,2] x", "float[n,2] y", body))
    assert found.ops == {"DequantizeLinear": 1, "Mul": 1}


def test_random_nodes_stay(run, text):
    body = "a = RandomUniformLike(c) y = Mul(x, a)"
    found = run(FoldConstants(), text("float[n,2] x", "float[n,2] y", body, {"c": _F([1, 2])}), compare=False)
    assert found.changes == 0


def test_large_results_are_not_stored(run, text):
    body = "a = Expand(c, s) y = Add(x, a)"
    weights = {"c": _F([1]), "s": ints(1024, 1024)}
    found = run(FoldConstants(), text("float[1024,1024] x", "float[1024,1024] y", body, weights))
    assert (found.changes, found.reason("fold-constant")) == (0, "size-limit")
    found = run(FoldConstants(max_growth=4 * 1024**2), text("float[1024,1024] x", "float[1024,1024] y", body, weights))
    assert found.ops == {"Add": 1}


def test_result_that_takes_its_inputs_place_may_be_large(run, text, rng):
    body = "a = Transpose(c) y = MatMul(x, a)"
    weights = {"c": rng.normal(size=(64, 16)).astype(_F)}
    found = run(FoldConstants(max_growth=0), text("float[n,16] a1", "float[n,64] y", body.replace("x", "a1"), weights))
    assert found.ops == {"MatMul": 1}


def test_constant_result_keeps_the_output_name(run, text):
    found = run(FoldConstants(), text("float[n] x", "float y, float[n] z", "y = Add(c, c) z = Relu(x)", {"c": _F(1)}))
    assert found.ops == {"Identity": 1, "Relu": 1}
    assert found.model.graph.outputs[0].name == "y"


def test_bodies_of_if_are_folded(run, text):
    body = """
    y = If(c) <then_branch = t () => (float[n] p) { q = Add(k, k) p = Mul(x, q) },
               else_branch = e () => (float r) { r = Constant<value_float=2.0>() }>
    """
    found = run(FoldConstants(), text("bool c, float[n] x", "float[m] y", body, {"k": _F(1)}), compare=False)
    assert found.ops == {"If": 1, "Mul": 1, "Constant": 1}


def test_half_precision_is_evaluated_in_half_precision(run, text):
    weights = {"c": np.float16([2049])}
    found = run(FoldConstants(), text("float16[n] x", "float16[n] y", "a = Add(c, c) y = Mul(x, a)", weights))
    assert found.node("Mul").inputs[1].const_value.numpy().dtype == np.float16
    assert constant(found, "Mul", 1) == [4096.0]


def lengths(of: str, tag: str = "") -> str:
    """Spell out the first two lengths of a value as ``u0`` and ``u1``, as exporters do."""
    return f"""
    s{tag} = Shape({of}) i0{tag} = Gather(s{tag}, zero) i1{tag} = Gather(s{tag}, one)
    u0{tag} = Unsqueeze(i0{tag}, ax) u1{tag} = Unsqueeze(i1{tag}, ax)
    """


_TARGET = lengths("x")
_AXES = {"zero": np.int64(0), "one": np.int64(1), "ax": ints(0), "h": ints(2), "d": ints(3), "minus": ints(-1)}


def test_target_of_the_inputs_own_lengths_becomes_a_constant(run, text):
    body = f"{_TARGET} t = Concat<axis=0>(u0, u1, h, d) y = Reshape(x, t)"
    found = run(FoldShapes(), text("float[b,t,6] x", "float[p,q,2,3] y", body, _AXES))
    assert constant(found, "Reshape", 1) == [0, 0, 2, 3]


def test_zero_as_a_length_is_given_up_for_zero_as_a_copy(run, text):
    body = f"{_TARGET} t = Concat<axis=0>(u0, u1, h, d) y = Reshape<allowzero=1>(x, t)"
    found = run(FoldShapes(), text("float[b,t,6] x", "float[p,q,2,3] y", body, _AXES), sizes=(0, 2))
    assert constant(found, "Reshape", 1) == [0, 0, 2, 3]
    assert "allowzero" not in found.node("Reshape").attributes


def test_one_open_length_is_inferred(run, text):
    body = f"{_TARGET} p = Mul(u0, u1) t = Concat<axis=0>(p, h, d) y = Reshape(x, t)"
    found = run(FoldShapes(), text("float[b,t,6] x", "float[p,2,3] y", body, _AXES))
    assert constant(found, "Reshape", 1) == [-1, 2, 3]


def test_length_is_followed_through_layers(run, text, rng):
    body = f"""
    {_TARGET} r = Range(zero, i1, one) e = Gather(table, r) a = Add(x, e) n = MatMul(a, w)
    {lengths("n", "n")} t = Concat<axis=0>(u0n, u1n, h, d) y = Reshape(n, t)
    """
    weights = {**_AXES, "table": rng.normal(size=(8, 6)).astype(_F), "w": rng.normal(size=(6, 6)).astype(_F)}
    found = run(FoldShapes(), text("float[b,t,6] x", "float[p,q,2,3] y", body, weights))
    assert constant(found, "Reshape", 1) == [0, 0, 2, 3]
    assert not any(
        isinstance(d, str) and "~" in d for n in all_nodes(found.model) for d in shape_of(n.outputs[0]) or ()
    )


def test_known_lengths_become_constants(run, text):
    body = "s = Shape(x) i = Gather(s, one) f = Cast<to=1>(i) y = Mul(x, f)"
    found = run(FoldShapes(), text("float[n,4] x", "float[n,4] y", body, {"one": np.int64(1)}))
    assert found.ops == {"Cast": 1, "Mul": 1}
    assert constant(found, "Cast", 0) == 4


def test_two_open_lengths_stay(run, text):
    body = f"{_TARGET} t = Concat<axis=0>(u1, u0, h, d) y = Reshape(x, t)"
    found = run(FoldShapes(), text("float[b,t,6] x", "float[p,q,2,3] y", body, _AXES))
    assert found.reason("reshape-target") == "dynamic-shape"


def test_open_length_beside_a_copied_axis_stays(run, text):
    # The batch may be empty: a -1 beside it would be undefined.
    body = f"{_TARGET} t = Concat<axis=0>(u0, h, u1, d) y = Reshape(x, t)"
    found = run(FoldShapes(), text("float[b,t,6] x", "float[p,2,q,3] y", body, _AXES), sizes=(0, 2))
    assert found.reason("reshape-target") == "dynamic-shape"


def test_expand_to_own_lengths_goes(run, text):
    body = f"{_TARGET} t = Concat<axis=0>(u0, u1, d) e = Expand(x, t) y = Relu(e)"
    found = run(FoldShapes(), text("float[b,t,3] x", "float[b,t,3] y", body, _AXES))
    assert found.node("Relu").inputs[0].name == "x"


def test_expand_target_with_minus_one_is_understood(run, text):
    # torch.export writes -1 for "keep"; a length is never -1, so Where always takes the length.
    body = f"""
    {_TARGET} t = Concat<axis=0>(u0, u1, d) m = Equal(t, minus) o = ConstantOfShape<value=int64[1] {{1}}>(three)
    w = Where(m, o, t) e = Expand(x, w) y = Relu(e)
    """
    weights = {**_AXES, "three": ints(3)}
    found = run(FoldShapes(), text("float[b,t,3] x", "float[b,t,3] y", body, weights))
    assert found.node("Relu").inputs[0].name == "x"


def test_equal_shape_computations_are_merged(run, text):
    body = """
    a = Relu(x) s = Shape(x) r = Shape(a) i = Gather(s, one) j = Gather(r, one)
    f = Cast<to=1>(i) g = Cast<to=1>(j) p = Mul(x, f) y = Mul(p, g)
    """
    found = run(FoldShapes(), text("float[n,m] x", "float[n,m] y", body, {"one": np.int64(1)}))
    first, second = (node for node in all_nodes(found.model) if node.op_type == "Cast")
    assert first.inputs[0] is second.inputs[0]


@pytest.mark.parametrize("taken", [True, False])
def test_if_with_a_known_condition(run, text, taken):
    body = """
    d = Neg(x)
    y, z = If(c) <then_branch = t () => (float[n] p, float[n] o) { p = Add(d, k) o = Identity(d) },
                  else_branch = e () => (float[n] q, float[n] r) { q = Abs(d) r = Exp(q) }>
    """
    found = run(
        InlineConstantIf(), text("float[n] x", "float[n] y, float[n] z", body, {"c": np.array(taken), "k": _F(2)})
    )
    assert found.ops == ({"Neg": 1, "Add": 1, "Identity": 1} if taken else {"Neg": 1, "Abs": 1, "Exp": 1})
    assert len(found.model.graph.inputs[0].uses()) == 1


def test_if_in_a_branch(run, text):
    inner = """
    If(k) <then_branch = a () => (float[n] u) { u = Neg(x) }, else_branch = b () => (float[n] v) { v = Abs(x) }>
    """
    body = f"""
    y = If(c) <then_branch = t () => (float[n] p) {{ i = {inner} p = Relu(i) }},
               else_branch = e () => (float[n] q) {{ q = Exp(x) }}>
    """
    found = run(InlineConstantIf(), text("bool c, float[n] x", "float[n] y", body, {"k": np.array(False)}))
    assert found.ops == {"If": 1, "Abs": 1, "Relu": 1, "Exp": 1}


def test_if_with_a_computed_condition_stays(run, text):
    body = """
    y = If(c) <then_branch = t () => (float[n] p) { p = Neg(x) }, else_branch = e () => (float[n] q) { q = Abs(x) }>
    """
    assert run(InlineConstantIf(), text("bool c, float[n] x", "float[n] y", body)).changes == 0


def test_equal_nodes_are_merged(run, text):
    body = """
    a = Add(x, c) b = Add(d, x) e = Mul(a, b) f = Softmax<axis=1>(x) g = Softmax<axis=-1>(x) h = Add(f, g) y = Add(e, h)
    """
    found = run(Deduplicate(), text("float[n,4] x", "float[n,4] y", body, {"c": _F([1]), "d": _F([1])}))
    assert found.ops == {"Add": 3, "Mul": 1, "Softmax": 2}
    assert set(origins(found.node("Add"))) == {"Add_0", "Add_1"}


def test_equal_nodes_inside_a_branch_see_the_outer_graph(run, text):
    body = """
    a = Neg(x) z = Relu(a)
    y = If(c) <then_branch = t () => (float[n] p) { b = Neg(x) p = Exp(b) },
               else_branch = e () => (float[n] q) { d = Abs(x) q = Exp(d) }>
    """
    found = run(Deduplicate(), text("bool c, float[n] x", "float[n] y, float[n] z", body))
    assert found.ops == {"Neg": 1, "Relu": 1, "If": 1, "Exp": 2, "Abs": 1}


def test_equal_graph_outputs_stay_apart(run, text):
    found = run(Deduplicate(), text("float[n] x", "float[n] y, float[n] z", "y = Neg(x) z = Neg(x)"))
    assert found.changes == 0


def test_random_nodes_are_not_merged(run, text):
    body = "a = RandomUniformLike(x) b = RandomUniformLike(x) y = Sub(a, b)"
    assert run(Deduplicate(), text("float[n] x", "float[n] y", body), compare=False).changes == 0


def test_equal_constants_are_merged_on_request(run, text, rng):
    array = rng.normal(size=(4, 4)).astype(_F)
    weights = {"c": array, "d": array.copy(), "e": array.T.copy()}
    body = "a = MatMul(x, c) b = MatMul(a, d) y = MatMul(b, e)"
    found = run(Deduplicate(), text("float[n,4] x", "float[n,4] y", body, weights))
    assert sorted(found.model.graph.initializers) == ["c", "e"]
    found = run(Deduplicate(constants=False), text("float[n,4] x", "float[n,4] y", body, weights))
    assert sorted(found.model.graph.initializers) == ["c", "d", "e"]


def test_unused_parts_go_with_what_their_bodies_read(run, text):
    body = """
    a = Neg(x) b = Add(a, k)
    d = If(c) <then_branch = t () => (float[n] p) { p = Exp(b) },
               else_branch = e () => (float[n] q) { u = Abs(x) q = Exp(b) }>
    y = Relu(x)
    """
    found = run(RemoveUnused(), text("bool c, float[n] x", "float[n] y", body, {"k": _F(1)}))
    assert found.ops == {"Relu": 1}
    assert not found.model.graph.initializers


def test_shapes_are_inferred(text):
    model = parse_text(text("float[n,4] x", "float[n,4] y", "a = Relu(x) y = Neg(a)"))
    value = model.graph.node(0).outputs[0]
    value.shape = None
    assert InferShapes().run(CompileState(model, load_target("ort-x86"))) == 1
    assert shape_of(value) == ("n", 4)
