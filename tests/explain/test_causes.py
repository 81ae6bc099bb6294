"""The first cause of planted non-fusions, and none where the engine fuses."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from qcompiler.explaining.causes import advice_table
from qcompiler.explaining.explain import explain_build, explain_given
from qcompiler.options import Options
from tests.explain.planted import FUSED, GIVEN, NUMBERS, PLANNED, WEIGHTS, Given, planned_options
from tests.passes.quantize.lab import import_exactly, model_of, random_feeds

TARGET = Options(target="ort-x86")
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def given_model(case: Given) -> bytes:
    return model_of(case.inputs, case.result, case.body, NUMBERS, case.opset).SerializeToString()


@pytest.mark.parametrize("what", GIVEN)
def test_the_first_cause_in_given_qdq(what: str) -> None:
    code, case = GIVEN[what]
    if code == "signed-activation" and not ON_X86:
        pytest.skip("signed activations fuse on this processor")
    (account,) = explain_given(given_model(case), TARGET, "n").accounts
    assert account.form == "given"
    assert account.first is not None
    assert account.first.code == code, account.causes
    assert account.first.advice == advice_table()["given"][code]
    assert account.first.text


@pytest.mark.parametrize("what", FUSED)
def test_no_cause_where_the_engine_fuses(what: str) -> None:
    (account,) = explain_given(given_model(FUSED[what]), TARGET, "n").accounts
    assert (account.form, account.causes) == ("fused", ())


@pytest.mark.parametrize("what", PLANNED)
def test_the_first_cause_in_a_build(what: str, tmp_path: Path) -> None:
    code, case = PLANNED[what]
    proto = model_of(case.inputs, case.result, case.body, WEIGHTS)
    feeds = random_feeds(import_exactly(proto), 8, 2)
    for feed in feeds:
        if "p" in feed:
            feed["p"] = feed["p"] & False
        if "v" in feed and feed["v"].dtype == "int64":
            feed["v"] = feed["v"][:1] * 0 + 1
    override = tmp_path / "o.toml"
    if case.override:
        override.write_text(f'[[override]]\nmatch = "n"\nform = "{case.override}"\n')
    options = planned_options(case, feeds, str(override) if case.override else "")
    (account,) = explain_build(proto, options, "n", errors=False).accounts
    assert account.first is not None, account
    assert account.first.code == code, account.causes
    assert account.first.advice == advice_table()["plan"][code]
    # Of an unknown rank this engine makes more than our own rules do: the bias stays outside, the product is fused.
    assert (account.kernel == "") == (code != "unknown-rank")


def test_there_are_more_than_twenty_plants_of_as_many_kinds() -> None:
    assert len(GIVEN) >= 20
    assert len(PLANNED) >= 20
    assert len({code for code, _ in (*GIVEN.values(), *PLANNED.values())}) >= 30
