"""The planner's problem: one option per fusion group, and charges that are paid once, whoever asks for them.

Everything adds up: time, bytes, stored bits and noise power of the options chosen and of the charges incurred. A charge
is what several groups share: the quantization of one value (paid once, however many groups read it), its way back to
float, the noise of one calibrated activation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qcompiler.errors import BudgetError

Key = tuple[str, str]
"""A group and the name of one of its options."""


@dataclass(frozen=True)
class Option:
    """One way to run a fusion group.

    Attributes:
        name: a form such as ``float``, ``static`` or ``dynamic``. The first option of a group wins ties.
        cost: time per run in microseconds, without what charges cover; finite.
        bytes: size of its stored weights, scales and zero points included.
        noise: relative noise power (error power / signal power) that it adds per output; 0 where none is given.
        bits: stored bits of its weights, all elements together (``8 * elements`` for int8).
    """

    name: str
    cost: float
    bytes: int
    noise: Mapping[str, float] = field(default_factory=dict)
    bits: float = 0.0


@dataclass(frozen=True)
class Cause:
    """One reason to pay a charge: it holds if any of ``asked`` is chosen and none of ``unless``.

    A cause that asks for nothing never holds.
    """

    asked: tuple[Key, ...]
    unless: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Charge:
    """What is paid once as soon as one of its causes holds.

    Attributes:
        name: what it is, such as ``quantize:VALUE``, ``dequantize:VALUE`` or ``value:NAME``; unique in a problem.
        causes: the reasons, one suffices.
        cost: microseconds per run, not negative.
        noise: relative noise power per output, not negative.
        bytes: bytes, not negative.
        bits: stored bits of a weight that several groups read, not negative.
    """

    name: str
    causes: tuple[Cause, ...]
    cost: float = 0.0
    noise: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    bits: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Options per group and the charges that couple them; checked on construction.

    Attributes:
        options: the options per group, at least one each; names are unique within a group.
        charges: what groups share.
        outputs: the outputs at which noise is counted.
        fixed_cost: microseconds per run that no choice changes.
        fixed_bytes: bytes that no choice changes.
        weights: elements over which ``bits`` is averaged; 0 if there are none.

    Raises:
        BudgetError: a group without options, an unknown group, option or output, a name given twice, a number that is
            not finite, or a negative one (only an option's cost and ``fixed_cost`` may be negative: they can be
            differences).
    """

    options: Mapping[str, tuple[Option, ...]]
    charges: tuple[Charge, ...]
    outputs: tuple[str, ...]
    fixed_cost: float = 0.0
    fixed_bytes: int = 0
    weights: int = 0

    def __post_init__(self) -> None:
        _unique(self.outputs, "output")
        _unique((c.name for c in self.charges), "charge")
        _finite(self.fixed_cost, "the fixed cost")
        _least(self.fixed_bytes, "the fixed bytes")
        _least(self.weights, "the number of weights")
        for group, options in self.options.items():
            if not options:
                raise BudgetError(f"group {group!r} has no option; expected at least one, such as float")
            _unique((o.name for o in options), f"option of group {group!r}")
            for option in options:
                self._check_option(group, option)
        known = {(group, option.name) for group, options in self.options.items() for option in options}
        for charge in self.charges:
            self._check_charge(charge, known)

    def _check_option(self, group: str, option: Option) -> None:
        what = f"option {option.name!r} of group {group!r}"
        _finite(option.cost, f"the cost of {what}")
        _least(option.bytes, f"the bytes of {what}")
        _least(option.bits, f"the bits of {what}")
        self._check_noise(option.noise, what)
        if option.bits > 0 and not self.weights:
            raise BudgetError(f"{what} stores {option.bits:g} bits of weights, but the problem counts 0 weights")

    def _check_charge(self, charge: Charge, known: set[Key]) -> None:
        what = f"charge {charge.name!r}"
        _least(charge.cost, f"the cost of {what}")
        _least(charge.bytes, f"the bytes of {what}")
        _least(charge.bits, f"the bits of {what}")
        self._check_noise(charge.noise, what)
        for cause in charge.causes:
            for key in (*cause.asked, *cause.unless):
                if key not in known:
                    raise BudgetError(f"{what} names option {key[1]!r} of group {key[0]!r}, which does not exist")

    def _check_noise(self, noise: Mapping[str, float], what: str) -> None:
        for output, power in noise.items():
            if output not in self.outputs:
                raise BudgetError(f"{what} adds noise at {output!r}, which is none of the outputs {self.outputs}")
            _least(power, f"the noise of {what} at {output!r}")


@dataclass(frozen=True)
class Limits:
    """Upper bounds; None, or an output that is not named, is not bounded.

    Attributes:
        noise: largest relative noise power per output (``10 ** (-dB / 10)`` for an SQNR in dB), above 0.
        bytes: largest size in bytes.
        bits: largest average of stored bits per weight.
        latency_us: largest time per run in microseconds.
        latency_share: largest time per run / that of float; `beside` turns it into microseconds, and only these bind.

    Raises:
        BudgetError: a bound that is not a positive finite number.
    """

    noise: Mapping[str, float] = field(default_factory=dict)
    bytes: int | None = None
    bits: float | None = None
    latency_us: float | None = None
    latency_share: float | None = None

    def __post_init__(self) -> None:
        named = {f"noise at {output!r}": bound for output, bound in self.noise.items()}
        given = {**named, "bytes": self.bytes, "bits": self.bits, "latency": self.latency_us}
        given["latency, as a share,"] = self.latency_share
        for what, bound in given.items():
            if bound is not None and not (math.isfinite(bound) and bound > 0):
                raise BudgetError(f"the limit of {what} is {bound}; expected a positive finite number")

    def beside(self, float_us: float) -> Limits:
        """Return the limits for a model that takes so many microseconds in float."""
        if self.latency_share is None:
            return self
        most = self.latency_share * float_us
        return replace(self, latency_us=min(most, self.latency_us or most), latency_share=None)


def _unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BudgetError(f"{what} {name!r} is given twice")
        seen.add(name)


def _finite(number: float, what: str) -> None:
    if not math.isfinite(number):
        raise BudgetError(f"{what} is {number}; expected a finite number")


def _least(number: float, what: str) -> None:
    _finite(number, what)
    if number < 0:
        raise BudgetError(f"{what} is {number}; expected at least 0")
