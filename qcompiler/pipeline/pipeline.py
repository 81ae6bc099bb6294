"""An ordered list of passes: checked as a whole, run with instruments, and written as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qcompiler.errors import PassError, QCompilerError, VerifyError
from qcompiler.ir.phase import Phase
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.parse import print_pass, read_passes
from qcompiler.pipeline.registry import PassRegistry, needed_phases
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class Step:
    """One pass of a running pipeline: its place (from 0) and the pass."""

    index: int
    value: Pass

    @property
    def name(self) -> str:
        """Return the pass's name."""
        return self.value.name()

    @property
    def text(self) -> str:
        """Return the pass with its options, as a pipeline string."""
        return print_pass(self.value)


class Instrument(Protocol):
    """Something that watches a pipeline run; it must not change the graph."""

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Look at the state in front of a pass."""
        ...

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Look at the state behind a pass; an error raised here fails the pass."""
        ...

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Look at what a failed pass (or a failed check behind it) left."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a pass did: its text and its number of changes."""

    text: str
    changes: int


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; ``str`` of it parses back to an equal pipeline."""

    passes: tuple[Pass, ...] = ()

    @staticmethod
    def parse(text: str, registry: PassRegistry) -> Pipeline:
        """Read a pipeline string such as ``fold-constants,fuse-qdq-mat-mul{per-channel=false}``.

        Raises:
            PassError: the text is malformed, or names an unknown pass or option.
        """
        return Pipeline(tuple(registry.build(part) for part in read_passes(text)))

    def __str__(self) -> str:
        return ",".join(print_pass(p) for p in self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.passes + other.passes)

    def phase_after(self, phase: Phase) -> Phase:
        """Return the phase behind the last pass, for a graph that starts in ``phase``.

        Raises:
            PassError: a pass needs another phase than the one it would meet; names both passes.
        """
        giver = f"the graph given is in phase {phase.name}"
        for index, step in enumerate(self.passes):
            needs = needed_phases(step)
            if phase not in needs:
                wanted = " or ".join(p.name for p in needs)
                raise PassError(
                    f"pass {index + 1} ({step.name()}) needs phase {wanted}, but {giver}; "
                    "reorder the pipeline or add the pass in between"
                )
            if step.gives is not None:
                phase = step.gives
                giver = f"pass {index + 1} ({step.name()}) gives phase {phase.name}"
        return phase

    def run(self, state: CompileState, instruments: Sequence[Instrument] = ()) -> tuple[StepResult, ...]:
        """Run all passes on a state and return what each did.

        Instruments nest: they are asked in order in front of a pass and in reverse order behind it, so the last one is
        nearest to the pass. If a pass or an instrument fails, every
        instrument is told (`Instrument.on_failure`), then the error goes on: a `QCompilerError` as it is (a
        `VerifyError` as `PassError`, since the graph was sound before the pass), anything else as `PassError`.

        Raises:
            PassError: the order is illegal (nothing was run), or a pass failed.
        """
        self.phase_after(state.phase)
        return tuple(_run_step(state, Step(i, p), instruments) for i, p in enumerate(self.passes))


def _run_step(state: CompileState, step: Step, instruments: Sequence[Instrument]) -> StepResult:
    try:
        for instrument in instruments:
            instrument.before_pass(state, step)
        changes = step.value.run(state)
        if step.value.gives is not None:
            state.phase = step.value.gives
        for instrument in reversed(instruments):
            instrument.after_pass(state, step, changes)
    except Exception as error:
        _tell(state, step, error, instruments)
        if isinstance(error, VerifyError) or not isinstance(error, QCompilerError):
            kind = "" if isinstance(error, VerifyError) else f"{type(error).__name__}: "
            raise PassError(f"pass {step.index + 1} ({step.text}) failed: {kind}{error}") from error
        raise
    return StepResult(step.text, changes)


def _tell(state: CompileState, step: Step, error: Exception, instruments: Sequence[Instrument]) -> None:
    for instrument in reversed(instruments):
        try:
            instrument.on_failure(state, step, error)
        except Exception as second:  # the first error is the one to report
            error.add_note(f"{type(instrument).__name__} could not record the failure: {second}")
