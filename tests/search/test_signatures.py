"""Signatures: alike for layers that cost alike, different where anything that time depends on differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompiler.search.borders import Border
from qcompiler.search.signatures import Signer, digest
from qcompiler.targets.groups import Group, find_groups
from tests.passes.quantize.lab import import_exactly, model_of
from tests.search.nets import SAME, TARGET, WEIGHTS, chain, net


def signer_of(groups: Mapping[str, Group]) -> Signer:
    return Signer(list(groups.values()), TARGET, {}, {}, {})


def of(body: str, name: str = "c0", form: str = "float", forms: Mapping[str, str] | None = None) -> str:
    _, groups = net(body)
    return signer_of(groups).signature(groups[name], form, forms or {})


def test_names_and_numbers_do_not_count() -> None:
    first = of(f"[c0] a = Conv{SAME}(x, w) [t0] y = Tanh(a)")
    assert first == of(f"[c0] other = Conv{SAME}(x, v) [t0] y = Tanh(other)")
    assert first == of(f"[root] a = Conv{SAME}(x, w) [t0] y = Tanh(a)", "root")
    assert len(first) == 32


def test_what_time_depends_on_counts() -> None:
    plain = f"[c0] a = Conv{SAME}(x, w) [t0] y = Tanh(a)"
    signatures = [
        of(plain),
        of(plain, form="static"),
        of("[c0] a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) [t0] y = Tanh(a)"),
        of(f"[c0] a = Conv{SAME}(x, w) [r0] b = Relu(a) [t0] y = Tanh(b)"),  # an activation is fused
    ]
    assert len(set(signatures)) == len(signatures)


def test_shapes_count_and_open_axes_by_their_elements() -> None:
    def group_in(shape: str, elements: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> str:
        model = import_exactly(model_of(f"float[{shape}] x", "float[] y", f"[c0] y = Conv{SAME}(x, w)", WEIGHTS))
        groups = find_groups(model, TARGET)
        return Signer(groups, TARGET, elements, {}, shapes).signature(groups[0], "float", {})

    assert group_in("1,4,8,8", {}, {}) != group_in("1,4,16,16", {}, {})
    assert group_in("n,4,8,8", {"x": 256}, {}) == group_in("m,4,8,8", {"x": 256}, {})
    assert group_in("n,4,8,8", {"x": 256}, {}) != group_in("n,4,8,8", {"x": 512}, {})
    known = {"x": (1, 4, 8, 8), "y": (1, 4, 8, 8)}
    assert group_in("n,4,8,8", {"x": 256}, known) == group_in("1,4,8,8", {}, known)


def test_neighbours_count_where_they_decide_the_layout() -> None:
    body = chain("Conv", "Conv", "Tanh")
    assert of(body, "c1", "float", {}) != of(body, "c1", "float", {"c0": "static"})
    products = "[m0] a = MatMul(x, m) [m1] b = MatMul(a, m) [t0] y = Tanh(b)"
    _, groups = net(products, "float[2,64] x")
    signer = signer_of(groups)
    beside_float = signer.signature(groups["m1"], "dynamic", {"m0": "float", "m1": "dynamic"})
    assert beside_float == signer.signature(groups["m1"], "dynamic", {"m0": "dynamic", "m1": "dynamic"})


def test_equal_layers_of_one_model_share() -> None:
    _, groups = net(chain("Conv", "Conv", "Conv", "Conv", "Tanh"))
    signer, forms = signer_of(groups), dict.fromkeys(groups, "static")
    found = [signer.signature(g, "static", forms) for g in groups.values()]
    assert found[1] == found[2]
    assert len(set(found)) == 3  # the first reads floats, the last is read as floats


def test_engine_forms_of_the_build_and_of_the_group_count() -> None:
    _, groups = net(chain("Conv", "Conv", "Tanh"))
    base = signer_of(groups)

    def changed(engine_forms: Mapping[str, str]) -> list[bool]:
        other = replace(base, engine_forms=engine_forms)
        return [base.signature(g, "static", {}) != other.signature(g, "static", {}) for g in groups.values()]

    assert changed({"skip-layer-norm": "avoid"}) == [True, True]
    assert changed({"emit:c1": "qoperator"}) == [False, True]
    assert changed({"emit:elsewhere": "qoperator"}) == [False, False]


def test_formats_of_the_target_count_but_not_in_float() -> None:
    _, groups = net(chain("Conv", "Tanh"))
    base = signer_of(groups)
    other = replace(base, target=replace(TARGET, weight_bits=7))
    assert base.signature(groups["c0"], "static", {}) != other.signature(groups["c0"], "static", {})
    assert base.signature(groups["c0"], "float", {}) == other.signature(groups["c0"], "float", {})


def test_conversions_by_kind_size_and_neighbours() -> None:
    _, groups = net(chain("Conv", "Conv", "Tanh"))
    signer = signer_of(groups)
    signatures = [
        signer.conversion("quantize", "v0", Border("c0", ("c1",), False, 256)),
        signer.conversion("dequantize", "v0", Border("c0", ("c1",), False, 256)),
        signer.conversion("quantize", "v0", Border("c0", ("c1",), False, 512)),
        signer.conversion("quantize", "v0", Border("c0", (), True, 256)),
    ]
    assert len(set(signatures)) == 4
    assert not signer.plain("v0")
    assert signer.plain("unknown")


def test_lone_nodes_are_signed_together() -> None:
    model, groups = net(chain("Conv", "Tanh"))
    other, _ = net(chain("Conv", "Exp"))
    signer = signer_of(groups)

    def lone(of: ir.Model) -> list[ir.Node]:
        return [n for n in of.graph if n.op_type != "Conv"]

    assert signer.lone(lone(model)) == signer.lone(lone(model.clone()))
    assert signer.lone(lone(model)) != signer.lone(lone(other))
    assert signer.lone([]) != signer.lone(lone(model))


def test_attributes_of_every_kind_have_a_text() -> None:
    node = ir.node("Foo", [], {"a": 1, "b": [1.0, 2.0], "c": "text", "t": ir.tensor(np.zeros((2, 3), np.int8))})
    same = ir.node("Foo", [], {"t": ir.tensor(np.ones((2, 3), np.int8)), "c": "text", "b": [1.0, 2.0], "a": 1})
    other = ir.node("Foo", [], {"a": 2, "b": [1.0, 2.0], "c": "text", "t": ir.tensor(np.zeros((2, 3), np.int8))})
    signer = Signer([], TARGET, {}, {}, {})
    assert signer.lone([node]) == signer.lone([same])
    assert signer.lone([node]) != signer.lone([other])


def test_a_digest_is_the_same_in_every_process() -> None:
    assert digest({"b": [1, 2], "a": None}) == digest({"a": None, "b": [1, 2]})
    assert digest([1]) == "080a9ed428559ef602668b4c00f114f1"
