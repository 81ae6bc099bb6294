"""Bytes by formula are those of the built files, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest

from qcompiler.ir.constants import remove_unread_constants
from qcompiler.ir.serialize import weight_bytes as bytes_of
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.front import front_passes
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.search.weight_sizes import fixed_bytes, shared_weights, stored_sizes, weight_bytes
from qcompiler.targets.groups import find_groups
from qcompiler.targets.placement import Policy, propose
from tests import synthetic
from tests.passes.quantize.lab import lab
from tests.search.nets import SAME, TARGET, net

LOWERING = (PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq(), LowerOnnxruntime())

VALUE_BYTES = 5
"""Scale and zero point of one quantized activation, which the formula leaves out."""


def test_a_convolution_by_hand() -> None:
    _, groups = net(f"[c0] a = Conv{SAME}(x, w) [t0] y = Tanh(a)")
    weight = 4 * 4 * 3 * 3
    assert weight_bytes(groups["c0"], "float", TARGET) == 4 * weight
    assert weight_bytes(groups["c0"], "static", TARGET) == weight + 4 * 4 + 4  # scales, zero points


def test_a_product_in_packed_blocks_by_hand() -> None:
    rows = tuple(replace(r, forms=("weight-only",), emit={"weight-only": "MatMulNBits"}) for r in TARGET.rows)
    target = replace(TARGET, weight="uint4", weight_bits=4, weight_symmetric=False, block=16, blocks=(16,), rows=rows)
    model, _ = net("[m0] a = MatMul(x, m) [t0] y = Tanh(a)", "float[1,64] x")
    (group,) = find_groups(model, target)
    blocks = 64 // 16
    packed, scales = 64 * 64 // 2, 4 * 64 * blocks
    assert weight_bytes(group, "weight-only", target) == packed + scales + 64 * blocks // 2
    assert weight_bytes(group, "weight-only:uint4", replace(target, weight_symmetric=True)) == packed + scales


def test_a_weight_in_small_floats_has_scales_of_a_byte_and_one_above_them() -> None:
    target = replace(TARGET, weight="float4e2m1", block=16, blocks=(16,), weight_scale="float8e4m3fn")
    model, _ = net("[m0] a = MatMul(x, m) [t0] y = Tanh(a)", "float[1,64] x")
    (group,) = find_groups(model, target)
    assert weight_bytes(group, "dynamic", target) == 64 * 64 // 2 + 64 * 4 + 4


def test_sharing_is_reported_and_counted_once() -> None:
    body = "[m0] a = MatMul(x, m) [m1] b = MatMul(a, m) [t0] y = Tanh(b)"
    model, groups = net(body, "float[2,64] x")
    listed = list(groups.values())
    assert shared_weights(listed) == {"m": ("m0", "m1")}
    sizes = stored_sizes(model, listed, TARGET, {"m0": ["dynamic"], "m1": ["dynamic"]})
    assert sizes.groups == {"m0": {"float": 0, "dynamic": 0}, "m1": {"float": 0, "dynamic": 0}}
    assert sizes.shared == {"m": {"float": 4 * 4096, "dynamic": 4096 + 4 * 64 + 64}}
    assert sizes.readers == {"m": ("m0", "m1")}
    assert sizes.fixed == fixed_bytes(model, listed) == bytes_of(model) - 4 * 4096
    assert sizes.weights == 4096


def test_what_others_read_stays_in_float() -> None:
    body = "[m0] a = MatMul(x, m) [g0] b = ReduceSum(m) [a0] c = Sub(a, b) [t0] y = Tanh(c)"
    model, groups = net(body, "float[2,64] x")
    sizes = stored_sizes(model, [groups["m0"]], TARGET, {"m0": ["dynamic"]})
    assert sizes.groups["m0"] == {"float": 0, "dynamic": 4096 + 4 * 64 + 64}
    assert sizes.fixed == bytes_of(model)


POLICIES = {
    "float": Policy("float", "float", "float", False),
    "static": Policy("static", "static", "dynamic", True),
    "dynamic": Policy("float", "dynamic", "dynamic", False),
}


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("make", [synthetic.residual_cnn, synthetic.transformer_block, synthetic.two_heads])
def test_the_built_file_has_the_bytes(make: Callable[[], onnx.ModelProto], policy: str) -> None:
    made = lab(make(), passes=front_passes())
    groups = list(made.groups.values())
    state = made.run(LOWERING, propose(groups, POLICIES[policy]))
    remove_unread_constants(state.model)
    forms = {g.name: state.plan.form(g.name) for g in groups}
    sizes = stored_sizes(made.base.model, groups, TARGET, {n: [f] for n, f in forms.items() if f != "float"})
    told = sizes.fixed + sum(sizes.groups[name][form] for name, form in forms.items())
    told += sum(by_form[f] for n, by_form in sizes.shared.items() for f in {forms[r] for r in sizes.readers[n]})
    scalars = [v for v in state.model.graph.initializers.values() if v.dtype is ir.DataType.UINT8 and v.shape == ()]
    assert told == bytes_of(state.model) - VALUE_BYTES * len(scalars)
    if policy == "static":
        assert sizes.fixed < told < bytes_of(made.base.model)
