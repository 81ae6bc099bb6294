"""Ready conditions for `rule(where=[...])`; each returns None or a stable reason code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompiler.ir.graph import const_array, is_const, is_float, rank_of, shape_of
from qcompiler.patterns.language import Clause, Const, Number, Op, Opt, Var
from qcompiler.patterns.match import Match
from qcompiler.patterns.operators import AttributeValue, attribute_value

Named = str | Var | Const | Number | Op | Opt


def name_of(value: Named) -> str:
    """Return the name under which a pattern (or a name itself) is bound."""
    return value if isinstance(value, str) else value.name


def where(name: str, check: Callable[[Match], str | None], structural: bool = False) -> Clause:
    """Make a clause of a function that returns None or a reason, see `Clause`."""
    return Clause(name, check, structural)


def is_constant(*values: Named) -> Clause:
    """Require constants (absent optional inputs pass)."""
    names = [name_of(v) for v in values]

    def check(m: Match) -> str | None:
        bad = next((n for n in names if (v := m.get(n)) is not None and not is_const(v)), None)
        return None if bad is None else f"not-constant: {bad} is computed at run time"

    return Clause(f"is_constant({', '.join(names)})", check)


def not_constant(value: Named) -> Clause:
    """Require a value that is computed at run time."""
    name = name_of(value)
    return Clause(
        f"not_constant({name})", lambda m: f"constant: {name} is a constant" if is_const(m.get(name)) else None
    )


def per_tensor(value: Named) -> Clause:
    """Require a constant of one element."""
    name = name_of(value)

    def check(m: Match) -> str | None:
        array = const_array(m.get(name))
        if array is None:
            return f"not-constant: {name} is computed at run time"
        return None if array.size == 1 else f"not-per-tensor: {name} has {array.size} elements"

    return Clause(f"per_tensor({name})", check)


def rank(value: Named, *wanted: int) -> Clause:
    """Require a known rank, one of ``wanted``."""
    name = name_of(value)

    def check(m: Match) -> str | None:
        actual = rank_of(m.get(name))
        if actual is None:
            return f"unknown-rank: the rank of {name} is not known"
        expected = " or ".join(map(str, wanted))
        return None if actual in wanted else f"rank: {name} has rank {actual}, expected {expected}"

    return Clause(f"rank({name}, {', '.join(map(str, wanted))})", check)


def same_shape(first: Named, second: Named) -> Clause:
    """Require equal known shapes; symbolic axes are equal by name."""
    a, b = name_of(first), name_of(second)

    def check(m: Match) -> str | None:
        left, right = shape_of(m.get(a)), shape_of(m.get(b))
        if left is None or right is None or None in left or None in right:
            return f"unknown-shape: the shapes of {a} and {b} are not both known"
        return None if left == right else f"shape: {a} is {left}, {b} is {right}"

    return Clause(f"same_shape({a}, {b})", check)


def same_rank(first: Named, second: Named) -> Clause:
    """Require equal known ranks."""
    a, b = name_of(first), name_of(second)

    def check(m: Match) -> str | None:
        left, right = rank_of(m.get(a)), rank_of(m.get(b))
        if left is None or right is None:
            return f"unknown-rank: the ranks of {a} and {b} are not both known"
        return None if left == right else f"rank: {a} has rank {left}, {b} has {right}"

    return Clause(f"same_rank({a}, {b})", check)


def same_type(first: Named, second: Named) -> Clause:
    """Require equal known element types."""
    a, b = name_of(first), name_of(second)

    def check(m: Match) -> str | None:
        left, right = m.bindings[a].dtype, m.bindings[b].dtype
        if left is None or right is None:
            return f"unknown-type: the types of {a} and {b} are not both known"
        return None if left == right else f"type: {a} is {left}, {b} is {right}"

    return Clause(f"same_type({a}, {b})", check)


def float_typed(*values: Named) -> Clause:
    """Require float32, float16 or bfloat16 (absent optional inputs pass)."""
    names = [name_of(v) for v in values]

    def check(m: Match) -> str | None:
        bad = next((n for n in names if (v := m.get(n)) is not None and not is_float(v)), None)
        return None if bad is None else f"not-float: {bad} is {m.bindings[bad].dtype}"

    return Clause(f"float_typed({', '.join(names)})", check)


def attribute(node: str, name: str, *wanted: AttributeValue) -> Clause:
    """Require an attribute (or its default) to have one of the given values."""

    def check(m: Match) -> str | None:
        found = m.find(node)
        if found is None:
            return None
        actual = attribute_value(found, name, m.opset)
        return None if actual in wanted else f"attribute: {name} of {found.name} is {actual}, expected {wanted}"

    return Clause(f"attribute({node}.{name} in {wanted})", check)


def last_axis(node: str, value: Named, attr: str = "axis") -> Clause:
    """Require an axis attribute that names the last axis of a value; -1 needs no known rank."""
    name = name_of(value)

    def check(m: Match) -> str | None:
        axis = attribute_value(m.node(node), attr, m.opset)
        count = rank_of(m.get(name))
        if axis in (-1, (-1,)):
            return None
        if count is None:
            return f"unknown-rank: the rank of {name} is not known"
        last = count - 1
        return (
            None if axis in (last, (last,)) else f"not-last-axis: {attr} is {axis}, the last axis of {name} is {last}"
        )

    return Clause(f"last_axis({node}.{attr}, {name})", check)


def opset_at_least(version: int) -> Clause:
    """Require a version of the ONNX operators."""
    return Clause(
        f"opset_at_least({version})",
        lambda m: None if m.opset >= version else f"opset: the model has opset {m.opset}, the form needs {version}",
    )


def finite(*values: Named) -> Clause:
    """Require constants without NaN or infinity (absent ones pass)."""
    names = [name_of(v) for v in values]

    def check(m: Match) -> str | None:
        for name in names:
            array = const_array(m.get(name))
            if array is not None and not np.isfinite(np.asarray(array, dtype=np.float64)).all():
                return f"not-finite: {name} holds NaN or infinity"
        return None

    return Clause(f"finite({', '.join(names)})", check)


def distinct(first: Named, second: Named) -> Clause:
    """Require two different values."""
    a, b = name_of(first), name_of(second)
    return Clause(f"distinct({a}, {b})", lambda m: f"same-value: {a} is {b}" if m.get(a) is m.get(b) else None)


def replaceable(by: Named) -> Clause:
    """Require that the root's output can become an existing value.

    A graph output keeps its name, so a graph input, a constant, another graph output or a value of an outer scope
    cannot take its place.
    """
    name = name_of(by)

    def check(m: Match) -> str | None:
        new, old = m.bindings[name], m.root.outputs[0]
        if not old.is_graph_output():
            return None
        if new.is_graph_input() or new.is_initializer() or new.is_graph_output() or new.graph is not m.root.graph:
            return f"graph-output: {old.name} is a graph output and {new.name} cannot take its name"
        return None

    return Clause(f"replaceable({name})", check)


def only_use(*values: Named) -> Clause:
    """Require that each constant is read once, so that changing it does not add a second copy."""
    names = [name_of(v) for v in values]

    def check(m: Match) -> str | None:
        for name in names:
            value = m.get(name)
            if value is not None and (len(value.uses()) > 1 or value.is_graph_output()):
                return f"shared-constant: {name} ({value.name}) is read {len(value.uses())} times"
        return None

    return Clause(f"only_use({', '.join(names)})", check)
