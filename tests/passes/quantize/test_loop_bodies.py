"""Bodies of Loop and Scan on the way to integers: where Q and DQ stand, what the engine fuses, what stays out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.analysis import bodies, open_graphs
from qcompiler.ir.graph import all_nodes, is_op
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.pipeline.numerics import sqnr_db
from tests import loops
from tests.passes.quantize.lab import OPTIMIZED, Lab, lab, model_of, normal, outputs, reasons

LEAST_DB = 30.0
"""Ranges of 4 to 5 standard deviations in 256 steps leave 35 to 40 dB per product; the state passes through a few."""


def made(name: str) -> Lab:
    makers = {
        "loop": (loops.recurrent_loop, loops.loop_feeds()),
        "scan": (loops.recurrent_scan, loops.scan_feeds()),
        "nested": (loops.nested_loops, loops.nested_feeds() + loops.nested_feeds(2, deep=False)),
        "conv": (loops.convolution_loop, loops.image_feeds()),
    }
    make, feeds = makers[name]
    return lab(make(), feeds=feeds, passes=[Canonicalize()])


def held(model: ir.Model, name: str) -> dict[str, list[ir.Node]]:
    """Return the nodes of the body that a node holds, by operator."""
    (holder,) = [n for n in all_nodes(model) if n.name == name]
    found: dict[str, list[ir.Node]] = {}
    for body in bodies(holder):
        for node in body:
            found.setdefault(node.op_type, []).append(node)
    return found


def worst_db(work: Lab, model: ir.Model) -> float:
    pairs = [(outputs(work.base.model, f), outputs(model, f, OPTIMIZED)) for f in work.feeds]
    wanted = [{str(i): a for i, a in enumerate(first)} for first, _ in pairs]
    found = [{str(i): a for i, a in enumerate(second)} for _, second in pairs]
    return min(sqnr_db(wanted, found).values())


STATIC = {"MatMul": "static-float", "Gemm": "static-float", "Conv": "static", "Add": "static"}
DYNAMIC = {"MatMul": "dynamic", "Gemm": "dynamic"}


@pytest.mark.parametrize(
    ("name", "forms", "planned"),
    [
        ("loop", STATIC, 4), ("loop", DYNAMIC, 3), ("scan", STATIC, 4), ("scan", DYNAMIC, 3),
        ("nested", STATIC, 5), ("nested", DYNAMIC, 4), ("conv", STATIC, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("emit", ["auto", "qoperator"])
def test_every_group_in_a_body_is_fused_and_close_to_float(name: str, forms, planned: int, emit: str) -> None:
    work = made(name)
    proof = work.prove(emit, **forms)
    assert (proof.planned, len(proof.fused), proof.missed) == (planned, planned, ())
    assert worst_db(work, work.lowered(emit, **forms).model) >= LEAST_DB


def test_a_captured_activation_is_quantized_once_in_front_of_the_loop():
    state = made("loop").inserted(MatMul="static-float", Gemm="static-float")
    assert [n.name for n in state.model.graph if is_op(n, "QuantizeLinear")] == ["x/QuantizeLinear"]
    inside = held(state.model, "loop")
    assert [n.name for n in inside["QuantizeLinear"]] == ["h/QuantizeLinear", "hn/QuantizeLinear"]
    read = {str(n.inputs[0].name) for n in inside["DequantizeLinear"]}
    assert {"x:q", "h:q", "hn:q"} <= read


def test_a_captured_activation_gets_its_dynamic_scale_once_in_front_of_the_loop():
    state = made("loop").inserted(MatMul="dynamic", Gemm="dynamic")
    assert [n.name for n in state.model.graph if is_op(n, "DynamicQuantizeLinear")] == ["x/DynamicQuantizeLinear"]
    assert [n.name for n in held(state.model, "loop")["DynamicQuantizeLinear"]] == [
        "h/DynamicQuantizeLinear", "hn/DynamicQuantizeLinear",
    ]  # fmt: skip


def test_state_and_rows_leave_the_body_in_float():
    for name, holder in (("loop", "loop"), ("conv", "loop"), ("scan", "scan")):
        work = made(name)
        state = work.lowered(**STATIC)
        (node,) = [n for n in all_nodes(state.model) if n.name == holder]
        (body,) = bodies(node)
        (before,) = bodies(next(n for n in all_nodes(work.base.model) if n.name == holder))
        assert [(v.name, v.dtype) for v in body.outputs] == [(v.name, v.dtype) for v in before.outputs]
        assert [v.name for v in body.inputs] == [v.name for v in before.inputs]


def test_a_value_of_the_outer_graph_that_two_loops_deep_reads_is_quantized_outside_both():
    state = made("nested").inserted(MatMul="static-float", Gemm="static-float")
    assert [n.name for n in state.model.graph if is_op(n, "QuantizeLinear")] == ["x/QuantizeLinear"]
    assert not [n for n in held(state.model, "choose").get("QuantizeLinear", []) if n.name.startswith("x/")]


def test_a_loop_in_a_branch_quantizes_in_that_branch():
    text = """
    [w] y = If(p) <
      then_branch = yes () => (float[n,64] a) {
        [loop] a = Loop(k, , x) <body = b (int64 i, bool go, float[n,64] h) => (bool again, float[n,64] g)
          { [again] again = Identity(go) [one] u = MatMul(x, m) [sum] g = Add(u, h) }> },
      else_branch = no () => (float[n,64] c) { [neg] c = Neg(x) }>
    """
    given = model_of("float[n,64] x, bool p, int64 k", "float[n,64] y", text, {"m": normal(1, 64, 64, scale=0.1)})
    feeds = [
        {"x": normal(seed, 3, 64), "p": np.asarray(seed % 2 == 0), "k": np.asarray(2)} for seed in range(4)
    ]  # fmt: skip
    work = lab(given, feeds=feeds)
    state = work.inserted(MatMul="static-float")
    assert not [n for n in state.model.graph if is_op(n, "QuantizeLinear")]
    assert [n.name for n in held(state.model, "w")["QuantizeLinear"]] == ["x/QuantizeLinear"]
    assert "QuantizeLinear" not in held(state.model, "loop")
    assert work.prove(MatMul="static-float").fused == {"one": "MatMulIntegerToFloat"}


def test_integers_of_a_group_in_front_of_the_loop_are_captured_as_they_are():
    state = made("conv").lowered(**STATIC)
    inside = held(state.model, "loop")
    reads = {str(n.inputs[0].name) for n in inside["DequantizeLinear"]}
    assert "r0:q" in reads
    assert not [n for n in inside["QuantizeLinear"] if n.name == "r0/QuantizeLinear"]
    assert not [n for n in state.model.graph if is_op(n, "DequantizeLinear") and n.name == "front:dequantize"]


def test_weights_of_a_body_may_be_constants_inside_it():
    text = """
    [loop] y = Loop(k, , x) <body = b (int64 i, bool go, float[n,32] h) => (bool again, float[n,32] g)
      <float[32,32] inner = {{{inner}}}>
      {{ [again] again = Identity(go) [one] u = MatMul(h, inner) [two] v = MatMul(u, m) [tanh] g = Tanh(v) }}>
    """.replace("{{", "{").replace("}}", "}")
    inner = ", ".join(f"{v:.4f}" for v in normal(2, 32 * 32, scale=0.15))
    given = model_of(
        "float[n,32] x, int64 k", "float[n,32] y", text.replace("{inner}", inner),
        {"m": normal(1, 32, 32, scale=0.15)},
    )  # fmt: skip
    work = lab(given, feeds=[{"x": normal(s, 3, 32), "k": np.asarray(2)} for s in range(3)])
    state = work.lowered(MatMul="static-float")
    assert set(work.prove(MatMul="static-float").fused) == {"one", "two"}
    (body,) = bodies(next(n for n in state.model.graph if n.name == "loop"))
    floats = [n for g in open_graphs(state.model) for n, v in g.initializers.items() if len(v.shape or ()) == 2]
    assert {state.model.graph.initializers[n].dtype for n in floats} == {ir.DataType.INT8}
    assert not body.initializers  # the float weight went with its last reader
    assert worst_db(work, state.model) >= LEAST_DB


def test_what_a_branch_that_never_ran_holds_stays_float_and_says_so():
    work = lab(loops.nested_loops(), feeds=loops.nested_feeds(3), passes=[Canonicalize()])
    state = work.planned(**STATIC)
    said = {r.node: r for r in state.remarks if r.reason == "never-observed"}
    assert set(said) == {"single"}
    (value,) = work.groups["single"].data
    assert said["single"].text == f"{value.name} was never executed during calibration"
    state = work.planned()  # also where whoever decided wanted it in float
    assert reasons(state, "plan-quantization") == ["never-observed"]


def test_names_on_the_axes_of_a_loop_are_not_believed():
    text = """
    [loop] y = Loop(k, , x) <body = b (int64 i, bool go, float[n,32] h) => (bool again, float[n,32] g)
      { [again] again = Identity(go) [twice] g = Concat<axis=0>(h, h)
        [s] s = Shape(h) [t] t = Shape(x) [same] e = Sub(s, t) }>
    """
    model = lab(model_of("float[n,32] x, int64 k", "float[m,32] y", text), calibrate=False).base.model
    (body,) = bodies(next(iter(model.graph)))
    assert [None if isinstance(d, int) else d.value for d in body.inputs[2].shape or ()] == [None, None]
    assert body.inputs[2].shape[1] == 32
    assert [d.value for d in model.graph.inputs[0].shape or () if not isinstance(d, int)] == ["n"]
