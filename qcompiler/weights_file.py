"""One file of weights for several graphs: each distinct tensor is stored once, found by its bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.serialize import EXTERNAL_THRESHOLD, stored_tensors, to_bytes_with
from qcompiler.staging import Staging

_OWN_NAME = re.compile(r"weights-[0-9a-f]{12}\.bin")
_ALIGNMENTS = ((1 << 20, 1 << 16), (1 << 16, 1 << 12), (0, 64))
"""(least bytes, alignment): Windows maps files from multiples of 64 KiB, Linux from pages; what is small is copied."""


@dataclass
class Stored:
    """One distinct content in the weights file.

    Attributes:
        tensor: the first tensor that has it.
        uses: names of the tensors that have it, by graph.
        offset: where it lies.
    """

    tensor: ir.TensorProtocol
    uses: dict[str, list[str]] = field(default_factory=dict)
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return self.tensor.nbytes

    @property
    def graphs(self) -> tuple[str, ...]:
        """Return the graphs that use it."""
        return tuple(self.uses)


@dataclass(frozen=True)
class WeightsFile:
    """Where the tensors of several graphs lie in one file.

    Attributes:
        models: the graphs by name.
        stored: what is in the file, in the order of its offsets, by digest.
        digests: which of these each initializer is.
    """

    models: Mapping[str, ir.Model]
    stored: Mapping[str, Stored]
    digests: Mapping[ir.Value, str]

    @property
    def name(self) -> str:
        """Return the file's name: it holds a digest of the contents, so that no other build's file is overwritten."""
        made = hashlib.sha256()
        for digest, tensor in self.stored.items():
            made.update(f"{digest}@{tensor.offset};".encode())
        return f"weights-{made.hexdigest()[:12]}.bin"

    @property
    def nbytes(self) -> int:
        """Return the size of the file."""
        return max((s.offset + s.nbytes for s in self.stored.values()), default=0)

    def model_bytes(self, graph: str) -> bytes:
        """Return one graph as a protobuf whose larger tensors are pointers into the file."""
        model, name = self.models[graph], self.name
        pointers: dict[ir.Value, ir.TensorProtocol] = {}
        for value, tensor in stored_tensors(model):
            if (digest := self.digests.get(value)) is not None:
                pointers[value] = ir.ExternalTensor(
                    name, self.stored[digest].offset, tensor.nbytes, tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()), name=value.name or "",
                )  # fmt: skip
            elif isinstance(tensor, ir.ExternalTensor):  # a small one, in a file of the model as given
                pointers[value] = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
        return to_bytes_with(model, pointers, strip=True)

    def chunks(self) -> Iterator[bytes]:
        """Yield the contents of the file, one tensor at a time."""
        place = 0
        for tensor in self.stored.values():
            yield b"\0" * (tensor.offset - place)
            yield tensor.tensor.tobytes()
            place = tensor.offset + tensor.nbytes


def lay_out(models: Mapping[str, ir.Model]) -> WeightsFile:
    """Find every distinct tensor of some graphs by its bytes, and give each its place in one file.

    Tensors below `EXTERNAL_THRESHOLD` bytes, and texts, stay in their graphs.
    """
    found: dict[str, Stored] = {}
    digests: dict[ir.Value, str] = {}
    for graph, model in models.items():
        for value, tensor in stored_tensors(model):
            if tensor.dtype == ir.DataType.STRING or tensor.nbytes < EXTERNAL_THRESHOLD:
                continue
            digest = hashlib.sha256(tensor.tobytes()).hexdigest()
            digests[value] = digest
            found.setdefault(digest, Stored(tensor)).uses.setdefault(graph, []).append(str(value.name))
    # Large ones first: what is aligned to less fills no gaps behind them.
    ranks = {d: next(i for i, (least, _) in enumerate(_ALIGNMENTS) if s.nbytes >= least) for d, s in found.items()}
    ordered = {d: found[d] for d in sorted(found, key=lambda d: ranks[d])}
    place = 0
    for digest, stored in ordered.items():
        alignment = _ALIGNMENTS[ranks[digest]][1]
        stored.offset = -(-place // alignment) * alignment
        place = stored.offset + stored.nbytes
    return WeightsFile(models, ordered, digests)


def write_together(folder: Path, weights: WeightsFile, texts: Mapping[str, str]) -> tuple[Path, ...]:
    """Write graphs, their one weights file and some texts into a folder; on failure it is as it was.

    The weights file comes first and has a name of its own, so that an older build in the folder stays whole until the
    last of the new files has its name. Then weights files of the replaced models are removed, unless another model in
    the folder refers to them.

    Args:
        folder: is made if its parent is there.
        weights: of `lay_out`.
        texts: other files by name.

    Raises:
        ModelError: a file cannot be written; the text has the system's reason.
    """
    with Staging() as staging:
        try:
            open_folder(staging, folder)
            models = {f"{graph}.onnx": weights.model_bytes(graph) for graph in weights.models}
            contents = {name: iter((text.encode(),)) for name, text in texts.items()}
            contents = {name: iter((data,)) for name, data in models.items()} | contents
            if weights.stored:
                contents = {weights.name: weights.chunks()} | contents
            for name, chunks in contents.items():
                _write(staging, folder / name, chunks)
            replaced = _referred(folder / name for name in models if (folder / name).exists())
            staging.commit()
        except OSError as error:
            raise ModelError(f"cannot write to {folder}: {error.strerror or error}") from error
    for name in replaced - _referred(folder.glob("*.onnx")):
        with suppress(OSError):
            (folder / name).unlink()
    return tuple(folder / name for name in contents)


def open_folder(staging: Staging, folder: Path) -> None:
    """Make the folder of several graphs if it is not there; without a commit it is removed again.

    Raises:
        ModelError: it cannot be made, or is a file.
    """
    try:
        staging.make_folder(folder)
    except OSError as error:
        reason = "it is a file" if folder.exists() else error.strerror or str(error)
        raise ModelError(f"cannot write to {folder}: {reason}; several graphs go into a folder") from error


def _write(staging: Staging, final: Path, chunks: Iterator[bytes]) -> None:
    try:
        temporary = staging.stage_file(final)
    except OSError as error:
        raise ModelError(f"cannot write {final}: {error.strerror or error}") from error
    with open(temporary, "xb") as file:
        for chunk in chunks:
            file.write(chunk)


def _referred(models: Iterable[Path]) -> set[str]:
    """Return the names of the weights files that models refer to; what is no model refers to nothing."""
    found: set[str] = set()
    for path in models:
        with suppress(Exception):  # protobuf and the file system raise their own types
            found |= set(_locations(onnx.load(path, load_external_data=False).graph))
    return {name for name in found if _OWN_NAME.fullmatch(name)}


def _locations(graph: onnx.GraphProto) -> Iterator[str]:
    for tensor in graph.initializer:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _locations(body)
