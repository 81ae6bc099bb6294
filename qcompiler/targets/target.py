"""A target's capability table: which operators run on integers, in which forms, and why."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, get_args

from qcompiler.errors import TargetError
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.plan import FORMS

Kind = Literal["weighted", "arithmetic", "mover", "recurrent"]


@dataclass(frozen=True)
class OpRow:
    """What a target can do with one operator.

    Attributes:
        type: ONNX operator types the row covers.
        kind: ``weighted`` (a weight and an activation, or two activations), ``arithmetic`` (own scales in and out),
            ``mover`` (moves or selects integers: equal parameters in and out) or ``recurrent``.
        forms: forms the operator has besides float.
        data: indices of the quantized data inputs; empty means all.
        weight: index of the weight input, -1 if the row has none.
        weight_axis: axis of per-channel weight scales (negative counts from the end), None for per tensor only.
        bias: index of the int32 bias, -1 if there is none.
        constants: whether constant data inputs may be quantized.
        min_reduce: least reduced length (K) at which the integer form can win; smaller ones stay float.
        fixed_output: (scale, zero point) the operator's output always has, if any.
        emit: for a form, the engine's operator emitted directly because the engine does not fuse the Q/DQ form.
        why: the engine's rule behind the row.
    """

    type: tuple[str, ...]
    kind: Kind
    forms: tuple[str, ...]
    data: tuple[int, ...] = ()
    weight: int = -1
    weight_axis: int | None = None
    bias: int = -1
    constants: bool = True
    min_reduce: int = 0
    fixed_output: tuple[float, int] | None = None
    emit: dict[str, str] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Target:
    """A capability table.

    Attributes:
        name: as given to ``--target``.
        engine: the backend that runs it.
        processor: instruction-set family the table is for; empty for any.
        requires: processor flags without which the table does not hold.
        activation: format of quantized activations.
        signed: format of activations of both signs, symmetric, where a zero point costs time; empty for ``activation``.
        weight: format of quantized weights.
        weight_bits: bits of the weight's range; 7 where a processor's 16-bit sums of 8-bit products would saturate.
        narrow_weights: weights avoid the most negative integer.
        activations: unary operators that fold into an output's quantization (Relu, Clip).
        traps: names of engine-specific rewrites worth trying, with the reason.
        max_opset: newest opset the engine runs.
        rows: one row per operator family.
        doc: one paragraph for ``qcompiler targets``.
    """

    name: str
    engine: str
    processor: str = ""
    requires: tuple[str, ...] = ()
    activation: str = "uint8"
    signed: str = ""
    weight: str = "int8"
    weight_bits: int = 8
    narrow_weights: bool = True
    activations: tuple[str, ...] = ()
    traps: dict[str, str] = field(default_factory=dict)
    max_opset: int = 21
    rows: tuple[OpRow, ...] = ()
    doc: str = ""

    def row(self, op_type: str) -> OpRow | None:
        """Return the row of an operator, or None if the target always runs it in float."""
        return next((row for row in self.rows if op_type in row.type), None)

    def supports(self, op_type: str, form: str) -> str | None:
        """Return None if the operator has the form on this target, else the reason why not."""
        row = self.row(op_type)
        if row is None:
            return f"{self.engine} has no integer kernel for {op_type}"
        if form not in row.forms:
            return f"{op_type} has the forms {', '.join(row.forms)} on {self.name}, not {form}"
        return None


def _row(table: dict[str, Any], name: str) -> OpRow:
    known = set(OpRow.__dataclass_fields__)
    if unknown := set(table) - known:
        raise TargetError(f"target {name}: unknown key {sorted(unknown)[0]!r} in an [[op]] row")
    for key in ("type", "kind", "forms"):
        if key not in table:
            raise TargetError(f"target {name}: an [[op]] row lacks {key!r}")
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    for key in ("type", "forms", "data"):
        if not isinstance(fields.get(key, ()), tuple):
            raise TargetError(f"target {name}: {key!r} of an [[op]] row is {fields[key]!r}; expected a list")
    if fields["kind"] not in get_args(Kind):
        raise TargetError(f"target {name}: kind is {fields['kind']!r}; expected one of {', '.join(get_args(Kind))}")
    if unknown := set(fields["forms"]) - (set(FORMS) - {"float"}):
        raise TargetError(f"target {name}: unknown form {sorted(unknown)[0]!r}; known: {', '.join(FORMS[1:])}")
    return OpRow(**fields)


def parse_target(text: str, name: str) -> Target:
    """Read a capability table from TOML text.

    Raises:
        TargetError: the text is not TOML, or has a key the schema does not know.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"target {name}: {error}") from error
    head = dict(data.get("target", {}))
    if unknown := set(head) - set(Target.__dataclass_fields__):
        raise TargetError(f"target {name}: unknown key {sorted(unknown)[0]!r} in [target]")
    if "engine" not in head:
        raise TargetError(f"target {name}: [target] lacks 'engine'")
    for key in ("activation", "weight", *(["signed"] if head.get("signed") else [])):
        if head.get(key, "int8") not in FORMATS:
            raise TargetError(f"target {name}: unknown format {head[key]!r} for {key}; known: {', '.join(FORMATS)}")
    head = {key: tuple(v) if isinstance(v, list) else v for key, v in head.items()}
    rows = tuple(_row(table, name) for table in data.get("op", []))
    return Target(**{"name": name, **head, "traps": dict(data.get("traps", {})), "rows": rows})


def target_names() -> tuple[str, ...]:
    """Return the names of the shipped targets."""
    folder = resources.files("qcompiler.targets")
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def load_target(name: str) -> Target:
    """Return a shipped target by name.

    Raises:
        TargetError: no such target; the text lists those there are.
    """
    if name not in target_names():
        raise TargetError(f"unknown target {name!r}; known: {', '.join(('cpu', 'host', *target_names()))}")
    text = resources.files("qcompiler.targets").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_target(text, name)
