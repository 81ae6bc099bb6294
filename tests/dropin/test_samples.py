"""Requests as calibration data: copied, bounded, and only those that can serve."""

from __future__ import annotations

import threading

import numpy as np
import onnxruntime

from qcompiler.dropin.samples import Samples, copied


def test_requests_are_copied_since_callers_reuse_buffers() -> None:
    buffer = np.ones(3, np.float32)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.arange(3, dtype=np.int64))
    made = copied({"a": buffer, "b": value, "c": [1.5, 2.0]})
    buffer[:] = 7
    assert made is not None
    assert made["a"].tolist() == [1, 1, 1]
    assert (made["b"].tolist(), made["b"].dtype) == ([0, 1, 2], np.int64)
    assert made["c"].tolist() == [1.5, 2.0]


def test_what_cannot_calibrate_is_left_out() -> None:
    assert copied({"a": np.array([1.0, np.nan])}) is None
    assert copied({"a": np.array([np.inf], np.float16)}) is None
    assert copied({"a": np.array([{1: 2}], object)}) is None
    text = copied({"a": np.array(["x", "y"], object)})
    assert text is not None
    assert text["a"].tolist() == ["x", "y"]


def test_the_last_one_needed_is_told_to_one_caller() -> None:
    samples = Samples(50, 10**6)
    told = []

    def work() -> None:
        for _ in range(20):
            if samples.add({"x": np.zeros(2)}):
                told.append(len(samples))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [50]
    assert len(samples.close()) == 50
    assert samples.close() == []


def test_bytes_are_bounded() -> None:
    samples = Samples(100, 100)
    assert not samples.add({"x": np.zeros(200, np.uint8)})  # too large alone: a smaller one may follow
    assert not samples.add({"x": np.zeros(60, np.uint8)})
    assert samples.add({"x": np.zeros(60, np.uint8)})  # no room for it: what is there must do
    assert [feed["x"].nbytes for feed in samples.close()] == [60]


def test_nothing_is_taken_after_the_end() -> None:
    samples = Samples(2, 100)
    samples.add({"x": np.zeros(1)})
    assert len(samples.close()) == 1
    assert not samples.add({"x": np.zeros(1)})
    assert samples.close() == []


def test_the_count_stays_after_the_requests_are_handed_over() -> None:
    samples = Samples(2, 1 << 20)
    feed = {"x": np.zeros(4, np.float32)}
    assert [samples.add(feed) for _ in range(3)] == [False, True, False]
    assert len(samples.close()) == 2
    assert len(samples) == 2
    assert samples.close() == []
