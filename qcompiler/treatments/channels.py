"""Outlier channel splitting as a treatment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qcompiler.ir.channels import ChannelClass, channel_classes
from qcompiler.passes.split_outlier_channels import SplitOutlierChannels, why_not_split
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.treatments.renamed import observed_anew
from qcompiler.treatments.treatment import Case, Parameters, counted, whole

LEAST_FACTOR = 1.25
"""By what factor the range of a class's values shrinks at least."""


@dataclass(frozen=True)
class SplitOutliers:
    """Give the channels with the largest outliers twice, halved (OCS, arXiv:1901.09504).

    Parameters: per class of channels, by the name of its first value, which channels are split, one after another.

    Attributes:
        ratio: share of a class's channels that are added at most (the paper takes 1 to 5 percent).
    """

    ratio: float = 0.03
    name: str = "split-outlier-channels"
    least_gain_db: float = 1.0
    costs_time: bool = True

    def choose(self, case: Case) -> Parameters:
        """Return the splits of the classes whose ranges they shrink enough."""
        points = {str(v.name) for g in case.workshop.groups if g.legal for v in (*g.data, *g.results)}
        chosen: Parameters = {}
        for each in channel_classes(case.workshop.base.model, case.shared):
            if why_not_split(each):
                continue
            splits = self._splits(each, case, points)
            if splits:
                chosen[each.name] = splits
        return chosen

    def _splits(self, each: ChannelClass, case: Case, points: set[str]) -> list[int]:
        """Return the channels to split: again and again the one with the largest reach."""
        reach = np.zeros(each.size)
        for value, _ in each.values:
            tensor = case.statistics.tensors.get(str(value.name))
            if tensor is None or tensor.channels is None or str(value.name) not in points:
                continue
            if tensor.channels.reach.shape == reach.shape and np.isfinite(tensor.channels.reach).all():
                reach = np.maximum(reach, tensor.channels.reach)
        if not reach.any():
            return []
        now, splits = reach.tolist(), []
        for _ in range(math.ceil(self.ratio * each.size)):
            worst = int(np.argmax(now))
            now[worst] /= 2.0
            now.append(now[worst])
            splits.append(worst)
        return splits if float(reach.max()) >= LEAST_FACTOR * max(now) else []

    def parts(self, parameters: Parameters) -> list[Parameters]:
        """Return all of it: it is tried together."""
        return whole(parameters)

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        """Return how many places are touched."""
        return counted(parameters)

    def apply(self, case: Case, parameters: Parameters) -> Case:
        """Return the model with split channels, its changed values observed anew."""
        state = case.workshop.base.clone()
        state.splitting = {name: tuple(map(int, channels)) for name, channels in parameters.items()}
        state.quantized = {}
        Pipeline((SplitOutlierChannels(),)).run(state)
        return observed_anew(case, state)
