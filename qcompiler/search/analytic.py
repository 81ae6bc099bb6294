"""What a choice of forms costs where nothing can be timed: from the work of every group and the bytes that it moves.

The law is a roofline (Williams, Waterman and Patterson, Roofline, CACM 52(4), 2009): a group takes as long as the
slower of its arithmetic and its memory traffic. The rates per class of processor are data: ``rates.toml`` beside this
file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

import onnx_ir as ir

from qcompiler.errors import TargetError
from qcompiler.ir.analysis import macs
from qcompiler.ir.graph import attr_int, is_const
from qcompiler.ir.shapes import element_count
from qcompiler.quant.plan import Form
from qcompiler.search.borders import Kind, find_borders, reads, stores
from qcompiler.search.costs import Conversion, CostTable, Origin
from qcompiler.targets.groups import Group, reduce_length
from qcompiler.targets.host import Processor
from qcompiler.targets.target import Target

SHARE: Mapping[Form, float] = {"float": 1.0, "static": 0.5, "static-float": 0.5, "dynamic": 0.6, "weight-only": 0.3}
"""Time of a product in a form, by that in float: tensor cores do twice as many products of 8 bits as of 16, and a
product bound by reading its weights takes their share of the bytes (4 bits and a scale against 16)."""
_TABLE = "rates.toml"
_GENERIC = "generic"
_GPU_ENGINES = frozenset({"tensorrt", "triton", "ort-tensorrt"})
_WEIGHT_BYTES: Mapping[str, float] = {"weight-only": 0.6, "static": 1.0, "static-float": 1.0, "dynamic": 1.0}
"""Bytes per element of a weight; of 4 bits with the scales of their blocks."""


@dataclass(frozen=True)
class Rates:
    """What one class of processors does.

    Attributes:
        name: of the class.
        about: where the numbers come from.
        overhead: microseconds per operator.
        bandwidth: bytes per microsecond.
        float_bytes: bytes of a float activation.
        rate: work per microsecond by kind of operator and form.
        conversion: nanoseconds per element by kind.
        machine: architecture, empty for any.
        requires: processor features.
        sm: CUDA compute capability, 0 for a CPU.
    """

    name: str
    about: str
    overhead: float
    bandwidth: float
    float_bytes: float
    rate: Mapping[str, Mapping[str, float]]
    conversion: Mapping[Kind, float]
    machine: str = ""
    requires: tuple[str, ...] = field(default=())
    sm: int = 0

    def cost(self, kind: str, form: str, work: float, traffic: float) -> float:
        """Return the microseconds of one operator.

        Args:
            kind: ``product``, ``convolution``, ``depthwise``, ``recurrent``, ``arithmetic`` or ``mover``.
            form: a form; one that the class has no rate for runs as in float.
            work: multiply-adds, or elements read and written for ``arithmetic`` and ``mover``.
            traffic: bytes read and written.
        """
        rates = self.rate[kind]
        return self.overhead + max(work / rates.get(form, rates["float"]), traffic / self.bandwidth)


@cache
def known_rates() -> tuple[Rates, ...]:
    """Return all classes of processors, in the order in which they are tried."""
    text = resources.files("qcompiler.search").joinpath(_TABLE).read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    return tuple(
        Rates(name, **{**table, "requires": tuple(table.get("requires", ()))}) for name, table in tables.items()
    )


def rates_named(name: str) -> Rates:
    """Return a class by its name.

    Raises:
        TargetError: there is no such class; the text lists those there are.
    """
    found = next((rates for rates in known_rates() if rates.name == name), None)
    if found is None:
        raise TargetError(f"no rates for {name!r}; known: {', '.join(r.name for r in known_rates())}")
    return found


def rates_for(target: Target, processor: Processor | None = None) -> Rates:
    """Return the class that fits a target best.

    Args:
        target: one for GPUs is matched by its compute capability: the newest class that is not newer.
        processor: this machine's, if the target is for it; what the target's table requires by default.
    """
    if target.sm:
        older = [rates for rates in known_rates() if 0 < rates.sm <= target.sm]
        return max(older, key=lambda rates: rates.sm, default=_oldest())
    machine = processor.machine if processor is not None else target.processor
    features = (processor.features if processor is not None else frozenset()) | set(target.requires)
    for rates in known_rates():
        if rates.machine and rates.machine == machine and set(rates.requires) <= features:
            return rates
    return _oldest() if target.engine in _GPU_ENGINES or "cuda" in target.requires else rates_named(_GENERIC)


def _oldest() -> Rates:
    return min((rates for rates in known_rates() if rates.sm), key=lambda rates: rates.sm)


def analytic_costs(groups: Sequence[Group], elements: Mapping[str, int], processor: Rates | str) -> CostTable:
    """Return computed costs of every legal form of every group, and of every conversion.

    What stands outside groups is not in it: ``fixed`` is 0.

    Args:
        groups: all groups of a model.
        elements: elements per value in a typical feed; values not named count what the graph says, open axes as 1.
        processor: a class of processors, or its name.

    Raises:
        TargetError: there is no class of that name.
    """
    rates = rates_named(processor) if isinstance(processor, str) else processor
    known = {str(v.name): _elements(v, elements) for g in groups for v in (*g.data, *g.results, g.float_result)}
    borders = find_borders(groups, known)
    costs: dict[str, dict[str, float]] = {}
    for group in groups:
        forms: tuple[Form, ...] = ("float", *group.legal)
        costs[group.name] = {form: _group_cost(group, form, known, rates) for form in forms}
    options = {name: tuple(forms) for name, forms in costs.items()}
    conversions = {}
    for name, border in borders.items():
        made = Conversion()
        for kind in border.possible(options):
            us = rates.overhead + border.elements * rates.conversion[kind] * 1e-3
            made = made.with_cost(kind, us, "analytic")
        conversions[name] = made
    origin: dict[str, dict[str, Origin]] = {n: dict.fromkeys(forms, "analytic") for n, forms in costs.items()}
    return CostTable(costs, conversions, 0.0, borders, origin, "analytic")


def _group_cost(group: Group, form: Form, elements: Mapping[str, int], rates: Rates) -> float:
    kind = _kind(group)
    read = sum(elements[str(v.name)] for v in group.data)
    written = sum(elements[str(v.name)] for v in group.results)
    traffic = read * (rates.float_bytes if reads(form) is None else 1.0)
    traffic += written * (1.0 if stores(form) else rates.float_bytes)
    weights = sum(element_count(v) or 0 for v in group.root.inputs if is_const(v))
    traffic += weights * _WEIGHT_BYTES.get(form, rates.float_bytes)
    work = float(read + written) if kind in ("arithmetic", "mover") else _multiply_adds(group, elements)
    extra = 0.0
    if group.activation is not None and form not in ("float", "static"):
        extra = rates.cost("arithmetic", "float", 2.0 * written, 2.0 * written * rates.float_bytes)
    return rates.cost(kind, form, work, traffic) + extra


def _kind(group: Group) -> str:
    if group.row.kind != "weighted":
        return group.row.kind
    if group.root.op_type == "Gather":
        return "mover"
    if group.root.op_type != "Conv":
        return "product"
    return "depthwise" if attr_int(group.root, "group", 1) > 1 else "convolution"


def _multiply_adds(group: Group, elements: Mapping[str, int]) -> float:
    """Return the multiply-adds in the feed that the elements are of."""
    length = reduce_length(group.root)
    if group.row.kind == "weighted" and length is not None:
        return float(elements[str(group.float_result.name)] * length)
    return float(macs(group.root) or 0)


def _elements(value: ir.Value, elements: Mapping[str, int]) -> int:
    found = elements.get(str(value.name), 0) or element_count(value, 1)
    return found if found is not None else 1


def analytic_cost(groups: Sequence[Group]) -> Callable[[Mapping[str, Form]], float]:
    """Return a function from forms to a predicted time, in arbitrary units.

    Args:
        groups: all groups of a model; only products have a cost. Open axes count as 1.
    """
    work = {g.name: float(macs(g.root) or 0) for g in groups if g.row.kind in ("weighted", "recurrent")}

    def predict(forms: Mapping[str, Form]) -> float:
        return sum(amount * SHARE[forms.get(name, "float")] for name, amount in work.items())

    return predict
