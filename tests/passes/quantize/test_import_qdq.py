"""import-qdq: a quantized model becomes a FLOAT graph and fixed numbers, and compiles back to the same integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.readback import Proof
from qcompiler.engine import Array
from qcompiler.ir.graph import all_nodes, const_array
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.passes.import_qdq import ImportQdq
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.spec import QuantSource
from qcompiler.targets.target import load_target
from tests.filecheck import run_pass_test
from tests.passes.quantize.lab import (
    OPTIMIZED,
    Lab,
    import_exactly,
    lab,
    model_of,
    normal,
    ops,
    outputs,
    random_feeds,
    reasons,
)

F = np.float32
IMAGE, OUT = "float[n,4,8,8] x", "float[n,8,p,q] y"
XS, YS = F(0.03), F(0.05)
_W, _W2, _B = normal(1, 8, 4, 3, 3, scale=0.2), normal(3, 8, 8, 1, 1, scale=0.3), normal(2, 8)
_WS = (np.abs(_W).max(axis=(1, 2, 3)) / 127).astype(F)
_W2S = F(np.abs(_W2).max() / 127)


def stored(weight: Array, scale: Array) -> Array:
    shaped = np.asarray(scale).reshape(-1, *[1] * (weight.ndim - 1)) if np.ndim(scale) else scale
    return np.clip(np.rint(weight / shaped), -127, 127).astype(np.int8)


W = {
    "w": stored(_W, _WS), "ws": _WS, "wz": np.zeros(8, np.int8), "w2": stored(_W2, _W2S), "w2s": np.asarray(_W2S),
    "w2z": np.asarray(0, np.int8), "w2u": (stored(_W2, _W2S).astype(np.int16) + 128).astype(np.uint8),
    "w2uz": np.asarray(128, np.uint8), "w2uo": np.asarray(120, np.uint8), "wf": _W2,
    "wfs": (np.abs(_W2).max(axis=(1, 2, 3)) / 127).astype(F), "b": np.rint(_B / (XS * _WS)).astype(np.int32),
    "bs": (XS * _WS).astype(F), "bz": np.zeros(8, np.int32), "xs": np.asarray(XS), "xz": np.asarray(-3, np.int8),
    "xzu": np.asarray(125, np.uint8), "ys": np.asarray(YS), "yz": np.asarray(5, np.int8), "zs": np.asarray(0.08, F),
    "zz": np.asarray(0, np.int8), "yzu": np.asarray(133, np.uint8),
}  # fmt: skip
QX = "xq = QuantizeLinear(x, xs, xz) dx = DequantizeLinear(xq, xs, xz) "
DW = "dw = DequantizeLinear<axis=0>(w, ws, wz) db = DequantizeLinear<axis=0>(b, bs, bz) c = Conv(dx, dw, db) "
QC = "cq = QuantizeLinear(c, ys, yz) dc = DequantizeLinear(cq, ys, yz) "
END = "dq = QuantizeLinear(d, zs, zz) y = DequantizeLinear(dq, zs, zz)"
LAST = "cq = QuantizeLinear(c, ys, yz) y = DequantizeLinear(cq, ys, yz)"


def imported(body: str, inputs: str = IMAGE, result: str = OUT) -> tuple[ir.Model, Lab]:
    """Return the model as given, and the laboratory of what import leaves of it."""
    proto = model_of(inputs, result, body, W)
    given = import_exactly(proto)
    feeds = random_feeds(given)
    rng = np.random.default_rng(4)
    for value in given.graph.inputs:
        if value.dtype == ir.DataType.INT8:
            for feed in feeds:
                feed[value.name] = rng.integers(-128, 128, tuple(value.shape)).astype(np.int8)
    return given, lab(proto, feeds=feeds, passes=[ImportQdq()])


def steps_from_given(given: ir.Model, work: Lab, step: float, forms: dict[str, str]) -> float:
    """Return the largest difference to the model as given, in steps, engine optimizations off and on."""
    model = work.lowered(**forms).model
    worst = 0.0
    for feed in work.feeds:
        for a, b, c in zip(outputs(given, feed), outputs(model, feed), outputs(model, feed, OPTIMIZED), strict=True):
            assert a.dtype == b.dtype == c.dtype
            wide = a.astype(np.float64)
            worst = max(worst, np.abs(wide - b.astype(F)).max() / step, np.abs(wide - c.astype(F)).max() / step)
    return worst


def test_pairs_go_weights_become_floats_and_numbers_are_kept():
    state = run_pass_test(
        "", _pipeline(),
        """
        # CHECK: Conv_{{[0-9]+}}: %c: {{.*}} = Conv(%x, const<f32 8x4x3x3 #{{....}}>, const<f32 8 #{{....}}>)
        # CHECK: QuantizeLinear(%c
        # CHECK-NEXT: %y: {{.*}} = DequantizeLinear(
        # CHECK-NEXT: }
        """,
        state=CompileState(import_exactly(model_of(IMAGE, OUT, QX + DW + LAST, W)), load_target("ort-x86")),
    )  # fmt: skip
    assert state.imported["x"] == QuantSource("fixed", scale=(float(XS),), zero_point=(125,))
    assert state.imported["c"] == QuantSource("fixed", scale=(float(YS),), zero_point=(133,))
    weight = next(v for n, v in state.imported.items() if n.startswith("w"))
    assert weight == QuantSource("fixed", scale=tuple(_WS.tolist()), zero_point=(0,) * 8)
    conv = next(n for n in all_nodes(state.model) if n.op_type == "Conv")
    np.testing.assert_array_equal(const_array(conv.inputs[1]), W["w"] * _WS.reshape(-1, 1, 1, 1))
    np.testing.assert_array_equal(const_array(conv.inputs[2]), W["b"].astype(F) * W["bs"])


def _pipeline():
    from qcompiler.pipeline.pipeline import Pipeline

    return Pipeline((ImportQdq(),))


CASES = {
    "signed activations": (QX + DW + LAST, IMAGE, OUT, 1, YS),
    "unsigned activations": ((QX + DW + LAST).replace("xz", "xzu").replace("yz", "yzu"), IMAGE, OUT, 1, YS),
    "integers outside": ("dx = DequantizeLinear(xq, xs, xz) " + DW + "cq = QuantizeLinear(c, ys, yz)",
                         "int8[2,4,8,8] xq", "int8[2,8,6,6] cq", 1, 1.0),
    "two convolutions": (QX + DW + QC + "dw2 = DequantizeLinear(w2, w2s, w2z) d = Conv(dc, dw2) " + END, IMAGE, OUT, 2,
                         0.08),
    "unsigned weights": (QX + DW + QC + "dw2 = DequantizeLinear(w2u, w2s, w2uz) d = Conv(dc, dw2) " + END, IMAGE, OUT,
                         2, 0.08),
    "float weights behind a pair": (
        QX + DW + QC + "q2 = QuantizeLinear(wf, w2s, w2z) dw2 = DequantizeLinear(q2, w2s, w2z) "
        "d = Conv(dc, dw2) " + END,
        IMAGE, OUT, 2, 0.08),
    "float weights behind a pair per channel": (
        QX + DW + QC + "q2 = QuantizeLinear<axis=0>(wf, wfs, wz) dw2 = DequantizeLinear<axis=0>(q2, wfs, wz) "
        "d = Conv(dc, dw2) " + END, IMAGE, OUT, 2, 0.08),
    "a pool of integers": (QX + DW + QC + "d = MaxPool<kernel_shape=[2,2]>(dc) dq = QuantizeLinear(d, ys, yz) "
                           "y = DequantizeLinear(dq, ys, yz)", IMAGE, OUT, 2, YS),
    "a pool that moves integers already": (
        QX + DW + "cq = QuantizeLinear(c, ys, yz) d = MaxPool<kernel_shape=[2,2]>(cq) y = DequantizeLinear(d, ys, yz)",
        IMAGE, OUT, 2, YS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_same_integers_come_out_and_everything_fuses(name):
    body, inputs, result, planned, step = CASES[name]
    given, work = imported(body, inputs, result)
    forms = {"Conv": "static", "MaxPool": "static"}
    assert steps_from_given(given, work, float(step), forms) <= 1e-3
    proof: Proof = work.prove(**forms)
    assert (proof.planned, proof.missed) == (planned, ())


@pytest.mark.parametrize("name", CASES)
def test_the_interface_is_unchanged_and_the_pass_settles(name):
    body, inputs, result, _, _ = CASES[name]
    given, work = imported(body, inputs, result)
    model = work.base.model
    for side in ("inputs", "outputs"):
        before, after = getattr(given.graph, side), getattr(model.graph, side)
        assert [(v.name, v.dtype) for v in before] == [(v.name, v.dtype) for v in after]
    settled = print_model(model)
    ImportQdq().run(work.base)
    assert print_model(model) == settled


def test_missing_parts_are_completed():
    given, work = imported(QX + DW + "y = Add(c, c)")
    forms = {"Conv": "static"}
    assert work.prove(**forms).missed == ()
    # The output of the convolution had no numbers: it gets observed ones, so a step of its range is the error.
    step = max(float(np.ptp(a)) for f in work.feeds for a in outputs(given, f)) / 255
    assert 0 < steps_from_given(given, work, step, forms) <= 1


def test_weights_alone_are_taken_as_they_are():
    _, work = imported("dw = DequantizeLinear<axis=0>(w, ws, wz) y = Conv(x, dw)")
    assert ops(work.base.model) == {"Conv": 1}
    state = work.inserted(Conv="static")
    dq = next(n for n in all_nodes(state.model) if n.op_type == "DequantizeLinear" and "axis" in n.attributes)
    np.testing.assert_array_equal(const_array(dq.inputs[0]), W["w"])
    np.testing.assert_array_equal(const_array(dq.inputs[1]), _WS)


def test_a_weight_whose_zero_point_is_not_the_middle_is_quantized_anew():
    body = QX + DW + QC + "dw2 = DequantizeLinear(w2u, w2s, w2uo) d = Conv(dc, dw2) " + END
    given, work = imported(body)
    assert "w2u:float" not in work.base.imported
    assert steps_from_given(given, work, 0.08, {"Conv": "static"}) <= 1.001
    assert work.prove(Conv="static").missed == ()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("xq = QuantizeLinear(x, xs, xz) dx = DequantizeLinear(xq, ys, xz) y = Conv(dx, wf4)", "pair-differs"),
        (QX + "x2 = QuantizeLinear(x, ys, xz) dx2 = DequantizeLinear(x2, ys, xz) y = Sum(dx, dx2)", "two-scales"),
    ],
)
def test_a_pair_that_stays_says_why(body, reason):
    proto = model_of(IMAGE, "float[] y", body, {**W, "wf4": normal(1, 8, 4, 1, 1)})
    work = lab(proto, calibrate=False, passes=[ImportQdq()])
    assert reasons(work.base) == [reason]
    assert ops(work.base.model)["QuantizeLinear"] >= 1


def test_a_model_without_quantization_is_left_alone():
    state = CompileState(import_exactly(model_of(IMAGE, OUT, "y = Conv(x, wf4)", {"wf4": normal(1, 8, 4, 1, 1)})),
                         load_target("ort-x86"))  # fmt: skip
    before = print_model(state.model)
    assert ImportQdq().run(state) == 0
    assert (print_model(state.model), state.imported) == (before, {})
    assert (ImportQdq.needs, ImportQdq.gives) == (Phase.FLOAT, Phase.FLOAT)


def test_a_pair_whose_scale_is_computed_stays():
    body = "s2 = Exp(v) xq = QuantizeLinear(x, s2, xz) y = DequantizeLinear(xq, s2, xz)"
    work = lab(model_of(IMAGE + ", float v", IMAGE.replace(" x", " y"), body, W), calibrate=False, passes=[ImportQdq()])
    assert ops(work.base.model) == {"Exp": 1, "QuantizeLinear": 1, "DequantizeLinear": 1}
    assert work.base.imported == {}


def test_inside_if_bodies():
    body = (
        "y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { xq = QuantizeLinear(x, xs, xz) "
        "dx = DequantizeLinear(xq, xs, xz) dw = DequantizeLinear<axis=0>(w, ws, wz) u = Conv(dx, dw) }, "
        "else_branch = g2 () => (float[n,8,6,6] v) { v = Conv(x, wf3) }>"
    )
    proto = model_of(IMAGE + ", bool p", "float[n,8,6,6] y", body, {**W, "wf3": _W})
    work = lab(proto, passes=[ImportQdq()])
    assert ops(work.base.model) == {"If": 1, "Conv": 2}
    assert work.base.imported["x"].zero_point == (125,)
    assert work.prove(Conv="static").missed == ()
