"""A decisions record with treatments gives the same bytes again, through the compiler and from a lock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.decisions import Decisions
from qcompiler.errors import CalibrationError
from qcompiler.explaining.lock import LockError, compile_locked, make_lock
from qcompiler.options import Options
from qcompiler.treatments import LAST, TREATMENTS
from tests.passes.quantize.lab import model_of
from tests.treatments.bench import feeds_of, normal

F = np.float32
WEIGHTS = {
    "w": normal(1, 16, 3, 3, 3, scale=0.3), "b": normal(2, 16), "v": normal(3, 64, 16, 1, 1, scale=0.3),
    "u": normal(4, 64, 16, 1, 1, scale=3.0), "g": normal(5, 64) + 1, "h": normal(6, 64), "m": normal(7, 64, 48),
    "flat": np.array([0, 64, -1]),
}  # fmt: skip
BODY = """[a] p = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(p) [c] q = Conv(r, v) [d] s = Conv(r, u)
[k] t = Concat<axis=2>(q, s) [f] l = Reshape(t, flat) [o] n = Transpose<perm=[0,2,1]>(l)
[n] i = LayerNormalization(n, g, h) [e] y = MatMul(i, m)"""
SHAPE = (2, 3, 8, 8)
SOURCE = model_of("float[2,3,8,8] x", "float[] y", BODY, WEIGHTS).SerializeToString()
FEEDS = feeds_of(0, 8, x=SHAPE)
FORMS: dict[str, Any] = {
    "a": "static", "c": "static", "d": "static", "k": "static", "f": "static", "o": "static", "e": "dynamic",
}  # fmt: skip
KEPT: dict[str, dict[str, Any]] = {
    "equalize-layers": {"p": [0.5, 1.0]},
    "smooth-activations": {"i": 0.5},
    "split-outlier-channels": {"p": [3]},
    "separate-concats": {"k": ["k", "f", "o"]},
    "round-adaptively": {"a": "sequential", "c": "soft", "e": "sequential"},
    "correct-bias": {"a@static": [0.01 * i for i in range(16)]},
}


def build(kept: dict[str, dict[str, Any]]) -> qcompiler.CompiledModel:
    record = Decisions(forms=FORMS, treatments=kept)
    return qcompiler.compile(SOURCE, target="ort-x86", calibration=FEEDS, decisions=record, guard=False)


@pytest.fixture(scope="module")
def plain() -> bytes:
    return build({}).to_bytes()


def test_every_treatment_is_here() -> None:
    assert set(KEPT) == {t.name for t in (*TREATMENTS, LAST)}


@pytest.mark.parametrize("name", list(KEPT))
def test_a_record_repeats_each_treatment_byte_for_byte(name: str, plain: bytes) -> None:
    first = build({name: KEPT[name]})
    assert first.to_bytes() != plain
    assert first.decisions.treatments == {name: KEPT[name]}
    text = first.decisions.to_json()
    again = qcompiler.compile(SOURCE, target="ort-x86", calibration=FEEDS, decisions=Decisions.from_json(text))
    assert again.to_bytes() == first.to_bytes()


def test_a_record_without_its_data_says_what_to_give() -> None:
    record = build({"round-adaptively": KEPT["round-adaptively"]}).decisions
    with pytest.raises(CalibrationError, match=r"treatments \(round-adaptively\); give the calibration data"):
        qcompiler.compile(SOURCE, target="ort-x86", decisions=replace(record, forms={"e": "dynamic"}))


def test_a_lock_repeats_treatments_and_names_other_data() -> None:
    options = Options(calibration=FEEDS, guard=False, target="ort-x86")
    made = build({name: KEPT[name] for name in ("equalize-layers", "round-adaptively", "correct-bias")})
    lock = make_lock(SOURCE, options, made)
    assert compile_locked(SOURCE, lock, Options(calibration=FEEDS)).to_bytes() == made.to_bytes()
    with pytest.raises(LockError, match="5 feeds, locked with 8"):
        compile_locked(SOURCE, lock, Options(calibration=FEEDS[:5]))
