"""What an explanation consists of: causes with their cure, and the places around an operator."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

Where = Literal["plan", "given"]
"""A cause in a plan of the compiler, or in a Q/DQ graph as it was given to an engine."""


@dataclass(frozen=True)
class Cause:
    """One thing that stands in the way of a form, or of a fusion.

    Attributes:
        code: stable kebab-case code.
        text: one sentence with the names and figures of this case.
        who: who says so: ``target``, ``plan``, ``calibration``, ``engine``, ``measurement``, ``guard``, ``user``, a
            rule or a pass.
        form: the form that it stands in the way of; empty for all.
        advice: what would make it fuse.
    """

    code: str
    text: str
    who: str = "target"
    form: str = ""
    advice: str = ""


def cause(code: str, text: str, who: str = "target", form: str = "", where: Where = "plan") -> Cause:
    """Return a cause with the advice that its code has."""
    return Cause(code, text, who, form, advice_for(code, where))


@functools.cache
def advice_table() -> dict[str, dict[str, str]]:
    """Return the advice by place (``plan``, ``given``) and reason code."""
    text = resources.files("qcompiler.explaining").joinpath("advice.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def advice_for(code: str, where: Where = "plan") -> str:
    """Return what a user does about a reason code; empty if the table has nothing on it."""
    return advice_table()[where].get(code, "")


@dataclass(frozen=True)
class Place:
    """A quantized, or quantizable, place around an operator.

    Attributes:
        role: ``input``, ``weight``, ``bias`` or ``output``.
        value: name of the value, or of the constant.
        format: storage format and granularity; ``float32`` where it is not quantized.
        source: where its scale comes from, one phrase.
        scale: the scale, or the least and largest of several; empty where there is none.
        zero_point: likewise.
        range: the range that was used, low and high.
        expected_db: SQNR that the observed histogram predicts for this place.
    """

    role: str
    value: str
    format: str
    source: str = ""
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    range: tuple[float, ...] = ()
    expected_db: float | None = None


@dataclass(frozen=True)
class Tried:
    """A rule that was tried by a pass and why it did not fire, or that it did."""

    rule: str
    node: str
    reason: str
    text: str
    done: bool
    by: str = ""


@dataclass(frozen=True)
class NodeAccount:
    """Everything that is known of one node and its group.

    Attributes:
        node: what was asked for.
        operator: its operator.
        group: its fusion group; empty if it has none.
        members: operators of the group, the root first.
        origins: imported nodes it comes from.
        form: the form of the group; ``given`` in a graph that was only read.
        why: why this form, as the build says.
        causes: what stands in the way of integers, the decisive one first; empty where it runs on them.
        places: inputs, weight, bias, output.
        tried: rules, those that did not fire last.
        kernel: the engine's kernel; empty if nothing was proven.
        macs_share: share of the model's multiply-adds.
        time_us: measured microseconds per run in its form; None if nothing was measured.
        time_share: share of the model's time; likewise.
        error_share: share of the output's error that goes away if the group is put back to float; None if not measured.
        notes: what else a user should know.
    """

    node: str
    operator: str
    group: str = ""
    members: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    form: str = "float"
    why: str = ""
    causes: tuple[Cause, ...] = ()
    places: tuple[Place, ...] = ()
    tried: tuple[Tried, ...] = ()
    kernel: str = ""
    macs_share: float | None = None
    time_us: float | None = None
    time_share: float | None = None
    error_share: float | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def first(self) -> Cause | None:
        """Return the decisive cause."""
        return self.causes[0] if self.causes else None
