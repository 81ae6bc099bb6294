"""The layers of a built engine, read from the builder's verbose log.

The text is no documented interface (it was the same in TensorRT for RTX 1.5 to 1.7), so this is the one place that
reads it, and a line that does not fit is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

HEADER = "Layers:"
_LIST = r"\[\]|\[ ?\{.*?\} ?\]"
_LINE = re.compile(
    rf"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: (?P<inputs>{_LIST})"
    rf"(?:, Constants: (?P<constants>{_LIST}))?, Outputs: (?P<outputs>{_LIST}), (?P<rest>.*)$"
)
_OPERAND = re.compile(
    r"Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<element>\w+)"
)
_TACTIC = re.compile(r"TacticName: (.*?)(?:, StreamId: |, Metadata: |$)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=[\s\x1e]*(?:\[ONNX Layer: |$))")
_IDLE = frozenset({"signal", "wait", "shape_call", "NoOp"})
"""Layers that compute nothing: order between streams, and shapes."""
_ELEMENTS = {"Int8": 8, "FP8": 8, "Int4": 4, "FP4": 4, "FP4E2M1": 4}
"""Element types that quantization stores, and their bits. E8M0 is a scale."""
_NUMBER = re.compile(r"_myl\d+_\d+$")


@dataclass(frozen=True)
class Operand:
    """One tensor at a layer: the engine's name, the dimensions (-1 is open) and TensorRT's element type."""

    name: str
    shape: tuple[int, ...]
    element: str

    @property
    def bits(self) -> int:
        """Return the bits of a quantized element, 0 for floats and other types."""
        return _ELEMENTS.get(self.element, 0)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: the engine's own.
        kind: ``gemm``, ``correlation`` (a convolution), ``kgen`` (a generated kernel), ``runtime_fusion`` (a product
            with what is around it) and others.
        inputs: tensors read.
        constants: weights, scales and other constants.
        outputs: tensors written.
        tactic: text of the chosen kernel.
        origins: names of the ONNX nodes that went into it.
    """

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    tactic: str = ""
    origins: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[str, ...]:
        """Return the operations of a generated kernel, of four letters each: ``Mul``, ``Cast``, ``Fc``, ``Corr``."""
        if not self.name.startswith("__myl_"):
            return ()
        return tuple(re.findall(r"[A-Z][a-z0-9]*", _NUMBER.sub("", self.name).removeprefix("__myl_")))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Return all that is read."""
        return self.inputs + self.constants

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        ports = {
            key: [[o.name, list(o.shape), o.element] for o in getattr(self, key)]
            for key in ("inputs", "constants", "outputs")
        }
        return {"name": self.name, "kind": self.kind, "tactic": self.tactic, "origins": list(self.origins), **ports}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read `to_dict` back."""
        ports = {
            key: tuple(Operand(name, tuple(shape), element) for name, shape, element in data[key])
            for key in ("inputs", "constants", "outputs")
        }
        return cls(data["name"], data["kind"], tactic=data["tactic"], origins=tuple(data["origins"]), **ports)


def parse_layers(text: str) -> tuple[Layer, ...]:
    """Read the log message that lists an engine's layers; those that compute nothing are left out.

    Args:
        text: the message, which begins with `HEADER`.
    """
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or match["kind"] in _IDLE:
            continue
        tactic = _TACTIC.search(match["rest"])
        _, _, origins = match["rest"].partition("Metadata:")
        found.append(
            Layer(
                match["name"], match["kind"], _operands(match["inputs"]), _operands(match["constants"] or ""),
                _operands(match["outputs"]), tactic[1] if tactic else "",
                tuple(dict.fromkeys(_ORIGIN.findall(origins.strip()))),
            )
        )  # fmt: skip
    return tuple(found)


def _operands(text: str) -> tuple[Operand, ...]:
    found = []
    for match in _OPERAND.finditer(text):
        shape = tuple(int(d) for d in re.findall(r"-?\d+", match["shape"]))
        found.append(Operand(match["name"], shape, match["element"]))
    return tuple(found)
