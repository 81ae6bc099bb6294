"""Text: which input takes what, padding and truncation, lines of .txt and .jsonl, and the tokenizer's own settings."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from qcompiler.calibration.readers import SourceOptions, read_source
from qcompiler.calibration.texts import text_columns, text_role
from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError

tokenizers = pytest.importorskip("tokenizers")

INT = np.dtype(np.int64)
OPEN = ("batch", "sequence")
WORDS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "b", "c", "d", "e")
CLS, SEP, PAD, A, B, C, D, E = range(1, 9)


def infos(shape: tuple[int | str | None, ...], *names: str) -> list[TensorInfo]:
    return [TensorInfo(name, INT, shape) for name in names]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Words by spaces, [CLS] before and [SEP] behind."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def changed(path: Path, **settings: dict[str, object]) -> Path:
    """Give the tokenizer truncation or padding of its own."""
    made = tokenizers.Tokenizer.from_file(str(path))
    if "truncation" in settings:
        made.enable_truncation(**settings["truncation"])
    if "padding" in settings:
        made.enable_padding(**settings["padding"])
    made.save(str(path))
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("a b c\n\n  \nd\na b c d e\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("input_ids", "input_ids"),
        ("input_ids:0", "input_ids"),
        ("input_ids_1", "input_ids"),
        ("model/input_ids", "input_ids"),
        ("decoder_input_ids", "input_ids"),
        ("tokens", "input_ids"),
        ("attention_mask", "attention_mask"),
        ("encoder.attention_mask", "attention_mask"),
        ("input_mask:0", "attention_mask"),
        ("segment_ids:0", "token_type_ids"),
        ("token_type_ids", "token_type_ids"),
        ("position_ids", "position_ids"),
        ("image", None),
        ("state", None),
        ("unmasked", None),
    ],
)
def test_names_say_what_an_input_takes(name: str, role: str | None) -> None:
    assert text_role(name) == role


def test_the_only_input_of_integers_takes_the_ids() -> None:
    assert text_columns(infos(OPEN, "x"), {}) == {"x": "input_ids"}
    assert text_columns(infos(OPEN, "x", "y"), {}) == {}
    assert text_columns(infos(OPEN, "x", "y"), {"y": "input_ids", "x": "attention_mask"}) == {
        "x": "attention_mask",
        "y": "input_ids",
    }


class TestEncoding:
    def test_rows_are_padded_to_the_longest_of_their_batch(self, tokenizer: Path, lines: Path) -> None:
        inputs = infos(OPEN, "input_ids", "attention_mask", "token_type_ids", "position_ids")
        (feed,) = read_source(lines, inputs, SourceOptions(tokenizer=tokenizer))
        assert feed["input_ids"].tolist() == [
            [CLS, A, B, C, SEP, PAD, PAD],
            [CLS, D, SEP, PAD, PAD, PAD, PAD],
            [CLS, A, B, C, D, E, SEP],
        ]
        assert feed["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 3 + [0] * 4, [1] * 7]
        assert feed["token_type_ids"].tolist() == [[0] * 7] * 3
        assert feed["position_ids"].tolist() == [list(range(7))] * 3

    @pytest.mark.parametrize(("shape", "sequence"), [(("batch", 5), None), (OPEN, 5)])
    def test_a_fixed_length_pads_and_cuts(
        self, tokenizer: Path, lines: Path, shape: tuple[str, int], sequence: int | None
    ) -> None:
        inputs = infos(shape, "input_ids", "attention_mask")
        options = SourceOptions(tokenizer=tokenizer, sequence=sequence, batch=2)
        first, second = read_source(lines, inputs, options)
        assert first["input_ids"].tolist() == [[CLS, A, B, C, SEP], [CLS, D, SEP, PAD, PAD]]
        assert second["input_ids"].tolist() == [[CLS, A, B, C, SEP]]  # d and e are cut, [SEP] is kept

    def test_without_a_mask_rows_stay_alone_and_unpadded(self, tokenizer: Path, lines: Path) -> None:
        feeds = list(read_source(lines, infos(OPEN, "tokens"), SourceOptions(tokenizer=tokenizer)))
        assert [f["tokens"].tolist() for f in feeds] == [
            [[CLS, A, B, C, SEP]],
            [[CLS, D, SEP]],
            [[CLS, A, B, C, D, E, SEP]],
        ]

    def test_a_fixed_batch_is_filled_with_rows_of_the_one_before(self, tokenizer: Path, lines: Path) -> None:
        feeds = list(read_source(lines, infos((2, 3), "x"), SourceOptions(tokenizer=tokenizer)))
        assert [f["x"].tolist() for f in feeds] == [[[CLS, A, SEP], [CLS, D, SEP]], [[CLS, D, SEP], [CLS, A, SEP]]]

    def test_an_input_without_a_batch_axis(self, tokenizer: Path, lines: Path) -> None:
        feeds = list(read_source(lines, infos(("length",), "input_ids"), SourceOptions(tokenizer=tokenizer, limit=2)))
        assert [f["input_ids"].tolist() for f in feeds] == [[CLS, A, B, C, SEP], [CLS, D, SEP]]

    def test_the_type_is_the_models(self, tokenizer: Path, lines: Path) -> None:
        inputs = [
            TensorInfo("input_ids", np.dtype(np.int32), OPEN),
            TensorInfo("attention_mask", np.dtype(np.float32), OPEN),
        ]
        feed = next(iter(read_source(lines, inputs, SourceOptions(tokenizer=tokenizer))))
        assert {n: a.dtype for n, a in feed.items()} == {"input_ids": np.int32, "attention_mask": np.float32}

    def test_the_tokenizers_own_settings_hold_where_the_model_leaves_it_open(
        self, tokenizer: Path, lines: Path
    ) -> None:
        changed(tokenizer, truncation={"max_length": 4}, padding={"length": 9, "pad_id": E, "direction": "left"})
        inputs = infos(OPEN, "input_ids", "attention_mask")
        (feed,) = read_source(lines, inputs, SourceOptions(tokenizer=tokenizer))
        assert feed["input_ids"].tolist() == [[CLS, A, B, SEP], [E, CLS, D, SEP], [CLS, A, B, SEP]]
        assert feed["attention_mask"].tolist() == [[1] * 4, [0, 1, 1, 1], [1] * 4]

    def test_a_text_without_end_is_cut(self, tokenizer: Path, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_text("a " * 2000)
        (feed,) = read_source(tmp_path / "long.txt", infos(OPEN, "x"), SourceOptions(tokenizer=tokenizer))
        assert feed["x"].shape == (1, 512)

    def test_two_lengths_are_an_error(self, tokenizer: Path, lines: Path) -> None:
        options = SourceOptions(tokenizer=tokenizer, sequence=5)
        with pytest.raises(CalibrationError, match=r"^texts cannot have two lengths: x 4, the option sequence 5$"):
            list(read_source(lines, infos((1, 4), "x"), options))


class TestFiles:
    def test_jsonl_takes_the_text_from_a_field(self, tokenizer: Path, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": "a", "label": 1}\n\n{"text": "b c", "label": 0}\n')
        feeds = list(read_source(path, infos(OPEN, "tokens"), SourceOptions(tokenizer=tokenizer)))
        assert [f["tokens"].tolist() for f in feeds] == [[[CLS, A, SEP]], [[CLS, B, C, SEP]]]
        path.write_text('{"prompt": "d"}\n')
        (feed,) = read_source(path, infos(OPEN, "tokens"), SourceOptions(tokenizer=tokenizer, text="prompt"))
        assert feed["tokens"].tolist() == [[CLS, D, SEP]]

    def test_jsonl_of_numbers_needs_no_tokenizer(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"input_ids": [4, 5], "attention_mask": [1, 1]}\n{"input_ids": [6], "attention_mask": [1]}\n')
        (feed,) = read_source(path, infos(OPEN, "input_ids", "attention_mask"))
        assert feed["input_ids"].tolist() == [[4, 5], [6, 0]]
        assert feed["attention_mask"].tolist() == [[1, 1], [1, 0]]

    @pytest.mark.parametrize(("line", "what"), [("{", "Expecting"), ("[1]", "expected an object, found a list")])
    def test_a_bad_line_is_named(self, tokenizer: Path, tmp_path: Path, line: str, what: str) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(CalibrationError, match=f"^cannot read {re.escape(str(path))}:2: {what}"):
            list(read_source(path, infos(OPEN, "x"), SourceOptions(tokenizer=tokenizer)))

    def test_a_folder_of_texts_in_natural_order(self, tokenizer: Path, tmp_path: Path) -> None:
        folder = tmp_path / "texts"
        folder.mkdir()
        for number, text in ((10, "c"), (9, "b")):
            (folder / f"{number}.txt").write_text(text)
        feeds = read_source(folder, infos(OPEN, "x"), SourceOptions(tokenizer=tokenizer))
        assert [f["x"].tolist() for f in feeds] == [[[CLS, B, SEP]], [[CLS, C, SEP]]]

    def test_the_identity_follows_the_tokenizer_not_its_place(
        self, tokenizer: Path, lines: Path, tmp_path: Path
    ) -> None:
        mark = lambda path: read_source(lines, infos(OPEN, "x"), SourceOptions(tokenizer=path)).identity  # noqa: E731
        first = mark(tokenizer)
        assert mark(tmp_path) == first  # the folder that holds it
        changed(tokenizer, truncation={"max_length": 4})
        assert mark(tokenizer) != first

    def test_text_needs_a_tokenizer(self, lines: Path, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"^text needs a tokenizer; give a tokenizer\.json \(--tokenizer\)$"):
            read_source(lines, infos(OPEN, "x"))
        with pytest.raises(CalibrationError, match=r"none\.json: no such file$"):
            read_source(lines, infos(OPEN, "x"), SourceOptions(tokenizer=tmp_path / "none.json"))
        (tmp_path / "bad.json").write_text("{}")
        with pytest.raises(CalibrationError, match=r"^cannot read the tokenizer .*bad\.json: "):
            read_source(lines, infos(OPEN, "x"), SourceOptions(tokenizer=tmp_path / "bad.json"))

    def test_a_file_that_is_no_text_is_named(self, tokenizer: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CalibrationError, match=r"^cannot read .*a\.txt: "):
            list(read_source(tmp_path / "a.txt", infos(OPEN, "x"), SourceOptions(tokenizer=tokenizer)))


def test_without_the_package_the_error_says_what_to_install(
    tokenizer: Path, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CalibrationError, match=r'^reading text needs tokenizers: pip install "qcompiler\[text\]"$'):
        read_source(lines, infos(OPEN, "x"), SourceOptions(tokenizer=tokenizer))
