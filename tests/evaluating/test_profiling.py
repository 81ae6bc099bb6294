"""Profiles: every microsecond has an origin, and float stands beside what was made of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qcompiler.engine import NodeCost, Profile
from qcompiler.errors import ModelError
from qcompiler.evaluating.pair import open_pair
from qcompiler.evaluating.profile_text import profile_dict
from qcompiler.evaluating.profiling import GroupTime, _groups, profile_models
from tests.evaluating.pairs import chain, write


def test_all_time_has_an_origin(tmp_path: Path) -> None:
    files = write(tmp_path)
    found = profile_models(str(files.model), files.compiled, rounds=3, seconds=0.01)
    a, b = found.models
    assert sum(g.before or 0.0 for g in found.groups) == pytest.approx(a.total)
    assert sum(g.after for g in found.groups) == pytest.approx(b.total)
    assert sum(o.microseconds for o in b.operators) == pytest.approx(b.total)
    assert [o.microseconds for o in b.operators] == sorted((o.microseconds for o in b.operators), reverse=True)
    converting = sum(o.microseconds for o in b.operators if o.conversion)
    assert b.conversions == pytest.approx(converting / b.total)
    assert sum(g.conversions for g in found.groups) == pytest.approx(converting)
    assert {g.name for g in found.groups} <= {f"bias{i}/Gemm" for i in range(5)} | {f"relu{i}" for i in range(5)}
    assert found.data == "random data"
    assert found.speedup == pytest.approx(a.timing.minimum / b.timing.minimum)


def test_times_are_given_to_origins(tmp_path: Path) -> None:
    files = write(tmp_path)
    pair = open_pair(str(files.model), files.compiled)
    assert pair.compiled is not None
    before = Profile((NodeCost("fc0", "FusedGemm", 10.0), NodeCost("fc1", "FusedGemm", 20.0)))
    after = Profile((
        NodeCost("fc0", "QGemm", 4.0), NodeCost("r0/QuantizeLinear", "QuantizeLinear", 3.0),
        NodeCost("fc1", "QGemm", 25.0),
    ))  # fmt: skip
    groups, notes = _groups(pair, [(before, pair.given), (after, pair.compiled)])
    found = {g.name: g for g in groups}
    first, second = found["bias0/Gemm"], found["bias1/Gemm"]
    assert (first.before, first.after, first.conversions, first.gain, first.slower) == (10.0, 7.0, 3.0, 3.0, False)
    assert first.kernels == ("QGemm", "QuantizeLinear")
    assert (second.before, second.after, second.gain, second.slower) == (20.0, 25.0, -5.0, True)
    assert notes == ()


def test_slower_means_more_than_noise() -> None:
    assert not GroupTime("a", "Conv", "static", 100.0, 102.5).slower
    assert GroupTime("a", "Conv", "static", 100.0, 104.0).slower
    assert not GroupTime("a", "Conv", "static", 0.0, 1.0).slower
    assert not GroupTime("a", "Conv", "", None, 100.0).slower


def test_one_model_is_profiled_as_it_is(tmp_path: Path) -> None:
    files = write(tmp_path)
    found = profile_models(str(files.compiled), feeds=str(files.feeds), rounds=3, seconds=0.01)
    assert found.speedup is None
    assert sum(g.after for g in found.groups) == pytest.approx(found.models[0].total)
    assert found.data == "the first feed of the data"
    data = profile_dict(found)
    assert data["groups"][0]["before_us"] is None
    assert data["models"][0]["min_us"] > 0


def test_models_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path)
    onnx.save(chain(width=16), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="do not belong together"):
        profile_models(str(files.model), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="no such file"):
        profile_models(str(tmp_path / "gone.onnx"))
    (tmp_path / "m.plan").write_bytes(b"x")
    with pytest.raises(ModelError, match="no profile per operator here; use trtexec"):
        profile_models(str(tmp_path / "m.plan"))
