"""Text into token ids, masks, types and positions, through a ``tokenizer.json`` (the ``text`` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompiler.engine import Array, TensorInfo
from qcompiler.errors import CalibrationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 512
"""Most tokens of a row where neither the model, the user nor the tokenizer says: the positions that a BERT knows."""

IDS, MASK, TYPES, POSITIONS = ROLES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""What a text gives."""

_ROLES = {
    POSITIONS: ("position_ids", "positions", "position", "pos_ids"),
    TYPES: ("token_type_ids", "segment_ids", "segments", "token_types", "type_ids", "input_type_ids"),
    MASK: ("attention_mask", "input_mask", "mask", "attn_mask", "padding_mask"),
    IDS: ("input_ids", "tokens", "token_ids", "ids", "input_tokens", "input_word_ids", "tokenized_text"),
}
_PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")


def text_role(name: str) -> str | None:
    """Return which column of a text an input asks for by its name, or None.

    ``input_ids:0``, ``input_ids_1`` and ``decoder_input_ids`` count as ``input_ids``.
    """
    plain = name.rsplit("/", 1)[-1].partition(":")[0].lower().rstrip("_0123456789").replace(".", "_")
    for role, names in _ROLES.items():
        if plain in names or any(plain.endswith(f"_{n}") for n in names if "_" in n):
            return role
    return None


def text_columns(inputs: Sequence[TensorInfo], rename: Mapping[str, str]) -> dict[str, str]:
    """Return which inputs a text fills, with the column for each.

    Args:
        inputs: the model's inputs.
        rename: input name to one of `ROLES`, where the name does not say it. The only input of rank 2 that holds
            integers takes the ids whatever its name is.
    """
    found = {}
    for info in inputs:
        role = rename.get(info.name) or text_role(info.name)
        if role in ROLES:
            found[info.name] = role
    whole = [i for i in inputs if i.dtype.kind in "iu" and i.shape is not None and len(i.shape) == 2]
    if IDS not in found.values() and len(whole) == 1 and whole[0].name not in found:
        found[whole[0].name] = IDS
    return found


class TextEncoder:
    """Encode texts for the inputs of one model.

    Attributes:
        columns: input name to what it takes of a text.
        length: tokens of every row, or None where rows are as long as the longest of their batch.
    """

    def __init__(
        self, path: Path, inputs: Sequence[TensorInfo], rename: Mapping[str, str], sequence: int | None
    ) -> None:
        """Load a tokenizer and set its truncation and padding by the model.

        Args:
            path: a ``tokenizer.json``.
            inputs: the model's inputs.
            rename: as for `text_columns`.
            sequence: tokens per row that the user wants.

        Raises:
            CalibrationError: no ``tokenizers`` package, a broken file, or two fixed lengths that differ.
        """
        self.columns = text_columns(inputs, rename)
        self._inputs = {i.name: i for i in inputs if i.name in self.columns}
        self.length = self._fixed(sequence)
        self._tokenizer = load_tokenizer(path)
        self._settle()

    def _fixed(self, sequence: int | None) -> int | None:
        lengths = {}
        for name, info in self._inputs.items():
            own = info.shape[-1] if info.shape else None
            if isinstance(own, int):
                lengths[name] = own
        if sequence is not None:
            lengths["the option sequence"] = sequence
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise CalibrationError(f"texts cannot have two lengths: {listed}")
        return next(iter(lengths.values()), None)

    def _settle(self) -> None:
        tokenizer = self._tokenizer
        cut, pad = dict(tokenizer.truncation or {}), dict(tokenizer.padding or {})
        longest = self.length or cut.get("max_length") or LONGEST
        tokenizer.enable_truncation(
            longest, **{k: v for k, v in cut.items() if k in ("stride", "strategy", "direction")}
        )
        if not pad:
            known = [(tokenizer.token_to_id(token), token) for token in _PADDING]
            pad["pad_id"], pad["pad_token"] = next(((i, t) for i, t in known if i is not None), (0, "[PAD]"))
        self.pad_id, self._left = int(pad["pad_id"]), pad.get("direction") == "left"
        self._pad_type = int(pad.get("pad_type_id", 0))
        tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        """Return [texts, length] per input, in the input's type; ids are padded, the mask is 0 there.

        Positions count the tokens from 0, and go on over the padding.
        """
        # One by one: encode_batch would start a thread pool of its own, which breaks in forked processes.
        encoded = [self._tokenizer.encode(text) for text in texts]
        length = self.length or max(1, *(len(e.ids) for e in encoded))
        filled = {
            IDS: [self._padded(e.ids, length, self.pad_id) for e in encoded],
            MASK: [self._padded(e.attention_mask, length, 0) for e in encoded],
            TYPES: [self._padded(e.type_ids, length, self._pad_type) for e in encoded],
            POSITIONS: [list(range(length)) for _ in encoded],
        }
        return {name: np.asarray(filled[role], self._inputs[name].dtype) for name, role in self.columns.items()}

    def _padded(self, numbers: Sequence[int], length: int, value: int) -> list[int]:
        spare = [value] * (length - len(numbers))
        return [*spare, *numbers] if self._left else [*numbers, *spare]


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a ``tokenizer.json``.

    Raises:
        CalibrationError: the ``tokenizers`` package is absent, or the file is none of its files.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CalibrationError('reading text needs tokenizers: pip install "qcompiler[text]"') from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises Exception itself
        raise CalibrationError(f"cannot read the tokenizer {path}: {error}") from error
