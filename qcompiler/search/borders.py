"""Where values cross between fusion groups, and which conversions a choice of forms pays there.

A value is converted at most three ways, each paid once however many groups read it: quantized with scales known ahead
of time, dequantized, and quantized with scales found at run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qcompiler.ir.graph import consumers
from qcompiler.targets.groups import Group

Kind = Literal["quantize", "dequantize", "dynamic"]
KINDS: tuple[Kind, ...] = ("quantize", "dequantize", "dynamic")
_READS: Mapping[str, Kind] = {"static": "quantize", "static-float": "quantize", "dynamic": "dynamic"}
_STORES = frozenset({"static"})


def form_of(option: str) -> str:
    """Return the form behind an option: ``weight-only`` of ``weight-only:int4``."""
    return re.split("[:@]", option, maxsplit=1)[0]


def stores(option: str) -> bool:
    """Return whether a group in this option writes its results quantized."""
    return form_of(option) in _STORES


def reads(option: str) -> Kind | None:
    """Return the conversion that a group in this option needs of its data: ``quantize``, ``dynamic`` or None."""
    return _READS.get(form_of(option))


@dataclass(frozen=True)
class Border:
    """One value that a group writes or reads as data.

    Attributes:
        producer: the group that writes it, empty if it is a graph input or a lone node's.
        readers: groups that read it as data, each once, in program order.
        outside: whether something else reads it as floats: a lone node, another input of a group, the caller.
        elements: elements in the measured feed, 0 if unknown.
    """

    producer: str = ""
    readers: tuple[str, ...] = ()
    outside: bool = False
    elements: int = 0

    def charges(self, choice: Mapping[str, str]) -> Iterator[Kind]:
        """Yield the conversions that a choice of options pays for this value; unnamed groups are float."""
        stored = bool(self.producer) and stores(choice.get(self.producer, "float"))
        wanted = [reads(choice.get(reader, "float")) for reader in self.readers]
        if "quantize" in wanted and not stored:
            yield "quantize"
        if stored and (self.outside or any(kind != "quantize" for kind in wanted)):
            yield "dequantize"
        if "dynamic" in wanted:
            yield "dynamic"

    def possible(self, options: Mapping[str, Sequence[str]]) -> Iterator[Kind]:
        """Yield the conversions that some choice among the options of each group pays.

        Args:
            options: options by group; a group without any is float.
        """
        asked = {reads(option) for reader in self.readers for option in options.get(reader, ())}
        if "quantize" in asked:
            yield "quantize"
        if self.producer and any(stores(option) for option in options.get(self.producer, ())):
            yield "dequantize"
        if "dynamic" in asked:
            yield "dynamic"


def find_borders(groups: Sequence[Group], elements: Mapping[str, int]) -> dict[str, Border]:
    """Return every value that a group writes or reads as data, by name, in program order.

    Args:
        groups: all groups of the model.
        elements: elements per value in the measured feed.
    """
    owner = {node: g for g in groups for node in g.nodes}
    values: dict[ir.Value, None] = {}
    for group in groups:
        values |= dict.fromkeys((*group.data, *group.results))
    return {str(v.name): _border(v, owner, elements.get(str(v.name), 0)) for v in values}


def _border(value: ir.Value, owner: Mapping[ir.Node, Group], elements: int) -> Border:
    node = value.producer()
    producer = owner.get(node) if node is not None else None
    if producer is not None and value not in producer.results:
        producer = None  # in front of the activation: what a form with integer output never writes
    readers: dict[str, None] = {}
    outside = value.is_graph_output()
    for consumer in consumers(value):
        reader = owner.get(consumer)
        if reader is not None and consumer is reader.root and value in reader.data:
            readers[reader.name] = None
        elif reader is None or reader is not producer:
            outside = True
    return Border(producer.name if producer is not None else "", tuple(readers), outside, elements)
