"""SmoothQuant on a whole model: which activations it would help, with which alpha, and the smoothed graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from qcompiler.calibration.observe import observe
from qcompiler.calibration.statistics import ChannelExtremes, Statistics
from qcompiler.engine import Feeds
from qcompiler.ir.graph import const_array
from qcompiler.passes.smooth_activations import SmoothActivations, changed_values, const_rows, matmul_families
from qcompiler.pipeline.pipeline import Instrument, Pipeline
from qcompiler.quant.smoothing import Float, best_alpha, smoothing_scale
from qcompiler.targets.groups import Group
from qcompiler.workshop import Workshop

LEAST_FACTOR = 2.0
"""An activation is smoothed where the expected error of its products falls at least to half (3 dB)."""
LEAST_GAIN_DB = 1.0
DB_PER_PERCENT = 0.3


def smoothable_channels(workshop: Workshop, statistics: Statistics) -> dict[str, ChannelExtremes]:
    """Return what calibration saw per channel of every activation that a product with constant weights reads."""
    found: dict[str, ChannelExtremes] = {}
    for name, family in matmul_families(workshop.groups, workshop.base.model.graph).items():
        seen = statistics.tensors[name].channels if name in statistics.tensors else None
        if seen is None or seen.axis != -1 or seen.squares is None or seen.low.shape != (const_rows(family[0]),):
            continue
        if np.isfinite(seen.reach).all():
            found[name] = seen
    return found


def choose_alphas(
    workshop: Workshop, channels: Mapping[str, ChannelExtremes], shared: frozenset[str] = frozenset()
) -> dict[str, float]:
    """Return alpha per activation whose smoothing is expected to pay, by the error of its products.

    Args:
        workshop: builds the plain graph.
        channels: what calibration saw per channel.
        shared: groups whose weights must stay as they are; activations that these read are not smoothed.
    """
    alphas: dict[str, float] = {}
    for name, family in matmul_families(workshop.groups, workshop.base.model.graph).items():
        if name not in channels or any(g.name in shared for g in family):
            continue
        seen = channels[name]
        low, high = seen.low.astype(np.float64), seen.high.astype(np.float64)
        assert seen.mean_square is not None
        alpha, factor = best_alpha(low, high, seen.mean_square, _weights(family))
        if factor >= LEAST_FACTOR:
            alphas[name] = alpha
    return alphas


def apply_smoothing(
    workshop: Workshop,
    statistics: Statistics,
    channels: Mapping[str, ChannelExtremes],
    alphas: Mapping[str, float],
    feeds: Iterable[Feeds],
    instruments: Iterable[Instrument] = (),
) -> tuple[Workshop, Statistics]:
    """Return a workshop over the smoothed graph and statistics in which the changed values were observed anew."""
    state = workshop.base.clone()
    families = matmul_families(workshop.groups, workshop.base.model.graph)
    for name, alpha in alphas.items():
        if name in families and name in channels:
            scale: Float = smoothing_scale(channels[name].reach.astype(np.float64), _weights(families[name]), alpha)
            state.smoothing[name] = tuple(scale.tolist())
    state.quantized = {}
    Pipeline((SmoothActivations(),)).run(state, tuple(instruments))
    fresh = observe(state.model, changed_values(state.smoothing, state.model), feeds, workshop.truth)
    merged = Statistics({**statistics.tensors, **fresh.tensors}, statistics.feeds)
    state.statistics = merged
    # What was learned of single groups does not hold any longer; what the whole model asks of the engine does.
    kept = {key: value for key, value in workshop.engine_forms.items() if not key.startswith("emit:")}
    return replace(workshop, base=state, engine_forms=kept, refused={}), merged


def _weights(family: Iterable[Group]) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    arrays = [const_array(g.root.inputs[1]) for g in family]
    return [a.astype(np.float32) for a in arrays if a is not None]
