"""Capability tables: what the schema refuses, and that every shipped one loads."""

from __future__ import annotations

import pytest

from qcompiler.errors import TargetError
from qcompiler.passes.integer_operators import EMITTERS
from qcompiler.patterns.traps import TRAP_RULES
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.plan import FORMS
from qcompiler.targets.target import load_target, parse_target, target_names

HEAD = '[target]\nengine = "onnxruntime"\n'
ROW = '[[op]]\ntype = ["Conv"]\nkind = "weighted"\nforms = ["static"]\n'


@pytest.mark.parametrize("name", target_names())
def test_every_shipped_table_holds_together(name):
    target = load_target(name)
    assert target.name == name
    assert target.doc
    assert FORMATS[target.activation].bits == 8
    assert FORMATS[target.weight].bits == (4 if target.scheme == "int4-weights" else 8)
    assert set(target.traps) <= set(TRAP_RULES)
    products = [row for row in target.rows if row.kind == "weighted" and row.weight < 0]  # of two activations
    assert all(len(row.data) == 2 and row is target.product_row(row.type[0]) for row in products)
    types = [t for row in target.rows for t in row.type if row not in products]
    assert len(types) == len(set(types))
    for row in target.rows:
        assert row.kind in ("weighted", "arithmetic", "mover", "recurrent")
        assert set(row.forms) <= set(FORMS) - {"float"}
        assert set(row.emit) <= set(row.forms)
        assert set(row.emit.values()) <= set(EMITTERS)
        assert row.why
        assert (row.weight >= 0) == (row.kind in ("weighted", "recurrent") and row not in products)


def test_the_two_tables_differ_in_weight_bits():
    assert (load_target("ort-x86").weight_bits, load_target("ort-generic").weight_bits) == (8, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[target", "target t: "),
        ('[target]\nflavour = "x"', r"unknown key 'flavour' in \[target\]"),
        ("", r"\[target\] lacks 'engine'"),
        ('[target]\nengine = "e"\nweight = "int7"', "unknown format 'int7' for weight; known: int2, uint2"),
        (HEAD + ROW.replace("weighted", "heavy"), "kind is 'heavy'; expected one of weighted, arithmetic, mover"),
        (HEAD + ROW.replace('["static"]', '["statics"]'), "unknown form 'statics'; known: static, static-float"),
        (HEAD + ROW.replace('["static"]', '"static"'), r"'forms' of an \[\[op\]\] row is 'static'; expected a list"),
        (HEAD + ROW + "weigth = 1", r"unknown key 'weigth' in an \[\[op\]\] row"),
        (HEAD + '[[op]]\nkind = "mover"\nforms = ["static"]', r"an \[\[op\]\] row lacks 'type'"),
        (HEAD + '[[op]]\ntype = ["Conv"]\nforms = ["static"]', "lacks 'kind'"),
        (HEAD + '[[op]]\ntype = ["Conv"]\nkind = "weighted"', "lacks 'forms'"),
    ],
)
def test_a_malformed_table_is_refused_by_the_name_of_the_key(text, message):
    with pytest.raises(TargetError, match=message):
        parse_target(text, "t")


def test_an_unknown_target_lists_those_there_are():
    with pytest.raises(TargetError, match=r"unknown target 'gpu'; known: cpu, host, .*openvino, .*ort-generic, "):
        load_target("gpu")


def test_a_table_answers_what_it_supports_and_why_not():
    target = parse_target('[target]\nengine = "an engine"\n' + ROW, "t")
    assert target.supports("Conv", "static") is None
    assert target.supports("Conv", "dynamic") == "Conv has the forms static on t, not dynamic"
    assert target.supports("Tanh", "static") == "an engine has no integer kernel for Tanh"
