from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import VerifyError
from qcompiler.ir.graph import ORIGIN
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import parse_text
from qcompiler.ir.verify import CORE_RULES, VerifyRule, verify

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "qcompiler" : 1]>'

CONV = f"""{HEAD} g (uint8[1,2,4,4] x) => (float[1,3,4,4] y)
<float xs = {{0.5}}, uint8 xz = {{3}}, int8[3,2,1,1] w = {{1,2,3,4,5,6}}, float[3] ws = {{0.1, 0.2, 0.3}},
 int32[3] b = {{1,2,3}}, float[3] bs = {{0.05, 0.1, 0.15}}>
{{ [dx] xf = DequantizeLinear(x, xs, xz) [dw] wf = DequantizeLinear<axis = 0>(w, ws)
   [db] bf = DequantizeLinear<axis = 0>(b, bs) [conv] y = Conv(xf, wf, bf) }}"""

PLAIN = f"{HEAD} g (float[2] x) => (float[2] y) {{ [a] h = Relu(x) [b] y = Neg(h) }}"

FUSED = f"""{HEAD} g (float[2] x) => (float[2] y) {{ [a] y = qcompiler.same(x) }}
<domain: "qcompiler", opset_import: ["" : 21]> same(p) => (q) {{ [inner] q = Identity(p) }}"""


def break_value_name(model: ir.Model) -> None:
    model.graph[0].outputs[0].name = "x"


def break_nameless(model: ir.Model) -> None:
    model.graph[0].outputs[0].name = ""


def break_node_name(model: ir.Model) -> None:
    model.graph[1].name = "a"


def break_order(model: ir.Model) -> None:
    first, second = model.graph[0], model.graph[1]
    model.graph.remove(first)
    model.graph.insert_after(second, first)


def break_output(model: ir.Model) -> None:
    model.graph.outputs[0] = ir.Value(name="nothing", type=ir.TensorType(ir.DataType.FLOAT))


def break_import(model: ir.Model) -> None:
    model.graph[0].domain = "elsewhere"


def break_function_opset(model: ir.Model) -> None:
    next(iter(model.functions.values())).opset_imports[""] = 20


def break_operator(model: ir.Model) -> None:
    model.graph[0].op_type = "Reluu"


def break_arity(model: ir.Model) -> None:
    model.graph[0].op_type = "Add"


def break_required(model: ir.Model) -> None:
    model.graph[0].op_type = "Add"
    model.graph[0].resize_inputs(2)
    model.graph[0].replace_input_with(1, model.graph.inputs[0])
    model.graph[0].replace_input_with(0, None)


def break_attribute(model: ir.Model) -> None:
    model.graph[0].attributes.add(ir.AttrInt64("alpha", 1))


def break_shadow(model: ir.Model) -> None:
    value = model.graph.initializers["xs"]
    model.graph.inputs.append(value)


def break_zero_point_type(model: ir.Model) -> None:
    model.graph.initializers["xz"].dtype = ir.DataType.INT8


def break_zero_point_shape(model: ir.Model) -> None:
    model.graph.initializers["xz"].shape = ir.Shape([3])


def break_axis(model: ir.Model) -> None:
    model.graph[1].attributes.add(ir.AttrInt64("axis", 1))


def set_scale(model: ir.Model, name: str, numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    model.graph.initializers[name].const_value = ir.Tensor(array if len(numbers) > 1 else array.reshape(()), name=name)


def break_scale_sign(model: ir.Model) -> None:
    set_scale(model, "ws", [0.1, -0.2, 0.3])


def break_scale_finite(model: ir.Model) -> None:
    set_scale(model, "xs", [float("nan")])


def break_bias(model: ir.Model) -> None:
    set_scale(model, "bs", [0.05, 0.1, 0.1500003])


def nothing(model: ir.Model) -> None:
    del model


def break_call(model: ir.Model) -> None:
    model.functions.clear()


def break_call_arity(model: ir.Model) -> None:
    model.graph[0].resize_inputs(2)


@pytest.mark.parametrize(
    ("text", "spoil", "phase", "rule", "reason"),
    [
        (PLAIN, break_value_name, Phase.FLOAT, "unique-value-names", "Relu 'a'.*two values are named 'x'"),
        (PLAIN, break_nameless, Phase.FLOAT, "unique-value-names", "Relu 'a'.*has no name"),
        (PLAIN, break_node_name, Phase.FLOAT, "unique-node-names", "Neg 'a'.*two nodes"),
        (PLAIN, break_order, Phase.FLOAT, "defined-before-use", "Neg 'b'.*reads 'h' before"),
        (PLAIN, break_output, Phase.FLOAT, "defined-before-use", "output 'nothing' of graph 'g'"),
        (CONV, break_shadow, Phase.FLOAT, "initializers-are-no-inputs", "'xs' is also an input"),
        (PLAIN, break_import, Phase.FLOAT, "opset-imported", "no opset import for domain 'elsewhere'"),
        (FUSED, break_function_opset, Phase.FUSED, "opset-imported", "function 'same' .* different ONNX opsets"),
        (PLAIN, break_operator, Phase.FLOAT, "fits-schema", "Reluu 'a'.*opset 21 has no operator Reluu"),
        (PLAIN, break_arity, Phase.FLOAT, "fits-schema", "Add 'a'.*expected 2 to 2 inputs, found 1"),
        (PLAIN, break_required, Phase.FLOAT, "fits-schema", "Add 'a'.*input 'A' is required"),
        (PLAIN, break_attribute, Phase.FLOAT, "fits-schema", "Relu 'a'.*unknown attribute 'alpha'"),
        (CONV, break_zero_point_type, Phase.QDQ, "quantization-types", "'dx'.*zero point is INT8.*UINT8"),
        (CONV, break_zero_point_shape, Phase.QDQ, "quantization-types", "'dx'.*scale has shape"),
        (CONV, break_axis, Phase.QDQ, "quantization-types", "'dw'.*scale has 3 entries, axis 1 has 2"),
        (CONV, break_scale_sign, Phase.QDQ, "quantization-types", "'dw'.*not a positive finite"),
        (CONV, break_scale_finite, Phase.QDQ, "quantization-types", "'dx'.*not a positive finite"),
        (CONV, break_bias, Phase.QDQ, "bias-scale", r"Conv 'conv'.*differs .* by 1\.99e-06"),
        (FUSED, break_call, Phase.FUSED, "fused-have-functions", "same 'a'.*no function qcompiler::same"),
        (FUSED, break_call_arity, Phase.FUSED, "fused-have-functions", "expected 1 inputs and 1 outputs"),
        (FUSED, nothing, Phase.LOWERED, "no-fused-nodes", "same 'a'"),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_each_rule_is_broken_by_its_own_fault(
    text: str, spoil: Callable[[ir.Model], None], phase: Phase, rule: str, reason: str
) -> None:
    model = parse_text(text)
    if spoil is not nothing:
        verify(model, phase)
    spoil(model)
    with pytest.raises(VerifyError, match=rf"^{phase.name.lower()} graph breaks {rule}: .*{reason}"):
        verify(model, phase)
    # Nothing else is wrong (a bad scale is wrong in the bias too; a missing input has no other witness).
    also = {rule, "bias-scale"} if rule == "quantization-types" else {rule}
    verify(model, phase, [r for r in CORE_RULES if r.name not in also])


def test_every_rule_has_a_negative_test() -> None:
    marks = test_each_rule_is_broken_by_its_own_fault.pytestmark  # type: ignore[attr-defined]
    assert {case[3] for case in marks[0].args[1]} == {rule.name for rule in CORE_RULES}


def test_the_origin_is_named() -> None:
    model = parse_text(PLAIN)
    model.graph[0].metadata_props[ORIGIN] = "first;second"
    model.graph[0].op_type = "Reluu"
    with pytest.raises(VerifyError, match=r"Reluu 'a' \(origin first, second\)"):
        verify(model, Phase.FLOAT)


def test_a_body_may_read_outer_values_but_not_later_ones() -> None:
    text = f"""{HEAD} g (float[2] x, bool c) => (float[2] y) {{
        [a] h = Relu(x)
        [i] k = If (c) <then_branch = t () => (float[2] p) {{ [p1] p = Neg(h) }},
                        else_branch = e () => (float[2] q) {{ [q1] q = Neg(x) }}>
        [z] late = Exp(x)
        [s] y = Add(k, late) }}"""
    model = parse_text(text)
    verify(model, Phase.FLOAT)
    body = model.graph.node("i").attributes["then_branch"].as_graph()
    body[0].replace_input_with(0, model.graph.node("z").outputs[0])
    with pytest.raises(VerifyError, match=r"Neg 'p1'.*reads 'late' before"):
        verify(model, Phase.FLOAT)


def test_a_foreign_bias_scale_is_legal_before_the_plan() -> None:
    model = parse_text(CONV)
    break_bias(model)
    verify(model, Phase.FLOAT)
    verify(model, Phase.PLANNED)


def test_a_bias_scale_within_rounding_passes() -> None:
    model = parse_text(CONV)
    set_scale(model, "bs", [0.05, np.nextafter(np.float32(0.1), np.float32(1)).item(), 0.15])
    verify(model, Phase.QDQ)


def test_upper_layers_pass_their_own_rules_in() -> None:
    rule = VerifyRule(
        "no-neg", frozenset({Phase.QDQ}), lambda m: ((n, "is a Neg") for n in m.graph if n.op_type == "Neg")
    )
    model = parse_text(PLAIN)
    verify(model, Phase.FLOAT, (*CORE_RULES, rule))
    with pytest.raises(VerifyError, match=r"qdq graph breaks no-neg: Neg 'b' \(origin b\): is a Neg"):
        verify(model, Phase.QDQ, (*CORE_RULES, rule))
