"""`qcompiler.ort` as a module, `optimize`, and ``qcompiler cache``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import typer
from typer.testing import CliRunner

import qcompiler
import qcompiler.ort
from qcompiler.cli_cache import cache_command, parse_span
from qcompiler.dropin.settings import DropinOptions
from qcompiler.dropin.store import Cache
from qcompiler.errors import PassError
from tests.dropin.conftest import feeds, small_net, sqnr


def test_every_other_name_is_onnx_runtimes() -> None:
    for name in dir(onnxruntime):
        assert hasattr(qcompiler.ort, name), name
        if name not in ("InferenceSession", "SessionOptions") and not name.startswith("__"):
            assert getattr(qcompiler.ort, name) is getattr(onnxruntime, name)
    assert qcompiler.ort.__version__ == onnxruntime.__version__
    assert set(dir(onnxruntime)) <= set(dir(qcompiler.ort))
    with pytest.raises(AttributeError, match="module 'onnxruntime' has no attribute 'InferenceSezzion'"):
        _ = qcompiler.ort.InferenceSezzion


def test_the_signature_is_onnx_runtimes_and_one_option_more() -> None:
    given = inspect.signature(onnxruntime.InferenceSession.__init__).parameters
    ours = inspect.signature(qcompiler.ort.InferenceSession.__init__).parameters
    assert [n for n in ours if n != "qcompiler_options"] == list(given)
    assert {n: p.default for n, p in given.items()} == {n: ours[n].default for n in given}
    for name in ("run", "run_async", "run_with_ort_values", "run_with_iobinding", "set_providers", "io_binding"):
        stock, own = (getattr(m.InferenceSession, name) for m in (onnxruntime, qcompiler.ort))
        assert list(inspect.signature(own).parameters) == list(inspect.signature(stock).parameters)


def test_session_options_are_onnx_runtimes() -> None:
    options = qcompiler.ort.SessionOptions()
    assert isinstance(options, onnxruntime.SessionOptions)
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.qcompiler_calls == []


def test_optimize_gives_the_bytes_of_compile(net: Path, cache: Path) -> None:
    made = qcompiler.ort.optimize(net, {"calibration": feeds(4)})
    assert made == qcompiler.compile(net, calibration=feeds(4), guard=False).to_bytes()
    assert qcompiler.ort.optimize(onnx.load(net), DropinOptions(calibration=feeds(4))) == made
    assert len(Cache(cache).entries()) == 1
    dynamic = qcompiler.ort.optimize(net.read_bytes())
    assert dynamic == qcompiler.compile(net, guard=False).to_bytes()
    assert b"Dynamic" in dynamic
    feed = feeds(1)[0]
    expected, found = (
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, feed)[0] for m in (str(net), made)
    )
    assert sqnr(expected, found) > 30


def test_without_data_is_another_entry_than_with_requests(net: Path, cache: Path) -> None:
    qcompiler.ort.optimize(net)
    session = qcompiler.ort.InferenceSession(net, providers=["CPUExecutionProvider"])
    assert session.qcompiler_report.state == "collecting"


def test_optimize_gives_the_model_back_where_it_cannot_help(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert qcompiler.ort.optimize(net, {"recipe": "no-such"}) == net.read_bytes()
    (record,) = caplog.records
    assert "no-such" in record.getMessage()
    with pytest.raises(PassError, match="unknown qcompiler option"):
        qcompiler.ort.optimize(net, {"recpie": "int8"})
    monkeypatch.setenv("QCOMPILER_ORT", "off")
    assert qcompiler.ort.optimize(net) == net.read_bytes()
    onnx.save(small_net(), tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    inside = onnx.load_from_string(qcompiler.ort.optimize(tmp_path / "e.onnx"))
    assert np.array_equal(
        onnx.numpy_helper.to_array(inside.graph.initializer[0]),
        onnx.numpy_helper.to_array(small_net().graph.initializer[0]),
    )
    with pytest.raises(FileNotFoundError):
        qcompiler.ort.optimize(tmp_path / "absent.onnx")


def run_command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command("cache")(cache_command)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_lists_measures_and_clears(net: Path, cache: Path) -> None:
    assert run_command().output == f"0 entries in {cache}\n"
    qcompiler.ort.optimize(net)
    (entry,) = Cache(cache).entries()
    listed = run_command("list").output
    assert entry.key[:12] in listed
    assert "net.onnx" in listed
    assert "compiled" in listed
    assert run_command("size").output == f"{entry.size / 1000:.1f} kB in {cache}\n"
    assert run_command("clear", "--unused", "1d").output == f"removed 0 entries from {cache}\n"
    assert run_command("clear", "--folder", str(cache)).output == f"removed 1 entries from {cache}\n"
    assert list(cache.iterdir()) == []


def test_the_command_refuses_what_it_does_not_know() -> None:
    assert (parse_span("30d"), parse_span(" 2W "), parse_span("90s")) == (2_592_000.0, 1_209_600.0, 90.0)
    with pytest.raises(PassError, match="--unused is 'soon'; expected a span like 30d, 12h or 2w"):
        parse_span("soon")
    assert isinstance(run_command("burn").exception, PassError)
    assert isinstance(run_command("list", "--unused", "1d").exception, PassError)
