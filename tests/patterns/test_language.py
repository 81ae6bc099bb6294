"""Patterns as values: what they match, how they print."""

import numpy as np
import pytest

from qcompiler.ir.text import parse_text
from qcompiler.passes.catalog import PASSES
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.catalog import all_rules
from qcompiler.patterns.language import any_of, const, maybe, number, op, opt, repeat, rest, rule, var
from qcompiler.patterns.match import Match, find_matches

_HEAD = '<ir_version: 10, opset_import: ["": 21]> agraph (float[n,4] x, float[n,4] z) => (float[n,4] y)'


def matches(pattern, body: str, head: str = _HEAD) -> list[Match]:
    model = parse_text(f"{head} {{ {body} }}")
    root = model.graph.outputs[0].producer()
    return list(find_matches(pattern, root, 21))


def names(match: Match) -> dict[str, str]:
    return {key: value.name for key, value in match.bindings.items()}


def test_same_variable_is_the_same_value():
    square = op("Mul", var("a"), var("a"))
    assert [names(m) for m in matches(square, "y = Mul(x, x)")] == [{"a": "x"}]
    assert matches(square, "y = Mul(x, z)") == []


def test_commutative_operators_match_both_ways():
    pattern = op("Mul", op("Relu", var("a")), var("b"))
    assert [names(m) for m in matches(pattern, "r = Relu(x) y = Mul(z, r)")] == [{"a": "x", "b": "z"}]
    assert matches(op("Sub", op("Relu", var("a")), var("b")), "r = Relu(x) y = Sub(z, r)") == []


def test_both_orders_are_offered():
    found = matches(op("Add", var("a"), var("b")), "y = Add(x, z)")
    assert [names(m) for m in found] == [{"a": "x", "b": "z"}, {"a": "z", "b": "x"}]


def test_numbers_are_compared_in_their_own_precision():
    head = '<ir_version: 10, opset_import: ["": 21]> agraph (float16[n] x) => (float16[n] y)'
    # 0x3da8 is 1.4140625, the half-precision value next to the square root of two.
    body = "c = Constant<value=float16 {15784}>() y = Div(x, c)"
    assert len(matches(op("Div", var("a"), number(2**0.5)), body, head)) == 1
    assert matches(op("Div", var("a"), number(1.41)), body, head) == []


def test_number_that_would_add_an_axis_is_none():
    body = "c = Constant<value=float[1,1,1] {0}>() y = Add(x, c)"
    head = _HEAD.replace("(float[n,4] y)", "(float[1,n,4] y)")
    assert matches(op("Add", var("a"), number(0.0)), body, head) == []


def test_optional_input():
    pattern = op("Clip", var("a"), maybe(const("low")), maybe(const("high")), name="clip")
    low = "l = Constant<value_float=0.0>() "
    assert [set(m.bindings) for m in matches(pattern, "y = Clip(x)")] == [{"a", "clip"}]
    assert [set(m.bindings) for m in matches(pattern, low + "y = Clip(x, l)")] == [{"a", "clip", "low"}]
    assert [set(m.bindings) for m in matches(pattern, low + 'y = Clip(x, "", l)')] == [{"a", "clip", "high"}]


def test_more_inputs_than_the_pattern_names_do_not_match():
    assert matches(op("Clip", var("a")), "l = Constant<value_float=0.0>() y = Clip(x, l)") == []


def test_rest_takes_all_further_inputs():
    pattern = op("Concat", rest("parts", op("Relu", var("in"), name="relu")), name="join")
    (found,) = matches(pattern, "a = Relu(x) b = Relu(z) y = Concat<axis=0>(a, b)")
    assert [v.name for v in found.rest("parts")] == ["a", "b"]
    assert (found.bindings["parts.0.in"].name, found.bindings["parts.1.in"].name) == ("x", "z")
    assert [n.op_type for n in found.interior] == ["Relu", "Relu"]
    assert matches(pattern, "a = Relu(x) y = Concat<axis=0>(a, z)") == []


def test_attributes_count_with_their_defaults():
    pattern = op("Gemm", var("a"), var("b"), attrs={"transB": 0, "alpha": 1.0})
    head = '<ir_version: 10, opset_import: ["": 21]> agraph (float[4,4] x, float[4,4] z) => (float[4,4] y)'
    assert len(matches(pattern, "y = Gemm(x, z)", head)) == 1
    assert matches(pattern, "y = Gemm<transB=1>(x, z)", head) == []
    assert matches(pattern, "y = Gemm<alpha=2.0>(x, z)", head) == []


def test_second_output():
    pattern = op("Relu", op("Split", var("a"), attrs={"axis": 1}, output=1))
    body = "a, b = Split<axis=1, num_outputs=2>(x) c = Relu({}) y = Concat<axis=1>(c, c)"
    wrapped = op("Concat", pattern, pattern)
    assert len(matches(wrapped, body.format("b"))) == 1
    assert matches(wrapped, body.format("a")) == []


def test_optional_wrapper_is_taken_if_it_is_there():
    pattern = op("Neg", opt(("Relu", "Clip"), op("Add", var("a"), var("b")), name="act"))
    assert matches(pattern, "s = Add(x, z) r = Relu(s) y = Neg(r)")[0].find("act").op_type == "Relu"
    assert matches(pattern, "s = Add(x, z) y = Neg(s)")[0].find("act") is None


def test_optional_wrapper_at_the_root_leaves_the_match_to_the_wrapper():
    pattern = opt("Relu", op("Neg", var("a")), name="act")
    model = parse_text(_HEAD + "{ s = Neg(x) y = Relu(s) }")
    first, second = model.graph
    assert list(find_matches(pattern, first, 21)) == []
    assert [m.node("act").name for m in find_matches(pattern, second, 21)] == [second.name]


def test_repeat_takes_the_longest_chain_first():
    pattern = op("Neg", repeat(("Relu", "Abs"), var("a"), "chain"))
    found = matches(pattern, "r = Relu(x) s = Abs(r) y = Neg(s)")
    assert [len(m.chain("chain")) for m in found] == [2, 1, 0]
    assert [n.op_type for n in found[0].chain("chain")] == ["Abs", "Relu"]
    assert [m.a.name for m in found] == ["x", "r", "s"]


def test_values_of_outer_graphs_are_leaves():
    body = """
    r = Relu(x)
    y = If(c) <then_branch = t () => (float[n,4] p) { p = Relu(r) },
               else_branch = e () => (float[n,4] q) { q = Neg(x) }>
    """
    model = parse_text(_HEAD.replace("float[n,4] z", "bool c") + "{" + body + "}")
    branch = model.graph.node(1).attributes["then_branch"].as_graph()
    assert list(find_matches(op("Relu", op("Relu", var("a"))), branch.node(0), 21)) == []


def test_unknown_names_of_a_match_are_errors():
    (found,) = matches(op("Relu", var("a"), name="relu"), "y = Relu(x)")
    with pytest.raises(AttributeError, match="no value named 'b'"):
        _ = found.b
    with pytest.raises(ValueError, match="'a' is not a constant"):
        found.array("a")
    assert found.get("b") is None


def test_rules_print_their_pattern():
    made = rule(
        "demo",
        match=op("Mul", any_of(var("x"), number(0.5)), op("Add", var("x"), maybe(const("c")), name="sum")),
        build=lambda b, m: m.x,
        doc="Say how it looks.",
    )
    assert str(made) == "demo: Mul((x | 0.5), sum=Add(x, [const c]))\n  Say how it looks."


def test_a_rule_starts_at_an_operator():
    with pytest.raises(ValueError, match="a rule starts at an operator"):
        rule("bad", match=var("x"), build=lambda b, m: m.x)


def test_all_rules_have_a_name_and_a_sentence():
    rules = all_rules()
    assert len({r.name for r in rules}) == len(rules)
    assert all(r.doc.endswith(".") and r.roots() for r in rules)
    assert all(np.all([ch.islower() or ch in "-0123456789" for ch in r.name]) for r in rules)


def test_every_rule_that_a_pass_tries_is_in_the_catalog():
    known = {r.name for r in all_rules()}
    tried = {r.name for cls in PASSES if issubclass(cls, RewritePass) for r in cls().rules}
    assert tried
    assert tried <= known
