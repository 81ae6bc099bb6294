"""One compilation per model and process: collect, hand to a worker, tell the sessions, or leave it for later."""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from qcompiler.dropin.building import build
from qcompiler.dropin.planning import LOGGER, Plan
from qcompiler.dropin.samples import Samples
from qcompiler.dropin.store import Entry
from qcompiler.dropin.worker import BUSY, LOCKED

if TYPE_CHECKING:
    from qcompiler.engine import Feeds

_HAND_OVER_SECONDS = 30.0
"""Most seconds that the end of the process waits for samples that are just being handed to a worker."""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Listener(Protocol):
    """A session that waits for its compiled model."""

    def compiled_model_ready(self, entry: Entry, sample: Feeds | None) -> None:
        """Use the entry; ``sample`` is a request that calibrated it, if any."""
        ...

    def compiled_model_refused(self, reason: str) -> None:
        """Stay in float for good."""
        ...


class Job:
    """The compilation of one model in this process, for all its sessions.

    It lives as long as the process even if its sessions do not: a script may drop its session before it ends.
    """

    def __init__(self, plan: Plan, more_than: int = 0) -> None:
        """Start to collect, or to compile where the calibration data are there.

        Args:
            plan: what to compile.
            more_than: samples that the entry in the cache has already; fewer or as many are no reason to compile.
        """
        options = plan.options
        self.plan, self.more_than = plan, more_than
        self.samples = Samples(options.requests or 1, options.sample_bytes or 0)
        self.collecting = plan.self_calibrating
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._handed_over = threading.Event()
        self._first: Feeds | None = None
        self._owner = os.getpid()
        atexit.register(self.finish)
        if not self.collecting:
            self._start(options.calibration, 0)

    def subscribe(self, session: Listener) -> None:
        """Tell a session when the compiled model is there."""
        self._listeners.add(session)

    def offer(self, feed: Feeds) -> None:
        """Take one request, and compile if it is the last that is needed."""
        if self.collecting and self.samples.add(feed):
            self.collecting = False
            feeds = self.samples.close()
            self._first = feeds[0]
            self._start(feeds, len(feeds))

    def finish(self) -> None:
        """At the end of the process: hand what was collected to a worker that outlives it."""
        if os.getpid() != self._owner:
            return  # a forked child: the samples are its parent's
        if not self.collecting:
            self._handed_over.wait(_HAND_OVER_SECONDS)
            return
        self.collecting = False
        feeds = self.samples.close()
        if len(feeds) > self.more_than:
            worker = Worker.started(self.plan, feeds, len(feeds))
            if worker is not None:
                worker.leave()

    def _start(self, calibration: Any, samples: int) -> None:
        threading.Thread(
            target=self._run, args=(calibration, samples), name="qcompiler-compile", daemon=True
        ).start()  # fmt: skip

    def _run(self, calibration: Any, samples: int) -> None:
        try:
            reason = self._compile(calibration, samples)
            del calibration
            entry = self.plan.cache.load(self.plan.key)
        except Exception as error:  # a thread of ours must end in words, not in a traceback
            entry, reason = None, f"{type(error).__name__}: {error}"
        finally:
            self._handed_over.set()
        atexit.unregister(self.finish)
        registry().forget(self)
        listeners = list(self._listeners)
        if entry is None or entry.refused:
            reason = entry.refused if entry is not None else reason
            registry().warn(self.plan, reason)
            for session in listeners:
                session.compiled_model_refused(reason)
            return
        for session in listeners:
            session.compiled_model_ready(entry, self._first)

    def _compile(self, calibration: Any, samples: int) -> str:
        """Have the entry made by a worker; return what went wrong in case there is none."""
        plan = self.plan
        worker = Worker.started(plan, calibration, samples)
        self._handed_over.set()
        if worker is None:
            with plan.cache.locked(plan.key, float(plan.options.wait or 0)) as mine:
                if mine and plan.cache.load(plan.key) is None:
                    build(plan.order, calibration, samples)
            return "another process took too long to compile it"
        if plan.self_calibrating:
            calibration.clear()  # the worker has them: give the memory back
        if worker.word == BUSY:
            while not plan.cache.wait(plan.key, 1.0):
                pass
        return f"the worker ended with code {worker.wait()}"


class Worker:
    """A process of low priority that compiles one model, and lives on when this one ends."""

    def __init__(self, process: subprocess.Popen[bytes], word: str) -> None:
        """Hold a process that has said its word."""
        self._process, self.word = process, word

    @classmethod
    def started(cls, plan: Plan, calibration: Any, samples: int) -> Worker | None:
        """Start a worker and wait until it holds the lock; None if the order cannot leave this process."""
        if not sys.executable:
            return None
        # A file without a name (Windows: deleted when closed): nothing is left, however the processes end.
        with tempfile.TemporaryFile(prefix="qcompiler-") as file:
            if not plan.order.write(calibration, file):
                return None
            environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1")}
            arguments: Sequence[str] = (str(plan.cache.folder), plan.key, str(samples))
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "qcompiler.dropin.worker", *arguments],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=None if os.environ.get("QCOMPILER_DEBUG") else subprocess.DEVNULL,
                env=environment,
                # A group of its own, so that Ctrl-C does not reach it, but not a session of its own: Linux shares the
                # processor between sessions (autogroup), where a low priority inside one of them counts for nothing.
                process_group=0 if os.name == "posix" else None,
                creationflags=_windows_flags(),
            )
        assert process.stdout is not None
        with process.stdout:
            word = process.stdout.readline().decode().strip()
        return cls(process, word)

    def wait(self) -> int:
        """Return the exit code of the process."""
        return self._process.wait()

    def leave(self) -> None:
        """Let the process go on without us."""
        if self.word == LOCKED:
            # Else the garbage collector complains that a child still runs, which is what we want.
            self._process.returncode = 0
        else:
            self._process.wait()


def _windows_flags() -> int:
    names = ("BELOW_NORMAL_PRIORITY_CLASS", "CREATE_NEW_PROCESS_GROUP", "DETACHED_PROCESS")
    return sum(getattr(subprocess, name, 0) for name in names)


class Registry:
    """The jobs of this process, by cache entry."""

    def __init__(self) -> None:
        """Make an empty one."""
        self._jobs: dict[str, Job] = {}
        self._warned: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def join(self, plan: Plan, session: Listener, more_than: int = 0) -> Job:
        """Return the job of a plan, with the session among its listeners; it is started if there is none."""
        with self._lock:
            job = self._jobs.get(plan.key)
            if job is None:
                job = self._jobs[plan.key] = Job(plan, more_than)
            job.subscribe(session)
            return job

    def forget(self, job: Job) -> None:
        """Drop a job that has ended."""
        with self._lock:
            if self._jobs.get(job.plan.key) is job:
                del self._jobs[job.plan.key]

    def warn(self, plan: Plan, reason: str) -> None:
        """Say once per model and reason that the original runs."""
        self.warn_of(plan.order.name, reason)

    def warn_of(self, name: str, reason: str) -> None:
        """Say once per name and reason that the original runs."""
        with self._lock:
            if (name, reason) in self._warned:
                return
            self._warned.add((name, reason))
        logging.getLogger(LOGGER).warning("%s runs as it is: %s", name, " ".join(reason.split()))


@cache
def registry() -> Registry:
    """Return the registry of this process."""
    return Registry()
