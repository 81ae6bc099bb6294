"""The proof: names as the engine leaves them, borders, and what counts as fused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.readback import Planned, planned_fusions, prove
from tests.passes.quantize.lab import import_exactly, lab, model_of, normal

F = np.float32
W = {"w": normal(1, 8, 4, 3, 3, scale=0.2), "w2": normal(2, 8, 8, 1, 1), "s": np.asarray(0.1, F),
     "z": np.asarray(0, np.uint8), "i": np.zeros((8, 4, 3, 3), np.int8), "iz": np.asarray(0, np.int8)}  # fmt: skip
IMAGE = "float[n,4,8,8] x"
QCONV = "y = QLinearConv(q, s, z, i, s, iz, s, z)"


def graph(body: str, *names: str) -> ir.Model:
    """Return a graph whose nodes have the given names, as an engine's."""
    model = import_exactly(model_of("uint8[n,4,8,8] q, " + IMAGE, "float[] y", body, W))
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    return model


CONV = Planned("conv", "Conv", ("q",), ("y",))


@pytest.mark.parametrize("name", ["conv", "conv_token_7", "conv_nhwc", "conv_nhwc_token_12", "conv/duplicated"])
def test_the_engines_suffixes_do_not_hide_a_group(name):
    assert prove([CONV], graph(QCONV, name)).fused == {"conv": "QLinearConv"}


def test_a_renamed_kernel_is_found_by_the_tensor_it_writes():
    assert prove([CONV], graph(QCONV, "something else")).fused == {"conv": "QLinearConv"}
    away = Planned("conv", "Conv", ("q",), ("elsewhere",))
    assert [m.reason for m in prove([away], graph(QCONV, "something else")).missed] == ["engine-kept-float"]


def test_a_dequantize_of_the_group_that_is_left_is_a_miss_even_beside_a_kernel():
    body = "d = DequantizeLinear(q, s, z) " + QCONV
    (miss,) = prove([CONV], graph(body, "conv/DequantizeLinear_2_token_1", "conv")).missed
    assert miss.reason == "engine-left-dequantize"
    assert miss.text == "the engine still executes conv/DequantizeLinear_2_token_1"


def test_the_dequantize_behind_a_group_belongs_to_its_readers():
    body = "a = QLinearConv(q, s, z, i, s, iz, s, z) y = DequantizeLinear(a, s, z)"
    assert prove([Planned("conv", "Conv", (), ("a",))], graph(body, "conv", "conv:dequantize")).missed == ()


def test_a_group_name_that_begins_like_another_is_not_confused():
    body = "d = DequantizeLinear(q, s, z) " + QCONV
    assert prove([CONV], graph(body, "conv_2/DequantizeLinear", "conv")).missed == ()


def test_a_mover_may_vanish_but_not_keep_its_dequantize():
    mover = Planned("t", "Transpose", ("q",), ("t:out",))
    assert prove([mover], graph(QCONV, "conv")).fused == {"t": "moved away"}
    body = "d = DequantizeLinear(q, s, z) t0 = Transpose<perm=[0,1,3,2]>(d) " + QCONV
    (miss,) = prove([mover], graph(body, "t/DequantizeLinear", "t", "conv")).missed
    assert "and Transpose in float" in miss.text


def test_planned_is_every_group_that_the_plan_does_not_leave_in_float():
    body = "c = Conv(x, w) p, q = Split<axis=1,num_outputs=2>(c) y = Concat<axis=1>(q, p)"
    work = lab(model_of(IMAGE, "float[n,8,6,6] y", body, W))
    state = work.fused(Conv="static", Split="static", Concat="static")
    assert [p.kind for p in planned_fusions(state.model)] == ["Conv", "Concat"]
    planned = planned_fusions(state.model, state.plan)
    assert [(p.group, p.kind) for p in planned] == [("Conv_0", "Conv"), ("Split_1", "Split"), ("Concat_2", "Concat")]
    assert planned[0].inputs[0] == "x:q"
    assert planned[0].outputs == ("c:q",)


def test_groups_in_bodies_are_planned_and_proven():
    body = (
        "y = If(p) <then_branch = g1 () => (float[n,8,6,6] u) { u = Conv(x, w) }, "
        "else_branch = g2 () => (float[n,8,6,6] v) { c = Conv(x, w) v = Conv(c, w2) }>"
    )
    work = lab(model_of(IMAGE + ", bool p", "float[n,8,6,6] y", body, W))
    assert len(planned_fusions(work.fused(Conv="static").model)) == 3
    assert len(work.prove(Conv="static").fused) == 3


def test_nothing_planned_is_proven_at_once():
    proof = prove([], graph(QCONV, "conv"))
    assert proof.to_dict() == {"planned": 0, "fused": 0, "missed": [], "note": "", "kernels": {}}
