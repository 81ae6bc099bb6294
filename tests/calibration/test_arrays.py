"""Arrays in files: what is mapped or streamed is what NumPy loads; .npy in every arrangement; limits and identities."""

import re
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qcompiler.calibration.arrays import Streamed, load_npy
from qcompiler.calibration.readers import SourceOptions, read_source
from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError

FLOAT = np.dtype(np.float32)
OPEN = TensorInfo("image", FLOAT, ("batch", 3))
FIXED = TensorInfo("image", FLOAT, (2, 3))
OTHER = TensorInfo("other", np.dtype(np.int64), ("batch",))


def rows(count: int, first: float = 0.0) -> np.ndarray:
    return (np.arange(count * 3, dtype=np.float32) + np.float32(first)).reshape(count, 3)


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("count", [2, 6, 7, 65])
    @pytest.mark.parametrize("info", [OPEN, FIXED])
    def test_every_form_gives_the_same_feeds(self, tmp_path: Path, save: object, count: int, info: TensorInfo) -> None:
        for name, array in (("c", rows(count)), ("f", np.asfortranarray(rows(count)))):
            save(tmp_path / f"{name}.npz", image=array)  # type: ignore[operator]
            feeds = [f["image"] for f in read_source(tmp_path / f"{name}.npz", [info])]
            starts = range(0, count, 32) if info is OPEN else [*range(0, count - 1, 2), *([count - 2] * (count % 2))]
            stops = [s + (32 if info is OPEN else 2) for s in starts]
            assert len(feeds) == len(stops)
            for feed, start, stop in zip(feeds, starts, stops, strict=True):
                np.testing.assert_array_equal(feed, rows(count)[start:stop])

    def test_the_batch_of_an_open_axis_can_be_asked_for(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", image=rows(7))
        (tmp_path / "folder").mkdir()
        np.save(tmp_path / "folder" / "image.npy", rows(7))
        for source in (tmp_path / "a.npz", tmp_path / "folder"):
            for info, sizes in ((OPEN, [3, 3, 1]), (FIXED, [2, 2, 2, 2])):
                feeds = list(read_source(source, [info], SourceOptions(batch=3)))
                assert [len(f["image"]) for f in feeds] == sizes

    def test_several_compressed_arrays_are_read_side_by_side(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "a.npz", image=rows(40), other=np.arange(40), rate=np.int64(3))
        infos = [OPEN, OTHER, TensorInfo("rate", np.dtype(np.int64), ())]
        feeds = list(read_source(tmp_path / "a.npz", infos))
        assert [f["other"].tolist() for f in feeds] == [list(range(32)), list(range(32, 40))]
        assert [int(f["rate"]) for f in feeds] == [3, 3]
        np.testing.assert_array_equal(np.concatenate([f["image"] for f in feeds]), rows(40))

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_a_large_file_is_never_whole_in_memory(self, tmp_path: Path, save: object) -> None:
        save(tmp_path / "a.npz", image=np.zeros((2048, 4096), np.float32))  # type: ignore[operator]
        wide = TensorInfo("image", FLOAT, ("batch", 4096))
        tracemalloc.start()
        total = sum(len(f["image"]) for f in read_source(tmp_path / "a.npz", [wide]))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == 2048
        assert peak < 2048 * 4096 * 4 / 4  # feeds of 32 rows: one sixty-fourth, and a few copies of it

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_types_that_numpy_does_not_define_come_back(self, tmp_path: Path, save: object) -> None:
        given = np.array([[0.5, -2, 3]], ml_dtypes.bfloat16)
        save(tmp_path / "a.npz", image=given)  # type: ignore[operator]
        info = TensorInfo("image", np.dtype(ml_dtypes.bfloat16), ("batch", 3))
        (feed,) = read_source(tmp_path / "a.npz", [info])
        assert feed["image"].dtype == ml_dtypes.bfloat16
        assert feed["image"].tolist() == given.tolist()

    def test_python_objects_are_refused(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", image=np.array([None, 1], object))
        with pytest.raises(CalibrationError, match=r"a\.npz: it holds Python objects, which are not read"):
            list(read_source(tmp_path / "a.npz", [OPEN]))

    def test_a_damaged_compressed_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez_compressed(path, image=np.random.default_rng(0).random((64, 3), np.float32))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(CalibrationError, match=f"^cannot read {re.escape(str(path))}: "):
            list(read_source(path, [OPEN]))

    def test_arrays_may_be_renamed(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", pixels=rows(2))
        (feed,) = read_source(tmp_path / "a.npz", [OPEN], SourceOptions(rename={"image": "pixels"}))
        np.testing.assert_array_equal(feed["image"], rows(2))


def test_a_streamed_array_skips_and_overlaps() -> None:
    import io

    data = np.arange(40, dtype=np.int32).reshape(20, 2)
    stream = Streamed(io.BytesIO(data.tobytes()), data.shape, data.dtype)
    for start, stop in ((0, 3), (2, 6), (10, 12), (11, 12), (15, 30)):
        np.testing.assert_array_equal(stream.take(start, stop), data[start:stop])
    with pytest.raises(EOFError, match="cut short"):
        Streamed(io.BytesIO(b"123"), (2, 2), np.dtype(np.int32)).take(0, 1)


class TestNpy:
    def test_one_file_is_cut_as_in_an_npz(self, tmp_path: Path) -> None:
        np.save(tmp_path / "any.npy", rows(5))
        feeds = [f["image"] for f in read_source(tmp_path / "any.npy", [FIXED])]
        np.testing.assert_array_equal(np.stack(feeds), [rows(5)[0:2], rows(5)[2:4], rows(5)[3:5]])

    def test_files_of_one_sample_each_for_a_single_input(self, tmp_path: Path) -> None:
        for index in (10, 2, 1):
            np.save(tmp_path / f"s{index}.npy", rows(1, index)[0])
        np.save(tmp_path / "labels.npy", np.arange(3))
        assert [f["image"].tolist() for f in read_source(tmp_path, [OPEN])] == [rows(1, i).tolist() for i in (1, 2, 10)]

    def test_files_named_as_the_inputs(self, tmp_path: Path) -> None:
        np.save(tmp_path / "image.npy", rows(40))
        np.save(tmp_path / "numbers.npy", np.arange(40))
        feeds = list(read_source(tmp_path, [OPEN, OTHER], SourceOptions(rename={"other": "numbers"})))
        assert [f["other"].tolist() for f in feeds] == [list(range(32)), list(range(32, 40))]
        np.testing.assert_array_equal(feeds[1]["image"], rows(40)[32:])

    def test_a_folder_per_sample(self, tmp_path: Path) -> None:
        for index in (10, 9):
            (tmp_path / f"sample{index}").mkdir()
            np.save(tmp_path / f"sample{index}" / "image.npy", rows(1, index))
            np.save(tmp_path / f"sample{index}" / "other.npy", np.array([index]))
        assert [int(f["other"][0]) for f in read_source(tmp_path, [OPEN, OTHER])] == [9, 10]

    def test_a_name_that_is_no_input_is_an_error(self, tmp_path: Path) -> None:
        np.save(tmp_path / "image.npy", rows(1))
        np.save(tmp_path / "picture.npy", rows(1))
        with pytest.raises(CalibrationError, match=r"the model has no input 'picture'; its inputs are: image, other$"):
            list(read_source(tmp_path, [OPEN, OTHER]))

    def test_the_limit_takes_evenly_spaced_files(self, tmp_path: Path) -> None:
        for index in range(10):
            np.save(tmp_path / f"{index}.npy", rows(1, index))
        source = read_source(tmp_path, [OPEN], SourceOptions(limit=3))
        assert [float(f["image"][0, 0]) for f in source] == [1.0, 5.0, 8.0]
        whole = read_source(tmp_path, [OPEN])
        assert len(list(whole)) == 10
        assert source.identity != whole.identity

    @pytest.mark.parametrize("cut", [3, 60, -1])
    def test_a_broken_file_is_named(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "a.npy"
        np.save(path, rows(9))
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(CalibrationError, match=f"^cannot read {re.escape(str(path))}: "):
            list(read_source(path, [OPEN]))

    def test_empty_and_scalar_files_can_be_mapped(self, tmp_path: Path) -> None:
        np.save(tmp_path / "none.npy", np.zeros((0, 3), np.float32))
        np.save(tmp_path / "one.npy", np.float32(7))
        assert load_npy(tmp_path / "none.npy").shape == (0, 3)
        assert float(load_npy(tmp_path / "one.npy")) == 7.0


class TestIdentity:
    def test_follows_contents_names_order_and_options(self, tmp_path: Path) -> None:
        for folder, values in (("a", (1, 2)), ("b", (1, 2)), ("c", (2, 1))):
            (tmp_path / folder).mkdir()
            for index, value in enumerate(values):
                np.save(tmp_path / folder / f"{index}.npy", rows(1, value))
        a, b, c = (read_source(tmp_path / folder, [OPEN]).identity for folder in "abc")
        assert a == b
        assert a != c
        assert read_source(tmp_path / "a", [OPEN], SourceOptions(batch=4)).identity != a

    def test_is_found_on_demand_and_kept(self, tmp_path: Path) -> None:
        np.save(tmp_path / "0.npy", rows(1))
        source = read_source(tmp_path, [OPEN])
        split = read_source(tmp_path, [OPEN]).split()
        first = source.identity
        np.save(tmp_path / "0.npy", rows(1, 5))
        assert source.identity == first  # once found
        assert split.ranges.identity != first  # not asked for before the file changed


def test_options_are_checked() -> None:
    with pytest.raises(CalibrationError, match=r"^the data option limit is 0; expected a number from 1$"):
        SourceOptions(limit=0)


def test_the_limit_bounds_what_is_read_of_any_source(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=rows(9))
    source = read_source(tmp_path / "a.npz", [FIXED], SourceOptions(limit=2))
    assert [f["image"].tolist() for f in source] == [rows(9)[:2].tolist(), rows(9)[2:4].tolist()]
