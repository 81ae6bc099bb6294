"""Which channels must be scaled alike, and where they end."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.engine import Array
from qcompiler.ir.channels import ChannelClass, channel_classes
from tests.passes.quantize.lab import import_exactly, model_of, normal

WEIGHTS = {
    "w": normal(1, 4, 3, 3, 3), "v": normal(2, 4, 4, 1, 1), "u": normal(3, 6, 4, 1, 1), "d": normal(4, 4, 1, 3, 3),
    "wide": normal(5, 5, 8, 1, 1), "m": normal(6, 4, 7), "flat": normal(7, 16, 7), "b": normal(8, 4),
    "c": normal(9, 1, 4, 1, 1), "six": np.float32(6), "zero": np.float32(0), "z": normal(10, 2, 6),
    "axis": np.array([2, 3]), "to2d": np.array([-1, 16]), "s0": np.array([1]), "s1": np.array([3]), "s2": np.array([1]),
    "half": normal(11, 5, 2, 1, 1),
}  # fmt: skip
IMAGE = "float[1,3,2,2] x"


def classes(body: str, inputs: str = IMAGE, keep: tuple[str, ...] = ()) -> dict[str, ChannelClass]:
    used = {name: array for name, array in WEIGHTS.items() if f"{name})" in body or f"{name}," in body}
    model = import_exactly(model_of(inputs, "float[] y", body, used))
    return {c.name: c for c in channel_classes(model, keep)}


def ends(found: ChannelClass) -> tuple[list[str], list[str]]:
    return [str(u.node.name) for u in found.given], [str(u.node.name) for u in found.read]


FIRST = "[a] p = Conv<pads=[1,1,1,1]>(x, w, b)"


@pytest.mark.parametrize(
    "between",
    [
        "q = Relu(p)",
        "q = LeakyRelu<alpha=0.1>(p)",
        "q = PRelu(p, c)",
        "q = MaxPool<kernel_shape=[2,2]>(p)",
        "q = AveragePool<kernel_shape=[2,2]>(p)",
        "q = GlobalAveragePool(p)",
        "q = Clip(p, zero)",
        "r = Mul(p, c) q = Identity(r)",
        "r = Sigmoid(x) s = GlobalAveragePool(r) t = ReduceMean<keepdims=1>(s) q = Mul(p, t)",
        "q = Add(p, c)",
    ],
)
def test_channels_pass_what_keeps_them_apart_and_in_scale(between: str) -> None:
    (found,) = classes(f"{FIRST} {between} [e] y = Conv(q, v)").values()
    assert (found.name, found.size) == ("p", 4)
    assert ends(found) == (["a"], ["e"])


@pytest.mark.parametrize(
    "between",
    [
        "q = Sigmoid(p)",
        "q = Clip(p, zero, six)",
        "q = Softmax<axis=1>(p)",
        "r = Relu(p) s = Tanh(p) q = Identity(r)",
        "r = Relu(p) q = Mul(r, p)",
        "q = Add(p, x4)",
    ],
)
def test_what_is_no_such_function_binds_its_channels(between: str) -> None:
    inputs = f"{IMAGE}, float[1,4,2,2] x4" if "x4" in between else IMAGE
    assert classes(f"{FIRST} {between} [e] y = Conv(q, v)", inputs) == {}


def test_all_layers_of_a_residual_branch_share_their_channels() -> None:
    body = f"{FIRST} r = Relu(p) [f] s = Conv(r, v) t = Add(s, r) k = Relu(t) [e] y = Conv(k, u)"
    (found,) = classes(body).values()
    assert ends(found) == (["a", "f"], ["f", "e"])
    assert found.size == 4
    assert {str(v.name) for v, _ in found.values} == {"p", "r", "s", "t", "k"}


def test_a_depthwise_layer_ends_one_class_and_begins_another() -> None:
    found = classes(f"{FIRST} r = Relu(p) [f] s = Conv<group=4, pads=[1,1,1,1]>(r, d) t = Relu(s) [e] y = Conv(t, u)")
    assert {name: ends(c) for name, c in found.items()} == {"p": (["a"], ["f"]), "s": (["f"], ["e"])}


def test_a_concat_keeps_the_channels_of_its_inputs_apart() -> None:
    body = f"{FIRST} [g] k = Conv(p, v) j = Concat<axis=1>(p, k) [e] y = Conv(j, wide)"
    (found,) = classes(body).values()
    assert found.size == 8
    (last,) = [use for use in found.read if use.node.name == "e"]
    assert last.ids.tolist() == list(range(8))
    assert ends(found) == (["a", "g"], ["g", "e"])


def test_channels_of_a_concat_with_an_input_are_bound_in_part() -> None:
    body = f"{FIRST} j = Concat<axis=1>(p, x4) [e] y = Conv(j, wide)"
    (found,) = classes(body, f"{IMAGE}, float[1,4,2,2] x4").values()
    assert found.read[0].ids.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


def test_a_slice_takes_some_channels_along() -> None:
    body = f"{FIRST} r = Relu(p) q = Slice(r, s0, s1, s2) [e] y = Conv(q, half)"
    (found,) = classes(body).values()
    assert found.read[0].ids.tolist() == [1, 2]


def test_a_flat_layout_repeats_each_channel() -> None:
    (found,) = classes(f"{FIRST} r = Relu(p) f = Reshape(r, to2d) [e] y = Gemm(f, flat)").values()
    assert found.read[0].ids.tolist() == np.repeat(np.arange(4), 4).tolist()


def test_a_pooled_image_ends_in_a_product() -> None:
    body = f"{FIRST} r = Relu(p) k = ReduceMean<keepdims=0>(r, axis) [e] y = MatMul(k, m)"
    (found,) = classes(body).values()
    assert ends(found) == (["a"], ["e"])
    assert found.read[0].axis == 0


def test_outputs_kept_layers_and_shared_weights_are_left_alone() -> None:
    assert classes("[a] y = Conv<pads=[1,1,1,1]>(x, w, b)") == {}
    assert classes(f"{FIRST} r = Relu(p) [e] y = Conv(r, v)", keep=("e",)) == {}
    assert classes(f"{FIRST} [f] q = Conv(p, v) [g] k = Conv(q, v) y = Conv(k, u)", keep=()) == {}


def test_a_value_that_a_body_reads_is_left_alone() -> None:
    body = (
        f"{FIRST} r = Relu(p) [e] q = Conv(r, v) "
        "y = If(c) <then_branch = t () => (float[1,4,2,2] k) { k = Neg(r) }, else_branch = e () => (float[1,4,2,2] l) "
        "{ l = Identity(q) }>"
    )
    assert classes(body, f"bool c, {IMAGE}") == {}


def test_an_open_batch_and_size_do_not_matter() -> None:
    body = f"{FIRST} r = Relu(p) q = GlobalAveragePool(r) [e] y = Conv(q, v)"
    (found,) = classes(body, "float[N,3,H,W] x").values()
    assert found.size == 4


def test_numbers_of_a_class_count_from_zero() -> None:
    found = classes(f"{FIRST} t = Sigmoid(p) [f] s = Conv(t, v) r = Relu(s) [e] y = Conv(r, u)")
    assert list(found) == ["s"]
    lanes: list[Array] = [lane.ids for _, lane in found["s"].values]
    assert all(ids.tolist() == [0, 1, 2, 3] for ids in lanes)
