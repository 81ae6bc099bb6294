"""Every row of the table, as OpenVINO executes it: between two convolutions, in fixed and in open shapes."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.backends.openvino import OvEngine
from qcompiler.backends.openvino_proof import prove_layers
from qcompiler.backends.readback import planned_fusions
from qcompiler.engine import EngineOptions
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_openvino import LowerOpenvino
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.search.quality import sqnr_db
from qcompiler.targets.host import detect
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import ENGINE, REFERENCE, lab, model_of, normal

pytest.importorskip("openvino")

TARGET = load_target("openvino").on(detect().features)
ONE = EngineOptions(threads=1)
STEPS = (PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq())
W = {
    "w": normal(1, 32, 4, 3, 3, scale=0.2), "b": normal(2, 32), "u": normal(3, 32, 4, 3, 3, scale=0.2),
    "v": normal(4, 8, 32, 1, 1, scale=0.1), "v2": normal(5, 8, 64, 1, 1, scale=0.1),
    "v3": normal(6, 8, 8, 1, 1, scale=0.3), "v4": normal(7, 8, 16, 1, 1, scale=0.2),
    "dw": normal(8, 32, 1, 3, 3, scale=0.3), "m": normal(9, 128, 48, scale=0.1), "n": normal(10, 48),
    "two": np.asarray([2], np.int64), "one": np.asarray([1], np.int64), "nine": np.asarray([9], np.int64),
    "grid": np.asarray([0, 32, 4, 9], np.int64), "picks": np.asarray([5, 1, 2, 2], np.int64),
    "flat": np.asarray([0, 0, 36], np.int64), "axis": np.asarray([4], np.int64),
    "scales": np.asarray([1, 1, 2, 2], np.float32), "rows": np.asarray([0, 36, 32], np.int64),
    "mm": normal(11, 32, 48, scale=0.2),
}  # fmt: skip
RELU = "c = Conv(x, w, b) r = Relu(c) "
SIGNED = "r = Conv(x, w, b) "
BODIES = {
    "Conv": "y = Conv(r, v)",
    "Conv depthwise": "a = Conv<group=32>(r, dw, b) y = Conv(a, v)",
    "MatMul": "t = Reshape(r, flat) p = Transpose<perm=[0,2,1]>(t) y0 = MatMul(p, mm) y = Add(y0, n)",
    "Gemm": "k = MaxPool<kernel_shape=[3,3],strides=[3,3]>(r) f = Flatten(k) y = Gemm(f, m, n)",
    "Add": "d = Conv(x, u) a = Add(r, d) y = Conv(a, v)",
    "Concat": "d = Conv(x, u, b) a = Concat<axis=1>(r, d) y = Conv(a, v2)",
    "AveragePool": "a = AveragePool<kernel_shape=[2,2]>(r) y = Conv(a, v)",
    "GlobalAveragePool": "a = GlobalAveragePool(r) y = Conv(a, v)",
    "Reshape": "a = Reshape(r, grid) y = Conv(a, v)",
    "Transpose": "a = Transpose<perm=[0,1,3,2]>(r) y = Conv(a, v)",
    "Slice": "a = Slice(r, one, nine, two) y = Conv(a, v)",
    "Gather": "a = Gather<axis=3>(r, picks) y = Conv(a, v)",
    "Split": "a, e = Split<axis=1,num_outputs=2>(r) g = Conv(a, v4) h = Conv(e, v4) y = Add(g, h)",
    "Squeeze": "a = Unsqueeze(r, axis) e = Squeeze(a, axis) y = Conv(e, v)",
    "MaxPool": "a = MaxPool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1]>(r) y = Conv(a, v)",
    "Resize": 'a = Resize<mode="nearest">(r, , scales) y = Conv(a, v)',
    "DepthToSpace": "a = DepthToSpace<blocksize=2>(r) y = Conv(a, v3)",
}


def test_every_operator_of_the_table_is_here() -> None:
    listed = {kind for row in TARGET.rows for kind in row.type}
    assert listed == {kind for text in BODIES.values() for kind in listed if f" {kind}" in f" {RELU}{text}"}


@pytest.mark.parametrize("batch", ["2", "n"], ids=["fixed", "open"])
@pytest.mark.parametrize("head", [RELU, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_row_holds(kind: str, head: str, batch: str) -> None:
    if any(not row.forms for row in TARGET.rows if kind in row.type):
        pytest.skip(f"{kind} is float on this processor: see the row's requires")
    of = lab(model_of(f"float[{batch},4,8,8] x", "float[] y", head + BODIES[kind], W), target=TARGET)
    forms = {g.name: "static" if "static" in g.legal else "static-float" for g in of.groups.values() if g.legal}
    assert len(forms) == len(of.groups), {g.name: g.refusals for g in of.groups.values()}
    fused = of.run(STEPS, forms)  # type: ignore[arg-type]
    planned = planned_fusions(fused.model, fused.plan)
    lowered = of.run((*STEPS, LowerOpenvino()), forms).model  # type: ignore[arg-type]
    exact = OvEngine(precision="f32").load(lowered, ONE)
    for runner in (exact, OvEngine().load(lowered, ONE)):
        proof = prove_layers(planned, runner.executed())
        assert [(m.kind, m.text) for m in proof.missed] == []
        assert proof.planned >= 2
    # One step here and there: the engine rounds an average by itself, and ties its own way.
    for feed in of.feeds:
        (wanted,) = ENGINE.load(lowered, REFERENCE).run(feed).values()
        (actual,) = exact.run(feed).values()
        assert sqnr_db(wanted, actual) > 35
