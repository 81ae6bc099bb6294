"""What a session says of itself: whether it runs the compiled model, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["off", "original", "collecting", "compiling", "compiled", "next-start"]


@dataclass(frozen=True)
class Status:
    """The state of one session; ``session.qcompiler_report`` is a new one each time.

    Attributes:
        state: ``off`` (asked for), ``original`` (see reason), ``collecting`` (float, requests are sampled),
            ``compiling`` (float, a compilation runs), ``compiled``, or ``next-start`` (float; the compiled model
            lies in the cache).
        reason: why the session runs the original model.
        requests: requests sampled so far.
        samples: feeds that the compiled model was calibrated with.
        from_cache: whether the session started with the compiled model.
        key: name of the cache entry.
        folder: folder of the cache.
        build: the report of the compilation, as `Report.to_dict` gives it.
    """

    state: State
    reason: str = ""
    requests: int = 0
    samples: int = 0
    from_cache: bool = False
    key: str = ""
    folder: str = ""
    build: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def compiled(self) -> bool:
        """Return whether requests run on the compiled model."""
        return self.state == "compiled"
