"""The .qcal file: what is read equals what was written, bit for bit, or there is one clear error."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.calibration.container import read_container, write_container
from qcompiler.calibration.qcal import (
    Journal,
    Key,
    check_key,
    load_qcal,
    names_digest,
    read_journal,
    read_qcal,
    write_journal,
    write_qcal,
)
from qcompiler.calibration.statistics import Statistics, TensorStatistics
from qcompiler.errors import CalibrationError

KEY = Key("0123456789abcdef" * 4, "fedcba9876543210", names_digest(["a"]), "onnxruntime 1.31.1", 1)

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
feeds = st.lists(hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(3)), elements=floats), max_size=4)


def statistics_of(values: dict[str, list[npt.NDArray[np.float32]]], axis: int | None = 1) -> Statistics:
    made = Statistics(feeds=max((len(v) for v in values.values()), default=0), about=KEY.to_about())
    for name, tensors in values.items():
        made.tensors[name] = TensorStatistics()
        for index, tensor in enumerate(tensors):
            made.tensors[name].add(tensor, index, axis, squares=axis is not None)
    return made


def small() -> Statistics:
    generator = np.random.default_rng(0)
    return statistics_of({n: [generator.standard_normal((2, 3, 4)).astype(np.float32)] * 2 for n in ("b", "a")})


def assert_same(left: Statistics, right: Statistics) -> None:
    assert (left.feeds, left.about, left.synthetic) == (right.feeds, right.about, right.synthetic)
    assert set(left.tensors) == set(right.tensors)
    for name, tensor in left.tensors.items():
        (fields, arrays), (others, other) = tensor.state(), right.tensors[name].state()
        assert fields == others
        assert {k: (a.dtype, a.shape, a.tobytes()) for k, a in arrays.items()} == {
            k: (a.dtype, a.shape, a.tobytes()) for k, a in other.items()
        }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=6), feeds, max_size=3), st.sampled_from([None, 1]), st.text(max_size=5))
def test_what_is_read_equals_what_was_written_bit_for_bit(
    tmp_path: Path, values: dict[str, list[npt.NDArray[np.float32]]], axis: int | None, note: str
) -> None:
    made = replace(statistics_of(values, axis), synthetic=note)
    write_qcal(made, tmp_path / "s.qcal")
    again = read_qcal(tmp_path / "s.qcal")
    assert_same(made, again)
    # What was read goes on as if it had never been written.
    for name in made:
        one = np.full((1, 3), 0.5, np.float32)
        made.tensors[name].add(one, 9, axis)
        again.tensors[name].add(one, 9, axis)
    assert_same(made, again)


@given(hnp.arrays(st.sampled_from([np.int64, np.uint64, np.float32, np.float64]), hnp.array_shapes(min_side=0)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_keep_every_bit(tmp_path: Path, array: npt.NDArray[np.generic]) -> None:
    write_container(tmp_path / "c", {"x": 1}, {"array": array})
    body, arrays = read_container(tmp_path / "c")
    assert body == {"x": 1}
    found = arrays["array"]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_the_ranges_and_the_key_come_back(tmp_path: Path) -> None:
    made = replace(small(), synthetic="standard normal")
    ranges = {"a": {"min-max": (-1.0, 2.0), "percentile:99.9": (-0.5, 1e-45)}}
    write_qcal(made, tmp_path / "s.qcal", ranges=ranges)
    found = load_qcal(tmp_path / "s.qcal")
    assert found.ranges == ranges
    assert found.key == KEY
    assert found.statistics.synthetic == "standard normal"
    with safetensors.safe_open(tmp_path / "s.qcal", framework="numpy") as file:
        text = json.loads(file.metadata()["qcal"])
    assert text["version"] == 1
    assert text["body"]["ranges"]["a"]["percentile:99.9"] == [-0.5, 1e-45]


def test_the_bytes_are_the_same_in_any_order_and_process(tmp_path: Path) -> None:
    made = small()
    turned = replace(made, tensors=dict(reversed(made.tensors.items())))
    write_qcal(made, tmp_path / "1.qcal")
    write_qcal(turned, tmp_path / "2.qcal")
    code = "import sys; from qcompiler.calibration.qcal import *; write_qcal(read_qcal(sys.argv[1]), sys.argv[2])"
    # Another process has another seed for hashing.
    subprocess.run([sys.executable, "-c", code, tmp_path / "1.qcal", tmp_path / "3.qcal"], check=True, cwd=tmp_path)
    first = (tmp_path / "1.qcal").read_bytes()
    assert (tmp_path / "2.qcal").read_bytes() == first
    assert (tmp_path / "3.qcal").read_bytes() == first


def test_a_histogram_takes_the_room_of_what_is_in_it(tmp_path: Path) -> None:
    one = statistics_of({"a": [np.ones((1, 1), np.float32)]}, axis=None)
    write_qcal(one, tmp_path / "s.qcal")
    full = one.tensors["a"].counts.nbytes
    assert (tmp_path / "s.qcal").stat().st_size < full / 8


def test_no_file_is_left_where_writing_fails(tmp_path: Path) -> None:
    write_qcal(small(), tmp_path / "s.qcal")
    before = (tmp_path / "s.qcal").read_bytes()
    with pytest.raises(CalibrationError, match="a number in it is not finite"):
        write_qcal(small(), tmp_path / "s.qcal", ranges={"a": {"min-max": (float("-inf"), 1.0)}})
    with pytest.raises(CalibrationError, match=r"cannot write .*none/s\.qcal \(0\.0 MB\): No such file"):
        write_qcal(small(), tmp_path / "none" / "s.qcal")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match=r"cannot write .*folder .*Is a directory"):
        write_qcal(small(), tmp_path / "folder")
    assert (tmp_path / "s.qcal").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["folder", "s.qcal"]


def test_a_full_disk_is_one_error_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_qcal(small(), tmp_path / "s.qcal")
    before = (tmp_path / "s.qcal").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CalibrationError, match="No space left on device; nothing was changed there"):
        write_qcal(Statistics(), tmp_path / "s.qcal")
    assert (tmp_path / "s.qcal").read_bytes() == before
    assert os.listdir(tmp_path) == ["s.qcal"]


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    write_qcal(small(), tmp_path / "s.qcal")
    data = (tmp_path / "s.qcal").read_bytes()
    for end in [0, 4, 8, 100, *range(200, len(data) - 1, 997), len(data) - 1]:
        (tmp_path / "t.qcal").write_bytes(data[:end])
        with pytest.raises(CalibrationError, match="calibrate anew"):
            read_qcal(tmp_path / "t.qcal")


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    write_qcal(small(), tmp_path / "s.qcal")
    data = (tmp_path / "s.qcal").read_bytes()
    for place in range(0, len(data), 61):
        bad = bytearray(data)
        bad[place] ^= 1
        (tmp_path / "t.qcal").write_bytes(bad)
        with pytest.raises(CalibrationError, match=r"calibrate anew|holds no calibration statistics"):
            read_qcal(tmp_path / "t.qcal")


def rewritten(path: Path, change: dict[str, object]) -> Path:
    """Replace entries of the JSON text, checksum and all."""
    body, arrays = read_container(path)
    for where, value in change.items():
        *parents, last = where.split(".")
        place = body
        for parent in parents:
            place = place[parent]
        place[last] = value
    target = path.with_name("changed.qcal")
    write_container(target, body, arrays)
    return target


@pytest.mark.parametrize(
    "change",
    [
        {"tensors.a.fields.count": 7},
        {"tensors.a.fields.count": "7"},
        {"tensors.a.fields": {}},
        {"tensors.a.arrays": ["counts"]},
        {"tensors.a.index": 1},
        {"tensors": []},
        {"feeds": "many"},
        {"about": None},
        {"ranges": {"a": {"min-max": [1.0]}}},
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_qcal(small(), tmp_path / "s.qcal")
    with pytest.raises(CalibrationError):
        read_qcal(rewritten(tmp_path / "s.qcal", change))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (["int64", [1 << 40], 0], "is not expected here"),
        (["int64", [-1], 0], "is not expected here"),
        (["object", [2], 0], "is not expected here"),
        (["int64", [2], 1], "do not fit 2"),
        (["int64", [2], -1], "do not fit 2"),
        (["int64"], "damaged"),
    ],
)
def test_a_claimed_shape_is_checked_before_it_takes_memory(tmp_path: Path, how: list[object], text: str) -> None:
    from qcompiler.calibration import container

    stored = {"x": np.ones(2, np.uint8)}
    full = {"body": {}, "packing": {"x": how}}
    head = {"version": 1, "sha256": container._checksum(full, stored), **full}
    (tmp_path / "s.qcal").write_bytes(safetensors.numpy.save(stored, {"qcal": json.dumps(head)}))
    with pytest.raises(CalibrationError, match=text):
        read_container(tmp_path / "s.qcal")


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no file .*; qcompiler calibrate writes one"):
        read_qcal(tmp_path / "s.qcal")
    with pytest.raises(CalibrationError, match="is a folder"):
        read_qcal(tmp_path)
    safetensors.numpy.save_file({"w": np.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CalibrationError, match="holds no calibration statistics"):
        read_qcal(tmp_path / "weights.safetensors")
    head = json.dumps({"version": 99, "sha256": "", "body": {}, "packing": {}})
    (tmp_path / "new.qcal").write_bytes(safetensors.numpy.save({}, {"qcal": head}))
    with pytest.raises(CalibrationError, match="has version 99, this release reads 1; calibrate anew"):
        read_qcal(tmp_path / "new.qcal")


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_the_key_survives_as_text() -> None:
    assert Key.from_about(KEY.to_about()) == KEY
    assert Key.from_about(replace(KEY, data=None).to_about()) == replace(KEY, data=None)
    assert Key.from_about({}) is None
    with pytest.raises(CalibrationError, match="say incompletely what they are of"):
        Key.from_about({**KEY.to_about(), "threads": "some"})


def test_names_make_a_digest_whatever_their_order() -> None:
    assert names_digest(["b", "a", "b"]) == names_digest(["a", "b"])
    assert names_digest(["a,b"]) != names_digest(["a", "b"])
    assert len(names_digest([])) == 16


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"graph": "f" * 64}, "the model changed: the statistics are of graph ffffffffffff, this one is 0123456789ab"),
        ({"data": "0" * 16}, "the data changed: the statistics are of data 000000000000, this is data fedcba987654"),
        ({"data": None}, "the data changed: the statistics are of data without an identity, this is data fedcba987654"),
        ({"observed": "1" * 16}, "other tensors are wanted: the statistics are of set 111111111111, this is set "),
        ({"engine": "x 1"}, "the engine changed: the statistics were taken with x 1, this is onnxruntime 1.31.1"),
        ({"threads": 4}, "the statistics were taken with 4 threads, wanted are 1"),
        ({"statistics": 0}, "the statistics have version 0, wanted is 1"),
    ],
)
def test_what_differs_is_said(change: dict[str, object], text: str) -> None:
    (found,) = check_key(replace(KEY, **change), KEY)  # type: ignore[arg-type]
    assert found.startswith(text)


def test_equal_keys_differ_in_nothing() -> None:
    assert check_key(KEY, KEY) == []
    assert check_key(KEY, replace(KEY, data=None)) == [], "statistics given in place of data"
    assert check_key(None, KEY) == ["the statistics do not say which model they are of"]
    assert len(check_key(replace(KEY, graph="", threads=2), KEY)) == 2


# ---- journals ------------------------------------------------------------------------------------------------------


def test_a_journal_comes_back(tmp_path: Path) -> None:
    digests = {5: "0123456789abcdef", 0: "f" * 16, 3: "0" * 16}
    made = Journal(small(), digests, {"group": 2})
    write_journal(made, tmp_path / "j")
    found = read_journal(tmp_path / "j")
    assert found.digests == digests
    assert found.done == (0, 3, 5)
    assert found.position == {"group": 2}
    assert found.key == KEY
    assert_same(found.statistics, made.statistics)


def test_an_empty_journal_comes_back(tmp_path: Path) -> None:
    write_journal(Journal(Statistics(), {}), tmp_path / "j")
    found = read_journal(tmp_path / "j")
    assert (found.done, found.statistics.tensors, found.key) == ((), {}, None)


def test_finished_and_unfinished_runs_are_told_apart(tmp_path: Path) -> None:
    write_journal(Journal(small(), {}), tmp_path / "j")
    write_qcal(small(), tmp_path / "s.qcal")
    with pytest.raises(CalibrationError, match="is of an unfinished run; finish it with --resume"):
        read_qcal(tmp_path / "j")
    with pytest.raises(CalibrationError, match="is of a finished run, there is nothing to resume"):
        read_journal(tmp_path / "s.qcal")


@pytest.mark.parametrize("digest", ["", "0123", "x" * 16, "0123456789ABCDEF"])
def test_a_digest_has_16_hexadecimal_digits(tmp_path: Path, digest: str) -> None:
    with pytest.raises(CalibrationError, match="16 hexadecimal digits"):
        write_journal(Journal(Statistics(), {0: digest}), tmp_path / "j")
