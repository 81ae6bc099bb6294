"""Matching a pattern against a graph: bindings, matched nodes, and whether replacing them is safe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import const_array, is_const, is_op, rank_of, single_consumer
from qcompiler.patterns.language import AnyOf, Const, Maybe, Number, Op, Opt, Pattern, Repeat, Rest, Var
from qcompiler.patterns.operators import COMMUTATIVE, attribute_value


@dataclass(frozen=True)
class Match:
    """What a pattern found.

    Attributes:
        root: the node whose output is replaced.
        bindings: values by name; an operator's name is bound to its output, an absent optional input to nothing.
        named: nodes by name.
        nodes: all matched nodes, the root first.
        chains: nodes of each `repeat`, outermost first.
        opset: version of the ONNX domain in this model.
    """

    root: ir.Node
    bindings: dict[str, ir.Value] = field(default_factory=dict)
    named: dict[str, ir.Node] = field(default_factory=dict)
    nodes: tuple[ir.Node, ...] = ()
    chains: dict[str, tuple[ir.Node, ...]] = field(default_factory=dict)
    opset: int = 0

    def __getattr__(self, name: str) -> ir.Value:
        """Return a bound value: ``m.x``."""
        try:
            return self.__dict__["bindings"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"the match has no value named {name!r}") from None

    def get(self, name: str) -> ir.Value | None:
        """Return a bound value, or None if that part of the pattern was absent."""
        return self.bindings.get(name)

    def node(self, name: str) -> ir.Node:
        """Return a matched node by its name in the pattern.

        Raises:
            KeyError: that part of the pattern was absent.
        """
        return self.named[name]

    def find(self, name: str) -> ir.Node | None:
        """Return a matched node by name, or None if that part of the pattern was absent."""
        return self.named.get(name)

    def rest(self, name: str) -> tuple[ir.Value, ...]:
        """Return the values that a `rest` pattern took, in order."""
        found: list[ir.Value] = []
        while (value := self.bindings.get(f"{name}.{len(found)}")) is not None:
            found.append(value)
        return tuple(found)

    def chain(self, name: str) -> tuple[ir.Node, ...]:
        """Return the nodes that a `repeat` pattern took, outermost first."""
        return self.chains.get(name, ())

    def array(self, name: str) -> Array:
        """Return the contents of a bound constant.

        Raises:
            ValueError: the value is not a constant.
        """
        found = const_array(self.get(name))
        if found is None:
            raise ValueError(f"{name!r} is not a constant here")
        return found

    @property
    def interior(self) -> tuple[ir.Node, ...]:
        """Return the matched nodes other than the root."""
        return self.nodes[1:]


def find_matches(pattern: Pattern, root: ir.Node, opset: int) -> Iterator[Match]:
    """Yield every way in which ``pattern`` matches with ``root`` as its outermost node, preferred ones first."""
    for output in root.outputs:
        for found in _match(pattern, output, Match(root, opset=opset), _Place(top=True)):
            if found.nodes and found.nodes[0] is root:
                yield found
        if isinstance(pattern, Op) and pattern.output == 0:
            break


def _bound(state: Match, name: str, value: ir.Value) -> Match | None:
    if not name:
        return state
    known = state.bindings.get(name)
    if known is not None:
        return state if known is value else None
    return replace(state, bindings={**state.bindings, name: value})


def _took(state: Match, name: str, node: ir.Node) -> Match:
    named = {**state.named, name: node} if name else state.named
    nodes = state.nodes if node in state.nodes else (*state.nodes, node)
    return replace(state, named=named, nodes=nodes)


@dataclass(frozen=True)
class _Place:
    """Where a pattern stands: the node that reads the value, whether it is the root, and the prefix of bound names."""

    reader: ir.Node | None = None
    top: bool = False
    prefix: str = ""

    def label(self, name: str) -> str:
        """Return the name to bind under, empty for an unnamed pattern."""
        return self.prefix + name if name else ""

    def below(self, reader: ir.Node) -> _Place:
        """Return the place of an input of ``reader``."""
        return _Place(reader, False, self.prefix)


def _match(pattern: Pattern, value: ir.Value, state: Match, place: _Place) -> Iterator[Match]:
    if isinstance(pattern, Var):
        if (made := _bound(state, place.label(pattern.name), value)) is not None:
            yield made
    elif isinstance(pattern, Const):
        if is_const(value) and (made := _bound(state, place.label(pattern.name), value)) is not None:
            yield made
    elif isinstance(pattern, Number):
        if equals_number(value, pattern.value, pattern.tol) and not _raises_rank(value, place.reader):
            made = _bound(state, place.label(pattern.name), value)
            if made is not None:
                yield made
    elif isinstance(pattern, AnyOf):
        for option in pattern.options:
            yield from _match(option, value, state, place)
    elif isinstance(pattern, Op):
        yield from _match_op(pattern, value, state, place)
    elif isinstance(pattern, Opt):
        yield from _match_opt(pattern, value, state, place)
    else:
        yield from _match_repeat(pattern, value, state, place)


def _producer(value: ir.Value, state: Match) -> ir.Node | None:
    """Return the value's producer if it lies in the root's graph: values of outer scopes are leaves."""
    node = value.producer()
    return node if node is not None and node.graph is state.root.graph else None


def _has_attributes(pattern: Op, node: ir.Node, opset: int) -> bool:
    for key, wanted in pattern.attrs:
        actual = attribute_value(node, key, opset)
        if isinstance(wanted, float) and isinstance(actual, float):
            if not np.isclose(actual, wanted, rtol=1e-6, atol=0.0):
                return False
        elif actual != wanted:
            return False
    return True


def _match_op(pattern: Op, value: ir.Value, state: Match, place: _Place) -> Iterator[Match]:
    node = _producer(value, state)
    if node is None or not is_op(node, *pattern.types, domain=pattern.domain) or value.index() != pattern.output:
        return
    if not _has_attributes(pattern, node, state.opset):
        return
    label = place.label(pattern.name)
    named = _bound(_took(state, label, node), label, value)
    if named is None:
        return
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    below = place.below(node)
    yield from _match_inputs(pattern.inputs, inputs, named, below)
    if node.op_type in COMMUTATIVE and len(inputs) == 2 and len(pattern.inputs) == 2 and inputs[0] is not inputs[1]:
        yield from _match_inputs(pattern.inputs, inputs[::-1], named, below)


def _match_inputs(
    patterns: tuple[Pattern | Maybe | Rest, ...], inputs: list[ir.Value | None], state: Match, place: _Place
) -> Iterator[Match]:
    if not patterns:
        if not inputs:
            yield state
        return
    head, tail = patterns[0], patterns[1:]
    if isinstance(head, Rest):
        yield from _match_rest(head, inputs, state, place)
        return
    value = inputs[0] if inputs else None
    if isinstance(head, Maybe):
        if value is None:
            yield from _match_inputs(tail, inputs[1:], state, place)
            return
        head = head.inner
    if value is None:
        return
    for found in _match(head, value, state, place):
        yield from _match_inputs(tail, inputs[1:], found, place)


def _match_rest(
    pattern: Rest, inputs: list[ir.Value | None], state: Match, place: _Place, index: int = 0
) -> Iterator[Match]:
    if index == len(inputs):
        yield state
        return
    value = inputs[index]
    label = f"{place.prefix}{pattern.name}.{index}"
    if value is None:
        if pattern.each is None:  # an absent optional input in the middle binds nothing
            yield from _match_rest(pattern, inputs, state, place, index + 1)
        return
    if (bound := _bound(state, label, value)) is None:
        return
    if pattern.each is None:
        yield from _match_rest(pattern, inputs, bound, place, index + 1)
        return
    for found in _match(pattern.each, value, bound, _Place(place.reader, False, label + ".")):
        yield from _match_rest(pattern, inputs, found, place, index + 1)


def _is_wrapper(node: ir.Node | None, types: tuple[str, ...]) -> bool:
    return (
        node is not None
        and is_op(node, *types)
        and bool(node.inputs)
        and node.inputs[0] is not None
        and all(v is None or is_const(v) for v in node.inputs[1:])
    )


def _match_opt(pattern: Opt, value: ir.Value, state: Match, place: _Place) -> Iterator[Match]:
    node = _producer(value, state)
    if node is not None and _is_wrapper(node, pattern.types):
        label = place.label(pattern.name)
        bound = _bound(_took(state, label, node), label, value)
        inner = node.inputs[0]
        if bound is not None and inner is not None:
            yield from _match(pattern.inner, inner, bound, place.below(node))
    reader = single_consumer(value)
    if place.top and reader is not None and reader.inputs[0] is value and _is_wrapper(reader, pattern.types):
        return  # the match that starts at the wrapper is the larger one
    yield from _match(pattern.inner, value, state, place)


def _match_repeat(pattern: Repeat, value: ir.Value, state: Match, place: _Place) -> Iterator[Match]:
    """Yield the longest chain first."""
    steps: list[tuple[ir.Value, Match, _Place]] = [(value, state, place)]
    chain: tuple[ir.Node, ...] = ()
    while len(steps) <= pattern.at_most:
        node = _producer(value, state)
        if node is None or not is_op(node, *pattern.types) or not node.inputs or node.inputs[0] is None:
            break
        chain = (*chain, node)
        value = node.inputs[0]
        state = _took(state, "", node)
        state = replace(state, chains={**state.chains, place.prefix + pattern.name: chain})
        steps.append((value, state, place.below(node)))
    for inner, then, by in reversed(steps[pattern.at_least :]):
        yield from _match(pattern.inner, inner, then, by)


def equals_number(value: ir.Value | None, wanted: float, tol: float = 1e-6) -> bool:
    """Return whether a value is a constant of one element equal to ``wanted`` within its type's resolution."""
    if value is None or not is_const(value):
        return False
    if value.shape is not None and any(d != 1 for d in value.shape):
        return False
    array = const_array(value)
    if array is None or array.size != 1 or array.dtype.kind in "OSU":
        return False
    resolution = 0.0
    if array.dtype.kind not in "iub":
        resolution = float(ml_dtypes.finfo(array.dtype).eps)  # type: ignore[no-untyped-call]
    actual = float(array.astype(np.float64).reshape(()))
    bound = max(tol, resolution) * (abs(wanted) or 1.0)
    return actual == wanted or abs(actual - wanted) <= bound


def _raises_rank(value: ir.Value, reader: ir.Node | None) -> bool:
    """Return whether a constant of one element can give its reader's result more axes than the other inputs have."""
    rank = rank_of(value) or 0
    if rank == 0 or reader is None:
        return False
    return not any(
        other is not None and other is not value and (rank_of(other) or 0) >= rank for other in reader.inputs
    )


def unsafe(match: Match, keeps: tuple[str, ...]) -> tuple[str, str] | None:
    """Return (code, sentence) if removing the matched inner nodes would take a value that something else reads."""
    kept = {id(match.named[name]) for name in keeps if name in match.named}
    inside = {id(node) for node in match.nodes}
    for node in match.interior:
        if id(node) in kept:
            continue
        for value in node.outputs:
            if value.is_graph_output():
                return "graph-output", f"{value.name} inside the pattern is a graph output"
            for use in value.uses():
                if use.node.graph is not match.root.graph:
                    return "captured", f"{value.name} inside the pattern is read by a subgraph"
                if id(use.node) not in inside:
                    return "interior-used-elsewhere", f"{value.name} inside the pattern is also read by {use.node.name}"
    return None
