"""The session: ONNX Runtime's in every respect, on the compiled model before and after it takes over."""

from __future__ import annotations

import atexit
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import qcompiler
from qcompiler.dropin import jobs
from qcompiler.dropin.jobs import registry
from qcompiler.dropin.session import InferenceSession
from qcompiler.dropin.store import Cache, Entry
from qcompiler.errors import PassError
from qcompiler.ort import SessionOptions
from tests.dropin.conftest import WIDTH, Told, feeds, one_thread, small_net, sqnr

CPU = ["CPUExecutionProvider"]


def float_outputs(net: Path, given: list[Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(net, one_thread(), CPU)
    return [session.run(None, feed)[0] for feed in given]


def cached_bytes(cache: Path) -> bytes:
    (entry,) = Cache(cache).entries()
    return (cache / entry.key / "model.onnx").read_bytes()


@pytest.fixture
def worker() -> None:
    """Ask for a real process that compiles."""


@pytest.fixture(autouse=True)
def compile_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile in a thread, as where an order cannot leave the process: starting Python takes longer than a test."""
    if "worker" not in request.fixturenames:
        monkeypatch.setattr(jobs.Worker, "started", classmethod(lambda *_: None))


# ---- self-calibration -----------------------------------------------------------------------------------------


def test_the_first_requests_run_in_float_and_the_rest_compiled(worker: None, net: Path, cache: Path) -> None:
    told, given = Told(), feeds(6)
    expected = float_outputs(net, given)
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 5, "callback": told})
    assert isinstance(session, onnxruntime.InferenceSession)
    assert session.qcompiler_report.state == "collecting"
    for feed, want in zip(given[:4], expected[:4], strict=True):
        assert np.array_equal(session.run(None, feed)[0], want)
    assert session.qcompiler_report.requests == 4
    session.run(["y"], given[4])
    status = told.wait()
    assert (status.state, status.samples, status.from_cache) == ("compiled", 5, False)
    assert status.build["integer_share"] == 1.0
    found = session.run(None, given[5])[0]
    assert not np.array_equal(found, expected[5])
    assert sqnr(expected[5], found) > 30
    again = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 5})
    assert again.qcompiler_report.from_cache
    assert again.qcompiler_report.compiled
    assert np.array_equal(again.run(None, given[5])[0], found)


def test_the_result_equals_offline_calibration_on_the_same_samples(swapped: Any, net: Path, cache: Path) -> None:
    swapped(count=6)
    offline = qcompiler.compile(net, calibration=feeds(6), guard=False)
    assert cached_bytes(cache) == offline.to_bytes()


def test_samples_are_copies(net: Path, cache: Path) -> None:
    told, buffer = Told(), np.empty((4, WIDTH), np.float32)
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 6, "callback": told})
    for feed in feeds(6):
        buffer[:] = feed["x"]
        session.run(None, {"x": buffer})
        buffer[:] = 1000  # a caller fills its buffer with something else
    told.wait()
    assert cached_bytes(cache) == qcompiler.compile(net, calibration=feeds(6), guard=False).to_bytes()


def test_a_failed_request_fails_as_ever_and_does_not_count(net: Path) -> None:
    session = InferenceSession(net, one_thread(), CPU)
    plain = onnxruntime.InferenceSession(net, one_thread(), CPU)
    for bad in ({"x": np.zeros((1, 3), np.float32)}, {}, {"z": np.zeros((1, WIDTH), np.float32)}):
        with pytest.raises(Exception) as expected:  # noqa: PT011  # ONNX Runtime's own types
            plain.run(None, bad)
        with pytest.raises(type(expected.value)) as found:
            session.run(None, bad)
        assert str(found.value) == str(expected.value)
    session.run(None, {"x": np.full((1, WIDTH), np.nan, np.float32)})
    assert session.qcompiler_report.requests == 0


def test_sessions_of_one_model_share_a_compilation(net: Path, cache: Path) -> None:
    told = [Told(), Told()]
    sessions = [
        InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 4, "callback": t}) for t in told
    ]
    for number, feed in enumerate(feeds(4)):
        sessions[number % 2].run(None, feed)
    assert [t.wait().state for t in told] == ["compiled", "compiled"]
    assert len(Cache(cache).entries()) == 1
    assert registry()._jobs == {}


def test_few_samples_are_made_up_for_later(worker: None, net: Path, cache: Path) -> None:
    first = InferenceSession(net, one_thread(), CPU)
    first.run(None, feeds(1)[0])
    job = registry()._jobs[first.qcompiler_report.key]
    job.finish()  # what the end of the process does
    atexit.unregister(job.finish)
    registry.cache_clear()  # another process
    Cache(cache).wait(job.plan.key, 60)
    told = Told()
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 4, "callback": told})
    assert (session.qcompiler_report.state, session.qcompiler_report.samples) == ("compiled", 1)
    for feed in feeds(4):
        session.run(None, feed)
    assert told.wait().samples == 4
    assert cached_bytes(cache) == qcompiler.compile(net, calibration=feeds(4), guard=False).to_bytes()


# ---- the swap ----------------------------------------------------------------------------------------------------


def test_no_request_waits_or_fails_while_the_compiled_model_comes(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the loading of the compiled model for as long as it takes to serve 50 requests of each of 4 threads."""
    loading, go_on, stop = threading.Event(), threading.Event(), threading.Event()
    load = InferenceSession._loaded

    def slow(self: InferenceSession, entry: Entry) -> Any:
        loading.set()
        assert go_on.wait(60)
        return load(self, entry)

    monkeypatch.setattr(InferenceSession, "_loaded", slow)
    told, given = Told(), feeds(4)
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 4, "callback": told})
    expected = float_outputs(net, given)
    served, errors = [0] * 4, []

    def serve(number: int) -> None:
        while not stop.is_set():
            try:
                found = session.run(None, given[number])[0]
                assert sqnr(expected[number], found) > 30
            except Exception as error:
                errors.append(error)
                return
            served[number] += 1

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    assert loading.wait(120)
    before = list(served)
    while not errors and min(now - then for now, then in zip(served, before, strict=True)) < 50:
        assert not told.status
    go_on.set()
    assert told.wait().state == "compiled"
    after = list(served)
    while not errors and min(now - then for now, then in zip(served, after, strict=True)) < 50:
        pass
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_the_float_engine_is_freed(net: Path) -> None:
    told = Told()
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 2, "callback": told})
    engine = weakref.ref(session._sess)
    for feed in feeds(2):
        session.run(None, feed)
    assert told.wait().compiled
    gc.collect()
    assert engine() is None


def test_everything_about_the_model_stays_as_it_was(net: Path, swapped: Callable[[], InferenceSession]) -> None:
    session, plain = swapped(), onnxruntime.InferenceSession(net, one_thread(), CPU)
    for what in ("get_inputs", "get_outputs"):
        given, found = ([(v.name, v.type, v.shape) for v in getattr(s, what)()] for s in (plain, session))
        assert found == given
    assert session.get_modelmeta().custom_metadata_map == {"names": "{0: 'cat'}"}
    assert session.get_modelmeta().graph_name == "net"
    assert session.get_providers() == plain.get_providers()
    assert session.get_provider_options() == plain.get_provider_options()
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_overridable_initializers() == []


def test_options_are_those_of_the_session_not_what_the_caller_made_of_them_since(net: Path) -> None:
    told, options = Told(), one_thread()
    session = InferenceSession(net, options, CPU, qcompiler_options={"requests": 1, "callback": told})
    options.intra_op_num_threads = 3
    session.run(None, feeds(1)[0])
    assert told.wait().compiled
    assert session.get_session_options().intra_op_num_threads == 1


# ---- the other ways to run ----------------------------------------------------------------------------------------


def test_run_async_before_and_after(net: Path, cache: Path) -> None:
    told, given = Told(), feeds(3)
    session = InferenceSession(
        net, one_thread(intra_op_num_threads=2), CPU, qcompiler_options={"requests": 2, "callback": told}
    )

    def once(feed: Any) -> Any:
        done, found = threading.Event(), []

        def take(results: Any, data: Any, error: str) -> None:
            found.extend([results, data, error])
            done.set()

        session.run_async(["y"], feed, take, "mine")
        assert done.wait(60)
        assert found[1:] == ["mine", ""]
        return found[0][0]

    expected = float_outputs(net, given)
    assert sqnr(expected[0], once(given[0])) > 100
    once(given[1])
    assert told.wait().samples == 2
    assert 30 < sqnr(expected[2], once(given[2])) < 100
    assert cached_bytes(cache) == qcompiler.compile(net, calibration=given[:2], guard=False, threads=2).to_bytes()


def test_bindings_before_and_after(net: Path, cache: Path) -> None:
    told, given = Told(), feeds(6)
    expected = float_outputs(net, given)
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 3, "callback": told})
    old = session.io_binding()
    assert isinstance(old, onnxruntime.IOBinding)

    def once(binding: Any) -> Any:
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    old.bind_cpu_input("x", given[0]["x"])
    assert np.array_equal(once(old), expected[0])
    old.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(given[1]["x"]))
    assert np.array_equal(once(old), expected[1])
    memory = given[2]["x"]
    old.bind_input("x", "cpu", 0, np.float32, memory.shape, memory.ctypes.data)
    assert np.array_equal(once(old), expected[2])
    assert told.wait().samples == 3
    assert cached_bytes(cache) == qcompiler.compile(net, calibration=given[:3], guard=False).to_bytes()
    old.bind_cpu_input("x", given[3]["x"])
    assert np.array_equal(once(old), expected[3])  # it stays with the engine that it was made of
    new = session.io_binding()
    new.bind_cpu_input("x", given[4]["x"])
    assert 30 < sqnr(expected[4], once(new)) < 100
    with pytest.raises(ValueError, match="IOBinding must be used with the session that created it"):
        session.run_with_iobinding(onnxruntime.InferenceSession(net, one_thread(), CPU).io_binding())


def test_ort_values_before_and_after(net: Path) -> None:
    told, given = Told(), feeds(3)
    expected = float_outputs(net, given)
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 2, "callback": told})
    found = []
    for number, feed in enumerate(given):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(feed["x"])
        found.append(session.run_with_ort_values(None, {"x": value})[0].numpy())
        if number == 1:
            assert told.wait().samples == 2
    assert np.array_equal(found[0], expected[0])
    assert 30 < sqnr(expected[2], found[2]) < 100


def test_values_of_the_session_keep_its_engine(net: Path) -> None:
    told = Told()
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 1, "callback": told})
    value = session.create_ortvalue_from_shape_and_type([4, WIDTH], np.float32, "cpu")
    value.update_inplace(feeds(1)[0]["x"])
    session.run_with_ort_values(None, {"x": value})
    status = told.wait()
    assert (status.state, status.reason) == ("next-start", "values belong to the session")
    session.run_with_ort_values(None, {"x": value})


# ---- session options -----------------------------------------------------------------------------------------------


def test_a_profile_is_of_one_model_and_whole(net: Path, tmp_path: Path) -> None:
    told = Told()
    profiling = {"enable_profiling": True, "profile_file_prefix": str(tmp_path / "p")}
    session = InferenceSession(net, one_thread(**profiling), CPU, qcompiler_options={"requests": 2, "callback": told})
    for feed in feeds(3):
        session.run(None, feed)
    assert (told.wait().state, told.status[0].reason) == ("next-start", "the session profiles")
    session.run(None, feeds(1)[0])
    text = Path(session.end_profiling()).read_text()
    assert text.count('"model_run"') == 4
    assert "Quantize" not in text
    again = InferenceSession(net, one_thread(**profiling), CPU, qcompiler_options={"requests": 2})
    assert again.qcompiler_report.from_cache
    again.run(None, feeds(1)[0])
    assert "Quantize" in Path(again.end_profiling()).read_text()


def test_the_optimized_model_is_written_once_per_session(net: Path, tmp_path: Path) -> None:
    told, path = Told(), tmp_path / "optimized.onnx"
    options = one_thread(optimized_model_filepath=str(path))
    session = InferenceSession(net, options, CPU, qcompiler_options={"requests": 1, "callback": told})
    written = path.read_bytes()
    session.run(None, feeds(1)[0])
    assert told.wait().reason == "the session writes its optimized model"
    assert path.read_bytes() == written
    assert InferenceSession(net, options, CPU, qcompiler_options={"requests": 1}).qcompiler_report.compiled
    assert path.read_bytes() != written


def test_the_swap_can_wait_for_the_next_start(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_SWAP", "off")
    told = Told()
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 1, "callback": told})
    session.run(None, feeds(1)[0])
    assert told.wait().state == "next-start"
    assert np.array_equal(session.run(None, feeds(1)[0])[0], float_outputs(net, feeds(1))[0])


def added_weight() -> onnxruntime.SessionOptions:
    options = SessionOptions()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((WIDTH, WIDTH), np.float32))
    options.add_initializer("w1", value)
    options.kept = value  # ONNX Runtime does not
    return options


def no_qdq() -> onnxruntime.SessionOptions:
    options = one_thread()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (lambda: one_thread(graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL),
         "the session options turn optimizations off"),
        (no_qdq, "the session options set session.disable_quant_qdq"),
        (added_weight, "the session options use add_initializer"),
    ],
)  # fmt: skip
def test_options_that_a_compiled_model_cannot_honour(
    net: Path, cache: Path, options: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    if reason.endswith("add_initializer"):
        proto = small_net()
        del proto.graph.initializer[0]
        proto.graph.initializer.insert(0, onnx.numpy_helper.from_array(np.ones((WIDTH, WIDTH), np.float32), "w1"))
        onnx.save(proto, net, save_as_external_data=True, location="w", size_threshold=0)
    session = InferenceSession(net, options(), CPU)
    assert (session.qcompiler_report.state, session.qcompiler_report.reason) == ("original", reason)
    session.run(None, feeds(1)[0])
    assert not cache.exists()
    assert caplog.records == []  # it is no failure


def test_a_gpu_that_is_here_keeps_the_model(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.dropin.planning import obstacle

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert obstacle(net, None, both, both, {}) == "CUDAExecutionProvider runs it"
    assert obstacle(net, None, [("CUDAExecutionProvider", {}), "CPUExecutionProvider"], both, {}) != ""
    assert obstacle(net, None, None, both, {}) == "CUDAExecutionProvider runs it"
    assert obstacle(net, None, both, ["CPUExecutionProvider"], {}) == ""  # asked for, but not here
    assert obstacle(net, None, CPU, both, {}) == ""
    assert obstacle("m.ort", None, CPU, CPU, {}) == "the model is in ORT format"
    assert obstacle(net, None, CPU, CPU, {"disabled_optimizers": ["x"]}) == "disabled_optimizers is set"


def test_new_providers_mean_the_original_model(net: Path, swapped: Callable[[], InferenceSession]) -> None:
    session = swapped()
    session.set_providers(CPU)
    assert (session.qcompiler_report.state, session.qcompiler_report.reason) == (
        "original", "the providers were changed",
    )  # fmt: skip
    assert np.array_equal(session.run(None, feeds(1)[0])[0], float_outputs(net, feeds(1))[0])
    binding = session.io_binding()
    binding.bind_cpu_input("x", feeds(1)[0]["x"])
    binding.bind_output("y")
    session.run_with_iobinding(binding)


def test_a_request_may_replace_weights(tmp_path: Path) -> None:
    path = tmp_path / "old.onnx"
    onnx.save(small_net(ir_version=4, overridable=True), path)
    told, given = Told(), feeds(3)
    session = InferenceSession(path, one_thread(), CPU, qcompiler_options={"requests": 2, "callback": told})
    for feed in given[:2]:
        session.run(None, feed)
    assert told.wait().compiled
    other = {**given[2], "w1": np.zeros((WIDTH, WIDTH), np.float32)}
    assert np.array_equal(session.run(None, other)[0], np.zeros((4, WIDTH), np.float32))
    assert sqnr(float_outputs(path, given)[2], session.run(None, given[2])[0]) > 30


# ---- falling back ---------------------------------------------------------------------------------------------------


def test_off_is_off(net: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_ORT", "off")
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"calibration": feeds(2)})
    assert session.qcompiler_report.state == "off"
    assert np.array_equal(session.run(None, feeds(1)[0])[0], float_outputs(net, feeds(1))[0])
    assert not cache.exists()


def test_a_model_that_does_not_compile_runs_with_one_warning(
    worker: None, net: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    options = {"requests": 1, "callback": told, "recipe": "no-such-recipe"}
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options=options)
    session.run(None, feeds(1)[0])
    assert told.wait().state == "original"
    assert "no-such-recipe" in told.status[0].reason
    again = InferenceSession(net, one_thread(), CPU, qcompiler_options=options)  # known by now: not tried again
    assert again.qcompiler_report.reason == told.status[0].reason
    assert np.array_equal(again.run(None, feeds(1)[0])[0], float_outputs(net, feeds(1))[0])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "qcompiler.ort"
    assert record.getMessage().startswith("net.onnx runs as it is: ")


def test_a_cache_that_cannot_be_used_is_one_warning(
    net: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"cache": tmp_path / "file"})
    assert "cannot use the cache" in session.qcompiler_report.reason
    assert len(caplog.records) == 1
    assert session.run(None, feeds(1)[0])[0].shape == (4, WIDTH)


def test_a_bad_variable_is_a_warning_and_a_bad_option_an_error(
    net: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PassError, match="unknown qcompiler option 'requets'"):
        InferenceSession(net, qcompiler_options={"requets": 3})
    monkeypatch.setenv("QCOMPILER_REQUESTS", "many")
    assert InferenceSession(net, one_thread(), CPU).qcompiler_report.state == "original"
    assert "QCOMPILER_REQUESTS is 'many'" in caplog.records[0].getMessage()


def test_a_missing_or_broken_model_is_an_error_of_onnx_runtime(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"location: nowhere")
    for name in ("absent.onnx", "broken.onnx"):
        with pytest.raises(Exception) as expected:  # noqa: PT011  # ONNX Runtime's own types
            onnxruntime.InferenceSession(tmp_path / name, one_thread(), CPU)
        with pytest.raises(type(expected.value)):
            InferenceSession(tmp_path / name, one_thread(), CPU)
    with pytest.raises(TypeError, match="Unable to load from type"):
        InferenceSession(3)  # type: ignore[arg-type]


def test_a_damaged_entry_is_rebuilt(net: Path, cache: Path, swapped: Callable[[], InferenceSession]) -> None:
    swapped()
    whole = cached_bytes(cache)
    (path,) = cache.glob("*/model.onnx")
    path.write_bytes(whole[:1000])
    session = swapped()
    assert not session.qcompiler_report.from_cache
    assert cached_bytes(cache) == whole


def test_a_model_that_changes_while_it_is_served_is_not_compiled(net: Path) -> None:
    told = Told()
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 1, "callback": told})
    onnx.save(small_net(seed=5), net)
    session.run(None, feeds(1)[0])
    assert "has changed since the session was made" in told.wait().reason


def test_a_callback_that_fails_is_logged(net: Path, caplog: pytest.LogCaptureFixture) -> None:
    called = threading.Event()

    def bad(status: Any) -> None:
        called.set()
        raise ValueError("mine")

    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 1, "callback": bad})
    session.run(None, feeds(1)[0])
    assert called.wait(120)
    while not caplog.records:
        pass
    assert caplog.records[0].getMessage() == "the callback of qcompiler_options failed"


# ---- given calibration ----------------------------------------------------------------------------------------------


def test_given_calibration_compiles_at_first_use(net: Path, cache: Path) -> None:
    given = feeds(4)
    session = InferenceSession(net, one_thread(), CPU, qcompiler_options={"calibration": given})
    assert session.qcompiler_report.compiled
    assert cached_bytes(cache) == qcompiler.compile(net, calibration=given, guard=False).to_bytes()
    assert InferenceSession(net, one_thread(), CPU, qcompiler_options={"calibration": given}).qcompiler_report.compiled
    assert len(Cache(cache).entries()) == 1
    InferenceSession(net, one_thread(), CPU, qcompiler_options={"calibration": feeds(4, seed=9)})
    assert len(Cache(cache).entries()) == 2  # other data, another result


def test_calibration_may_be_a_file_named_in_the_environment(
    net: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "feeds.npz", x=np.concatenate([f["x"] for f in feeds(8)]))
    monkeypatch.setenv("QCOMPILER_CALIBRATION", str(tmp_path / "feeds.npz"))
    assert InferenceSession(net, one_thread(), CPU).qcompiler_report.compiled
    assert cached_bytes(cache) == qcompiler.compile(net, calibration=tmp_path / "feeds.npz", guard=False).to_bytes()


@pytest.mark.parametrize("portable", [True, False])
def test_given_calibration_in_the_background(worker: None, net: Path, cache: Path, portable: bool) -> None:
    told, given = Told(), feeds(4)
    data: Any = given if portable else lambda: iter(given)  # a lambda cannot leave this process
    session = InferenceSession(
        net, one_thread(), CPU, qcompiler_options={"calibration": data, "background": True, "callback": told}
    )
    assert not session.qcompiler_report.from_cache
    session.run(None, given[0])
    assert told.wait().state == "compiled"
    assert cached_bytes(cache) == qcompiler.compile(net, calibration=given, guard=False).to_bytes()


def test_bytes_are_a_model_too(net: Path) -> None:
    told = Told()
    session = InferenceSession(net.read_bytes(), one_thread(), CPU, qcompiler_options={"requests": 1, "callback": told})
    session.run(None, feeds(1)[0])
    assert told.wait().compiled
    by_path = InferenceSession(net, one_thread(), CPU, qcompiler_options={"requests": 1})
    assert by_path.qcompiler_report.from_cache  # the same contents
