"""Few shapes in place of many: open axes are filled up with zeros to the next of a few lengths, results are cut back.

Each shape of the inputs has a plan, and a CUDA graph, of its own; with buckets there is one for each bucket. What a
model does along an axis may see what it is filled with: a batch of samples that are independent does not, nor do tokens
behind a mask of zeros. So nobody but the user names the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.nn.functional as nn
from torch import Tensor

from qcompiler.backends.triton.program import Port
from qcompiler.errors import CalibrationError, ModelError, TargetError


@dataclass(frozen=True)
class Buckets:
    """Lengths by the name of an open axis, ascending.

    Attributes:
        lengths: of each axis; longer ones run as they are.
    """

    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        """Check that the axes are there, and that results can be cut back.

        Raises:
            ModelError: no input has such an axis, or an output has an open axis that is no input's.
        """
        named = {d for p in inputs for d in p.shape or () if isinstance(d, str)}
        for axis in self.lengths:
            if axis not in named:
                raise ModelError(f"buckets: no input has an axis {axis!r}; expected some of {', '.join(sorted(named))}")
        for port in outputs if self.lengths else ():
            if port.shape is None or any(not isinstance(d, int) and d not in named for d in port.shape):
                raise ModelError(
                    f"buckets: output {port.name} has the shape {port.shape}, whose open axes are no input's: nobody "
                    "knows where to cut it; name its axes in the model, or give no buckets"
                )

    def fill(self, feeds: Mapping[str, Tensor], inputs: Sequence[Port]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the feeds at the lengths of buckets, and the true length of each axis that was filled up.

        Raises:
            CalibrationError: an axis has two lengths.
        """
        true: dict[str, int] = {}
        for port in inputs:
            for axis, length in zip(port.shape or (), feeds[port.name].shape, strict=False):
                if isinstance(axis, str) and axis in self.lengths and true.setdefault(axis, length) != length:
                    raise CalibrationError(f"axis {axis} has the lengths {true[axis]} and {length} in one feed")
        wanted = {axis: next((n for n in self.lengths[axis] if n >= length), length) for axis, length in true.items()}
        found = {p.name: self._filled(feeds[p.name], p, wanted) for p in inputs}
        return found, {axis: length for axis, length in true.items() if wanted[axis] != length}

    @staticmethod
    def _filled(tensor: Tensor, port: Port, wanted: Mapping[str, int]) -> Tensor:
        room: list[int] = []
        for axis, length in zip(port.shape or (), tensor.shape, strict=False):
            room = [0, wanted[axis] - length if isinstance(axis, str) and axis in wanted else 0, *room]
        return nn.pad(tensor, room) if any(room) else tensor

    @staticmethod
    def cut(results: Mapping[str, Tensor], outputs: Sequence[Port], true: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the results at their true lengths."""
        found = dict(results)
        for port in outputs:
            for index, axis in enumerate(port.shape or ()):
                if isinstance(axis, str) and axis in true:
                    found[port.name] = found[port.name].narrow(index, 0, true[axis])
        return {name: tensor.contiguous() for name, tensor in found.items()}


def parse_buckets(text: str) -> Buckets:
    """Return buckets from a text such as ``batch=1,8,32 time=64,128``.

    Raises:
        TargetError: the text is no such list.
    """
    lengths: dict[str, tuple[int, ...]] = {}
    for part in text.split():
        axis, _, numbers = part.partition("=")
        found = [n for n in numbers.split(",") if n]
        if not axis or not found or not all(n.isdigit() and int(n) > 0 for n in found) or axis in lengths:
            raise TargetError(f"buckets are {text!r}; expected an axis and lengths, such as 'batch=1,8,32 time=64,128'")
        lengths[axis] = tuple(sorted({int(n) for n in found}))
    return Buckets(lengths)
