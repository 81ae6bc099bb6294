"""What is to be done for one session: which cache entry it wants, or why it stays as it is."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompiler.dropin.building import Order, build
from qcompiler.dropin.digests import entry_key, model_digest
from qcompiler.dropin.settings import DropinOptions
from qcompiler.dropin.store import Cache, Entry, open_cache

LOGGER = "qcompiler.ort"
"""Name of the logger that says all that there is to say."""
_OURS = ("CPUExecutionProvider", "AzureExecutionProvider")
_SETTINGS = {
    "session.load_model_format": ("", "ONNX"),
    "session.disable_quant_qdq": ("", "0"),
    "session.model_external_initializers_file_folder_path": ("",),
    "ep.context_enable": ("", "0"),
}
"""Configuration entries of a session, and the values under which a compiled model may take the place of another."""
_ALL_OPTIMIZATIONS = 99


@dataclass(frozen=True)
class Plan:
    """What one session wants.

    Attributes:
        options: with nothing left open.
        order: the compilation.
        cache: where its result lies.
    """

    options: DropinOptions
    order: Order
    cache: Cache

    @property
    def key(self) -> str:
        """Return the name of the cache entry."""
        return self.order.key

    @property
    def self_calibrating(self) -> bool:
        """Return whether real requests calibrate."""
        return self.options.calibration is None

    def find(self) -> Entry | None:
        """Return the entry, waiting for another process that makes it; None if there is none (yet)."""
        entry = self.cache.load(self.key)
        if entry is not None or not self.cache.busy(self.key):
            # Between the two looks the maker may have finished.
            return entry or self.cache.load(self.key)
        seconds = float(self.options.wait or 0)
        logging.getLogger(LOGGER).warning(
            "another process compiles %s: waiting up to %g s (QCOMPILER_WAIT)", self.order.name, seconds
        )
        self.cache.wait(self.key, seconds)
        return self.cache.load(self.key)

    def make(self) -> Entry | None:
        """Compile now, once over all processes, and return the entry; None if another took too long."""
        with self.cache.locked(self.key, float(self.options.wait or 0)) as mine:
            if not mine:
                return None
            entry = self.cache.load(self.key)
            if entry is None:
                build(self.order, self.options.calibration, 0)
                entry = self.cache.load(self.key)
        return entry


def make_plan(
    source: str | os.PathLike[str] | bytes, options: DropinOptions, threads: int, *, self_calibrating: bool = True
) -> Plan:
    """Return the plan for a model.

    Args:
        source: a path or bytes.
        options: resolved.
        threads: threads inside one operator that the session asks for; 0 is no wish.
        self_calibrating: whether requests will follow that can calibrate.

    Raises:
        QCompilerError: the cache cannot be used.
        OSError: the model cannot be read.
        ValueError: it is no model.
    """
    options = replace(options, threads=options.threads if options.threads is not None else max(1, threads))
    cache = open_cache(Path(options.cache or ""))
    model: str | bytes = source if isinstance(source, bytes) else os.path.abspath(os.fspath(source))
    digest = model_digest(model)
    asked = options.compile_options()
    named = {name: _file(value) for name, value in asked.items() if name in ("recipe", "overrides", "evaluation")}
    data = _file(options.calibration) if options.calibration is not None else "self" if self_calibrating else None
    key = entry_key(digest, {**asked, **named, "calibration": data, "tag": options.tag})
    name = "model" if isinstance(model, bytes) else os.path.basename(model)
    return Plan(options, Order(cache.folder, key, model, digest, name, asked), cache)


def _file(value: Any) -> Any:
    """Return the path that a text names, so that its contents count; ``file.py:function`` names a file as well."""
    if not isinstance(value, str):
        return value
    path = re.sub(r"(\.py):\w+$", r"\1", value)
    return [value, Path(path)] if Path(path).exists() else value


def obstacle(
    source: Any, sess_options: Any, providers: Sequence[Any] | None, available: Sequence[str], others: Mapping[str, Any]
) -> str:
    """Return why a session must stay as it is, or an empty text.

    Args:
        source: the model's path or bytes.
        sess_options: ``onnxruntime.SessionOptions`` or None.
        providers: as given to the session.
        available: what this ONNX Runtime has.
        others: further keyword arguments of the session.
    """
    if isinstance(source, str | os.PathLike) and os.fspath(source).endswith(".ort"):
        return "the model is in ORT format"
    if others.get("disabled_optimizers"):
        return "disabled_optimizers is set"
    names = [p if isinstance(p, str) else p[0] for p in providers] if providers else list(available)
    if foreign := [n for n in names if n in available and n not in _OURS]:
        return f"{foreign[0]} runs it"
    return "" if sess_options is None else _setting_in_the_way(sess_options)


def _setting_in_the_way(options: Any) -> str:
    for call in getattr(options, "qcompiler_calls", ()):
        return f"the session options use {call}"
    if getattr(options, "has_providers", bool)():
        return "the session options choose providers"
    if int(options.graph_optimization_level.value) != _ALL_OPTIMIZATIONS:
        return "the session options turn optimizations off"
    for name, allowed in _SETTINGS.items():
        try:
            value = options.get_session_config_entry(name)
        except RuntimeError:  # not set
            continue
        if value not in allowed:
            return f"the session options set {name}"
    return ""
