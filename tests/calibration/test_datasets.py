"""Rows: data sets and loaders, stand-ins for them and the real ones where they are installed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.calibration.image_options import ImageOptions
from qcompiler.calibration.readers import SourceOptions, as_feed_source
from qcompiler.calibration.rows import as_array, row_feeds
from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
X = TensorInfo("x", FLOAT, ("batch", 2))
IDS = TensorInfo("input_ids", INT, ("batch", "time"))
MASK = TensorInfo("attention_mask", INT, ("batch", "time"))


def feeds_of(rows: list[dict[str, Any]], *inputs: TensorInfo, **options: Any) -> list[dict[str, Any]]:
    return [{n: a.tolist() for n, a in f.items()} for f in row_feeds(rows, inputs, SourceOptions(**options))]


class TestRows:
    def test_rows_are_stacked_and_other_columns_left_out(self) -> None:
        rows = [{"x": [i, i + 0.5], "label": i} for i in range(5)]
        assert feeds_of(rows, X, batch=2) == [
            {"x": [[0, 0.5], [1, 1.5]]},
            {"x": [[2, 2.5], [3, 3.5]]},
            {"x": [[4, 4.5]]},
        ]

    def test_a_row_may_hold_the_whole_feed(self) -> None:
        rows = [{"x": np.zeros((3, 2), np.float32)}, {"x": np.ones((1, 2), np.float32)}]
        assert feeds_of(rows, X) == [{"x": [[0, 0]] * 3}, {"x": [[1, 1]]}]

    def test_columns_may_be_renamed(self) -> None:
        assert feeds_of([{"values": [1, 2]}], X, rename={"x": "values"}) == [{"x": [[1, 2]]}]

    def test_a_missing_column_is_named(self) -> None:
        text = (
            "the calibration data has the columns y, label; the model's input 'x' takes none of them; name its column "
            "(--data rename.INPUT=COLUMN) or fill it with a number (--data values.INPUT=NUMBER)"
        )
        with pytest.raises(CalibrationError, match=f"^{re.escape(text)}$"):
            feeds_of([{"y": 1, "label": 2}], X)

    def test_ragged_tokens_are_padded_with_zeros_positions_go_on(self) -> None:
        positions = TensorInfo("position_ids", INT, ("batch", "time"))
        rows = [
            {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]},
            {"input_ids": [5], "attention_mask": [1], "position_ids": [0]},
        ]
        (feed,) = feeds_of(rows, IDS, MASK, positions)
        assert feed["input_ids"] == [[7, 8, 9], [5, 0, 0]]
        assert feed["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
        assert feed["position_ids"] == [[0, 1, 2], [0, 1, 2]]

    def test_tokens_without_a_mask_stay_alone(self) -> None:
        rows = [{"input_ids": [7, 8, 9]}, {"input_ids": [5]}]
        assert feeds_of(rows, IDS) == [{"input_ids": [[7, 8, 9]]}, {"input_ids": [[5]]}]

    def test_tokens_fit_a_fixed_length(self) -> None:
        rows = [{"input_ids": [7, 8, 9]}, {"input_ids": [5]}]
        assert feeds_of(rows, TensorInfo("input_ids", INT, (2, 2))) == [{"input_ids": [[7, 8], [5, 0]]}]

    def test_other_ragged_columns_are_an_error(self) -> None:
        wave = TensorInfo("wave", FLOAT, (None, None))
        rows = [{"wave": [1.0, 2.0]}, {"wave": [1.0]}]
        with pytest.raises(
            CalibrationError, match=r"differ in shape in the column 'wave': \[1\], \[2\]; give --data batch=1"
        ):
            feeds_of(rows, wave)
        assert feeds_of(rows, wave, batch=1) == [{"wave": [[1, 2]]}, {"wave": [[1]]}]

    def test_a_row_that_is_no_dict_is_an_error(self) -> None:
        with pytest.raises(
            CalibrationError, match=r"^a row of the calibration data is a int; expected a dict of columns$"
        ):
            list(row_feeds([3], [X], SourceOptions()))  # type: ignore[list-item]

    def test_only_one_batch_of_rows_is_read_ahead(self) -> None:
        read: list[int] = []

        def rows() -> Iterator[dict[str, list[float]]]:
            for index in range(100):
                read.append(index)
                yield {"x": [0.0, 1.0]}

        next(iter(row_feeds(rows(), [X], SourceOptions(batch=4))))
        assert len(read) == 4


class TestPictures:
    IMAGE = TensorInfo("pixel_values", FLOAT, (None, 3, 2, 2))
    PLAIN = ImageOptions(scale=1.0)

    def test_pixels_and_pillow_pictures_go_to_the_image_input(self) -> None:
        pillow = pytest.importorskip("PIL.Image")
        given = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        for cell in (given, pillow.fromarray(given)):
            (feed,) = feeds_of([{"img": cell, "label": 3}], self.IMAGE, images=self.PLAIN)
            assert feed["pixel_values"] == [given.transpose(2, 0, 1).tolist()]

    def test_undecoded_pictures(self) -> None:
        import io

        pillow = pytest.importorskip("PIL.Image")
        given = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        stored = io.BytesIO()
        pillow.fromarray(given).save(stored, format="PNG")
        (feed,) = feeds_of([{"img": {"bytes": stored.getvalue(), "path": None}}], self.IMAGE, images=self.PLAIN)
        assert feed["pixel_values"] == [given.transpose(2, 0, 1).tolist()]
        with pytest.raises(CalibrationError, match=r"^cannot read the picture my\.png: "):
            feeds_of([{"img": {"bytes": b"none", "path": "my.png"}}], self.IMAGE)

    def test_pictures_and_tokens_together(self) -> None:
        pytest.importorskip("PIL.Image")
        given = np.zeros((2, 2, 3), np.uint8)
        (feed,) = feeds_of([{"image": given, "input_ids": [1, 2]}], self.IMAGE, IDS, images=self.PLAIN)
        assert feed["input_ids"] == [[1, 2]]
        assert np.shape(feed["pixel_values"]) == (1, 3, 2, 2)

    def test_two_columns_of_pictures_need_a_name(self) -> None:
        pytest.importorskip("PIL.Image")
        row = {"left": np.zeros((2, 2, 3), np.uint8), "right": np.ones((2, 2, 3), np.uint8)}
        with pytest.raises(CalibrationError, match=r"^which pictures go where is not clear: columns left, right"):
            feeds_of([row], self.IMAGE)
        (feed,) = feeds_of([row], self.IMAGE, images=self.PLAIN, rename={"pixel_values": "right"})
        assert np.unique(feed["pixel_values"]).tolist() == [1]


class Loader:
    """What `is_loader` asks of a DataLoader; gives other batches every time if it shuffles."""

    dataset, batch_size, collate_fn = (), 2, None

    def __init__(self, batches: list[Any], sampler: object) -> None:
        self.batches, self.sampler, self.readings = batches, sampler, 0

    def __iter__(self) -> Iterator[Any]:
        self.readings += 1
        yield from self.batches if self.readings == 1 else self.batches[::-1]


class SequentialSampler: ...


class RandomSampler: ...


class TestLoaders:
    BATCHES = tuple((np.full((2, 2), i, np.float32), np.array([i, i])) for i in range(3))

    def test_tuples_are_in_the_models_order_labels_behind(self) -> None:
        source = as_feed_source(Loader(list(self.BATCHES), SequentialSampler()), [X])
        assert [f["x"][0, 0] for f in source] == [0, 1, 2]

    def test_what_shuffles_is_kept_as_first_read(self) -> None:
        source = as_feed_source(Loader(list(self.BATCHES), RandomSampler()), [X])
        assert [[float(f["x"][0, 0]) for f in source] for _ in range(2)] == [[0, 1, 2]] * 2
        in_order = as_feed_source(Loader(list(self.BATCHES), SequentialSampler()), [X])
        assert [[float(f["x"][0, 0]) for f in in_order] for _ in range(2)] == [[0, 1, 2], [2, 1, 0]]

    def test_dicts_lose_what_the_model_does_not_take(self) -> None:
        batches = [{"x": np.zeros((1, 2), np.float32), "labels": np.array([1])}]
        (feed,) = as_feed_source(Loader(batches, SequentialSampler()), [X])
        assert list(feed) == ["x"]

    def test_plain_feeds_may_be_tuples_or_bare_arrays(self) -> None:
        (bare,) = as_feed_source([np.ones((1, 2), np.float32)], [X])
        assert bare["x"].tolist() == [[1, 1]]
        both = [X, TensorInfo("n", INT, ())]
        (pair,) = as_feed_source([(np.ones((1, 2), np.float32), np.int64(4))], both)  # type: ignore[list-item]
        assert (pair["x"].tolist(), int(pair["n"])) == ([[1, 1]], 4)

    def test_a_dict_of_a_user_still_may_not_misname(self) -> None:
        with pytest.raises(CalibrationError, match="the model has no input 'y'"):
            list(as_feed_source([{"x": np.ones((1, 2), np.float32), "y": np.ones(1)}], [X]))

    def test_torch(self) -> None:
        torch = pytest.importorskip("torch")
        data = torch.utils.data.TensorDataset(torch.arange(8.0).reshape(4, 2).requires_grad_(), torch.arange(4))
        source = as_feed_source(torch.utils.data.DataLoader(data, batch_size=3), [X])
        assert [f["x"].tolist() for f in source] == [[[0, 1], [2, 3], [4, 5]], [[6, 7]]]
        shuffled = as_feed_source(torch.utils.data.DataLoader(data, batch_size=1, shuffle=True), [X])
        first = [f["x"].tolist() for f in shuffled]
        assert all([f["x"].tolist() for f in shuffled] == first for _ in range(5))
        assert as_array(torch.tensor([0.5, -3], dtype=torch.bfloat16)).tolist() == [0.5, -3]

    def test_torch_bfloat16_reaches_a_bfloat16_input(self) -> None:
        torch = pytest.importorskip("torch")
        info = TensorInfo("x", np.dtype(ml_dtypes.bfloat16), (None, 2))
        (feed,) = as_feed_source([{"x": torch.tensor([[0.5, -3]], dtype=torch.bfloat16)}], [info])
        assert feed["x"].dtype == ml_dtypes.bfloat16
        assert feed["x"].tolist() == [[0.5, -3]]


class FakeSet:
    """What `is_dataset` asks of a data set."""

    column_names, features, map = ("x",), None, None

    def __iter__(self) -> Iterator[dict[str, list[float]]]:
        return iter([{"x": [1.0, 2.0]}, {"x": [3.0, 4.0]}])


class TestDatasets:
    def test_anything_with_named_columns_is_one(self) -> None:
        source = as_feed_source(FakeSet(), [X], SourceOptions(batch=1))  # type: ignore[arg-type]
        assert [[f["x"].tolist() for f in source] for _ in range(2)] == [[[[1, 2]], [[3, 4]]]] * 2
        assert source.identity is None

    def test_a_dict_of_them_is_refused(self) -> None:
        text = "the calibration data is a dict of data sets; give one of them: train, test"
        with pytest.raises(CalibrationError, match=f"^{text}$"):
            as_feed_source({"train": FakeSet(), "test": FakeSet()}, [X])  # type: ignore[arg-type]

    def test_a_function_may_return_one(self) -> None:
        source = as_feed_source(FakeSet, [X], SourceOptions(limit=1))  # type: ignore[arg-type, return-value]
        assert [f["x"].tolist() for f in source] == [[[1, 2], [3, 4]]]

    def test_the_real_ones(self) -> None:
        datasets = pytest.importorskip("datasets")
        rows = {"x": [[float(i), 0.5] for i in range(5)], "label": list(range(5))}
        made = datasets.Dataset.from_dict(rows)
        want = [[[0, 0.5], [1, 0.5]], [[2, 0.5], [3, 0.5]], [[4, 0.5]]]
        options = SourceOptions(batch=2)
        for given in (made, made.with_format("numpy"), made.to_iterable_dataset()):
            assert [f["x"].tolist() for f in as_feed_source(given, [X], options)] == want
        source = as_feed_source(made, [X], options)
        assert source.identity is not None
        assert source.identity != as_feed_source(made.select([0, 1]), [X], options).identity
        assert as_feed_source(made.to_iterable_dataset(), [X]).identity is None
        with pytest.raises(CalibrationError, match=r"give one of them: train$"):
            as_feed_source(datasets.DatasetDict({"train": made}), [X])

    def test_real_pictures(self) -> None:
        datasets = pytest.importorskip("datasets")
        pytest.importorskip("PIL.Image")
        pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        made = datasets.Dataset.from_dict({"image": list(pixels), "label": [0, 1]}, features=features)
        info = TensorInfo("pixel_values", FLOAT, (None, 3, 2, 2))
        (feed,) = as_feed_source(made, [info], SourceOptions(ImageOptions(scale=1.0)))
        np.testing.assert_array_equal(feed["pixel_values"], pixels.transpose(0, 3, 1, 2))


def test_reading_imports_no_optional_package() -> None:
    optional = {"torch", "datasets", "PIL", "tokenizers"}
    code = f"import sys\nimport qcompiler.calibration.readers\nprint({optional!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
