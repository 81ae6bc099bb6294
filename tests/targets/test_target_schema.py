"""Capability tables that extend others, and the schemes inside one."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from qcompiler.errors import TargetError
from qcompiler.pipeline.replay import _target
from qcompiler.targets import target as module
from qcompiler.targets.groups import block_of, find_groups
from qcompiler.targets.target import Target, load_target, parse_target
from tests.passes.quantize.lab import import_exactly, model_of, normal

HEAD = '[target]\nengine = "e"\n'


def row(*types: str, form: str = "static", table: str = "op", why: str = "") -> str:
    names = ", ".join(f'"{t}"' for t in types)
    return f'[[{table}]]\ntype = [{names}]\nkind = "weighted"\nforms = ["{form}"]\nwhy = "{why}"\n'


SHIPPED = {
    "base": HEAD
    + 'activation = "int8"\nsymmetric = true\nmax_opset = 17\n'
    + row("Conv", "MatMul", why="base")
    + row("Add", why="base")
    + '[traps]\na = "1"\nb = "2"\n[scheme.fp8]\nactivation = "float8e4m3fn"\nweight = "float8e4m3fn"\n'
    + row("MatMul", table="scheme.fp8.op", why="fp8")
    + '[scheme.half]\nfloat_type = "float16"\ndrop = ["Add"]\n[unavailable]\nnvfp4 = "needs SM120"\n',
    "child": '[target]\nextends = "base"\ndrop = ["Add"]\nmax_opset = 21\nsm = 89\n'
    + row("MatMul", form="dynamic", why="child")
    + '[traps]\nb = "3"\n[scheme.fp8]\nweight = "float8e5m2"\n[[scheme.fp8.op]]\ntype = ["Conv"]\nkind = "weighted"\n'
    + 'forms = ["static-float"]\nwhy = "child"\n',
    "old": '[target]\nextends = "base"\n[unavailable]\nfp8 = "no fp8 before SM89"\n',
    "grandchild": '[target]\nextends = "child"\nsm = 90\n',
    "ring": '[target]\nextends = "gnir"\n',
    "gnir": '[target]\nextends = "ring"\n',
    "lost": '[target]\nextends = "nowhere"\n',
}


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.setattr(module, "target_names", lambda: tuple(sorted(SHIPPED)))
    monkeypatch.setattr(module, "_text_of", SHIPPED.__getitem__)
    return load_target


def test_a_child_overrides_fields_rows_and_traps(shipped):
    child = shipped("child")
    assert (child.name, child.engine, child.activation, child.symmetric) == ("child", "e", "int8", True)
    assert (child.max_opset, child.sm) == (21, 89)
    assert [(r.type, r.forms, r.why) for r in child.rows] == [
        (("MatMul",), ("dynamic",), "child"),
        (("Conv",), ("static",), "base"),
    ]
    assert child.traps == {"a": "1", "b": "3"}
    assert child.row("Add") is None


def test_tables_extend_through_generations(shipped):
    child, grandchild = shipped("child"), shipped("grandchild")
    assert grandchild.sm == 90
    assert grandchild.rows == child.rows
    assert grandchild.schemes == ("int8", "fp8", "half")


def test_a_scheme_is_a_plain_target_with_other_fields_and_rows(shipped):
    fp8 = shipped("base", "fp8")
    assert isinstance(fp8, Target)
    assert (fp8.scheme, fp8.activation, fp8.weight, fp8.symmetric) == ("fp8", "float8e4m3fn", "float8e4m3fn", True)
    assert [r.why for r in fp8.rows] == ["fp8"]
    assert fp8.row("Conv") is None
    assert fp8.with_scheme("fp8") is fp8
    # Without rows of its own a scheme has those of the target, less what it drops.
    half = shipped("base", "half")
    assert half.float_type == "float16"
    assert [r.type for r in half.rows] == [("Conv", "MatMul")]


def test_a_childs_scheme_extends_that_of_its_parent(shipped):
    fp8 = shipped("child").with_scheme("fp8")
    assert (fp8.activation, fp8.weight, fp8.max_opset) == ("float8e4m3fn", "float8e5m2", 21)
    assert [(r.type, r.why) for r in fp8.rows] == [(("Conv",), "child"), (("MatMul",), "fp8")]


def test_a_missing_scheme_says_why_and_what_there_is(shipped):
    with pytest.raises(TargetError, match=r"target base has no scheme 'nvfp4': needs SM120; it has int8, fp8, half"):
        shipped("base").with_scheme("nvfp4")
    with pytest.raises(TargetError, match=r"target old has no scheme 'fp8': no fp8 before SM89; it has int8, half"):
        shipped("old", "fp8")
    with pytest.raises(TargetError, match=r"target base has no scheme 'int3'; it has int8, fp8, half; take one"):
        shipped("base", "int3")


def test_circles_and_unknown_parents_are_refused(shipped):
    with pytest.raises(TargetError, match="extend each other in a circle: ring -> gnir -> ring"):
        shipped("ring")
    with pytest.raises(TargetError, match="target lost: extends unknown 'nowhere'; known: base, child"):
        shipped("lost")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + '[scheme.fp8]\nactivaton = "int8"\n', r"unknown key 'activaton' in \[scheme.fp8\]"),
        (HEAD + '[scheme.fp8]\nengine = "f"\n', r"unknown key 'engine' in \[scheme.fp8\]"),
        (HEAD + '[scheme.fp8]\nweight = "fp8"\n', "unknown format 'fp8' for weight; known: .*float8e4m3fn"),
        (HEAD + 'bias = "int64"\n', "bias is 'int64'; expected one of int32, float"),
        (HEAD + 'float_type = "half"\n', "float_type is 'half'; expected one of float32, float16, bfloat16"),
        (HEAD + "symmetric = 1\n", r"symmetric in \[target\] is 1; expected a bool"),
        (HEAD + 'sm = "89"\n', r"sm in \[target\] is '89'; expected a whole number"),
        (HEAD + "blocks = 32\n", r"blocks in \[target\] is 32; expected a list"),
        (HEAD + '[schemes.fp8]\nweight = "int8"\n', "unknown table 'schemes'; known: op, scheme, target, traps"),
        (HEAD + row("MatMul", table="scheme.fp8.op", form="statics"), "unknown form 'statics'"),
    ],
)
def test_malformed_schemes_are_refused_by_the_name_of_the_key(text, message):
    with pytest.raises(TargetError, match=message):
        parse_target(text, "t")


def test_a_target_with_schemes_survives_the_replay_file(shipped):
    target = shipped("child")
    again = _target(json.loads(json.dumps(asdict(target))))
    assert again == target
    assert again.with_scheme("fp8") == target.with_scheme("fp8")


BLOCKS = HEAD + '[scheme.int4-weights]\nweight = "int4"\nblock = 128\nblocks = [128, 64, 32]\n'


def test_a_block_size_may_be_asked_for_where_the_scheme_has_it():
    target = parse_target(BLOCKS, "t")
    assert target.with_scheme("int4-weights").block == 128
    assert target.with_scheme("int4-weights", 32).block == 32
    assert target.with_scheme("int8", 32).block == 0  # a scheme without blocks
    with pytest.raises(TargetError, match="scheme int4-weights of t has no blocks of 16; it has blocks of 128, 64, 32"):
        target.with_scheme("int4-weights", 16)


GATED = (
    HEAD + 'weight = "int4"\nblock = 128\nblocks = [128, 64, 32]\n[[op]]\ntype = ["MatMul", "Gemm"]\n'
    'kind = "weighted"\nforms = ["weight-only"]\ndata = [0]\nweight = 1\nweight_axis = -1\nmin_reduce = 32\n'
    "min_columns = 16\nmultiple_of = 8\n"
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "code", "text"),
    [
        ((64, 32), None, ""),
        ((16, 32), "too-small", "sums 16 products, below 32"),
        ((64, 8), "too-few-columns", "8 output columns, below 16"),
        ((64, 20), "not-multiple", "reduces 64 and gives 20; the kernel needs multiples of 8"),
        ((72, 32), "block-size", "72 numbers along K, which blocks of 128, 64, 32 do not divide"),
    ],
)
def test_sizes_keep_a_product_in_float_for_a_named_reason(shape, code, text):
    k, n = shape
    model = import_exactly(model_of(f"float[b,{k}] x", f"float[b,{n}] y", "y = MatMul(x, m)", {"m": normal(1, k, n)}))
    (group,) = find_groups(model, parse_target(GATED, "t"))
    assert group.legal == (() if code else ("weight-only",))
    if code:
        assert [(f, c) for f, c, _ in group.refusals] == [("weight-only", code)]
        assert text in group.refusals[0][2]


@pytest.mark.parametrize(("k", "block"), [(256, 128), (192, 64), (96, 32), (72, None)])
def test_the_largest_block_that_divides_k_is_taken(k, block):
    model = import_exactly(model_of(f"float[b,{k}] x", "float[b,16] y", "y = MatMul(x, m)", {"m": normal(1, k, 16)}))
    (node,) = model.graph
    assert block_of(parse_target(GATED, "t"), node) == block


def test_a_convolution_has_no_blocks():
    text = GATED.replace('"MatMul", "Gemm"', '"Conv"').replace("min_columns = 16", "min_columns = 0")
    weights = {"w": normal(1, 8, 8, 3, 3)}
    model = import_exactly(model_of("float[b,8,9,9] x", "float[b,8,7,7] y", "y = Conv(x, w)", weights))
    (group,) = find_groups(model, parse_target(text, "t"))
    assert [(f, c) for f, c, _ in group.refusals] == [("weight-only", "block-form")]


def test_a_table_of_rows_is_gathered_by_rows():
    text = GATED.replace('"MatMul", "Gemm"', '"Gather"').replace("data = [0]\nweight = 1", "data = [1]\nweight = 0")
    for axis, code in ((0, None), (1, "gather-axis")):
        body = f"y = Gather<axis={axis}>(m, i)"
        model = import_exactly(model_of("int64[b] i", "float[p,q] y", body, {"m": normal(1, 64, 64)}))
        (group,) = find_groups(model, parse_target(text, "t"))
        assert [c for _, c, _ in group.refusals] == ([code] if code else [])


def test_a_row_that_needs_a_processor_flag_is_float_without_it() -> None:
    text = """[target]
engine = "onnxruntime"
[[op]]
type = ["Concat"]
kind = "arithmetic"
forms = ["static"]
requires = ["amx_int8"]
why = "x"
"""
    target = parse_target(text, "t")
    assert target.on({"amx_int8", "vnni"}).rows == target.rows
    row = target.on({"vnni"}).rows[0]
    assert (row.forms, row.why) == ((), "needs amx_int8: x")
