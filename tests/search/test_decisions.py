"""The decisions record as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qcompiler.decisions import Decisions
from qcompiler.errors import PassError

RECORD = Decisions(
    forms={"/conv": "static", "/fc": "dynamic", "/out": "static-float"},
    engine_forms={"emit:/conv": "qoperator", "skip-layer-norm": "avoid"},
    estimator="percentile:99.99",
    treatments={"smooth-activations": {"/norm/out": 0.55}},
    why={"/b": "float: its region was measured 12 us slower on integers"},
    figures={"profile_us": {"float": 100.5}, "regions_returned": [{"groups": ["/b"], "loss_us": 12.0}]},
    context={"engine": "onnxruntime 1.31.1", "threads": "1"},
)


def test_a_record_survives_the_way_through_text() -> None:
    assert Decisions.from_json(RECORD.to_json()) == RECORD
    assert Decisions.from_json(Decisions().to_json()) == Decisions()


def test_equal_records_have_equal_text() -> None:
    turned = Decisions.from_json(RECORD.to_json())
    assert turned.to_json() == RECORD.to_json()
    other = Decisions(forms=dict(reversed(RECORD.forms.items())))
    assert other.to_json() == Decisions(forms=RECORD.forms).to_json()
    assert RECORD.to_json().endswith("}\n")


def changed(**parts: Any) -> str:
    return json.dumps({**json.loads(RECORD.to_json()), **parts})


def without(part: str) -> str:
    return json.dumps({k: v for k, v in json.loads(RECORD.to_json()).items() if k != part})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a decisions record"),
        ("{", "not a decisions record"),
        ("[]", "not a decisions record"),
        ("3", "not a decisions record"),
        ("{}", "not a decisions record: it lacks 'version'"),
        (without("version"), "it lacks 'version'"),
        (changed(version=99), "has version 99, this release reads 2; compile anew"),
        (changed(surprise=1), "not a decisions record: .*surprise"),
        (changed(forms={"/conv": "int3"}), "names the unknown form 'int3'"),
        (changed(forms=["static"]), "expected a table in 'forms', found"),
        (changed(forms=None), "expected a table in 'forms', found None"),
        (changed(engine_forms="avoid"), "expected a table in 'engine_forms', found 'avoid'"),
        (changed(treatments=[1]), "expected a table in 'treatments'"),
        (changed(forms={"/conv": ["static"]}), "names the unknown form"),
        (changed(estimator=3), "estimator"),
    ],
)
def test_anything_else_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        Decisions.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_record_without_treatments_is_read() -> None:
    assert Decisions.from_json(without("treatments")).treatments == {}
