"""Cross-layer equalization as a treatment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.statistics import ChannelExtremes, Statistics, TensorStatistics
from qcompiler.ir.channel_uses import WeightUse
from qcompiler.ir.channels import ChannelClass, channel_classes
from qcompiler.ir.graph import attr_int, const_array, rank_of
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.quant.equalization import Activation, Reader, best_scale, class_scale
from qcompiler.treatments.renamed import observed_anew
from qcompiler.treatments.treatment import Case, Parameters, counted, whole

LEAST_FACTOR = 1.1
"""By what factor the expected error of a class's readers falls at least."""

Float = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Equalize:
    """Divide the channels between layers by scales that the weights take on both sides (arXiv:1906.04721).

    Parameters: (alpha, strength) per class of channels, by the name of its first value.
    """

    name: str = "equalize-layers"
    least_gain_db: float = 0.2
    costs_time: bool = False

    def choose(self, case: Case) -> Parameters:
        """Return (alpha, strength) per class whose equalization is expected to pay."""
        chosen: Parameters = {}
        for name, (activations, readers, size) in _terms(case).items():
            best, factor = best_scale(activations, readers, size)
            if factor >= LEAST_FACTOR:
                chosen[name] = list(best)
        return chosen

    def parts(self, parameters: Parameters) -> list[Parameters]:
        """Return all of it: it is tried together."""
        return whole(parameters)

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        """Return how many places are touched."""
        return counted(parameters)

    def apply(self, case: Case, parameters: Parameters) -> Case:
        """Return the equalized model, its changed values observed anew."""
        state = case.workshop.base.clone()
        terms = _terms(case)
        state.equalization = {
            name: tuple(class_scale(*terms[name], float(alpha), float(strength)).tolist())
            for name, (alpha, strength) in parameters.items()
            if name in terms
        }
        state.quantized = {}
        Pipeline((EqualizeLayers(),)).run(state)
        return observed_anew(case, state)


_Terms = tuple[list[Activation], list[Reader], int]


def _terms(case: Case) -> dict[str, _Terms]:
    """Return what the error of each class is counted by: its quantized values, its readers, its channels."""
    points = {str(v.name) for g in case.workshop.groups if g.legal for v in (*g.data, *g.results)}
    found: dict[str, _Terms] = {}
    for each in channel_classes(case.workshop.base.model, case.shared):
        seen = dict(_seen(each, case.statistics))
        activations = [a for name, (a, _) in seen.items() if name in points]
        readers = [r for use in each.read if (r := _reader(use, seen)) is not None]
        if activations and len(readers) == len(each.read) > 0:
            found[each.name] = (activations, readers, each.size)
    return found


def _seen(each: ChannelClass, statistics: Statistics) -> Iterator[tuple[str, tuple[Activation, Float]]]:
    """Yield name, extremes and E[x^2] per channel of each value that was observed by channel along the class's axis."""
    for value, lane in each.values:
        tensor = statistics.tensors.get(str(value.name))
        channels = None if tensor is None else tensor.channels
        if tensor is None or channels is None or channels.low.shape != lane.ids.shape:
            continue
        if channels.axis + (rank_of(value) or 0) != lane.axis or not np.isfinite(channels.reach).all():
            continue
        low, high = channels.low.astype(np.float64), channels.high.astype(np.float64)
        yield str(value.name), (Activation(lane.ids, low, high), _mean_square(tensor, channels))


def _mean_square(tensor: TensorStatistics, channels: ChannelExtremes) -> Float:
    """Return E[x^2] per channel; where it was not asked for, as if all channels had the shape of the whole."""
    if channels.mean_square is not None:
        return channels.mean_square
    reach = np.square(channels.reach.astype(np.float64))
    return reach * (tensor.mean_square / max(float(reach.mean()), 1e-30))


def _reader(use: WeightUse, seen: Mapping[str, tuple[Activation, Float]]) -> Reader | None:
    """Return a product as the error counts it; None if nothing is known of what it reads."""
    data, weight = use.node.inputs[0], const_array(use.node.inputs[1])
    assert weight is not None
    known = None if data is None else _source(data, use.ids, seen)
    if known is None:
        return None
    groups = attr_int(use.node, "group", 1) if use.node.op_type == "Conv" else 1
    matrix = np.abs(weight.astype(np.float64))
    # [groups, outputs of a group, channels of a group, taps]
    if use.axis == 0:
        matrix = np.swapaxes(matrix, 0, 1)
    matrix = matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1], -1)
    shape = (groups, use.ids.size // groups)
    return Reader(
        use.ids.reshape(shape), matrix.max(axis=3), np.square(matrix).sum(axis=(1, 3)), matrix.shape[3],
        known.reshape(shape),
    )  # fmt: skip


def _source(data: ir.Value, ids: Ids, seen: Mapping[str, tuple[Activation, Float]]) -> Float | None:
    """Return E[x^2] per channel of what a product reads; of a value laid out flat that of the one in front."""
    if str(data.name) in seen and len(seen[str(data.name)][1]) == len(ids):
        return seen[str(data.name)][1]
    node = data.producer()
    if node is None or node.op_type not in ("Reshape", "Flatten", "Squeeze") or node.inputs[0] is None:
        return None
    known = seen.get(str(node.inputs[0].name))
    if known is None or len(ids) % len(known[1]):
        return None
    return np.repeat(known[1], len(ids) // len(known[1]))
