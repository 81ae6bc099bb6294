"""SmoothQuant as a treatment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompiler.smoother import LEAST_GAIN_DB, apply_smoothing, choose_alphas, smoothable_channels
from qcompiler.treatments.treatment import Case, Parameters, counted, whole


@dataclass(frozen=True)
class Smooth:
    """Divide activations of products by a scale per channel that their weights take (arXiv:2211.10438).

    Parameters: alpha per activation.
    """

    name: str = "smooth-activations"
    least_gain_db: float = LEAST_GAIN_DB
    costs_time: bool = True

    def choose(self, case: Case) -> Parameters:
        """Return alpha per activation whose smoothing is expected to pay."""
        channels = smoothable_channels(case.workshop, case.statistics)
        return dict(choose_alphas(case.workshop, channels, case.shared))

    def parts(self, parameters: Parameters) -> list[Parameters]:
        """Return all of it: it is tried together."""
        return whole(parameters)

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        """Return how many places are touched."""
        return counted(parameters)

    def apply(self, case: Case, parameters: Parameters) -> Case:
        """Return the smoothed model, its changed values observed anew."""
        channels = smoothable_channels(case.workshop, case.statistics)
        workshop, statistics = apply_smoothing(case.workshop, case.statistics, channels, parameters, case.feeds)
        return replace(case, workshop=workshop, statistics=statistics)
