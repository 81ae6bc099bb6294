"""What the drop-in is asked for: options in code, then environment variables, then defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.errors import PassError

if TYPE_CHECKING:
    from qcompiler.dropin.status import Status

ENABLED, CACHE, RECIPE, BUDGET = "QCOMPILER_ORT", "QCOMPILER_CACHE", "QCOMPILER_RECIPE", "QCOMPILER_BUDGET"
CALIBRATION, REQUESTS, WAIT = "QCOMPILER_CALIBRATION", "QCOMPILER_REQUESTS", "QCOMPILER_WAIT"
GUARD, SWAP, SAMPLE_BYTES = "QCOMPILER_GUARD", "QCOMPILER_SWAP", "QCOMPILER_SAMPLE_BYTES"

_OFF = frozenset({"off", "0", "no", "false"})
_ON = frozenset({"", "on", "1", "yes", "true"})


@dataclass(frozen=True)
class DropinOptions:
    """Options of the drop-in; what is None comes from its environment variable, then from the default.

    Attributes:
        enabled: compile at all (``QCOMPILER_ORT=off`` always wins).
        recipe: as for `qcompiler.compile` (``QCOMPILER_RECIPE``; ``int8``).
        target: a capability table of ONNX Runtime.
        calibration: feeds, as for `qcompiler.compile` (``QCOMPILER_CALIBRATION``, a path); compiled at first use.
            Without it the first real requests calibrate.
        evaluation: feeds of the metric.
        metric: function (outputs per feed, feeds) -> float, for drop budgets.
        budget: bounds such as ``"sqnr>=30"`` (``QCOMPILER_BUDGET``, bounds separated by ``;``).
        overrides: path of a .toml with ``[[override]]`` rows.
        min_sqnr: least SQNR per output in dB; the recipe's by default.
        threads: threads inside one operator while measuring; the session's own number by default, else 1.
        guard: measure speed and accuracy (``QCOMPILER_GUARD``; on).
        background: with ``calibration``, serve in float until the compiled model is there, instead of waiting for it.
        requests: real requests that calibrate (``QCOMPILER_REQUESTS``; 32).
        sample_bytes: most bytes of them kept in memory (``QCOMPILER_SAMPLE_BYTES``; 256 MiB).
        swap: use the compiled model in the process that calibrated it (``QCOMPILER_SWAP``; on), else from the next
            start.
        callback: called once with the `Status`, when the compiled model is in use or is known not to come.
        cache: folder of the cache (``QCOMPILER_CACHE``).
        wait: most seconds that a start waits for another process which compiles the same (``QCOMPILER_WAIT``; 120).
        tag: any text; another tag is another cache entry.
    """

    enabled: bool | None = None
    recipe: Any = None
    target: str = "host"
    calibration: Any = None
    evaluation: Any = None
    metric: Any = None
    budget: Any = None
    overrides: str | Path | None = None
    min_sqnr: float | None = None
    threads: int | None = None
    guard: bool | None = None
    background: bool = False
    requests: int | None = None
    sample_bytes: int | None = None
    swap: bool | None = None
    callback: Callable[[Status], None] | None = None
    cache: str | Path | None = None
    wait: float | None = None
    tag: str = ""

    def resolved(self, environment: Mapping[str, str] | None = None) -> DropinOptions:
        """Return the options with nothing left open: environment variables, then defaults.

        Raises:
            PassError: a variable or an option that cannot be read.
        """
        env = os.environ if environment is None else environment
        made = replace(
            self,
            enabled=_flag(env, ENABLED, True) and self.enabled is not False,
            recipe=self.recipe if self.recipe is not None else env.get(RECIPE) or "int8",
            calibration=self.calibration if self.calibration is not None else env.get(CALIBRATION) or None,
            budget=self.budget if self.budget is not None else _bounds(env.get(BUDGET)),
            guard=self.guard if self.guard is not None else _flag(env, GUARD, True),
            requests=self.requests if self.requests is not None else int(_number(env, REQUESTS, 32)),
            sample_bytes=self.sample_bytes if self.sample_bytes is not None else int(_number(env, SAMPLE_BYTES, 2**28)),
            swap=self.swap if self.swap is not None else _flag(env, SWAP, True),
            cache=Path(self.cache) if self.cache is not None else default_cache(env),
            wait=self.wait if self.wait is not None else _number(env, WAIT, 120.0),
        )
        if made.requests is None or made.requests < 1:
            raise PassError(f"requests is {made.requests}; expected at least 1")
        return made

    def compile_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `qcompiler.compile` that these options set, calibration left out."""
        return {
            "target": self.target,
            "recipe": self.recipe,
            "overrides": self.overrides,
            "budget": self.budget,
            "metric": self.metric,
            "evaluation": self.evaluation,
            "threads": self.threads,
            "guard": self.guard,
            "min_sqnr": self.min_sqnr,
        }


def read_options(given: DropinOptions | Mapping[str, Any] | None) -> DropinOptions:
    """Return options from what a caller gave.

    Raises:
        PassError: an unknown name, or something that is no table of options.
    """
    if given is None:
        return DropinOptions()
    if isinstance(given, DropinOptions):
        return given
    if not isinstance(given, Mapping):
        raise PassError(f"qcompiler_options is a {type(given).__name__}; expected a dict or DropinOptions")
    known = [f.name for f in fields(DropinOptions)]
    if unknown := sorted(set(map(str, given)) - set(known)):
        raise PassError(f"unknown qcompiler option {unknown[0]!r}; expected one of: {', '.join(known)}")
    return DropinOptions(**given)


def default_cache(env: Mapping[str, str]) -> Path:
    """Return the cache folder: ``QCOMPILER_CACHE``, else the user's cache folder of this system."""
    if env.get(CACHE):
        return Path(env[CACHE]).expanduser()
    if sys.platform == "win32":
        base = Path(env.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "qcompiler"


def _flag(env: Mapping[str, str], name: str, default: bool) -> bool:
    text = env.get(name)
    if text is None:
        return default
    word = text.strip().lower()
    if word not in _ON | _OFF:
        raise PassError(f"{name} is {text!r}; expected on or off")
    return default if not word else word in _ON


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise PassError(f"{name} is {text!r}; expected a number") from None
    if not 0 <= value < float("inf"):
        raise PassError(f"{name} is {text!r}; expected a number of at least 0")
    return value


def _bounds(text: str | None) -> list[str] | None:
    return [bound.strip() for bound in text.split(";") if bound.strip()] if text else None
