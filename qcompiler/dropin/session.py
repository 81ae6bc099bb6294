"""The session: ONNX Runtime's own, on the compiled model as soon as there is one."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from qcompiler.dropin.binding import SampledBinding
from qcompiler.dropin.jobs import Job, registry
from qcompiler.dropin.planning import LOGGER, Plan, make_plan, obstacle
from qcompiler.dropin.samples import copied
from qcompiler.dropin.settings import DropinOptions, read_options
from qcompiler.dropin.status import Status
from qcompiler.dropin.store import Entry

if TYPE_CHECKING:
    from qcompiler.engine import Array, Feeds

_OF_THE_ENGINE = (
    "_sess_options", "_inputs_meta", "_outputs_meta", "_overridable_initializers", "_input_meminfos",
    "_output_meminfos", "_input_epdevices", "_model_meta", "_providers", "_provider_options",
    "_profiling_start_time_ns",
)  # fmt: skip
"""What ONNX Runtime's Python class keeps of its engine beside the engine itself (``_sess``)."""


class InferenceSession(ort.InferenceSession):  # type: ignore[misc]  # onnxruntime has no types
    """``onnxruntime.InferenceSession`` that compiles its model, caches the result and runs it.

    Without ``qcompiler_options['calibration']`` the first real requests run in float and calibrate; a process of low
    priority then compiles the model, and the compiled one takes its place between two requests. The next session of the
    same model starts with it. If anything stands in the way the original model runs, and the log says so once.
    """

    def __init__(
        self,
        path_or_bytes: str | bytes | os.PathLike[str],
        sess_options: ort.SessionOptions | None = None,
        providers: Sequence[str | tuple[str, dict[Any, Any]]] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        *,
        qcompiler_options: DropinOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,  # onnxruntime's signature
    ) -> None:
        """Load a model, compiled if the cache has it; arguments as of ``onnxruntime.InferenceSession``.

        Args:
            path_or_bytes: the model.
            sess_options: as for ONNX Runtime.
            providers: as for ONNX Runtime.
            provider_options: as for ONNX Runtime.
            qcompiler_options: a `DropinOptions` or a mapping of its fields.
            kwargs: as for ONNX Runtime.

        Raises:
            PassError: an unknown name among ``qcompiler_options``.
        """
        options = read_options(qcompiler_options)
        self._sess: Any
        self._model_path: str | None
        self._model_bytes: bytes | None
        self._job: Job | None = None
        self._swap_lock = threading.Lock()
        self._status = Status("original")
        self._callback = options.callback
        self._engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kept: list[Any] = []
        self._asynchronous = False
        self._pinned = ""
        self._original: ort.InferenceSession | None = None
        self._names: frozenset[str] = frozenset()
        self._given = (path_or_bytes, sess_options, providers, provider_options, kwargs)
        plan = self._planned(options)
        entry = self._found(plan)
        if entry is None or not self._started_compiled(entry):
            super().__init__(path_or_bytes, sess_options, providers, provider_options, **kwargs)
            self._engines.add(self._sess)
        self._names = frozenset(i.name for i in self._inputs_meta)
        if plan is not None and not self._status.reason:
            self._begin(plan, entry)

    # ---- starting ---------------------------------------------------------------------------------------------

    def _planned(self, options: DropinOptions) -> Plan | None:
        """Return what is to be compiled; None if the session stays as it is. Nothing of ours may stop a session."""
        source, sess_options, providers, _, others = self._given
        name = "model" if isinstance(source, bytes) else os.path.basename(str(source))
        try:
            settings = options.resolved()
            if not settings.enabled:
                self._status = Status("off", "QCOMPILER_ORT=off, or enabled=False")
                return None
            reason = obstacle(source, sess_options, providers, ort.get_available_providers(), others)
            if reason:
                logging.getLogger(LOGGER).info("%s runs as it is: %s", name, reason)
                self._status = Status("original", reason)
                return None
            if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
                return None  # ONNX Runtime says it in its own words
            plan = make_plan(source, settings, sess_options.intra_op_num_threads if sess_options else 0)
        except Exception as error:
            registry().warn_of(name, f"{error}")
            self._status = Status("original", f"{error}")
            return None
        self._status = Status("original", key=plan.key, folder=str(plan.cache.folder))
        return plan

    def _found(self, plan: Plan | None) -> Entry | None:
        """Return the compiled model, made now if calibration data were given; None if there is none yet."""
        if plan is None:
            return None
        wait = not plan.self_calibrating and not plan.options.background
        try:
            entry = plan.find()
            if entry is None and wait:
                entry = plan.make()
                if entry is None:
                    self._refuse(plan.order.name, "another process took too long to compile it")
        except Exception as error:
            self._refuse(plan.order.name, f"{error}")
            return None
        if entry is not None and entry.refused:
            self._refuse(plan.order.name, entry.refused)
            return None
        return entry

    def _refuse(self, name: str, reason: str) -> None:
        registry().warn_of(name, reason)
        self._settle("original", reason)

    def _started_compiled(self, entry: Entry) -> bool:
        """Start on the compiled model and return True, or leave nothing behind and return False."""
        source, sess_options, providers, provider_options, kwargs = self._given
        compiled = entry.source if isinstance(entry.source, bytes) else str(entry.source)
        try:
            super().__init__(compiled, sess_options, providers, provider_options, **kwargs)
        except Exception as error:
            self._refuse(os.path.basename(str(entry.source))[:40] if isinstance(entry.source, str) else "model",
                         f"onnxruntime refuses the compiled model: {error}")  # fmt: skip
            return False
        # What is made anew from here on (set_providers, a failing provider) is made of the model as given.
        self._model_path, self._model_bytes = (None, source) if isinstance(source, bytes) else (os.fspath(source), None)
        self._engines.add(self._sess)
        self._settle("compiled", entry=entry, from_cache=True)
        return True

    def _begin(self, plan: Plan, entry: Entry | None) -> None:
        """Collect requests, or compile beside them, unless the entry is as good as it gets."""
        options = plan.options
        if entry is not None and (not plan.self_calibrating or entry.samples >= (options.requests or 1)):
            self._tell()
            return
        if not options.swap:
            self._pinned = "swap=False"
        elif self._sess_options.enable_profiling:
            self._pinned = "the session profiles"
        elif self._sess_options.optimized_model_filepath:
            self._pinned = "the session writes its optimized model"
        if entry is None:  # before the job begins, which may tell us of its end at any time
            self._settle("collecting" if plan.self_calibrating else "compiling")
        self._job = registry().join(plan, self, entry.samples if entry is not None else 0)

    # ---- the compiled model comes -----------------------------------------------------------------------------

    def compiled_model_ready(self, entry: Entry, sample: Feeds | None) -> None:
        """Put the compiled model in the place of the one that runs; called from a thread of the drop-in."""
        self._job = None
        if self._pinned:
            if not self._status.compiled:
                self._settle("next-start", self._pinned, entry=entry)
            self._tell()
            return
        try:
            made = self._loaded(entry)
            if sample is not None:
                made.run(None, sample)  # first runs are slow: no request should pay for it
        except Exception as error:
            self.compiled_model_refused(f"onnxruntime refuses the compiled model: {error}")
            return
        with self._swap_lock:
            if self._pinned:
                self._settle("next-start", self._pinned, entry=entry)
            else:
                before = self._sess
                self._engines.add(made._sess)
                self._sess = made._sess
                for name in _OF_THE_ENGINE:
                    if hasattr(made, name):
                        setattr(self, name, getattr(made, name))
                if self._asynchronous:
                    self._kept.append(before)  # requests of run_async hold no reference to their engine
                self._settle("compiled", entry=entry)
        self._tell()

    def _loaded(self, entry: Entry) -> ort.InferenceSession:
        # The engine's own copy of the options: the caller's may have been changed since.
        providers = list(self._providers)
        options = [dict(self._provider_options.get(name, {})) for name in providers]
        source = entry.source if isinstance(entry.source, bytes) else str(entry.source)
        return ort.InferenceSession(source, self._sess_options, providers, options, enable_fallback=0)

    def compiled_model_refused(self, reason: str) -> None:
        """Stay with the model that runs; called from a thread of the drop-in."""
        self._job = None
        if not self._status.compiled:
            self._settle("original", reason)
        self._tell()

    def _settle(self, state: Any, reason: str = "", *, entry: Entry | None = None, from_cache: bool = False) -> None:
        known = self._status
        self._status = Status(
            state,
            reason,
            samples=entry.samples if entry is not None else 0,
            from_cache=from_cache,
            key=known.key,
            folder=known.folder,
            build=entry.build if entry is not None else {},
        )

    def _tell(self) -> None:
        callback, self._callback = self._callback, None
        if callback is None:
            return
        try:
            callback(self.qcompiler_report)
        except Exception:
            logging.getLogger(LOGGER).exception("the callback of qcompiler_options failed")

    @property
    def qcompiler_report(self) -> Status:
        """Return what runs now, why, and the report of the compilation."""
        known, job = self._status, self._job
        if job is None or known.state not in ("collecting", "compiling"):
            return known
        state = "collecting" if job.collecting else "compiling"
        return Status(state, requests=len(job.samples), key=known.key, folder=known.folder)  # type: ignore[arg-type]

    # ---- requests ---------------------------------------------------------------------------------------------

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        """Run once; see ``onnxruntime.InferenceSession.run``."""
        if (other := self._for_extra(input_feed)) is not None:
            return other.run(output_names, input_feed, run_options)
        job = self._job
        if job is None or not job.collecting:
            return super().run(output_names, input_feed, run_options)
        return self._sampled(job, input_feed, lambda: super(InferenceSession, self).run(
            output_names, input_feed, run_options
        ))  # fmt: skip

    def run_with_ort_values(self, output_names: Any, input_dict_ort_values: Any, run_options: Any = None) -> Any:
        """Run once on values of ONNX Runtime; see ``onnxruntime.InferenceSession.run_with_ort_values``."""
        feed = input_dict_ort_values
        if (other := self._for_extra(feed)) is not None:
            return other.run_with_ort_values(output_names, feed, run_options)
        job = self._job
        if job is None or not job.collecting:
            return super().run_with_ort_values(output_names, feed, run_options)
        return self._sampled(job, feed, lambda: super(InferenceSession, self).run_with_ort_values(
            output_names, feed, run_options
        ))  # fmt: skip

    def run_async(
        self, output_names: Any, input_feed: Any, callback: Any, user_data: Any, run_options: Any = None
    ) -> Any:
        """Start a run; see ``onnxruntime.InferenceSession.run_async``."""
        if (other := self._for_extra(input_feed)) is not None:
            return other.run_async(output_names, input_feed, callback, user_data, run_options)
        self._asynchronous = True  # before the engine is looked up: whoever replaces it then keeps it
        job = self._job
        sample = self._copied(input_feed) if job is not None and job.collecting else None
        started = super().run_async(output_names, input_feed, callback, user_data, run_options)
        if job is not None and sample is not None:
            job.offer(sample)
        return started

    def io_binding(self) -> ort.IOBinding:
        """Return a binding; it stays with the engine that it was made of, whatever comes later."""
        with self._swap_lock:
            job = self._job
            return SampledBinding(self) if job is not None and job.collecting else ort.IOBinding(self)

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        """Run on bound memory; see ``onnxruntime.InferenceSession.run_with_iobinding``."""
        engine = getattr(iobinding, "_session", None)
        if engine is None or engine not in self._engines:
            super().run_with_iobinding(iobinding, run_options)
            return
        job = self._job
        if job is None or not job.collecting or not isinstance(iobinding, SampledBinding):
            engine.run_with_iobinding(iobinding._iobinding, run_options)
            return
        feed = iobinding.qcompiler_feed()
        self._sampled(job, feed, lambda: engine.run_with_iobinding(iobinding._iobinding, run_options))

    def _sampled(self, job: Job, feed: Mapping[str, Any] | None, run: Callable[[], Any]) -> Any:
        """Copy a request, run it, and count it if it went well."""
        sample = self._copied(feed)
        results = run()
        if sample is not None:
            job.offer(sample)
        return results

    def _copied(self, feed: Mapping[str, Any] | None) -> dict[str, Array] | None:
        """Return a copy of a request that can calibrate: of all inputs, and nothing else."""
        if not isinstance(feed, Mapping) or feed.keys() != self._names:
            return None
        return copied(feed)

    # ---- what belongs to the model as given -------------------------------------------------------------------

    def _for_extra(self, feed: Mapping[str, Any]) -> ort.InferenceSession | None:
        """Return the original model for a request that replaces weights, which the compiled one cannot do."""
        if not self._status.compiled or self._names.issuperset(feed):
            return None
        with self._swap_lock:
            if self._original is None:
                source, sess_options, providers, provider_options, kwargs = self._given
                self._original = ort.InferenceSession(source, sess_options, providers, provider_options, **kwargs)
            return self._original

    def set_providers(self, providers: Any = None, provider_options: Any = None) -> None:
        """Make the session anew, on the model as given; see ``onnxruntime.InferenceSession.set_providers``."""
        self._pin("the providers were changed")
        super().set_providers(providers, provider_options)
        self._engines.add(self._sess)
        self._job = None
        self._settle("original", "the providers were changed")

    def create_ortvalue_from_shape_and_type(self, *args: Any, **kwargs: Any) -> Any:  # as the installed version has it
        """Return a value that belongs to the engine, which therefore stays."""
        self._pin("values belong to the session")
        return super().create_ortvalue_from_shape_and_type(*args, **kwargs)

    def set_ep_dynamic_options(self, options: dict[str, str]) -> None:
        """Set options of the engine, which therefore stays."""
        self._pin("options of its providers were set")
        super().set_ep_dynamic_options(options)

    def set_tuning_results(self, results: Any, *, error_on_invalid: bool = False) -> Any:
        """Set tuning results of the engine, which therefore stays."""
        self._pin("tuning results were set")
        return super().set_tuning_results(results, error_on_invalid=error_on_invalid)

    def _pin(self, reason: str) -> None:
        with self._swap_lock:
            self._pinned = self._pinned or reason
