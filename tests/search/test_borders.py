"""Which conversions a choice of forms pays, value by value."""

from __future__ import annotations

import pytest

from qcompiler.search.borders import Border, find_borders, form_of, reads, stores
from tests.search.nets import SAME, chain, net


def test_a_chain_has_a_border_per_value() -> None:
    _, groups = net(chain("Conv", "Conv", "Tanh", "Conv"))
    borders = find_borders(list(groups.values()), {"x": 5, "v0": 7})
    assert borders == {
        "x": Border("", ("c0",), False, 5),
        "v0": Border("c0", ("c1",), False, 7),
        "v1": Border("c1", (), True, 0),  # a Tanh reads it
        "v2": Border("", ("c3",), False, 0),
        "y": Border("c3", (), True, 0),
    }


def test_an_activation_belongs_to_its_group() -> None:
    _, groups = net(f"[c0] a = Conv{SAME}(x, w) [r0] b = Relu(a) [c1] y = Conv{SAME}(b, v)")
    borders = find_borders(list(groups.values()), {})
    assert set(borders) == {"x", "b", "y"}
    assert borders["b"] == Border("c0", ("c1",))


@pytest.mark.parametrize(
    ("producer", "first", "second", "expected"),
    [
        ("float", "float", "float", []),
        ("float", "static", "float", ["quantize"]),
        ("float", "static", "static-float", ["quantize"]),  # once for both
        ("float", "dynamic", "static", ["quantize", "dynamic"]),
        ("float", "weight-only", "float", []),
        ("static", "static", "static-float", []),
        ("static", "static", "float", ["dequantize"]),
        ("static", "float", "float", ["dequantize"]),  # once for both
        ("static", "dynamic", "static", ["dequantize", "dynamic"]),
        ("static-float", "static", "float", ["quantize"]),  # it writes floats
    ],
)
def test_charges(producer: str, first: str, second: str, expected: list[str]) -> None:
    border = Border("p", ("a", "b"))
    assert list(border.charges({"p": producer, "a": first, "b": second})) == expected


def test_what_is_read_outside_is_dequantized() -> None:
    assert list(Border("p", ("a",), outside=True).charges({"p": "static", "a": "static"})) == ["dequantize"]
    assert list(Border("p", ("a",), outside=True).charges({"p": "float", "a": "float"})) == []


def test_what_options_make_possible() -> None:
    border = Border("p", ("a", "b"))
    options = {"p": ("float",), "a": ("float", "dynamic"), "b": ("float",)}
    assert list(border.possible(options)) == ["dynamic"]
    assert list(border.possible({**options, "p": ("float", "static")})) == ["dequantize", "dynamic"]
    assert list(border.possible({"a": ("float", "static")})) == ["quantize"]


def test_an_option_behaves_as_its_form() -> None:
    assert form_of("weight-only:int4") == form_of("weight-only@int4/32") == "weight-only"
    assert stores("static:int8")
    assert reads("dynamic:int4") == "dynamic"
    assert reads("weight-only:int4") is None
