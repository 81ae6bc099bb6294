"""Legality: a negative test per row, the table's schema, and what a check looks through."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.errors import TargetError
from qcompiler.targets.legality import Diagnostic, Legality, legality_names, load_legality, parse_legality
from tests.backends.quantized_graphs import Quant, Spec, build
from tests.targets.legality_cases import CASES, OPSET, Case, serialized

LEGALITY = {engine: load_legality(engine) for engine in CASES}
TENSORRT = LEGALITY["tensorrt"]


def read(data: bytes) -> ir.Model:
    return ir.serde.deserialize_model(onnx.load_model_from_string(data))


def check(graph: Spec | str, sm: int = 89, engine: str = "tensorrt", flavour: str = "") -> tuple[Diagnostic, ...]:
    return LEGALITY[engine].check(read(serialized(graph)), sm, flavour=flavour)


def codes(found: tuple[Diagnostic, ...]) -> set[str]:
    return {d.code for d in found}


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_every_row_has_a_negative_test() -> None:
    assert set(CASES) == set(legality_names())
    for engine, cases in CASES.items():
        assert set(cases) == {row.code for row in LEGALITY[engine].rows}


@pytest.mark.parametrize(("engine", "code"), [(e, c) for e, cases in CASES.items() for c in cases])
def test_a_row_refuses_its_graph_and_not_the_corrected_twin(engine: str, code: str) -> None:
    case: Case = CASES[engine][code]
    row = LEGALITY[engine].row(code)
    found = check(case.bad, case.sm, engine, case.flavour)
    assert codes(found) == {code, *case.also}
    mine = [d for d in found if d.code == code]
    assert {d.severity for d in mine} == {row.severity}
    for d in mine:
        assert d.advice == row.advice
        assert d.text[0].islower() or d.text.split(" ")[0] in NAMES or d.text[0].isdigit()
        assert str(d).startswith(f"{row.severity} {code}: ")
    assert codes(check(case.good, case.sm, engine, case.flavour)) <= set(case.also)


NAMES = {"Gather", "Attention", "MatMul", "ConvTranspose", "Conv"}
"""Operators that a text may start with."""


def test_the_uint8_trap_is_an_error_at_its_node() -> None:
    found = check(Spec("matmul", x=Quant("uint8")))
    assert codes(found) == {"uint8-quantization"}
    first = next(d for d in found if d.code == "uint8-quantization")
    assert first.node.startswith("n_quantizelinear")
    assert first.text == "numbers are stored as uint8"
    assert TENSORRT.row(first.code).stricter
    unsigned = check(Spec("matmul", x=Quant("uint8"), w=Quant("uint8", form="dq")))
    assert codes(unsigned) == {"uint8-quantization"}
    assert len(unsigned) == 2


@pytest.mark.parametrize("code", [r.code for r in TENSORRT.rows if r.stricter])
def test_what_is_stricter_than_the_parser_is_an_error(code: str) -> None:
    assert TENSORRT.row(code).severity == "error"


def test_errors_come_first() -> None:
    found = check(Spec("matmul", x=Quant(zero="nonzero"), w=Quant(axis=0, form="dq")))
    assert [d.code for d in found] == ["zero-point-not-zero", "weight-axis"]


@pytest.mark.parametrize(
    ("form", "axis", "expected"),
    [
        ("matmul", 1, 1), ("matmul", -1, 1), ("matmul", 0, 1), ("gemm", 0, 1), ("gemm-ta", 0, 1), ("gemm-tb", 1, 0),
        ("gemm-tb", 0, 0), ("matmul-transposed", 0, 0), ("matmul-transposed", 1, 0), ("conv", 1, 0), ("conv1d", 0, 0),
    ],
)  # fmt: skip
def test_the_output_axis_of_a_weight_is_known(form: str, axis: int, expected: int) -> None:
    found = check(Spec(form, w=Quant(axis=axis, form="dq")))
    wrong = axis % 2 != expected
    assert [d.code for d in found] == ["weight-axis"] * wrong
    if wrong:
        assert found[0].text == f"scales lie on axis {axis}; expected {expected}, the output axis"


# ---- conditions ---------------------------------------------------------------------------------------------------


def test_rows_hold_by_compute_capability() -> None:
    fp8, fp4 = Spec("pair", x=Quant("float8e4m3fn")), Spec("pair", 23, x=Quant("float4e2m1"))
    assert [codes(check(fp8, sm)) for sm in (80, 89, 90)] == [{"fp8-needs-sm89"}, set(), set()]
    assert [codes(check(fp4, sm)) for sm in (89, 90, 100, 120)] == [{"fp4-needs-sm100"}] * 2 + [set()] * 2


ROW = """
[legality.versions]
one = "2.0"
two = "7"
[[rule]]
code = "no-relu"
check = "operators"
refused = ["Relu"]
severity = "loss"
why = "for the test"
advice = "take another"
"""


def table(extra: str = "") -> Legality:
    return parse_legality(ROW + extra, "toy")


def relu() -> ir.Model:
    return read(serialized("g (float[2] x) => (float[2] y) { y = Relu(x) }"))


def test_rows_hold_by_flavour_and_version() -> None:
    since = table('since = { one = "1.10" }\nuntil = { one = "3" }')
    assert [len(since.check(relu(), version=v)) for v in ("1.9", "1.10", "1.10.1", "2.99", "3.0")] == [0, 1, 1, 1, 0]
    assert len(since.check(relu())) == 1  # 2.0 is the version of the table
    assert len(since.check(relu(), version="0.1", flavour="two")) == 1
    only = table('flavours = ["two"]')
    assert [len(only.check(relu(), flavour=f)) for f in ("one", "two")] == [0, 1]
    with pytest.raises(TargetError, match="unknown flavour 'three'; known: one, two"):
        only.check(relu(), flavour="three")
    with pytest.raises(TargetError, match=r"version is 'new'; expected one like 2\.0"):
        only.check(relu(), version="new")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("sides = 3", "check operators has no parameter 'sides'; it has: refused, domain"),
        ('refused = "x"', "Cannot overwrite a value"),
        ('flavours = ["three"]', "unknown flavour 'three'; known: one, two"),
        ('since = { three = "1" }', "unknown flavour 'three'"),
        ("domain = 3", "domain is 3; expected str"),
        ('[[rule]]\ncode = "a"\ncheck = "operators"', "a lacks 'severity'"),
        ('[[rule]]\ncode = "Not Kebab"', "code is 'Not Kebab'; expected a kebab-case name"),
        ('[[rule]]\ncode = "a"\ncheck = "guess"\nseverity = "loss"\nwhy = "w"\nadvice = "a"', "unknown check 'guess'"),
        ('[[rule]]\ncode = "a"\ncheck = "operators"\nseverity = "bad"\nwhy = "w"\nadvice = "a"', "severity is 'bad'"),
        (
            '[[rule]]\ncode = "a"\ncheck = "operators"\nseverity = "loss"\nwhy = "w"\nadvice = "a"',
            "check operators lacks its parameter 'refused'",
        ),
        (
            ROW[ROW.index("[[rule]]") :],
            "the code 'no-relu' is given twice",
        ),
    ],
)
def test_a_wrong_table_is_refused(extra: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        table(extra)


def test_a_table_without_flavours_is_refused() -> None:
    with pytest.raises(TargetError, match="lacks 'versions'"):
        parse_legality("", "toy")
    with pytest.raises(TargetError, match="no legality rules for engine 'toy'; known: openvino, tensorrt"):
        load_legality("toy")
    with pytest.raises(TargetError, match="no rule 'x'; known: no-relu"):
        table().row("x")


# ---- what is looked at --------------------------------------------------------------------------------------------

PAIR_U8 = "q = QuantizeLinear(x, s, z) {} = DequantizeLinear(q, s, z)"
BRANCH = f"""g (bool c, float[4] x) => (float[4] y) <float s = {{0.1}}, uint8 z = {{0}}> {{
  y = If(c) <then_branch = t () => (float[4] a) {{ {PAIR_U8.format("a")} }},
             else_branch = e () => (float[4] b) {{ b = Identity(x) }}>
}}"""
FUNCTION = f"""<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[4] x) => (float[4] y) {{ y = own.around(x) }}
<domain: "own", opset_import: ["" : 21]>
around (x) => (r) {{
  s = Constant<value = float {{0.1}}>() z = Constant<value = uint8 {{0}}>() {PAIR_U8.format("r")}
}}"""
CONTRIB = (
    "g (float[4] x) => (float[4] y) <float s = {0.1}, uint8 z = {0}> { "
    + PAIR_U8.replace("= ", "= com.microsoft.").format("y")
    + " }"
)


@pytest.mark.parametrize("text", [BRANCH, FUNCTION, CONTRIB], ids=["branch", "function", "com.microsoft"])
def test_branches_functions_and_contrib_nodes_are_checked(text: str) -> None:
    assert [d.code for d in check(text)] == ["uint8-quantization"]


TWICE = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[4] x) => (float[4] y) <float s = {0.1}, int8 z = {0}> { r = own.around(x, s, z) CALL }
<domain: "own", opset_import: ["" : 21]>
around (x, s, z) => (r) { [quantize] q = QuantizeLinear(x, s, z) [back] r = DequantizeLinear(q, s, z) }"""


def test_names_in_a_function_are_shared_where_it_is_called_twice() -> None:
    once, twice = TWICE.replace("CALL", "y = Relu(r)"), TWICE.replace("CALL", "y = own.around(r, s, z)")
    assert check(once) == ()
    assert [(d.code, d.node) for d in check(twice)] == [("node-name-shared", "quantize"), ("node-name-shared", "back")]
    assert check(twice.replace("[quantize]", "").replace("[back]", "")) == ()


def test_the_model_is_not_modified() -> None:
    model = read(serialized(FUNCTION))
    before = ir.serde.serialize_model(model).SerializeToString()
    TENSORRT.check(model)
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_a_diagnostic_names_node_and_origin() -> None:
    model = read(build(Spec("pair", x=Quant("uint8"))))
    node = model.graph.node(0)
    node.metadata_props["qcompiler.origin"] = "a;b"
    found = TENSORRT.check(model)[0]
    assert (found.node, found.origin) == (node.name, "a;b")
    assert str(found) == (
        f"error uint8-quantization: {node.name} (a;b): numbers are stored as uint8; "
        "quantize symmetrically to int8 with an explicit zero point 0"
    )


def test_a_rule_about_the_model_names_no_node() -> None:
    found = TENSORRT.check(read(build(Spec("pair", 26))))
    assert [(d.node, d.text) for d in found] == [("", "the model uses opset 26; expected 9 to 25")]
    assert str(found[0]).startswith("error opset-out-of-range: the model: ")


def test_dynamic_shapes_and_float_models_are_clean() -> None:
    text = "g (float[n,a,b] x, float[k,m] v) => (y) { p = MatMul(x, v) y = Relu(p) }"
    assert check(OPSET + text) == ()


NVFP4 = """<ir_version: 11, opset_import: ["" : 23, "trt" : 1]> g (float16[4,32] x) => (float16[4,16] y) {
  q, s = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(x, outer)
  xs = DequantizeLinear(s, outer)
  xf = DequantizeLinear<axis = -1, block_size = 16>(q, xs)
  wss = DequantizeLinear(ws, outer)
  wf = DequantizeLinear<axis = 0, block_size = 16>(w, wss)
  y = MatMul(xf, wf)
}"""


def test_nvfp4_with_two_levels_of_scales_is_taken_by_blackwell_only() -> None:
    model = onnx.parser.parse_model(NVFP4)
    kinds = onnx.TensorProto
    for name, kind, sizes in (
        ("outer", kinds.FLOAT16, ()), ("w", kinds.FLOAT4E2M1, (32, 16)), ("ws", kinds.FLOAT8E4M3FN, (2, 16)),
    ):  # fmt: skip
        model.graph.initializer.append(onnx.helper.make_tensor(name, kind, sizes, [1.0] * int(np.prod(sizes))))
    for name, kind, sizes in (("q", kinds.FLOAT4E2M1, (4, 32)), ("s", kinds.FLOAT8E4M3FN, (4, 2))):
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, sizes))
    graph = read(model.SerializeToString())
    assert [d for d in TENSORRT.check(graph, sm=120) if d.severity == "error"] == []
    assert "fp4-needs-sm100" in codes(TENSORRT.check(graph, sm=89))
