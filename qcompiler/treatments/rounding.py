"""Adaptive rounding of weights as a treatment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.ir.graph import attr_int, attr_str, const_array, is_op
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.passes.stored_constants import own_params
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.quant.arithmetic import spread
from qcompiler.quant.plan import use_point
from qcompiler.quant.rounding import Int, Real, RoundedWeight, round_nearest, round_sequentially, round_softly
from qcompiler.quant.saturation import pairs_fit
from qcompiler.quant.spec import QuantSpec
from qcompiler.targets.groups import Group
from qcompiler.treatments.moments import MOST_FEEDS, input_moments, inputs_of, product_work, rounding_work
from qcompiler.treatments.treatment import Case, Parameters, counted, whole

MOST_INPUTS = 4096
"""Products that one output may sum: more make an H of more than 64 MB."""
WORK_RATIO = 2.0
"""Multiply-adds that rounding takes at most, over those of the products themselves in all calibration feeds."""
LEAST_WORK = 2 * 10**11
"""Multiply-adds that rounding may take in any case: some ten seconds of one processor core."""
COLUMN_ELEMENTS = 1 << 20
"""Weights that are rounded side by side."""
METHODS = ("sequential", "soft")


@dataclass(frozen=True)
class RoundWeights:
    """Round each weight to the neighbour that keeps the product close, not to the nearest.

    Parameters: per group ``sequential`` (GPTQ, arXiv:2210.17323) or ``soft`` (AdaRound, arXiv:2004.10568). Both
    minimise the expected squared error of the product over the inputs that calibration gives.

    Attributes:
        method: what new parameters say.
    """

    method: str = "sequential"
    name: str = "round-adaptively"
    least_gain_db: float = 0.1
    costs_time: bool = False

    def choose(self, case: Case) -> Parameters:
        """Return the method per group whose weight can be rounded within the work that is allowed."""
        return dict.fromkeys(_affordable(case, _specs(case)), self.method)

    def parts(self, parameters: Parameters) -> list[Parameters]:
        """Return all of it: it is tried together."""
        return whole(parameters)

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        """Return how many weights are rounded, and how many are left out because of the work that they take."""
        left = len(set(_specs(case)) - set(parameters))
        return {**counted(parameters), **({"left_out_for_time": float(left)} if left else {})}

    def apply(self, case: Case, parameters: Parameters) -> Case:
        """Return the case over a state with the rounded weights."""
        if bad := [m for m in parameters.values() if m not in METHODS]:
            raise PassError(f"unknown rounding method {bad[0]!r}; expected one of {', '.join(METHODS)}")
        groups = {g.name: g for g in case.workshop.groups if g.name in parameters}
        weights = _weights(case, None if case.variants else groups)
        specs = {name: spec for name, (spec, reason) in weights.items() if name in groups and not reason}
        state = case.workshop.base.clone()
        state.quantized = {}  # by names, which rounded weights share
        measured = input_moments(
            case.workshop.base.model, [groups[n] for n in specs], case.feeds, case.workshop.truth,
            expected=case.statistics.feeds or MOST_FEEDS,
        )  # fmt: skip
        state.rounding = {
            group.name: round_weight(group, specs[group.name], hessian, parameters[group.name])
            for group, hessian in measured
        }
        roots = {g.name: g.root for g in case.workshop.groups}
        for name, (_, reason) in weights.items():
            if name not in state.rounding:
                text = reason or "rounding it takes too long, or its inputs were never observed"
                state.remark("round-adaptively", roots[name], "left-at-nearest", f"{name}: {text}")
        return replace(case, workshop=replace(case.workshop, base=state))


def _affordable(case: Case, specs: Iterable[str]) -> list[str]:
    """Return the products that can be rounded within the bounds on work, those that take least first to be taken."""
    groups = {g.name: g for g in case.workshop.groups}
    names = list(specs)
    budget = max(LEAST_WORK, WORK_RATIO * sum(product_work(groups[n], case.statistics) for n in names))
    taken, spent = set[str](), 0.0
    for name in sorted(names, key=lambda n: rounding_work(groups[n])):
        spent += rounding_work(groups[name])
        if spent > budget:
            break
        taken.add(name)
    return [name for name in names if name in taken]


def round_weight(group: Group, spec: QuantSpec, hessian: Real, method: str = "sequential") -> RoundedWeight:
    """Return a group's weight rounded by the error of its product.

    Args:
        group: Conv, Gemm or MatMul with a constant weight.
        spec: integer format of the weight.
        hessian: E[x x'] of what each output sums, [groups of a Conv or 1, K, K].
        method: ``sequential`` or ``soft``.
    """
    weight = const_array(group.root.inputs[group.row.weight])
    assert weight is not None
    params = own_params(weight, spec, group.root.op_type)
    spec = params.spec
    wide = weight.astype(np.float32)
    scale = np.broadcast_to(spread(params.effective.astype(np.float32), params, weight.shape), weight.shape)
    zero = np.broadcast_to(spread(params.zero_point.astype(np.float32), params, weight.shape), weight.shape)
    w, s, z = (_matrices(a, group.root) for a in (wide, scale, zero))
    rounder = round_sequentially if method == "sequential" else round_softly
    codes = np.empty(w.shape, _code_type(spec.limits))
    for part in _pieces(codes.shape):
        rounded = rounder(w[part], s[part], z[part], spec.limits, hessian[part[0]])
        if spec.pair_safe:
            taps = math.prod(weight.shape[2:]) if group.root.op_type == "Conv" else 1
            rounded = _pair_safe(rounded, round_nearest(w[part], s[part], z[part], spec.limits), taps)
        codes[part] = rounded
    return RoundedWeight(params, _unmatrices(codes, group.root, weight.shape))


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the parts and columns of [parts, K, N] that are rounded side by side.

    A piece has no fewer columns than rows if there are so many: H is factored once for each.
    """
    parts, rows, columns = shape
    wide = max(rows, COLUMN_ELEMENTS // rows)
    high = max(1, COLUMN_ELEMENTS // (rows * max(rows, min(wide, columns))))
    for first in range(0, parts, high):
        for start in range(0, columns, wide):
            yield slice(first, first + high), slice(None), slice(start, start + wide)


def _code_type(limits: tuple[int, int]) -> npt.DTypeLike:
    """Return the smallest integer type that holds all codes."""
    fitting = (t for t in (np.int8, np.uint8, np.int16, np.uint16) if _holds(np.iinfo(t), limits))
    return next(fitting, np.int32)


def _holds(kind: np.iinfo[Any], limits: tuple[int, int]) -> bool:
    return kind.min <= limits[0] and limits[1] <= kind.max


def _pair_safe(codes: Int, nearest: Int, taps: int) -> Int:
    """Keep the nearest codes of columns [parts, K, N] in which a pair of the others could saturate."""
    parts, rows, columns = codes.shape
    # Kernels add channels fastest, a weight holds taps fastest.
    summed = np.swapaxes(codes.reshape(parts, rows // taps, taps, columns), 1, 2).reshape(codes.shape)
    fits = pairs_fit(np.moveaxis(summed, 1, 0).reshape(rows, parts * columns))
    return np.where(fits.reshape(parts, 1, columns), codes, nearest)


def _matrices(weight: npt.NDArray[Any], root: ir.Node) -> npt.NDArray[Any]:
    """Lay a weight out as [groups, K, N]."""
    if root.op_type != "Conv":
        return weight[None]
    groups = attr_int(root, "group", 1)
    return np.swapaxes(weight.reshape(groups, weight.shape[0] // groups, -1), 1, 2)


def _unmatrices(codes: npt.NDArray[Any], root: ir.Node, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    return codes[0] if root.op_type != "Conv" else np.swapaxes(codes, 1, 2).reshape(shape)


def _specs(case: Case, groups: Mapping[str, Group] | None = None) -> dict[str, QuantSpec]:
    """Return the weight's specification of each product that can be rounded, in the first variant that has it.

    In a replay there are no variants: a weight has the same specification in every integer form.
    """
    return {name: spec for name, (spec, reason) in _weights(case, groups).items() if not reason}


def _weights(case: Case, groups: Mapping[str, Group] | None) -> dict[str, tuple[QuantSpec, str]]:
    """Return the weight's specification of each quantized product, and why it cannot be rounded (or an empty text)."""
    found: dict[str, tuple[QuantSpec, str]] = {}
    variants = list(case.variants.values()) or [
        {g.name: g.legal[0] for g in case.workshop.groups if g.legal and g.name in (groups or {})}
    ]
    for forms in variants:
        state = case.workshop.base.clone()
        state.forms = {
            g.name: "float" if g.name in case.workshop.refused else forms.get(g.name, "float")
            for g in case.workshop.groups
        }
        Pipeline((PlanQuantization(),)).run(state)
        for group in case.workshop.groups:
            point = state.plan.points.get(use_point(group.name, group.row.weight))
            if point is None or state.plan.form(group.name) == "float" or group.row.kind != "weighted":
                continue
            if groups is None or group.name in groups:
                fixed = "its integers are those of the imported model" if point.source.kind == "fixed" else ""
                found.setdefault(group.name, (point.spec, fixed or why_not_rounded(group, point.spec, case)))
    return found


def why_not_rounded(group: Group, spec: QuantSpec, case: Case) -> str:
    """Return why a weight cannot be rounded by the error of its product, or an empty text."""
    root = group.root
    weight = root.inputs[group.row.weight] if is_op(root, "Conv", "Gemm", "MatMul") else None
    array = const_array(weight)
    if weight is None or array is None:
        return f"{root.op_type} sums no products with one constant weight"
    if root.graph is not case.workshop.base.model.graph:
        return "it lies in a body of If, Loop or Scan, whose inputs differ from one execution to the next"
    if group.name in case.shared:
        return "other graphs of the build have its weight, too"
    if len(weight.uses()) != 1:
        return f"{len(weight.uses())} operators read its weight; it cannot suit the inputs of all"
    if attr_str(root, "auto_pad", "NOTSET") != "NOTSET":
        return "its padding depends on the size of its input"
    if not is_op(root, "Conv") and (array.ndim != 2 or attr_int(root, "transA", 0) or attr_int(root, "transB", 0)):
        return "its weight is no matrix of inputs by outputs"
    if spec.storage.kind != "int":
        return f"{spec.format} has no two neighbours at one distance everywhere"
    if not 1 < inputs_of(root) <= MOST_INPUTS:
        return f"an output sums {inputs_of(root)} products, more than {MOST_INPUTS} or only one"
    return "" if np.isfinite(array).all() else "its weight holds numbers that are not finite"
