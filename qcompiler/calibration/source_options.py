"""How a source is read: what the model's inputs alone do not say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qcompiler.calibration.image_options import ImageOptions
from qcompiler.errors import CalibrationError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class SourceOptions:
    """How files and rows become feeds.

    Attributes:
        images: size, layout and normalization of images.
        tokenizer: a ``tokenizer.json``, or the folder that holds one; needed for text.
        sequence: tokens per row; by default the model's fixed length, else the longest row of each batch.
        text: column of the text in .jsonl files and datasets.
        batch: rows per feed where the model leaves its batch axis open.
        limit: the most feeds to read. Of image and .npy files, evenly spaced ones are taken (folders are sorted by
            class), of everything else the first ones.
        rename: input name to column, array or file name, where they differ; text gives the columns ``input_ids``,
            ``attention_mask``, ``token_type_ids`` and ``position_ids``.
        values: input name to the one number that fills it in every feed, for inputs that the source does not give.
    """

    images: ImageOptions = field(default_factory=ImageOptions)
    tokenizer: str | Path | None = None
    sequence: int | None = None
    text: str = "text"
    batch: int | None = None
    limit: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sequence", "batch", "limit"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise CalibrationError(f"the data option {name} is {number}; expected a number from 1")

    def tokenizer_file(self) -> Path:
        """Return the tokenizer's file.

        Raises:
            CalibrationError: no tokenizer was given, or it is not there.
        """
        if self.tokenizer is None:
            raise CalibrationError("text needs a tokenizer; give a tokenizer.json (--tokenizer)")
        path = Path(self.tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise CalibrationError(f"cannot read the tokenizer {path}: no such file")
        return path

    def digest(self) -> str:
        """Return a digest of all options, the tokenizer's contents included (its path is not)."""
        options = asdict(self)
        options["tokenizer"] = file_digest([self.tokenizer_file()]) if self.tokenizer is not None else None
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(files: Iterable[Path]) -> str:
    """Return a digest of names and contents in the given order; one block is in memory at a time.

    Raises:
        CalibrationError: a file cannot be read.
    """
    made = hashlib.sha256()
    for file in files:
        made.update(f"{len(file.name)} {file.name} ".encode())
        own = hashlib.sha256()
        try:
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    own.update(block)
        except OSError as error:
            raise CalibrationError(f"cannot read {file}: {error.strerror or error}") from error
        made.update(own.digest())
    return made.hexdigest()[:16]
