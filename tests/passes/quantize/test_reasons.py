"""Every reason code: its cause gives that code, and without the cause the node fuses on ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.readback import Planned, Proof, planned_fusions, prove
from qcompiler.engine import Array
from qcompiler.ir.phase import Phase
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.pipeline.instruments.verify import VerifyInstrument
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.spec import QuantSource
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import ENGINE, OPTIMIZED, Lab, import_exactly, lab, model_of, normal

F = np.float32
IMAGE, OUT = "float[n,4,8,8] x", "float[] y"
MATRIX = "float[n,64] x"
W: dict[str, Array] = {
    "w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "w2": normal(3, 8, 8, 1, 1, scale=0.3),
    "m": normal(4, 64, 32, scale=0.1), "mb": normal(5, 32), "half": normal(4, 64, 32, scale=0.1).astype(np.float16),
    "batch": normal(6, 2, 64, 32, scale=0.1), "one": np.asarray(1, F), "small": normal(7, 16, 32),
    "pair": normal(8, 2, 1),
    "image": normal(9, 2, 4, 8, 8), "cat": normal(10, 2, 8, 6, 6), "sc": np.asarray([1, 1, 2, 2], F),
    "roi": np.asarray([0, 0, 0, 0, 1, 1, 1, 1], F), "lw": normal(12, 1, 64, 64, scale=0.1),
    "lr": normal(13, 1, 64, 16, scale=0.1), "lb": normal(14, 1, 128), "lp": normal(15, 1, 48),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model, and the group in question.

    Attributes:
        body: the nodes.
        inputs: the graph inputs.
        result: the graph outputs.
        forms: forms by operator type.
        imported: numbers fixed by hand.
        feeds: calibration, random by default; None for none.
        emit: how groups are lowered.
    """

    body: str
    inputs: str = IMAGE
    result: str = OUT
    forms: dict[str, Any] = field(default_factory=lambda: {"Conv": "static", "MaxPool": "static", "Resize": "static",
                                                           "Concat": "static", "AveragePool": "static"})  # fmt: skip
    imported: dict[str, QuantSource] = field(default_factory=dict)
    feeds: tuple[dict[str, Array], ...] | None = ()
    emit: str = "auto"

    def lab(self) -> Lab:
        proto = model_of(self.inputs, self.result, self.body, W)
        made = lab(proto, calibrate=self.feeds is not None, feeds=self.feeds or None)
        made.base.imported.update(self.imported)
        return made


def proof_of(case: Case) -> tuple[set[str], Proof, CompileState]:
    """Return the reason codes of all declined forms, the engine's proof, and the state."""
    work = case.lab()
    state = work.lowered(case.emit, **case.forms)
    codes = {r.reason for r in state.remarks if not r.done and r.pass_name in ("plan-quantization", "insert-qdq")}
    return codes, work.prove(case.emit, **case.forms), state


def kernels(proof: Proof, op_type: str) -> set[str]:
    return {kernel for group, kernel in proof.fused.items() if group.startswith(op_type)}


DYNAMIC = {"MatMul": "dynamic", "Gemm": "dynamic", "LSTM": "dynamic"}
GEMM = {"Gemm": "static"}
SEQUENCE = "float[s,n,64] x"
BRANCH = (
    "y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Conv(x, w) }, "
    "else_branch = g2 () => (float[n,8,6,6] v) { v = Exp(z) }>"
)
TAKEN, PASSED = ({"x": normal(1, 2, 4, 8, 8), "z": normal(2, 2, 8, 6, 6), "p": np.asarray(v)} for v in (True, False))
BRANCHES = IMAGE + ", float[n,8,6,6] z, bool p"
AT_MIDDLE, AT_ZERO = (QuantSource("fixed", scale=(0.05,), zero_point=(z,)) for z in (128, 0))
POOL = "c = Conv(x, w) y = AveragePool<kernel_shape=[3,3]{}>(c)"

PLANNING: dict[str, tuple[str, str, Case, Case]] = {
    # code: (operator type of the group, kernel, with the cause, without it)
    "weight-not-constant": ("Conv", "QLinearConv", Case("y = Conv(x, v)", IMAGE + ", float[8,4,3,3] v"),
                            Case("y = Conv(x, w)")),
    "weight-rank": ("MatMul", "DynamicQuantizeMatMul", Case("y = MatMul(x, batch)", "float[2,5,64] x", forms=DYNAMIC),
                    Case("y = MatMul(x, m)", "float[2,5,64] x", forms=DYNAMIC)),
    "gemm-form": ("Gemm", "QGemm", Case("y = Gemm<alpha=0.5>(x, m)", MATRIX, forms=GEMM),
                  Case("y = Gemm(x, m)", MATRIX, forms=GEMM)),
    "bias-not-constant": ("Gemm", "QGemm", Case("y = Gemm(x, m, v)", MATRIX + ", float[32] v", forms=GEMM),
                          Case("y = Gemm(x, m, mb)", MATRIX, forms=GEMM)),
    "bias-shape": ("Gemm", "QGemm", Case("y = Gemm(x, m, pair)", "float[2,64] x", forms=GEMM),
                   Case("y = Gemm(x, m, mb)", "float[2,64] x", forms=GEMM)),
    "too-small": ("MatMul", "DynamicQuantizeMatMul", Case("y = MatMul(x, small)", "float[n,16] x", forms=DYNAMIC),
                  Case("y = MatMul(x, m)", MATRIX, forms=DYNAMIC)),
    "not-float32": ("MatMul", "DynamicQuantizeMatMul",
                    Case("y = MatMul(x, half)", "float16[n,64] x", "float16[] y", forms=DYNAMIC),
                    Case("y = MatMul(x, m)", MATRIX, forms=DYNAMIC)),
    "indices-used": ("MaxPool", "NhwcMaxPool",
                     Case("c = Conv(x, w) y, i = MaxPool<kernel_shape=[2,2]>(c)", result=OUT + ", int64[] i"),
                     Case("c = Conv(x, w) y = MaxPool<kernel_shape=[2,2]>(c)")),
    "resize-mode": ("Resize", "Resize", Case('c = Conv(x, w) y = Resize<mode="linear">(c, , sc)'),
                    Case('c = Conv(x, w) y = Resize<mode="nearest">(c, , sc)')),
    "constant": ("Conv", "QLinearConv", Case("c = Conv(image, w) y = Add(c, z)", "float[2,8,6,6] z"),
                 Case("c = Conv(x, w) y = Add(c, z)", IMAGE + ", float[n,8,6,6] z")),
    "constant-input": ("Concat", "QLinearConcat", Case("c = Conv(x, w) y = Concat<axis=0>(c, cat)"),
                       Case("c = Conv(x, w) d = Conv(x, w, b) y = Concat<axis=0>(c, d)")),
    "dilations": ("AveragePool", "QLinearAveragePool", Case(POOL.format(",dilations=[2,2]")), Case(POOL.format(""))),
    "ceil-mode": ("AveragePool", "QLinearAveragePool", Case(POOL.format(",ceil_mode=1,count_include_pad=1")),
                  Case(POOL.format(",ceil_mode=1"))),
    "no-such-form": ("MatMul", "MatMulIntegerToFloat", Case("y = MatMul(x, m)", MATRIX, forms={"MatMul": "static"}),
                     Case("y = MatMul(x, m)", MATRIX, forms={"MatMul": "static-float"})),
    "never-observed": ("Conv", "QLinearConv", Case(BRANCH, BRANCHES, "float[n,8,6,6] y", feeds=(PASSED,)),
                       Case(BRANCH, BRANCHES, "float[n,8,6,6] y", feeds=(TAKEN, PASSED))),
    "no-calibration": ("Conv", "QLinearConv", Case("y = Conv(x, w)", feeds=None), Case("y = Conv(x, w)")),
    "layout": ("LSTM", "DynamicQuantizeLSTM",
               Case("y = LSTM<hidden_size=16,layout=1>(x, lw, lr, lb)", SEQUENCE, forms=DYNAMIC, feeds=None),
               Case("y = LSTM<hidden_size=16,layout=0>(x, lw, lr, lb)", SEQUENCE, forms=DYNAMIC, feeds=None)),
    "peephole": ("LSTM", "DynamicQuantizeLSTM",
                 Case("y = LSTM<hidden_size=16>(x, lw, lr, lb, , , , p)", SEQUENCE + ", float[1,48] p", forms=DYNAMIC),
                 Case("y = LSTM<hidden_size=16>(x, lw, lr, lb, , , , lp)", SEQUENCE, forms=DYNAMIC)),
}  # fmt: skip


@pytest.mark.parametrize("code", PLANNING)
def test_a_planning_reason_and_its_cure(code):
    op_type, kernel, bad, good = PLANNING[code]
    if code == "layout":
        # This engine does not even load an LSTM of layout 1, so there is nothing to read back.
        state = bad.lab().planned(**bad.forms)
        assert {r.reason for r in state.remarks} == {code}
        assert set(c.form for c in state.plan.choices.values()) == {"float"}  # noqa: C401
    else:
        codes, proof, _ = proof_of(bad)
        assert code in codes
        assert not kernels(proof, op_type)
        assert proof.missed == ()
    codes, proof, _ = proof_of(good)
    assert code not in codes
    assert kernels(proof, op_type) == {kernel}


def test_an_activation_that_is_not_redundant_and_its_cure():
    body = "c = Conv(x, w) y = Relu(c)"
    codes, proof, _ = proof_of(Case(body, imported={"y": AT_MIDDLE}))
    assert codes == {"activation-not-redundant"}
    assert [m.reason for m in proof.missed] == ["engine-left-dequantize"]
    codes, proof, _ = proof_of(Case(body, imported={"y": AT_ZERO}))
    assert codes == set()
    assert kernels(proof, "Conv") == {"QLinearConv"}


def test_the_engine_left_a_dequantize_and_its_cure():
    """A float bias without a quantized output matches no rule of the engine; the operator itself does."""
    case = {"body": "y = Gemm(x, m, mb)", "inputs": MATRIX, "forms": {"Gemm": "static-float"}}
    _, proof, _ = proof_of(Case(**case, emit="qdq"))
    (miss,) = proof.missed
    assert (miss.group, miss.kind, miss.reason) == ("Gemm_0", "Gemm", "engine-left-dequantize")
    assert miss.text == "the engine still executes Gemm_0/DequantizeLinear and Gemm in float"
    _, proof, _ = proof_of(Case(**case))
    assert proof.fused == {"Gemm_0": "MatMulIntegerToFloat"}


def executed(op: str) -> ir.Model:
    """Return what an engine might run: the group's name on a float or an integer kernel."""
    body = f"y = {op}"
    weights = {"s": np.asarray(0.1, F), "z": np.asarray(0, np.uint8), "wq": np.zeros((8, 4, 3, 3), np.int8),
               "wz": np.asarray(0, np.int8), **W}  # fmt: skip
    model = import_exactly(model_of("uint8[n,4,8,8] q, " + IMAGE, OUT, body, weights))
    next(iter(model.graph)).name = "Conv_0_nhwc_token_3"
    return model


def test_the_engine_kept_a_group_in_float_and_its_cure():
    planned = [Planned("Conv_0", "Conv", ("x",), ("y",))]
    (miss,) = prove(planned, executed("Conv(x, w)")).missed
    assert (miss.reason, miss.text) == ("engine-kept-float", "no integer kernel carries the group's name or writes y")
    assert prove(planned, executed("QLinearConv(q, s, z, wq, s, wz, s, z)")).fused == {"Conv_0": "QLinearConv"}


def by_hand(body: str, result: str = OUT, inputs: str = IMAGE) -> tuple[CompileState, Proof]:
    """Fuse and lower Q/DQ written by hand, and read the engine's graph back."""
    rng = np.random.default_rng(1)
    numbers = {"s": np.asarray(0.05, F), "z": np.asarray(120, np.uint8), "ws": np.asarray(0.01, F),
               "wz": np.asarray(0, np.int8), "wq": rng.integers(-99, 99, (8, 4, 3, 3)).astype(np.int8),
               "mq": rng.integers(-99, 99, (64, 32)).astype(np.int8)}  # fmt: skip
    model = import_exactly(model_of(inputs, result, body, {**W, **numbers}))
    state = CompileState(model, load_target("ort-x86"), Phase.QDQ)
    Pipeline((FuseQdq(),)).run(state, [VerifyInstrument()])
    planned = planned_fusions(state.model)
    Pipeline((LowerOnnxruntime(),)).run(state, [VerifyInstrument()])
    return state, prove(planned, ENGINE.optimized_graph(state.model, OPTIMIZED))


DQX = "xq = QuantizeLinear(x, s, z) dx = DequantizeLinear(xq, s, z) "
CONV = (
    DQX
    + "dw = DequantizeLinear(wq, ws, wz) c = Conv(dx, dw) q0 = QuantizeLinear(c, s, z) y = DequantizeLinear(q0, s, z)"
)
MATMUL = DQX + "dm = DequantizeLinear(mq, ws, wz) c = MatMul(dx, dm) "


def fusion_codes(state: CompileState) -> set[str]:
    return {r.reason for r in state.remarks if r.pass_name == "fuse-qdq" and not r.done}


@pytest.mark.parametrize(
    ("code", "more", "result", "inputs"),
    [
        ("interior-used-elsewhere", " e = Exp(c)", OUT + ", float[] e", IMAGE),
        ("graph-output", "", OUT + ", float[] c", IMAGE),
        ("captured", " e = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Exp(c) }, "
         "else_branch = g2 () => (float[n,8,6,6] v) { v = Tanh(c) }>", OUT + ", float[n,8,6,6] e", IMAGE + ", bool p"),
    ],
)  # fmt: skip
def test_a_value_inside_a_group_that_something_else_needs_and_its_cure(code, more, result, inputs):
    state, proof = by_hand(CONV + more, result, inputs)
    assert fusion_codes(state) == {code}
    assert proof.planned == 0
    state, proof = by_hand(CONV)
    assert fusion_codes(state) == set()
    assert set(proof.fused.values()) == {"QLinearConv"}


def test_a_larger_group_and_the_smaller_one_without_it():
    state, proof = by_hand(MATMUL + "y = Add(c, mb)", inputs=MATRIX)
    assert fusion_codes(state) == {"larger-group"}
    assert set(proof.fused.values()) == {"MatMulIntegerToFloat"}
    assert proof.missed == ()
    state, proof = by_hand(MATMUL + "y = Exp(c)", inputs=MATRIX)
    assert fusion_codes(state) == set()
    assert set(proof.fused.values()) == {"MatMulIntegerToFloat"}


def test_a_mover_between_different_parameters_and_its_cure():
    body = DQX + "t = MaxPool<kernel_shape=[2,2]>(dx) q0 = QuantizeLinear(t, {}, z) y = DequantizeLinear(q0, {}, z)"
    state, proof = by_hand(body.format("ws", "ws"))
    assert fusion_codes(state) == {"parameters-differ"}
    assert proof.planned == 0
    state, proof = by_hand(body.format("s", "s"))
    assert fusion_codes(state) == set()
    assert proof.missed == ()
    assert proof.planned == 1


def test_a_proof_reads_as_json():
    _, proof = by_hand(CONV)
    assert proof.to_dict() == {"planned": 1, "fused": 1, "missed": [], "note": "", "kernels": proof.fused}


def test_groups_without_a_call_are_proven_too():
    case = Case("c = Conv(x, w) p, q = Split<axis=1,num_outputs=2>(c) y = Concat<axis=1>(q, p)",
                forms={"Conv": "static", "Split": "static", "Concat": "static"})  # fmt: skip
    _, proof, _ = proof_of(case)
    assert set(proof.fused.values()) == {"QLinearConv", "Split", "QLinearConcat"}
    assert proof.missed == ()
