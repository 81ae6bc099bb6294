"""A target's capability table: which operators run quantized, in which forms, and why.

A table is one TOML file::

    [target]                     # fields of `Target`; they override inherited ones
    extends = "ort-x86"          # start from another table
    drop = ["Add"]               # remove the inherited rows of these operators; also in a [scheme.NAME]
    [[op]]                       # fields of `OpRow`; they stand in front of inherited rows, and win
    [traps]                      # name = "why"; merged with inherited ones
    [scheme.fp8]                 # fields of [target] that this scheme changes
    [[scheme.fp8.op]]            # if there are any, they replace the [[op]] rows
    [unavailable]                # nvfp4 = "why this target lacks the scheme"
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal, get_args

from qcompiler.errors import TargetError
from qcompiler.plugins import TARGETS, PluginError, conflicts, find_offer, offered_names
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.plan import FORMS

Kind = Literal["weighted", "arithmetic", "mover", "recurrent"]
FLOAT_TYPES = ("float32", "float16", "bfloat16")
BIASES = ("int32", "float")


@dataclass(frozen=True)
class OpRow:
    """What a target can do with one operator.

    Attributes:
        type: ONNX operator types the row covers.
        kind: ``weighted`` (a weight and an activation, or two activations), ``arithmetic`` (own scales in and out),
            ``mover`` (moves or selects integers: equal parameters in and out) or ``recurrent``.
        forms: forms the operator has besides float.
        data: indices of the quantized data inputs; empty means all.
        weight: index of the weight input, -1 if the row has none (a weighted one: ``data`` are two activations).
        weight_axis: axis of per-channel weight scales (negative counts from the end), None for per tensor only.
        bias: index of the bias, -1 if there is none.
        constants: whether constant data inputs may be quantized.
        min_reduce: least reduced length (K) at which the quantized form can win; smaller ones stay float.
        min_columns: least number of output columns or channels (N) at which it can win.
        multiple_of: K and N must be divisible by it, if it is not 0.
        fixed_output: (scale, zero point) the operator's output always has, if any.
        emit: for a form, the engine's operator emitted directly because the engine does not fuse the Q/DQ form.
        requires: processor flags without which the engine computes these forms wrongly.
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
    min_columns: int = 0
    multiple_of: int = 0
    fixed_output: tuple[float, int] | None = None
    emit: dict[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Target:
    """A capability table, in one scheme.

    Attributes:
        name: as given to ``--target``.
        engine: the backend that runs it.
        processor: instruction-set family the table is for; empty for any.
        requires: processor flags without which the table does not hold.
        sm: CUDA compute capability (80, 89, 90, 120), 0 if the target is no GPU.
        version: engine version that the table was seen on.
        scheme: name of the scheme that the fields and rows describe.
        activation: format of quantized activations.
        symmetric: whether activations have zero point 0 (the middle of an unsigned format).
        signed: format of activations of both signs, symmetric, where a zero point costs time; empty for ``activation``.
        weight: format of quantized weights.
        weight_bits: bits of the weight's range; 7 where a processor's 16-bit sums of 8-bit products would saturate.
        pair_safe: whether 8-bit weights are scaled so that no such sum of two products can: most channels then keep
            nearly 8 bits.
        weight_symmetric: whether weights have zero point 0.
        narrow_weights: weights avoid the most negative integer.
        weight_scale: format in which block scales are stored (float8e4m3fn, float8e8m0); empty for float.
        block: elements of K that share one weight scale; 0 is one scale per channel or tensor.
        blocks: block sizes that may be taken where ``block`` does not divide K, best first.
        bias: ``int32`` where a static group's bias is quantized, ``float`` where it stays float.
        float_type: type of what is computed in float: float32, float16 or bfloat16.
        activations: unary operators that fold into an output's quantization (Relu, Clip).
        traps: names of engine-specific rewrites worth trying, with the reason.
        max_opset: newest opset the engine runs.
        opset: opset to emit, 0 to keep the model's.
        rows: one row per operator family.
        doc: one paragraph for ``qcompiler targets``.
        scheme_tables: the other schemes, as read.
        unavailable: schemes that this target lacks, with the reason.
    """

    name: str
    engine: str
    processor: str = ""
    requires: tuple[str, ...] = ()
    sm: int = 0
    version: str = ""
    scheme: str = "int8"
    activation: str = "uint8"
    symmetric: bool = False
    signed: str = ""
    weight: str = "int8"
    weight_bits: int = 8
    pair_safe: bool = False
    weight_symmetric: bool = True
    narrow_weights: bool = True
    weight_scale: str = ""
    block: int = 0
    blocks: tuple[int, ...] = ()
    bias: str = "int32"
    float_type: str = "float32"
    activations: tuple[str, ...] = ()
    traps: dict[str, str] = field(default_factory=dict)
    max_opset: int = 21
    opset: int = 0
    rows: tuple[OpRow, ...] = ()
    doc: str = ""
    scheme_tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def schemes(self) -> tuple[str, ...]:
        """Return the names of the schemes there are, that of the head first."""
        return (self.scheme, *(name for name in self.scheme_tables if name != self.scheme))

    def with_scheme(self, name: str, block: int = 0) -> Target:
        """Return the table in another scheme: a plain target whose fields and rows are that scheme's.

        Args:
            name: one of `schemes`.
            block: block size to prefer, where the scheme allows it (``blocks`` lists those); 0 is the scheme's own.

        Raises:
            TargetError: the target has no such scheme; the text lists those it has, and why this one is missing.
        """
        if name == self.scheme:
            return self._in_blocks(block)
        if name not in self.scheme_tables:
            why = self.unavailable.get(name)
            reason = f": {why}" if why else ""
            raise TargetError(
                f"target {self.name} has no scheme {name!r}{reason}; it has {', '.join(self.schemes)}; "
                "take one of these, or another target"
            )
        table = self.scheme_tables[name]
        head = _fields({k: v for k, v in table.items() if k not in ("op", "drop")})
        rows = _without(self.rows, table.get("drop", []))
        if "op" in table:
            rows = tuple(_row(row, self.name) for row in table["op"])
        return replace(self, **{**head, "scheme": name, "rows": rows, "scheme_tables": {}})._in_blocks(block)

    def _in_blocks(self, block: int) -> Target:
        """Return the target with another block size; one without blocks stays as it is."""
        if block in (0, self.block) or not self.block:
            return self
        if block not in self.blocks:
            known = ", ".join(map(str, dict.fromkeys((self.block, *self.blocks))))
            raise TargetError(f"scheme {self.scheme} of {self.name} has no blocks of {block}; it has blocks of {known}")
        return replace(self, block=block)

    def on(self, features: Collection[str]) -> Target:
        """Return the table as it holds on a processor: rows whose flags it lacks have no form but float."""

        def held(row: OpRow) -> OpRow:
            lacking = [flag for flag in row.requires if flag not in features]
            return replace(row, forms=(), why=f"needs {' and '.join(lacking)}: {row.why}") if lacking else row

        return replace(self, rows=tuple(map(held, self.rows)))

    def row(self, op_type: str) -> OpRow | None:
        """Return the row of an operator, or None if the target always runs it in float."""
        return next((row for row in self.rows if op_type in row.type), None)

    def product_row(self, op_type: str) -> OpRow | None:
        """Return the row of a product of two activations, or None if the target computes such in float."""
        return next((r for r in self.rows if op_type in r.type and r.kind == "weighted" and r.weight < 0), None)

    def supports(self, op_type: str, form: str) -> str | None:
        """Return None if the operator has the form on this target, else the reason why not."""
        row = self.row(op_type)
        if row is None:
            return f"{self.engine} has no integer kernel for {op_type}"
        if form not in row.forms:
            return f"{op_type} has the forms {', '.join(row.forms)} on {self.name}, not {form}"
        return None


_NOT_IN_HEAD = frozenset({"rows", "traps", "scheme_tables", "unavailable"})
_NOT_IN_SCHEME = frozenset({"name", "engine", "scheme"})
_TABLES = frozenset({"target", "op", "traps", "scheme", "unavailable"})


def _row(table: Mapping[str, Any], name: str) -> OpRow:
    known = set(OpRow.__dataclass_fields__)
    if unknown := set(table) - known:
        raise TargetError(f"target {name}: unknown key {sorted(unknown)[0]!r} in an [[op]] row")
    for key in ("type", "kind", "forms"):
        if key not in table:
            raise TargetError(f"target {name}: an [[op]] row lacks {key!r}")
    fields = _fields(table)
    for key in ("type", "forms", "data", "requires"):
        if not isinstance(fields.get(key, ()), tuple):
            raise TargetError(f"target {name}: {key!r} of an [[op]] row is {fields[key]!r}; expected a list")
    if fields["kind"] not in get_args(Kind):
        raise TargetError(f"target {name}: kind is {fields['kind']!r}; expected one of {', '.join(get_args(Kind))}")
    if unknown := set(fields["forms"]) - (set(FORMS) - {"float"}):
        raise TargetError(f"target {name}: unknown form {sorted(unknown)[0]!r}; known: {', '.join(FORMS[1:])}")
    return OpRow(**fields)


def _fields(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}


def _without(rows: tuple[OpRow, ...], types: list[str] | tuple[str, ...]) -> tuple[OpRow, ...]:
    """Return the rows without some operator types; a row that covers no other is gone."""
    kept = (replace(row, type=tuple(t for t in row.type if t not in types)) for row in rows)
    return tuple(row for row in kept if row.type)


def _check_fields(head: Mapping[str, Any], name: str, where: str) -> None:
    """Check the fields of [target] or of a scheme.

    Raises:
        TargetError: a key is unknown, or its value of another type or not one of those allowed.
    """
    barred = _NOT_IN_HEAD if where == "[target]" else _NOT_IN_HEAD | _NOT_IN_SCHEME
    known = Target.__dataclass_fields__
    if unknown := set(head) - (set(known) - barred):
        raise TargetError(f"target {name}: unknown key {sorted(unknown)[0]!r} in {where}")
    for key, value in head.items():
        default = () if key in ("requires", "activations", "blocks") else known[key].default
        kind = list if isinstance(default, tuple) else str if key in ("name", "engine") else type(default)
        if type(value) is not kind:
            raise TargetError(f"target {name}: {key} in {where} is {value!r}; expected a {_KINDS[kind]}")
    for key in ("activation", "signed", "weight", "weight_scale"):
        value = head.get(key, "")
        if value and value not in FORMATS:
            raise TargetError(f"target {name}: unknown format {value!r} for {key}; known: {', '.join(FORMATS)}")
    for key, allowed in (("bias", BIASES), ("float_type", FLOAT_TYPES)):
        if head.get(key, allowed[0]) not in allowed:
            raise TargetError(f"target {name}: {key} is {head[key]!r}; expected one of {', '.join(allowed)}")


_KINDS: dict[type, str] = {list: "list", str: "text", bool: "bool", int: "whole number"}


def parse_target(text: str, name: str) -> Target:
    """Read a capability table from TOML text; what it extends is a shipped table, or one of an installed package.

    Raises:
        TargetError: the text is not TOML, has a key the schema does not know, or extends in a circle.
    """
    data = _extended(text, name, (name,))
    head = dict(data["target"])
    _check_fields(head, name, "[target]")
    if "engine" not in head:
        raise TargetError(f"target {name}: [target] lacks 'engine'")
    rows = tuple(_row(table, name) for table in data["op"])
    schemes: dict[str, dict[str, Any]] = {}
    for key, table in data["scheme"].items():
        _check_fields({k: v for k, v in table.items() if k not in ("op", "drop")}, name, f"[scheme.{key}]")
        schemes[key] = table
        for row in table.get("op", []):
            _row(row, name)
    parts = {"traps": data["traps"], "scheme_tables": schemes, "unavailable": data["unavailable"]}
    return Target(**{"name": name, **_fields(head), **parts, "rows": rows})


def _extended(text: str, name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """Return the tables of a file, merged with those of the table it extends."""
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"target {name}: {error}") from error
    if unknown := set(data) - _TABLES:
        raise TargetError(f"target {name}: unknown table {sorted(unknown)[0]!r}; known: {', '.join(sorted(_TABLES))}")
    data = {"target": {}, "op": [], "traps": {}, "scheme": {}, "unavailable": {}, **data}
    head = data["target"] = dict(data["target"])
    parent, drop = head.pop("extends", None), head.pop("drop", [])
    if parent is None:
        return data
    if parent in seen:
        raise TargetError(f"target {name}: tables extend each other in a circle: {' -> '.join((*seen, parent))}")
    if parent not in known_targets():
        raise TargetError(f"target {name}: extends unknown {parent!r}; known: {', '.join(known_targets())}")
    base = _extended(_text_of(parent), parent, (*seen, parent))
    base["target"].pop("name", None)
    missing = set(data["unavailable"]) - set(data["scheme"])
    schemes = {key: table for key, table in base["scheme"].items() if key not in missing}
    for key, table in data["scheme"].items():
        schemes[key] = _scheme_over(schemes.get(key, {}), table)
    return {
        "target": {**base["target"], **head},
        "op": _rows_over(base["op"], data["op"], drop),
        "traps": {**base["traps"], **data["traps"]},
        "scheme": schemes,
        "unavailable": {k: v for k, v in {**base["unavailable"], **data["unavailable"]}.items() if k not in schemes},
    }


def _scheme_over(base: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **child}
    if "op" in base:
        merged["op"] = _rows_over(base["op"], child.get("op", []), child.get("drop", []))
    return merged


def _rows_over(base: list[dict[str, Any]], child: list[dict[str, Any]], drop: list[str]) -> list[dict[str, Any]]:
    """Put a child's rows in front of those it extends, which lose the operators that it names or drops."""
    named = {*drop, *(t for row in child for t in row.get("type", []))}
    kept = [{**row, "type": [t for t in row.get("type", []) if t not in named]} for row in base]
    return [*child, *(row for row in kept if row["type"])]


def target_names() -> tuple[str, ...]:
    """Return the names of the shipped targets."""
    folder = resources.files("qcompiler.targets")
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


RESERVED = ("cpu", "host")
"""Names that stand for a target of this machine."""


def known_targets() -> tuple[str, ...]:
    """Return the names of the shipped targets, then of those that installed packages offer; none is loaded."""
    shipped = target_names()
    return (*shipped, *offered_names(TARGETS, (*shipped, *RESERVED)))


def target_owner(name: str) -> str:
    """Return the distribution (with its version) that offers a target, empty for a shipped one.

    Raises:
        PluginError: two packages offer it.
    """
    offer = None if name in target_names() else find_offer(TARGETS, name)
    return "" if offer is None else offer.source


def target_errors() -> tuple[PluginError, ...]:
    """Load the targets of all installed packages and return what is wrong with them."""
    shipped = (*target_names(), *RESERVED)
    found = list(conflicts(TARGETS, shipped))
    told = set(map(str, found))
    for name in offered_names(TARGETS, shipped):
        try:
            load_target(name)
        except PluginError as error:
            if str(error) not in told:
                found.append(error)
    return tuple(found)


def _text_of(name: str) -> str:
    if name in target_names():
        return resources.files("qcompiler.targets").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    offer = find_offer(TARGETS, name)
    assert offer is not None
    return offer.text()


def load_target(name: str, scheme: str = "") -> Target:
    """Return a target by name: a shipped one, or one of an installed package.

    Args:
        name: as `known_targets` lists it.
        scheme: one of `Target.schemes`; empty for the table's own (int8 in most).

    Raises:
        TargetError: no such target, or no such scheme on it; the text lists those there are.
        PluginError: a package offers the target, but it cannot be read; names the package.
    """
    if name not in known_targets():
        raise TargetError(f"unknown target {name!r}; known: {', '.join((*RESERVED, *known_targets()))}")
    target = parse_target(_text_of(name), name) if name in target_names() else _offered(name)
    return target.with_scheme(scheme) if scheme else target


def _offered(name: str) -> Target:
    """Return the target of a package; what is wrong with its table is told with the package's name."""
    offer = find_offer(TARGETS, name)
    assert offer is not None
    try:
        return parse_target(offer.text(), name)
    except TargetError as error:
        raise offer.error(f"is no capability table: {error}") from error
