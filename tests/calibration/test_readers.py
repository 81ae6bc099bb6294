"""Readers: every kind of source, and every way in which data can be wrong, with the line a user sees."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qcompiler.calibration.readers import (
    CHUNK,
    FeedSource,
    as_feed_source,
    load_function,
    random_feeds,
    read_source,
    validate,
)
from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError

IMAGE = TensorInfo("image", np.dtype(np.float32), ("batch", 3))
FIXED = TensorInfo("image", np.dtype(np.float32), (2, 3))
TOKENS = TensorInfo("tokens", np.dtype(np.int64), ("batch", "time"))
RATE = TensorInfo("rate", np.dtype(np.int64), ())


def rows(count: int, first: float = 0.0) -> np.ndarray:
    return (np.arange(count * 3, dtype=np.float32) + np.float32(first)).reshape(count, 3)


def fails(text: str) -> "pytest.RaisesExc[CalibrationError]":
    return pytest.raises(CalibrationError, match=f"^{re.escape(text)}$")


class TestValidate:
    def test_returns_the_arrays_in_the_order_of_the_inputs(self) -> None:
        feed = validate({"rate": np.int64(8), "image": rows(2)}, [IMAGE, RATE], 0)
        assert list(feed) == ["image", "rate"]
        np.testing.assert_array_equal(feed["image"], rows(2))
        assert feed["rate"].shape == ()

    def test_names_an_unknown_input(self) -> None:
        text = "sample 4: the model has no input 'picture'; its inputs are: image float32['batch', 3]"
        with fails(text):
            validate({"picture": rows(1), "image": rows(1)}, [IMAGE], 4)

    def test_names_a_missing_input(self) -> None:
        text = "sample 0: input 'rate' is missing; the inputs are: image float32['batch', 3], rate int64[]"
        with fails(text):
            validate({"image": rows(1)}, [IMAGE, RATE], 0)

    def test_refuses_what_is_no_dict(self) -> None:
        with fails("sample 1 is a tuple; expected a dict of input name to array"):
            validate((rows(1),), [IMAGE], 1)  # type: ignore[arg-type]

    def test_refuses_a_wrong_type(self) -> None:
        with fails("sample 0, input 'tokens': type float32, expected int64"):
            validate({"tokens": np.ones((1, 2), np.float32)}, [TOKENS], 0)

    def test_refuses_integers_that_do_not_fit(self) -> None:
        info = TensorInfo("x", np.dtype(np.int8), (1,))
        with fails("sample 0, input 'x': type int64, expected int8"):
            validate({"x": np.array([200])}, [info], 0)

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            (np.float64([[1, 2, 3]]), np.float32),
            (np.float16([[1, 2, 3]]), np.float32),
            (np.float32([[1, 2, 3]]), np.float16),
            (np.float32([[1, 2, 3]]), ml_dtypes.bfloat16),
            (np.int64([[1, 2, 3]]), np.int8),
            (np.int32([[1, 2, 3]]), np.int64),
            (np.uint8([[1, 2, 3]]), np.int32),
        ],
    )
    def test_converts_where_nothing_is_lost(self, given: np.ndarray, wanted: type) -> None:
        feed = validate({"x": given}, [TensorInfo("x", np.dtype(wanted), (1, 3))], 0)
        assert feed["x"].dtype == np.dtype(wanted)
        np.testing.assert_array_equal(feed["x"].astype(np.float64), [[1, 2, 3]])

    def test_refuses_what_overflows_in_the_models_type(self) -> None:
        with pytest.raises(CalibrationError, match=r"^sample 0, input 'image': "):
            validate({"image": np.full((1, 3), 1e300)}, [IMAGE], 0)

    @pytest.mark.parametrize("dtype", [np.complex64, np.str_])
    def test_refuses_types_that_no_conversion_saves(self, dtype: type) -> None:
        with pytest.raises(CalibrationError, match=r"^sample 0, input 'image': type .*, expected float32$"):
            validate({"image": rows(1).astype(dtype)}, [IMAGE], 0)

    def test_refuses_a_wrong_rank(self) -> None:
        with fails("sample 0, input 'image': shape [3], expected ['batch', 3]"):
            validate({"image": rows(1)[0]}, [IMAGE], 0)

    def test_refuses_a_wrong_length(self) -> None:
        with fails("sample 2, input 'image': shape [5, 3], expected [2, 3]"):
            validate({"image": rows(5)}, [FIXED], 2)

    @pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
    def test_refuses_what_is_not_finite(self, bad: float, kind: str) -> None:
        image = rows(2)
        image[1, 1] = bad
        with fails(f"sample 7, input 'image': the data holds {kind}; remove or mend that sample"):
            validate({"image": image}, [IMAGE], 7)


class TestPython:
    def test_a_list_can_be_read_again(self) -> None:
        source = as_feed_source([{"image": rows(1)}, {"image": rows(2)}], [IMAGE])
        assert [[f["image"].shape[0] for f in source] for _ in range(2)] == [[1, 2], [1, 2]]
        assert len(source) == 2
        assert list(source)[1]["image"].shape == (2, 3)

    def test_one_dict_is_one_feed(self) -> None:
        (feed,) = as_feed_source({"image": rows(4)}, [IMAGE])  # type: ignore[arg-type]
        np.testing.assert_array_equal(feed["image"], rows(4))

    def test_a_callable_is_called_for_each_reading(self) -> None:
        calls: list[int] = []

        def start() -> "list[dict[str, np.ndarray]]":
            calls.append(1)
            return [{"image": rows(1)}]

        source = as_feed_source(start, [IMAGE])
        assert [len(list(source)) for _ in range(3)] == [1, 1, 1]
        assert len(calls) == 3  # list() asks for the length, which must not cost a reading

    def test_a_feed_source_stays_itself(self) -> None:
        source = FeedSource(lambda: [{"image": rows(1)}], [IMAGE])
        assert as_feed_source(source, [IMAGE]) is source

    def test_an_iterator_is_spooled(self) -> None:
        started: list[int] = []

        def generate() -> "object":
            for index in range(3):
                started.append(index)
                yield {"image": rows(1, index)}

        source = as_feed_source(generate(), [IMAGE])  # type: ignore[arg-type]
        first = [f["image"][0, 0] for f in source]
        assert first == [f["image"][0, 0] for f in source] == [0.0, 1.0, 2.0]
        assert started == [0, 1, 2]

    def test_two_readings_of_an_iterator_side_by_side_see_the_same(self) -> None:
        source = as_feed_source(iter([{"image": rows(1, i)} for i in range(4)]), [IMAGE])
        one, other = iter(source), iter(source)
        seen_by_one = [next(one)["image"][0, 0]]
        seen_by_other = [f["image"][0, 0] for f in other]
        seen_by_one += [f["image"][0, 0] for f in one]
        assert seen_by_one == seen_by_other == [0.0, 1.0, 2.0, 3.0]

    def test_spooling_keeps_types_that_numpy_does_not_define(self) -> None:
        infos = [
            TensorInfo("file", np.dtype(ml_dtypes.bfloat16), (2,)),
            TensorInfo("text", np.dtype(np.object_), (1,)),
        ]
        feed = {"file": np.array([0.5, -2], ml_dtypes.bfloat16), "text": np.array(["ä"], np.object_)}
        (again,) = as_feed_source(iter([feed]), infos)
        assert again["file"].dtype == ml_dtypes.bfloat16
        assert again["file"].tolist() == [0.5, -2.0]
        assert again["text"].tolist() == ["ä"]

    @pytest.mark.parametrize("empty", [[], iter([]), lambda: []])
    def test_an_empty_source_is_an_error(self, empty: object) -> None:
        with fails("the calibration source is empty; give at least one feed"):
            list(as_feed_source(empty, [IMAGE]))  # type: ignore[arg-type]

    def test_a_failing_source_is_named_with_its_sample(self) -> None:
        def generate() -> "object":
            yield {"image": rows(1)}
            raise KeyError("lost")

        with fails("reading sample 1 failed: KeyError: 'lost'"):
            list(as_feed_source(generate, [IMAGE]))  # type: ignore[arg-type]

    def test_a_number_is_no_source(self) -> None:
        with fails("cannot read calibration data from a int"):
            as_feed_source(3, [IMAGE])  # type: ignore[arg-type]


class TestNpz:
    def save(self, folder: Path, name: str = "data.npz", **arrays: np.ndarray) -> Path:
        path = folder / name
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return path

    def test_an_array_of_the_models_rank_is_cut_into_its_batch(self, tmp_path: Path) -> None:
        feeds = list(read_source(self.save(tmp_path, image=rows(6)), [FIXED]))
        np.testing.assert_array_equal(np.stack([f["image"] for f in feeds]), rows(6).reshape(3, 2, 3))

    def test_the_last_rows_are_used_in_a_batch_that_repeats_some(self, tmp_path: Path) -> None:
        feeds = list(read_source(self.save(tmp_path, image=rows(7)), [FIXED]))
        assert len(feeds) == 4
        np.testing.assert_array_equal(feeds[-1]["image"], rows(7)[5:])

    @pytest.mark.parametrize(("count", "lengths"), [(70, [CHUNK, CHUNK, 6]), (5, [5]), (CHUNK, [CHUNK]), (33, [32, 1])])
    def test_an_open_batch_is_cut_into_chunks(self, tmp_path: Path, count: int, lengths: list[int]) -> None:
        feeds = list(read_source(self.save(tmp_path, image=rows(count)), [IMAGE]))
        assert [len(f["image"]) for f in feeds] == lengths
        np.testing.assert_array_equal(np.concatenate([f["image"] for f in feeds]), rows(count))

    def test_one_rank_more_is_one_feed_per_row(self, tmp_path: Path) -> None:
        stacked = rows(8).reshape(4, 2, 3)
        feeds = list(read_source(self.save(tmp_path, image=stacked), [FIXED]))
        np.testing.assert_array_equal(np.stack([f["image"] for f in feeds]), stacked)

    def test_a_scalar_is_repeated_and_takes_the_inputs_type(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, image=rows(6), rate=np.int32(16000))
        feeds = list(read_source(path, [FIXED, RATE]))
        assert [int(f["rate"]) for f in feeds] == [16000] * 3
        assert feeds[0]["rate"].dtype == np.int64

    def test_a_scalar_serves_an_input_of_one_element(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, image=rows(4), gain=np.float32(2))
        feeds = list(read_source(path, [FIXED, TensorInfo("gain", np.dtype(np.float32), (1,))]))
        assert [f["gain"].tolist() for f in feeds] == [[2.0], [2.0]]

    def test_columns_of_different_lengths_are_an_error(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, image=rows(8), tokens=np.zeros((5, 1, 4), np.int64))
        text = f"{path}: the arrays give different numbers of feeds: image 4, tokens 5; make them equally long"
        with fails(text):
            list(read_source(path, [FIXED, TOKENS]))

    def test_labels_alone_are_an_error(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, label=np.arange(2))
        with fails(f"{path} holds no array for the model's inputs: image"):
            list(read_source(path, [IMAGE]))

    def test_labels_are_left_out(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, image=rows(2), label=np.arange(2), labels_of_boxes=np.zeros(3))
        assert [list(f) for f in read_source(path, [FIXED])] == [["image"]]

    def test_an_unknown_array_is_an_error(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, picture=rows(2))
        with fails(f"{path}: the model has no input 'picture'; its inputs are: image"):
            list(read_source(path, [IMAGE]))

    def test_too_low_a_rank_is_an_error(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, image=np.ones(3, np.float32))
        with fails("sample 0, input 'image': shape [3], expected ['batch', 3]"):
            list(read_source(path, [IMAGE]))

    def test_too_few_rows_for_a_fixed_batch_is_an_error(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, image=rows(1))
        with fails("sample 0, input 'image': shape [1, 3], expected [2, 3]"):
            list(read_source(path, [FIXED]))

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"text"])
    def test_a_broken_file_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "broken.npz"
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=f"^cannot read {re.escape(str(path))}: "):
            list(read_source(path, [IMAGE]))

    def test_the_identity_follows_the_contents(self, tmp_path: Path) -> None:
        one = read_source(self.save(tmp_path, image=rows(2)), [IMAGE]).identity
        again = read_source(self.save(tmp_path, image=rows(2)), [IMAGE]).identity
        other = read_source(self.save(tmp_path, image=rows(2, 1.0)), [IMAGE]).identity
        assert one == again
        assert one != other
        assert as_feed_source([{"image": rows(2)}], [IMAGE]).identity is None

    def test_the_parts_of_a_split_have_identities_of_their_own(self, tmp_path: Path) -> None:
        split = read_source(self.save(tmp_path, image=rows(8)), [FIXED]).split()
        assert split.ranges.identity is not None
        assert split.ranges.identity != split.held_out.identity


class TestFolders:
    def test_a_folder_of_npz_is_read_in_natural_order(self, tmp_path: Path) -> None:
        for index in (10, 2, 1):
            np.savez(tmp_path / f"part{index}.npz", image=rows(2, index))
        feeds = list(read_source(str(tmp_path), [FIXED]))
        assert [float(f["image"][0, 0]) for f in feeds] == [1.0, 2.0, 10.0]

    def test_onnx_test_data_sets(self, tmp_path: Path) -> None:
        for index in (0, 1, 10):
            folder = tmp_path / f"test_data_set_{index}"
            folder.mkdir()
            for place, array in enumerate((rows(1, index), np.array(index))):
                path = folder / f"input_{place}.pb"
                path.write_bytes(numpy_helper.from_array(array).SerializeToString())
        infos = [IMAGE, RATE]
        assert [int(f["rate"]) for f in read_source(tmp_path, infos)] == [0, 1, 10]
        assert [int(f["rate"]) for f in read_source(tmp_path / "test_data_set_10", infos)] == [10]

    def test_a_test_data_set_without_an_input_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "test_data_set_0").mkdir()
        missing = tmp_path / "test_data_set_0" / "input_0.pb"
        with pytest.raises(CalibrationError, match=f"^cannot read {re.escape(str(missing))}: "):
            list(read_source(tmp_path, [IMAGE]))

    def test_an_input_that_is_no_tensor_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "test_data_set_0").mkdir()
        path = tmp_path / "test_data_set_0" / "input_0.pb"
        path.write_bytes(
            onnx.helper.make_tensor("x", onnx.TensorProto.FLOAT, [1, 3], [1, 2, 3]).SerializeToString()[:9]
        )
        with pytest.raises(CalibrationError, match=f"^cannot read {re.escape(str(path))}: "):
            list(read_source(tmp_path, [IMAGE]))

    def test_a_folder_without_data_is_an_error(self, tmp_path: Path) -> None:
        kinds = "neither test_data_set_* folders nor .npz, .npy, pictures, .txt or .jsonl files"
        with fails(f"the folder {tmp_path} holds {kinds}"):
            read_source(tmp_path, [IMAGE])

    def test_a_missing_path_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "none.npz"
        with fails(f"cannot read calibration data from {path}: no such file or folder"):
            read_source(path, [IMAGE])

    def test_a_file_of_another_kind_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "data.csv"
        path.write_text("1,2")
        kinds = ".npz, .npy, .txt, .jsonl, a picture, a folder, or file.py:function"
        with fails(f"cannot read calibration data from {path}: expected {kinds}"):
            read_source(path, [IMAGE])


class TestFunctions:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "mine.py"
        path.write_text(text)
        return path

    def test_a_function_is_called_anew_for_each_reading(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path,
            "import numpy as np\ndef feeds():\n"
            "    for i in range(3):\n        yield {'image': np.full((1, 3), i, 'f')}\n",
        )
        source = read_source(f"{path}:feeds", [IMAGE])
        assert [[float(f["image"][0, 0]) for f in source] for _ in range(2)] == [[0.0, 1.0, 2.0]] * 2

    def test_a_file_may_define_dataclasses_with_deferred_annotations(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path,
            "from __future__ import annotations\nfrom dataclasses import dataclass\nimport numpy as np\n"
            "@dataclass\nclass Size:\n    n: int = 2\n"
            "def feeds():\n    return [{'image': np.zeros((1, 3), 'f')}] * Size().n\n",
        )
        assert len(list(read_source(f"{path}:feeds", [IMAGE]))) == 2

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with fails(f"cannot load {tmp_path}/no.py:feeds: no such file"):
            read_source(f"{tmp_path}/no.py:feeds", [IMAGE])

    def test_a_missing_function_is_an_error(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "feeds = 3\n")
        with fails(f"cannot load {path}:feeds: the file has no function 'feeds'"):
            load_function(str(path), "feeds")

    def test_a_syntax_error_is_named(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "def f(:\n")
        with pytest.raises(CalibrationError, match=f"^cannot load {re.escape(str(path))}:f: SyntaxError: "):
            load_function(str(path), "f")

    def test_a_file_that_does_not_import_is_an_error(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "import nothing_of_this_name\n")
        text = f"cannot load {path}:feeds: ModuleNotFoundError: No module named 'nothing_of_this_name'"
        with fails(text):
            read_source(f"{path}:feeds", [IMAGE])


class TestRandom:
    def test_fits_the_inputs_and_repeats_by_seed(self) -> None:
        infos = [IMAGE, TOKENS, RATE, TensorInfo("flag", np.dtype(np.bool_), (2,))]
        feeds = random_feeds(infos, 3, seed=5)
        assert [validate(f, infos, i)["image"].shape for i, f in enumerate(feeds)] == [(1, 3)] * 3
        assert feeds[0]["flag"].dtype == np.bool_
        assert set(np.unique([f["tokens"] for f in feeds])) <= {0, 1}
        for one, again in zip(feeds, random_feeds(infos, 3, seed=5), strict=True):
            for name, array in one.items():
                np.testing.assert_array_equal(array, again[name])

    @pytest.mark.parametrize(
        "info", [TensorInfo("x", np.dtype(np.float32), None), TensorInfo("x", np.dtype(np.object_), (1,))]
    )
    def test_refuses_what_cannot_be_invented(self, info: TensorInfo) -> None:
        with fails("cannot make random data for input 'x': give --calibration SRC"):
            random_feeds([info], 1)
