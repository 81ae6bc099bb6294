"""Share feeds out over workers, merge what they saw, and survive workers that die and users who interrupt.

A shard is a few feeds with their numbers over the whole run. Merging is exact, so neither the sizes of the shards nor
the order in which they come back changes a bit of the result.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.executors import Workers
from qcompiler.calibration.feed_digests import FeedDigests, feed_digest
from qcompiler.calibration.observe import Observer, Progress, blank, default_memory, length_of
from qcompiler.calibration.shards import ModelNotFoundError, Remote, Shard, observe_remote, observe_shard
from qcompiler.calibration.statistics import Parts, Statistics
from qcompiler.engine import Engine, Feeds
from qcompiler.errors import CalibrationError, QCompilerError

Save = Callable[[Statistics, Mapping[int, str]], None]
"""Keeps a state to resume from: what was seen, and the digest of each feed that is in it."""

SHARD_SECONDS = 0.5
"""Shards grow until one takes about this long: merging one takes a few milliseconds."""
_MOST_FEEDS = 16
_MOST_BYTES = 2 << 20
_SAVE_SECONDS = 20.0
_TRIES = 3
_FIRST_CHECK = 16
_CHECK_GROWTH = 1.5
"""From check to check: ranges are stable that half as many feeds again did not move."""
_STABLE_SHARE = 0.95
_STABLE_ESTIMATOR = "percentile:99.99"


@dataclass(frozen=True)
class Plan:
    """What is to be observed, and how.

    Attributes:
        model: canonical FLOAT graph.
        names: values to observe, in any graph.
        engine: runs the model; picklable, if workers are other processes.
        threads: threads inside one operator.
        memory: bytes that observed values may take at a time, over all workers of this process; default a quarter of
            what is free.
        squares: names whose sum of squares per channel is wanted as well.
        parts: names that are wanted per channel or block as well.
        stable: stop as soon as half as many feeds again moved 95 % of the ranges by no more than this share.
    """

    model: ir.Model
    names: Sequence[str]
    engine: Engine
    threads: int = 1
    memory: int | None = None
    squares: Collection[str] = ()
    parts: Mapping[str, Parts] = field(default_factory=dict)
    stable: float | None = None


@dataclass
class Gathered:
    """The outcome of a run.

    Attributes:
        statistics: merged over all shards.
        digests: digest of each feed by its number.
        stopped: whether the ranges were stable before the feeds ended.
        notes: what a user should know, such as workers that were lost.
    """

    statistics: Statistics
    digests: FeedDigests
    stopped: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def data_digest(self) -> str:
        """Return one digest of all feeds in their order."""
        return self.digests.together


def gather(
    plan: Plan,
    feeds: Iterable[Feeds],
    workers: Workers,
    *,
    resumed: tuple[Statistics, Mapping[int, str]] | None = None,
    save: Save | None = None,
    progress: Progress | None = None,
) -> Gathered:
    """Observe all feeds, each once.

    Args:
        plan: what is to be observed.
        feeds: read once, and no further ahead than the workers need.
        workers: where shards run.
        resumed: a state that ``save`` kept; its feeds are read and compared, not run. Its statistics are used up.
        save: called now and then, and when the user interrupts; where the run may stop early, at each check.
        progress: called with feeds done and, where known, their number.

    Raises:
        CalibrationError: no feed, NaN in a tensor, feeds that differ from those of the resumed state, or a shard that
            failed `_TRIES` times because its worker died.
    """
    return _Run(plan, workers, save, progress, resumed).over(feeds)


class _Run:
    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        save: Save | None,
        progress: Progress | None,
        resumed: tuple[Statistics, Mapping[int, str]] | None,
    ) -> None:
        self.plan, self.workers, self.save, self.progress = plan, workers, save, progress
        self.out = Gathered(blank(plan.names), FeedDigests())
        self.known: Mapping[int, str] = {}
        if resumed is not None:
            self.out.statistics.take_in(resumed[0])
            self.out.digests, self.known = FeedDigests(resumed[1]), resumed[1]
        self.whole = True  # False while a shard is merged
        self.pending: dict[Future[Statistics], tuple[Shard, int, float]] = {}
        self.size = 1
        self.total: int | None = None
        self.saved_at = time.monotonic()
        self.stack = ExitStack()
        self.remote: Remote | None = None

    def over(self, feeds: Iterable[Feeds]) -> Gathered:
        self.total = length_of(feeds)
        memory = self.plan.memory or default_memory()
        plan, local = self.plan, self.workers.inline or self.workers.shares_memory
        share = max(1, memory // (self.workers.count if local else 1))
        self.observer = Observer(plan.model, plan.names, plan.engine, plan.threads, share, plan.squares, plan.parts)
        with self.stack:
            if not local:
                self.remote = self._send_model(memory)
            try:
                for shard in self._shards(feeds):
                    self._start(shard)
                self._finish()
            except BaseException:
                for future in self.pending:
                    future.cancel()
                if self.plan.stable is None:  # else it is as of the latest check, so that later checks come out alike
                    self._keep()
                raise
        if not self.out.statistics.feeds:
            raise CalibrationError("the calibration source is empty; give at least one feed")
        return self.out

    # ---- shards ------------------------------------------------------------------------------------------------

    def _shards(self, feeds: Iterable[Feeds]) -> Iterator[Shard]:
        indices: list[int] = []
        digests: list[str] = []
        held: list[Feeds] = []
        size, check, before, index = 0, _FIRST_CHECK, None, -1
        latest = max(self.known, default=-1)
        for index, feed in enumerate(feeds):
            digest = feed_digest(feed)
            if index in self.known:
                self._compare(index, digest)
            else:
                indices.append(index)
                held.append(feed)
                digests.append(digest)
                size += sum(np.asarray(a).nbytes for a in feed.values())
            at_check = self.plan.stable is not None and index + 1 == check
            if held and (len(held) >= self.size or size >= _MOST_BYTES or at_check):
                yield Shard(tuple(indices), tuple(held), tuple(digests))
                indices, held, digests, size = [], [], [], 0
            if at_check:
                check = max(check + 1, int(check * _CHECK_GROWTH))
                self._finish()
                if index < latest:  # the interrupted run went past this check; what it kept knows of later feeds
                    continue
                now = self._ranges()
                if before is not None and self._stable(before, now):
                    self.out.stopped = True
                    return
                before = now
                self._keep()
        if index < latest:
            raise CalibrationError(
                f"the interrupted run saw sample {latest}, now there are {index + 1} samples: the data changed; run "
                "without resuming"
            )
        if held:
            yield Shard(tuple(indices), tuple(held), tuple(digests))

    def _compare(self, index: int, digest: str) -> None:
        if self.known[index] != digest:
            raise CalibrationError(
                f"sample {index} is not the one that the interrupted run saw: the data changed; run without resuming"
            )

    def _ranges(self) -> dict[str, tuple[float, float]]:
        statistics = self.out.statistics
        statistics._ranges.clear()
        return {n: statistics.range(n, _STABLE_ESTIMATOR) for n in statistics if statistics.observed(n)}

    def _stable(self, before: Mapping[str, tuple[float, float]], now: Mapping[str, tuple[float, float]]) -> bool:
        assert self.plan.stable is not None
        calm = 0
        for name, (low, high) in now.items():
            width = max(high, 0.0) - min(low, 0.0)
            old = before.get(name, (np.inf, -np.inf))
            calm += max(abs(low - old[0]), abs(high - old[1])) <= self.plan.stable * width
        return calm >= _STABLE_SHARE * len(now)

    # ---- workers -----------------------------------------------------------------------------------------------

    def _start(self, shard: Shard, tries: int = 0) -> None:
        if self.workers.inline:
            began = time.monotonic()
            # Apart first: an interrupt in mid-feed must not leave half a feed in what is kept.
            self._merge(shard, observe_shard(self.observer, shard), began)
            return
        while len(self.pending) >= 2 * self.workers.count:
            self._take(wait(self.pending, return_when=FIRST_COMPLETED).done)
        self._submit(shard, tries)

    def _submit(self, shard: Shard, tries: int) -> None:
        try:
            executor = self.workers.executor
            if self.remote is None:
                future = executor.submit(observe_shard, self.observer, shard)
            else:
                future = executor.submit(observe_remote, self.remote, shard)
        except RuntimeError as error:  # broken, or shut down by its owner
            self._lost(shard, tries, error)
            return
        self.pending[future] = (shard, tries, time.monotonic())

    def _finish(self) -> None:
        while self.pending:
            self._take(wait(self.pending, return_when=FIRST_COMPLETED).done)

    def _take(self, done: Iterable[Future[Statistics]]) -> None:
        """Merge finished shards; those whose worker died start again."""
        for future in sorted(done, key=lambda f: self.pending[f][0].indices):
            if future not in self.pending:
                continue
            shard, tries, began = self.pending.pop(future)
            try:
                found = future.result()
            except QCompilerError:
                raise
            except ModelNotFoundError:
                if self.remote is not None:
                    self.remote = self.remote.with_payload()
                self._submit(shard, tries)
                continue
            except Exception as error:  # an executor's own failure; the model's errors are QCompilerError
                self._lost(shard, tries, error)
                continue
            self._merge(shard, found, began)

    def _merge(self, shard: Shard, found: Statistics, began: float) -> None:
        self.whole = False
        self.out.statistics.take_in(found)
        for index, digest in zip(shard.indices, shard.digests, strict=True):
            self.out.digests.note(index, digest)
        self.whole = True
        self._adapt(len(shard.feeds), time.monotonic() - began)
        if self.progress is not None:
            self.progress(self.out.statistics.feeds, self.total)
        if self.plan.stable is None and time.monotonic() - self.saved_at > _SAVE_SECONDS:
            self._keep()

    def _adapt(self, feeds: int, seconds: float) -> None:
        """Let shards grow while they are short; waiting in the queue counts, so they grow late rather than early."""
        wanted = self.size * 2 if seconds < SHARD_SECONDS and feeds >= self.size else self.size
        if self.total is not None:  # leave some for every worker
            wanted = min(wanted, max(1, self.total // (4 * self.workers.count)))
        self.size = min(wanted, _MOST_FEEDS)

    def _lost(self, shard: Shard, tries: int, error: Exception) -> None:
        """Start a shard again whose worker died; the run goes on without the executor if that is broken for good."""
        if tries + 1 >= _TRIES:
            raise CalibrationError(
                f"samples {shard.indices[0]} to {shard.indices[-1]} failed {_TRIES} times, the last time with "
                f"{type(error).__name__}: {error}; a worker may lack memory: lower the calibration memory or the "
                "number of workers"
            ) from error
        self.out.notes.append(f"a worker was lost ({type(error).__name__}); its samples were run again")
        if isinstance(error, BrokenExecutor):
            waiting = [(shard, tries), *((s, t) for s, t, _ in self.pending.values())]
            self.pending.clear()
            if not self.workers.renew():
                self.out.notes.append("the executor broke; the rest ran in the calling process")
                self.workers, self.remote = Workers("inline"), None
            for old, count in waiting:
                self._start(old, count + 1)
            return
        self._submit(shard, tries + 1)

    def _send_model(self, memory: int) -> Remote:
        """Write the model where workers of this machine read it."""
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-"))
        plan, share = self.plan, max(1, memory // self.workers.count)
        return Remote(
            str(Path(folder) / "model.onnx"), tuple(plan.names), plan.engine, plan.threads, share, tuple(plan.squares),
            dict(plan.parts),
        ).written(plan.model)  # fmt: skip

    # ---- the user ----------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Save what is merged so far; while a shard is merged, what was saved before is whole and stays."""
        if self.save is not None and self.whole and self.out.statistics.feeds:
            self.save(self.out.statistics, self.out.digests)
            self.saved_at = time.monotonic()
