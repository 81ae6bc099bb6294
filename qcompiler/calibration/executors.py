"""Where shards of a calibration run: this thread, a pool of threads or processes, a cluster."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from qcompiler.errors import CalibrationError

KINDS = ("inline", "threads", "processes", "dask")
_MOST_THREADS = 4
"""More threads wait for each other: the reductions hold Python's lock for part of their time."""
_UNKNOWN_WORKERS = 8
"""Shards under way on an executor that does not tell how many workers it has."""


@dataclass
class Workers:
    """An executor, and what is known of it.

    Attributes:
        text: ``inline``, ``threads``, ``processes`` (both with ``:N``) or ``dask``; empty where one was handed in.
        scheduler: address of a Dask scheduler.
        given: an executor that the caller owns; it is neither shut down nor replaced.
    """

    text: str = ""
    scheduler: str | None = None
    given: Executor | None = None
    _made: Executor | None = field(default=None, repr=False)
    _client: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.given is None:
            self._kind_and_count()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(wait=error is None)

    @property
    def inline(self) -> bool:
        """Return whether feeds run in the calling thread."""
        return self.given is None and self._kind_and_count()[0] == "inline"

    @property
    def shares_memory(self) -> bool:
        """Return whether workers see this process's objects, so that a model need not be sent."""
        return isinstance(self.executor, ThreadPoolExecutor)

    @property
    def count(self) -> int:
        """Return the number of workers, a guess where the executor does not tell."""
        if self.given is None and self.text != "dask":
            return self._kind_and_count()[1]
        return int(getattr(self.executor, "_max_workers", 0) or _UNKNOWN_WORKERS)

    @property
    def executor(self) -> Executor:
        """Return the executor, made at first use."""
        if self.given is not None:
            return self.given
        if self._made is None:
            self._made = self._make()
        return self._made

    def renew(self) -> bool:
        """Replace an executor that broke; False where it is the caller's own."""
        if self.given is not None:
            return False
        self._close(wait=False)
        return True

    def _kind_and_count(self) -> tuple[str, int]:
        kind, _, number = self.text.partition(":")
        if kind not in KINDS or (number and (not number.isdecimal() or int(number) < 1 or kind in ("inline", "dask"))):
            raise CalibrationError(
                f"unknown executor {self.text!r}; expected inline, threads, threads:N, processes, processes:N or dask"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        usual = {"inline": 1, "threads": min(cores, _MOST_THREADS)}.get(kind, cores)
        return kind, int(number) if number else usual

    def _make(self) -> Executor:
        kind, count = self._kind_and_count()
        if kind == "processes":
            # A fork would copy the engine's threads' locks in whatever state they are.
            return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
        if kind == "dask":
            return self._dask()
        return ThreadPoolExecutor(count, thread_name_prefix="qcompiler-calibrate")

    def _dask(self) -> Executor:
        if not self.scheduler:
            raise CalibrationError("the dask executor needs the scheduler's address: give --scheduler tcp://host:8786")
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError:
            raise CalibrationError('the dask executor needs Dask: pip install "qcompiler[dask]"') from None
        try:
            self._client = distributed.Client(self.scheduler, timeout=10)
        except (OSError, ValueError, TimeoutError) as error:
            raise CalibrationError(f"cannot reach the Dask scheduler at {self.scheduler}: {error}") from error
        made: Executor = self._client.get_executor()
        return made

    def _close(self, wait: bool) -> None:
        if self._made is not None:
            with suppress(Exception):  # a broken pool may refuse even this
                self._made.shutdown(wait=wait, cancel_futures=True)
            self._made = None
        if self._client is not None:
            self._client.close()
            self._client = None


def open_workers(executor: Executor | str | None, scheduler: str | None = None) -> Workers:
    """Return workers for what a caller gave: an executor, a text as `Workers.text`, or None for threads.

    Raises:
        CalibrationError: an unknown text, or something that is no executor.
    """
    if executor is None or isinstance(executor, str):
        return Workers(executor or ("threads" if scheduler is None else "dask"), scheduler)
    if not callable(getattr(executor, "submit", None)):
        raise CalibrationError(
            f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor or one of: "
            f"{', '.join(KINDS)}"
        )
    return Workers(given=executor)
