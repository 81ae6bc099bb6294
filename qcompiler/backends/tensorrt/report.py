"""What a build of a model by TensorRT came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from qcompiler.backends.tensorrt.layers import Layer
from qcompiler.engine import ShapeRange


@dataclass(frozen=True)
class ParserIssue:
    """Why a model was not taken.

    Attributes:
        code: TensorRT's name of the error, or ``BUILD``, ``EMPTY``, ``DIED``, ``TIMEOUT``, ``PROFILE``, ``API`` (an
            argument that TensorRT's binding refuses), ``TARGET`` or ``LOAD``.
        node: name of the ONNX node, empty if the issue is with no one node.
        operator: its operator type.
        text: TensorRT's own words.
        origin: names of the imported nodes that it comes from.
    """

    code: str
    node: str
    operator: str
    text: str
    origin: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line."""
        came = f", from {'; '.join(self.origin)}" if self.origin and self.origin != (self.node,) else ""
        where = f" at {self.operator} {self.node!r}{came}" if self.node else ""
        return f"{self.code}{where}: {self.text}"


@dataclass(frozen=True)
class BuildReport:
    """What a build of a model came to.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        version: the module's.
        sm: compute capability that was built for.
        issues: why there is no engine; empty if there is one.
        layers: of the engine; empty if the log did not list them.
        plan: the engine, if it was asked for.
        errors: the log's lines at level error.
        notes: what was assumed (shapes of open axes, another compute capability).
        profiles: the shapes that it was built for, for inputs with open axes.
    """

    flavour: str
    version: str
    sm: int
    issues: tuple[ParserIssue, ...] = ()
    layers: tuple[Layer, ...] = ()
    plan: bytes | None = field(default=None, repr=False)
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    profiles: Mapping[str, ShapeRange] = field(default_factory=dict)

    @property
    def built(self) -> bool:
        """Return whether there is an engine."""
        return not self.issues

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, without the engine and the profiles."""
        return {
            "flavour": self.flavour,
            "version": self.version,
            "sm": self.sm,
            "issues": [asdict(issue) for issue in self.issues],
            "layers": [layer.to_dict() for layer in self.layers],
            "errors": list(self.errors),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read `to_dict` back."""
        issues = tuple(ParserIssue(**{**issue, "origin": tuple(issue["origin"])}) for issue in data["issues"])
        layers = tuple(Layer.from_dict(layer) for layer in data["layers"])
        return cls(
            data["flavour"], data["version"], data["sm"], issues, layers, errors=tuple(data["errors"]),
            notes=tuple(data["notes"]),
        )  # fmt: skip
