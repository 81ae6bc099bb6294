"""What a treatment is, and what it works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from qcompiler.calibration.statistics import Statistics, TensorStatistics
from qcompiler.engine import Feeds
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.workshop import Workshop

Parameters = dict[str, Any]
"""What a treatment was applied with: names, numbers, texts, lists and tables of those. With the same data they give
the same bytes."""

Forms = Mapping[str, Form]


@dataclass(frozen=True)
class Case:
    """A model on which treatments are tried, or that was treated.

    Attributes:
        workshop: builds it.
        statistics: observed ranges of its graph.
        feeds: that ranges were found on; read again where values changed.
        variants: forms per group, by name: what the model will likely take.
        shared: groups whose weights other graphs have, too: they must stay as they are.
    """

    workshop: Workshop
    statistics: Statistics
    feeds: Iterable[Feeds]
    variants: Mapping[str, Forms] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    def over(self, state: CompileState, tensors: Mapping[str, TensorStatistics] | None = None) -> Case:
        """Return the case over another FLOAT state.

        Args:
            state: a clone of the base state that was changed.
            tensors: the statistics of its values where they are others than before.
        """
        old = self.statistics
        statistics = old if tensors is None else Statistics(dict(tensors), old.feeds, old.about, old.synthetic)
        state.statistics = statistics
        # What was learned of single groups does not hold any longer; what the whole model asks of the engine does.
        kept = {key: value for key, value in self.workshop.engine_forms.items() if not key.startswith("emit:")}
        workshop = replace(self.workshop, base=state, engine_forms=kept, refused={})
        return replace(self, workshop=workshop, statistics=statistics)


class Treatment(Protocol):
    """One way to make a model's integers more accurate.

    Attributes:
        name: stable, kebab-case: the name of its pass.
        least_gain_db: what it must gain to be kept, besides being beyond chance.
        costs_time: whether it can make the model slower; then it is timed as well.
    """

    @property
    def name(self) -> str:
        """Return the name of its pass."""
        ...

    @property
    def least_gain_db(self) -> float:
        """Return what it must gain to be kept."""
        ...

    @property
    def costs_time(self) -> bool:
        """Return whether it can make the model slower."""
        ...

    def choose(self, case: Case) -> Parameters:
        """Return what to do to the model; empty if there is nothing that could pay."""
        ...

    def parts(self, parameters: Parameters) -> list[Parameters]:
        """Return what is tried by itself, one after the other; nothing if there are no parameters."""
        ...

    def scope(self, case: Case, parameters: Parameters) -> dict[str, float]:
        """Return for the figures how much the parameters touch, and what they leave out for a reason of their own."""
        ...

    def apply(self, case: Case, parameters: Parameters) -> Case:
        """Return the treated model; the given one is left alone.

        Raises:
            CalibrationError: it needs data that the case does not have.
        """
        ...


def counted(parameters: Parameters) -> dict[str, float]:
    """Return the figures of a treatment whose parameters are one for each place that it touches."""
    return {"places": float(len(parameters))}


def whole(parameters: Parameters) -> list[Parameters]:
    """Return parameters that are tried together."""
    return [parameters] if parameters else []
