"""The quantization plan: which group takes which form, which point which format, and why. Serialisable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qcompiler.errors import PassError
from qcompiler.quant.spec import QuantSource, QuantSpec

Form = Literal["float", "static", "static-float", "dynamic", "weight-only"]
"""How a fusion group computes: in float; on quantized data with a quantized output; on quantized data with a float
output; the same with the input's scales found at run time; in float on a weight that is stored quantized."""

FORMS: tuple[Form, ...] = ("float", "static", "static-float", "dynamic", "weight-only")


@dataclass(frozen=True)
class Point:
    """A place that is quantized: a value (activation), or one use of a constant (weight or bias)."""

    spec: QuantSpec
    source: QuantSource


def use_point(node: str, index: int) -> str:
    """Return the key of one node input (weights and biases are points per use)."""
    return f"{node}#{index}"


@dataclass(frozen=True)
class GroupChoice:
    """The form of one fusion group and why it was chosen."""

    form: Form
    why: str = ""


@dataclass(frozen=True)
class QuantPlan:
    """All decisions of one build for one target.

    Attributes:
        choices: fusion group (name of its root node in the canonical graph) to form.
        points: value name or ``node#input`` to specification and source.
        engine_forms: engine-specific rewrites that were decided, by name.
    """

    choices: dict[str, GroupChoice] = field(default_factory=dict)
    points: dict[str, Point] = field(default_factory=dict)
    engine_forms: dict[str, str] = field(default_factory=dict)

    def form(self, group: str) -> Form:
        """Return the form of a group; a group the plan does not know stays float."""
        choice = self.choices.get(group)
        return "float" if choice is None else choice.form

    def to_json(self) -> str:
        """Return the plan as JSON text, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @staticmethod
    def from_json(text: str) -> QuantPlan:
        """Read what `to_json` wrote.

        Raises:
            PassError: the text is not a plan.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            points = {
                name: Point(
                    QuantSpec(**p["spec"]),
                    _source(p["source"]),
                )
                for name, p in data["points"].items()
            }
            choices = {name: GroupChoice(**c) for name, c in data["choices"].items()}
            return QuantPlan(choices, points, dict(data["engine_forms"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PassError(f"not a quantization plan: {error}") from error


def _source(data: dict[str, Any]) -> QuantSource:
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
    return QuantSource(**fields)
