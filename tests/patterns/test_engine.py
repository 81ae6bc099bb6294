"""Driving rules: safety, remarks, order, names and origins, endless rewriting."""

import pytest

from qcompiler.errors import PassError
from qcompiler.ir.graph import all_nodes, origins
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import parse_text
from qcompiler.ir.verify import verify
from qcompiler.patterns.clauses import rank, where
from qcompiler.patterns.engine import apply_rules
from qcompiler.patterns.language import op, rule, var

_HEAD = '<ir_version: 10, opset_import: ["": 21]> agraph'
_X = var("x")
JOIN = rule("join", match=op("Relu", op("Relu", _X, name="inner")), build=lambda b, m: b.op("Relu", m.x), doc="Join.")


def parse(body: str, inputs: str = "float[n] x", outputs: str = "float[n] y"):
    return parse_text(f"{_HEAD} ({inputs}) => ({outputs}) {{ {body} }}")


def ops(model) -> list[str]:
    return [node.op_type for node in all_nodes(model)]


def test_a_chain_is_joined_to_the_end():
    model = parse("a = Relu(x) b = Relu(a) c = Relu(b) y = Relu(c)")
    report = apply_rules(model, [JOIN])
    assert (ops(model), report.fired["join"], report.changes) == (["Relu"], 3, 3)
    verify(model, Phase.FLOAT)
    assert origins(model.graph.node(0)) == ("Relu_3", "Relu_2", "Relu_1", "Relu_0")
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("a = Relu(x) b = Relu(a) y = Add(a, b)", "float[n] y", "interior-used-elsewhere"),
        ("a = Relu(x) y = Relu(a)", "float[n] a, float[n] y", "graph-output"),
    ],
)
def test_inner_values_that_are_needed_keep_the_pattern(body, outputs, reason):
    model = parse(body, outputs=outputs)
    before = ops(model)
    seen = []
    report = apply_rules(model, [JOIN], on_remark=seen.append)
    assert ops(model) == before
    assert report.reasons("join") == (reason,)
    assert [(r.rule, r.reason, r.done) for r in seen] == [("join", reason, False)]
    assert report.tried["join"] == 1


def test_a_value_read_by_a_subgraph_keeps_the_pattern():
    body = """
    a = Relu(x) b = Relu(a)
    y = If(c) <then_branch = t () => (float[n] p) { p = Neg(a) }, else_branch = e () => (float[n] q) { q = Neg(b) }>
    """
    report = apply_rules(parse(body, "bool c, float[n] x"), [JOIN])
    assert report.reasons("join") == ("captured",)


def test_a_kept_inner_value_stays_for_its_other_readers():
    kept = rule("kept", match=JOIN.match, build=JOIN.build, keeps=("inner",))
    model = parse("a = Relu(x) b = Relu(a) y = Add(a, b)")
    assert apply_rules(model, [kept]).fired["kept"] == 1
    assert sorted(ops(model)) == ["Add", "Relu", "Relu"]
    assert all(node.inputs[0].name == "x" for node in all_nodes(model) if node.op_type == "Relu")


def test_a_clause_gives_its_reason_and_its_sentence():
    checked = rule("checked", match=JOIN.match, build=JOIN.build, where=[rank("x", 2)])
    report = apply_rules(parse("a = Relu(x) y = Relu(a)"), [checked])
    (remark,) = report.remarks
    assert (remark.node, remark.reason, remark.text) == ("Relu_1", "rank", "x has rank 1, expected 2")


def test_a_structural_clause_is_no_near_miss():
    never = where("never", lambda m: "no", structural=True)
    report = apply_rules(
        parse("a = Relu(x) y = Relu(a)"), [rule("n", match=JOIN.match, build=JOIN.build, where=[never])]
    )
    assert (report.remarks, report.tried["n"]) == ([], 0)


def test_a_near_miss_that_is_mended_later_is_not_reported():
    drop = rule("drop", match=op("Neg", op("Neg", _X)), build=lambda b, m: m.x)
    model = parse("a = Relu(x) n = Neg(a) o = Neg(n) b = Relu(o) y = Abs(b)")
    report = apply_rules(model, [JOIN, drop])
    assert ops(model) == ["Relu", "Abs"]
    assert [r.reason for r in report.remarks] == ["fired", "fired"]


def test_a_second_way_to_match_is_tried():
    only_x = where("a is x", lambda m: None if m.a.name == "x" else "other")
    swap = rule("swap", match=op("Add", var("a"), var("b")), where=[only_x], build=lambda b, m: b.op("Sub", m.a, m.b))
    model = parse("y = Add(z, x)", "float[n] x, float[n] z")
    apply_rules(model, [swap])
    assert [v.name for v in model.graph.node(0).inputs] == ["x", "z"]


def test_bodies_of_if_and_loop_are_rewritten_and_those_of_sequence_map_are_not():
    body = """
    u = If(c) <then_branch = t () => (float[n] p) { q = Relu(x) p = Relu(q) },
               else_branch = e () => (float[n] r) { r = Neg(x) }>
    y = Loop(k, c, u) <body = b (int64 i, bool g, float[n] v) => (bool h, float[n] w)
        { h = Not(g) s = Relu(v) w = Relu(s) }>
    """
    model = parse(body, "bool c, int64 k, float[n] x")
    assert apply_rules(model, [JOIN]).changes == 2
    verify(model, Phase.FLOAT)
    body = """
    s = SequenceConstruct(x)
    t = SequenceMap(s) <body = b (float[n] v) => (float[n] w) { u = Relu(v) w = Relu(u) }>
    y = ConcatFromSequence<axis=0>(t)
    """
    assert apply_rules(parse(body, "float[n] x", "float[m] y"), [JOIN]).changes == 0


def test_earlier_rules_win():
    first = rule("first", match=op("Relu", _X), build=lambda b, m: b.op("Abs", m.x))
    second = rule("second", match=op("Relu", _X), build=lambda b, m: b.op("Neg", m.x))
    model = parse("y = Relu(x)")
    assert apply_rules(model, [first, second]).fired == {"first": 1}
    assert ops(model) == ["Abs"]


def test_rules_that_undo_each_other_are_named():
    there = rule("there", match=op("Neg", _X), build=lambda b, m: b.op("Abs", m.x))
    back = rule("back", match=op("Abs", _X), build=lambda b, m: b.op("Neg", m.x))
    with pytest.raises(PassError, match="rules there and back undo each other"):
        apply_rules(parse("y = Neg(x)"), [there, back])


def test_a_rule_that_grows_without_end_is_stopped():
    grow = rule("grow", match=op("Neg", _X), build=lambda b, m: b.op("Neg", b.op("Abs", m.x)))
    with pytest.raises(PassError, match=r"rule grow at .*: more than 50 rewrites"):
        apply_rules(parse("y = Neg(x)"), [grow], max_firings=50)


def test_a_replacement_of_another_type_is_refused():
    def bad(b, m):
        made = b.op("Cast", m.x, to=7)
        made.type = parse("y = Cast<to=7>(x)", outputs="int64[n] y").graph.outputs[0].type
        return made

    with pytest.raises(PassError, match="rule bad at Relu_0: y is FLOAT, its replacement INT64"):
        apply_rules(parse("y = Relu(x)"), [rule("bad", match=op("Relu", _X), build=bad)])


def test_a_replacement_of_another_shape_is_refused():
    swap = rule("swap", match=op("Relu", _X), build=lambda b, m: b.op("Transpose", m.x, like=m.x))
    model = parse("a = Transpose(x) y = Relu(a)", "float[2,3] x", "float[3,2] y")
    model.graph.node(0).outputs[0].shape = model.graph.inputs[0].shape
    with pytest.raises(PassError, match="rule swap at Relu_1"):
        apply_rules(model, [swap])


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(PassError, match="two rules are named 'join'"):
        apply_rules(parse("y = Relu(x)"), [JOIN, JOIN])


def test_a_ban_stops_a_rule():
    model = parse("a = Relu(x) b = Relu(a) y = Relu(b)")
    left = [1]

    def allow(name, node):
        left[0] -= 1
        return left[0] >= 0

    assert apply_rules(model, [JOIN], allow=allow).changes == 1
    assert ops(model) == ["Relu", "Relu"]


def test_rules_edit_in_place_and_replace_several_outputs():
    def turn(b, m):
        b.set_attribute(m.root, "axis", 1)
        return m.root.outputs[0]

    not_yet = where("axis is 0", lambda m: None if m.root.attributes["axis"].as_int() == 0 else "done", structural=True)
    model = parse("y = Softmax<axis=0>(x)", "float[2,2] x", "float[2,2] y")
    made = apply_rules(model, [rule("turn", match=op("Softmax", _X), where=[not_yet], build=turn)])
    assert (made.changes, model.graph.node(0).attributes["axis"].as_int()) == (1, 1)

    def split(b, m):
        node = b.node("Split", m.x, outputs=2, num_outputs=2, axis=0)
        return tuple(reversed(node.outputs))

    model = parse("y, z = Split<axis=0, num_outputs=2>(x)", "float[4] x", "float[2] y, float[2] z")
    once = where("first", lambda m: None if m.root.outputs[0].name == "y" else "done", structural=True)
    apply_rules(model, [rule("turn", match=op("Split", _X), where=[once], build=split)])
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert [v.name for v in model.graph.node(0).outputs] == ["z", "y"]
    verify(model, Phase.FLOAT)


def test_a_replacement_that_is_another_output_gets_an_identity():
    same = rule("same", match=op("Abs", op("Abs", _X, name="inner")), keeps=("inner",), build=lambda b, m: m.inner)
    model = parse("a = Abs(x) y = Abs(a)", outputs="float[n] a, float[n] y")
    apply_rules(model, [same])
    assert ops(model) == ["Abs", "Identity"]
    verify(model, Phase.FLOAT)
