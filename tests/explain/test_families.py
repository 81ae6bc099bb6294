"""Every family of models is explained and blamed: a reason for every float node, a place for every group."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcompiler.explaining.accounts import group_accounts
from qcompiler.explaining.blame_run import accuse, measure
from qcompiler.explaining.causes import advice_table
from qcompiler.explaining.evidence import build_evidence
from qcompiler.explaining.finding import suggestions
from qcompiler.options import Options
from tests.families import FAMILIES, plain, source

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_node_in_float_has_a_cause_and_advice(name: str) -> None:
    built = build_evidence(source(name), Options(calibration=FAMILIES[name].feeds(), guard=False))
    accounts = group_accounts(built.evidence)
    assert accounts
    for account in accounts:
        if account.form == "float":
            assert account.first is not None, account
            assert account.first.advice, account.first
    assert {a.group for a in accounts if a.group} == {g.name for g in built.evidence.groups}


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("float16", "bfloat16") and not n.startswith("qdq")])
def test_every_quantized_group_is_measured(name: str, tmp_path: Path) -> None:
    made = plain(name)
    path = tmp_path / "m.onnx"
    made.save(path)
    result = measure(accuse(source(name), path, FAMILIES[name].feeds(), feeds=3))
    assert result.unaligned == ()
    assert result.faults
    assert result.worst_db > 20
    assert all(f.output_db >= result.worst_db - 6 for f in result.faults)


def test_every_reason_code_of_planning_has_advice() -> None:
    codes: set[str] = set()
    for file in ("groups.py", "placement.py"):
        text = (ROOT / "qcompiler" / "targets" / file).read_text(encoding="utf-8")
        codes |= set(re.findall(r'return "([a-z]+(?:-[a-z0-9]+)+)", ', text))
    assert len(codes) > 15
    assert codes <= set(advice_table()["plan"])


def test_every_reason_code_of_given_qdq_has_advice() -> None:
    text = (ROOT / "qcompiler" / "explaining" / "given.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'return \(?\s*"([a-z0-9]+(?:-[a-z0-9]+)+)",', text))
    assert len(codes) > 15
    assert codes <= set(advice_table()["given"])
    assert all(len(advice) > 20 for table in advice_table().values() for advice in table.values())


@pytest.mark.parametrize(
    ("name", "expected"), [("/block/conv1", "/block/Conv1"), ("Conv1", "/block/Conv1"), ("/blok/Conv1", "/block/Conv1")]
)
def test_suggestions(name: str, expected: str) -> None:
    assert suggestions(name, ["/stem/Conv", "/block/Conv1", "/block/Add"])[0] == expected
    assert suggestions("zzz", ["/stem/Conv"]) == []
