"""Every byte of a file belongs to a group, a conversion, a shared weight or the rest, and weights are found by name."""

from __future__ import annotations

import pytest

from qcompiler.ir.serialize import to_bytes
from qcompiler.search.attribution import Owners
from qcompiler.search.borders import find_borders
from qcompiler.search.file_sizes import FileSplitter, stored_bits, weight_of
from qcompiler.search.forms_problem import Sizes
from tests.search.nets import chain, net


@pytest.mark.parametrize(
    ("name", "weight"),
    [("w", "w"), ("w:q", "w"), ("w:q:lstm_scale", "w"), ("v:0:scale", "v:0"), ("wq", None), ("x:w", None)],
)
def test_a_constant_belongs_to_the_weight_that_its_name_begins_with(name: str, weight: str | None) -> None:
    assert weight_of(name, frozenset({"w", "v:0"})) == weight


def test_a_float_file_is_groups_and_the_rest() -> None:
    model, groups = net(chain("Conv", "Tanh"))
    splitter = FileSplitter(Owners.of(model, list(groups.values())), find_borders(list(groups.values()), {}))
    data = to_bytes(model, strip=True)
    found = splitter.split(data, {}, stored_bits(model, ["w"]))
    weight = 4 * 4 * 4 * 3 * 3
    assert found.total == len(data)
    assert found.bits == 8 * weight
    assert found.conversions == {}
    assert weight < found.groups["c0"] < weight + 200, "the weight, its name, and the node"
    assert found.rest == found.total - found.groups["c0"] > 0


def test_a_shared_weight_is_nobodys() -> None:
    model, groups = net(chain("Conv", "Conv"))
    listed = list(groups.values())
    splitter = FileSplitter(Owners.of(model, listed), find_borders(listed, {}), frozenset({"w"}))
    found = splitter.split(to_bytes(model, strip=True), {})
    assert found.shared > 4 * 4 * 4 * 3 * 3
    assert max(found.groups.values()) < 200


def test_corrected_sizes_tell_the_file_that_was_seen() -> None:
    model, groups = net(chain("Conv", "Conv"))
    listed = list(groups.values())
    splitter = FileSplitter(Owners.of(model, listed), find_borders(listed, {}))
    seen = splitter.split(to_bytes(model, strip=True), {})
    sizes = Sizes({g: {"float": 1, "static": 2} for g in groups}, {}, {}, 0, 144).corrected(seen)
    assert sizes.fixed + sum(by_form["float"] for by_form in sizes.groups.values()) == seen.total
    assert all(by_form["static"] == 2 for by_form in sizes.groups.values())
