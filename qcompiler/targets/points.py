"""What a choice of forms needs: activation points, weights, biases, and which share or derive their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, consumers, is_const
from qcompiler.quant.arithmetic import quantize
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.plan import Form, Point, QuantPlan, use_point
from qcompiler.quant.saturation import pairs_fit, summed_columns
from qcompiler.quant.spec import QuantSource, QuantSpec, RangeSource, affine_params, fixed_params
from qcompiler.targets.following import activation_bounds, function_behind
from qcompiler.targets.groups import Group, block_axis, block_of
from qcompiler.targets.target import Target

DYNAMIC_SUFFIX = "@dynamic"
INTEGER: frozenset[Form] = frozenset({"static", "static-float"})
"""Forms that read activations quantized with scales known ahead of time."""
_SIGNED_FROM = 0.25
"""Share of the largest value that the negative ones must reach for a signed format without zero point: its steps are
then at most 1.6 times as wide as those of an unsigned format with one."""


def activation_spec(target: Target) -> QuantSpec:
    """Return what the target wants of an activation."""
    floats = FORMATS[target.activation].kind == "float"
    return QuantSpec(target.activation, symmetric=target.symmetric or floats)


def weight_spec(target: Target) -> QuantSpec:
    """Return what the target wants of a weight, without its axis and block."""
    storage = FORMATS[target.weight]
    if storage.kind == "float":
        return QuantSpec(target.weight, symmetric=True)
    bits = target.weight_bits if target.weight_bits < storage.bits else 0
    symmetric = target.weight_symmetric
    narrow = symmetric and target.narrow_weights
    return QuantSpec(target.weight, symmetric=symmetric, narrow=narrow, bits=bits, pair_safe=target.pair_safe)


def adds_pairs(node: ir.Node) -> bool:
    """Return whether an operator's kernel adds products in pairs: all but a depthwise one, of one filter per channel.

    That one widens to 16 bits first (seen on ONNX Runtime 1.31 in one to three dimensions); with two filters per
    channel it is a product like the others.
    """
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type != "Conv" or weight is None or weight.shape is None:
        return True
    return not (weight.shape[1] == 1 and weight.shape[0] == attr_int(node, "group", 1))


def bias_point(activation: str, weight: str, spec: QuantSpec) -> Point:
    """Return the point of an int32 bias, whose scale is that of the activation times that of the weight.

    Args:
        activation: name of the activation's point.
        weight: key of the weight's point.
        spec: of the weight; a bias has one scale per channel where the weight has.
    """
    bias = QuantSpec("int32", None if spec.axis is None else 0, symmetric=True)
    return Point(bias, QuantSource("derived", (activation, weight)))


def imported_format(target: Target) -> str:
    """Return the format in which the numbers of an imported model are kept for a target."""
    return target.activation if target.activation in ("int8", "uint8") else "int8"


def replanned(source: QuantSource, target: Target) -> QuantSource:
    """Return the numbers of an imported activation as the target needs them.

    A target with zero points, or imported numbers without one, keeps them; otherwise the imported range is covered
    symmetrically: what the model clips at its wider end stays clipped there.

    Args:
        source: scale and zero point in `imported_format` of the target.
        target: says what its activations are.
    """
    spec, base = activation_spec(target), FORMATS[imported_format(target)]
    zero, scale = source.zero_point[0], source.scale[0]
    middle = 0 if base.signed else 128
    if spec.format == base.name and (not spec.symmetric or zero == middle):
        return source
    params = affine_params(spec, scale * (base.qmin - zero), scale * (base.qmax - zero))
    return replace(source, scale=(float(params.scale),), zero_point=(int(params.zero_point),))


def _changed(old: QuantSource, new: QuantSource, target: Target) -> str:
    before = f"{imported_format(target)} with scale {old.scale[0]:g} and zero point {old.zero_point[0]}"
    return f"imported as {before}; {target.name} takes {target.activation} with scale {new.scale[0]:g}, zero point 0"


class Points:
    """Derive the points of one choice of forms.

    Attributes:
        points: value name or ``node#input`` to what it is, filled by `build`.
        replanned: imported value to what was changed of its numbers.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        forms: Mapping[str, Form],
        target: Target,
        estimators: Mapping[str, str],
        default_estimator: str,
        statistics: RangeSource | None,
        imported: Mapping[str, QuantSource],
    ) -> None:
        self.imported = imported
        self.groups, self.forms, self.target = groups, forms, target
        self.estimators, self.default = estimators, default_estimator
        self.statistics = statistics
        self.owner = {node: g for g in groups for node in g.nodes}
        self.points: dict[str, Point] = {}
        self.replanned: dict[str, str] = {}
        self.activation = activation_spec(target)
        self.signed = QuantSpec(target.signed, symmetric=True) if target.signed else self.activation
        self.weight = weight_spec(target)

    def build(self) -> dict[str, Point]:
        """Return every point that the forms need."""
        for group in self.groups:
            form = self.forms[group.name]
            if form == "dynamic":
                self._dynamic(group)
            elif form == "weight-only":
                self._weight(group, form)
            elif form in INTEGER:
                self._static(group, form)
        for group in self.groups:
            if self.forms[group.name] == "static" and group.root.op_type == "Concat":
                self._share_concat(group)
        return self.points

    def _observed(self, value: ir.Value, group: Group) -> None:
        name = str(value.name)
        if name in self.imported:
            source = replanned(self.imported[name], self.target)
            if source != self.imported[name]:
                self.replanned[name] = _changed(self.imported[name], source, self.target)
            self.points[name] = Point(self.activation, source)
        elif name not in self.points:
            estimator = self.estimators.get(group.name, self.default)
            if self.activation.storage.kind == "float":
                estimator = "min-max"  # a wider range costs a float format no resolution where the numbers are
            elif estimator.partition(":")[0] == "auto":
                estimator = estimator_for(value, estimator.partition(":")[2])
            self.points[name] = Point(self._format(name), QuantSource("observed", estimator=estimator))

    def _format(self, name: str) -> QuantSpec:
        """Return the format of an activation: that of values of both signs, where the target has one and they occur."""
        if self.signed is self.activation or self.statistics is None or not self.statistics.observed(name):
            return self.activation
        low, high = self.statistics.range(name, "min-max")
        return self.signed if -low > _SIGNED_FROM * high else self.activation

    def _static(self, group: Group, form: Form) -> None:
        for value in group.data:
            self._observed(value, group)
        if group.row.kind == "weighted" and group.row.weight >= 0:
            self._weight(group, form)
        else:
            self._constants(group)
        if form != "static":
            return
        for value in group.results:
            name = str(value.name)
            if name in self.imported:
                self._observed(value, group)
            elif group.row.kind == "mover":
                self.points[name] = Point(self.activation, QuantSource("shared", (str(group.data[0].name),)))
            elif group.row.fixed_output is not None:
                scale, zero = group.row.fixed_output
                self.points[name] = Point(
                    self.activation, QuantSource("fixed", scale=(float(scale),), zero_point=(int(zero),))
                )
            else:
                self._observed(value, group)

    def _weight(self, group: Group, form: Form) -> None:
        row, root = group.row, group.root
        weight = root.inputs[row.weight]
        rank = len(weight.shape) if weight is not None and weight.shape is not None else 0
        axis = None if row.weight_axis is None else row.weight_axis % max(rank, 1)
        spec = replace(self.weight, axis=axis, pair_safe=self.weight.pair_safe and adds_pairs(root))
        if (block := block_of(self.target, root)) is not None:
            scale_format = self.target.weight_scale
            spec = replace(spec, axis=block_axis(root), block=block, scale_format=scale_format)
        key = use_point(group.name, row.weight)
        fixed = self._imported_weight(root, weight, spec)
        if fixed is not None and len(fixed.scale) == 1:
            spec = QuantSpec(self.weight.format, None, symmetric=True)
        self.points[key] = Point(spec, QuantSource("weight") if fixed is None else fixed)
        has_bias = 0 < row.bias < len(root.inputs) and root.inputs[row.bias] is not None
        if form == "static" and has_bias and self.target.bias == "int32":
            made = bias_point(str(group.data[0].name), key, replace(spec, axis=axis))
            self.points[use_point(group.name, row.bias)] = made

    def _imported_weight(self, root: ir.Node, weight: ir.Value | None, spec: QuantSpec) -> QuantSource | None:
        """Return the numbers of an imported weight, which are of int8 without zero point, if the target keeps such.

        Imported scales span 8 bits: under a target's narrower range they would clip, and pairs of them may saturate.
        Any other weight is quantized anew from the floats it stands for.
        """
        if weight is None or spec.format != "int8" or spec.bits or spec.block or not spec.symmetric:
            return None
        fixed, array = self.imported.get(str(weight.name)), const_array(weight)
        if fixed is None or array is None or not spec.pair_safe:
            return fixed
        kept = QuantSpec("int8", spec.axis if len(fixed.scale) > 1 else None, symmetric=True)
        integers = quantize(array, fixed_params(kept, fixed))
        return fixed if pairs_fit(summed_columns(integers, root.op_type)).all() else None

    def _constants(self, group: Group) -> None:
        for index in group.data_indices:
            value = group.root.inputs[index]
            if is_const(value):
                fixed = self._imported_constant(value)
                self.points[use_point(group.name, index)] = Point(self.activation, fixed or QuantSource("weight"))

    def _imported_constant(self, value: ir.Value | None) -> QuantSource | None:
        """Return the numbers of an imported constant (int8, zero point 0) in the format of activations, or None."""
        fixed = None if value is None else self.imported.get(str(value.name))
        if fixed is None or len(fixed.scale) != 1 or self.activation.format not in ("int8", "uint8"):
            return None
        return replace(fixed, zero_point=(0 if self.activation.storage.signed else 128,))

    def _dynamic(self, group: Group) -> None:
        if group.row.kind == "recurrent":
            for index in (1, 2):
                self.points[use_point(group.name, index)] = Point(self.weight, QuantSource("weight"))
            return
        spec = QuantSpec("uint8", dynamic=True)
        if self.activation.storage.kind == "float":
            block = block_of(self.target, group.root) or 0
            spec = replace(self.activation, axis=-1, dynamic=True, block=block, scale_format=self.target.weight_scale)
        self.points[str(group.data[0].name) + DYNAMIC_SUFFIX] = Point(spec, QuantSource("observed"))
        self._weight(group, "dynamic")

    def _share_concat(self, group: Group) -> None:
        """Let inputs that only this Concat reads take its output's parameters, so that it copies bytes."""
        out = str(group.results[0].name)
        for value in group.data:
            members = self._family(value)
            if members is None or not self._only_read_by(members, group):
                continue
            if not self._activation_stays_redundant(members, out):
                continue
            for name in members:
                if self.points[name].source.kind == "observed":
                    self.points[name] = Point(self.activation, QuantSource("shared", (out,)))

    def _family(self, value: ir.Value) -> dict[str, ir.Value] | None:
        """Return the value and all that share its parameters through movers, or None if its numbers are fixed."""
        root = value
        while (group := self.owner.get(root.producer())) is not None and (  # type: ignore[arg-type]
            group.row.kind == "mover" and self.forms[group.name] == "static"
        ):
            root = group.data[0]
        producer = self.owner.get(root.producer())  # type: ignore[arg-type]
        if producer is None or self.forms[producer.name] != "static" or producer.row.fixed_output is not None:
            return None
        members, work = {str(root.name): root}, [root]
        while work:
            for node in consumers(work.pop()):
                group = self.owner.get(node)
                if group is not None and group.row.kind == "mover" and self.forms[group.name] == "static":
                    for result in group.results:
                        if str(result.name) not in members:
                            members[str(result.name)] = result
                            work.append(result)
        if any(name not in self.points for name in members):
            return None
        return members

    def _activation_stays_redundant(self, members: Mapping[str, ir.Value], out: str) -> bool:
        """Return whether the wider range of the Concat still saturates where a producer's Relu or Clip does."""
        if self.statistics is None or not self.statistics.observed(out):
            return False
        point = self.points[out]
        low, high = self.statistics.range(out, point.source.estimator or "min-max", point.spec)
        for group in self.groups:
            if group.activation is None or self.forms[group.name] != "static":
                continue
            # Also one that a Concat in front shared already: it follows its Concat.
            if self._holder(str(group.results[0].name)) in members:
                least, most = activation_bounds(group.activation)
                if low < least or high > most:
                    return False
        return True

    def _holder(self, name: str) -> str:
        """Follow shared sources to the point that holds the numbers so far."""
        while (point := self.points.get(name)) is not None and point.source.kind == "shared":
            name = point.source.points[0]
        return name

    def _only_read_by(self, members: Mapping[str, ir.Value], concat: Group) -> bool:
        for value in members.values():
            if value.is_graph_output():
                return False
            for node in consumers(value):
                reader = self.owner.get(node)
                inside = reader is not None and (
                    reader is concat
                    or (
                        reader.row.kind == "mover"
                        and self.forms[reader.name] == "static"
                        and all(str(v.name) in members for v in reader.results)
                    )
                )
                if not inside:
                    return False
        return True


def estimator_for(value: ir.Value, otherwise: str = "") -> str:
    """Choose the estimator whose error counts where it matters: behind the function that alone reads the value.

    Args:
        value: a quantized activation.
        otherwise: estimator where there is no such function; by default the least squared error of the value itself.
    """
    through = function_behind(value)
    return f"mse::{through}" if through else otherwise or "mse"


def root_point(plan: QuantPlan, name: str) -> str:
    """Follow ``shared`` sources to the point that holds the numbers."""
    seen: set[str] = set()
    while plan.points[name].source.kind == "shared" and name not in seen:
        seen.add(name)
        name = plan.points[name].source.points[0]
    return name
