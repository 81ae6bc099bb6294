"""One file that reproduces a build byte for byte: decisions, options, versions, and digests of everything that counts.

`compile_locked` checks all of it before it compiles, and the bytes afterwards; what differs is named.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompiler.backends.catalog import open_backend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.exchange import RangeTable
from qcompiler.calibration.feed_digests import feed_digest
from qcompiler.calibration.qcal import write_qcal
from qcompiler.calibration.readers import FeedSource, as_feed_source
from qcompiler.calibration.statistics import Statistics
from qcompiler.compiled import CompiledModel
from qcompiler.compiler import compile_model
from qcompiler.dataset import open_dataset, read_statistics
from qcompiler.decisions import Decisions
from qcompiler.engine import EngineOptions, ShapeRange
from qcompiler.errors import PassError, QCompilerError
from qcompiler.ir.importer import import_model
from qcompiler.ir.reader import read_model
from qcompiler.ir.serialize import graph_digest
from qcompiler.options import ModelSource, Options, Settings, settle
from qcompiler.pipeline.instruments.weights import versions
from qcompiler.plugins import plugin_versions

LOCK_VERSION = 1
_MOST_FEEDS = 1024
"""Feeds whose digests are kept one by one, so that the one that changed can be named."""


class LockError(QCompilerError):
    """A lock file that cannot be read, or that this build does not agree with; names every difference."""


@dataclass(frozen=True)
class Lock:
    """What a build depends on, and what came of it.

    Attributes:
        decisions: what measurement chose.
        options: target, recipe, emit, opset, threads, shapes, random and synthetic counts.
        versions: the compiler, the libraries that carry graphs, and the engine.
        digests: ``model``, ``target``, ``recipe`` (overrides included), ``calibration``.
        feeds: digest of each calibration feed, if they are not too many.
        output: digest of the compiled model.
        output_bytes: its size.
    """

    decisions: Decisions
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    feeds: tuple[str, ...] = ()
    output: str = ""
    output_bytes: int = 0

    def to_json(self) -> str:
        """Return the lock as JSON text, keys sorted."""
        data = {
            "lock": LOCK_VERSION,
            "decisions": json.loads(self.decisions.to_json()),
            "options": self.options,
            "versions": self.versions,
            "digests": self.digests,
            "feeds": list(self.feeds),
            "output": {"sha256": self.output, "bytes": self.output_bytes},
        }
        return json.dumps(data, sort_keys=True, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Lock:
        """Read what `to_json` wrote.

        Raises:
            LockError: not a lock, or one of a version that this release does not know.
        """
        try:
            data = json.loads(text)
            if data["lock"] != LOCK_VERSION:
                raise LockError(f"the lock has version {data['lock']}, this release reads {LOCK_VERSION}; lock anew")
            return Lock(
                Decisions.from_json(json.dumps(data["decisions"])),
                dict(data["options"]),
                dict(data["versions"]),
                dict(data["digests"]),
                tuple(data["feeds"]),
                str(data["output"]["sha256"]),
                int(data["output"]["bytes"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, PassError) as error:
            raise LockError(f"not a lock file: {type(error).__name__}: {error}") from error


def read_lock(path: str | Path) -> Lock:
    """Read a lock file.

    Raises:
        LockError: it cannot be read, or is none.
    """
    try:
        return Lock.from_json(Path(path).read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise LockError(f"cannot read the lock {path}: {error.strerror or error}") from error
    except LockError as error:
        raise LockError(f"{path}: {error}") from error


def make_lock(source: ModelSource, options: Options, compiled: CompiledModel) -> Lock:
    """Return the lock of a build.

    Args:
        source: the model that was compiled.
        options: what it was compiled with.
        compiled: the result.

    Raises:
        QCompilerError: the calibration data cannot be read again (a plain iterator is gone).
    """
    settings = settle(options)
    calibration, feeds = _calibration_digest(source, options)
    data = compiled.to_bytes()
    return Lock(
        compiled.decisions,
        _kept_options(options, settings),
        _versions(settings),
        {**_digests(source, settings), **({"calibration": calibration} if calibration else {})},
        feeds,
        hashlib.sha256(data).hexdigest(),
        len(data),
    )


def locked_options(lock: Lock, options: Options) -> Options:
    """Return options with everything that the lock fixes; data, output and progress stay the caller's."""
    kept = lock.options
    shapes = {
        name: ShapeRange(*(tuple(part) for part in given)) if given and isinstance(given[0], list) else tuple(given)
        for name, given in kept.get("shapes", {}).items()
    }
    return replace(
        options,
        target=kept["target"],
        recipe=kept["recipe"] if isinstance(options.recipe, str) and options.recipe == "int8" else options.recipe,
        emit=kept["emit"],
        opset=kept["opset"],
        threads=kept["threads"],
        shapes=shapes or None,
        random_calibration=kept["random_calibration"],
        synthetic_calibration=kept["synthetic_calibration"],
        decisions=lock.decisions,
    )


def check_lock(lock: Lock, source: ModelSource, options: Options) -> tuple[str, ...]:
    """Return one sentence for everything that differs from when the lock was made; none if all agrees.

    Args:
        lock: the lock.
        source: the model.
        options: as `locked_options` gives them.
    """
    settings = settle(options)
    found = []
    versions_now = _versions(settings)
    for name, version in lock.versions.items():
        if (now := versions_now.get(name, "none")) != version:
            found.append(f"{name} is {now}, locked with {version}")
    for name in sorted(set(plugin_versions()) - set(lock.versions)):
        found.append(f"{name} is {versions_now[name]}, locked without")
    for name, digest in lock.digests.items():
        if name != "calibration" and (now := _digests(source, settings)[name]) != digest:
            found.append(f"the {_CALLED.get(name, name)} differs: digest {now[:12]}, locked with {digest[:12]}")
    if "calibration" in lock.digests or options.calibration is not None:
        found += _data_differences(lock, source, options)
    return tuple(found)


_CALLED = {
    "model": "model", "target": "target's table", "recipe": "recipe (or its overrides)", "calibration": "data",
}  # fmt: skip


def compile_locked(source: ModelSource, lock: Lock, options: Options | None = None) -> CompiledModel:
    """Repeat a locked build.

    Args:
        source: the model.
        lock: of `make_lock` or `read_lock`.
        options: the calibration data; a recipe file and overrides of the user's own, if the build had some; dump and
            progress. All else comes from the lock.

    Raises:
        LockError: something differs from when the lock was made, or the bytes do; the text names all of it.
        QCompilerError: as `qcompiler.compile`.
    """
    settled = locked_options(lock, options or Options())
    if differences := check_lock(lock, source, settled):
        raise LockError("this build is not the locked one: " + "; ".join(differences))
    compiled = compile_model(source, settled)
    data = compiled.to_bytes()
    if (now := hashlib.sha256(data).hexdigest()) != lock.output:
        raise LockError(
            f"the compiled model differs although all inputs agree: {len(data)} bytes with digest {now[:12]}, locked "
            f"with {lock.output_bytes} and {lock.output[:12]}; calibrated on another processor? lock with a .qcal "
            "instead of data, and report it if that does not help"
        )
    return compiled


# ---- digests --------------------------------------------------------------------------------------------------------


def _kept_options(options: Options, settings: Settings) -> dict[str, Any]:
    return {
        "target": settings.target.name,
        "recipe": options.recipe if isinstance(options.recipe, str) else options.recipe.name,
        "emit": options.emit,
        "opset": options.opset,
        "threads": options.threads,
        "shapes": {
            name: [list(s.least), list(s.best), list(s.most)] if isinstance(s, ShapeRange) else list(s)
            for name, s in (options.shapes or {}).items()
        },
        "random_calibration": options.random_calibration,
        "synthetic_calibration": options.synthetic_calibration,
    }


def _versions(settings: Settings) -> dict[str, str]:
    engine = open_backend(settings.target)
    found = {**versions(), "onnxruntime": OrtEngine().version}
    if settings.target.engine != "onnxruntime":
        found[settings.target.engine] = engine.version
    return found


def _digests(source: ModelSource, settings: Settings) -> dict[str, str]:
    recipe = {k: v for k, v in asdict(settings.recipe).items() if k != "doc"}
    return {
        "model": graph_digest(read_model(source)),
        "target": _text_digest(asdict(settings.target)),
        "recipe": _text_digest(recipe),
    }


def _text_digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _calibration_digest(source: ModelSource, options: Options) -> tuple[str, tuple[str, ...]]:
    """Return (digest of the data or statistics, digests of the feeds); empty where there is no data."""
    given = options.calibration
    if isinstance(given, str | Path) and (read := read_statistics(Path(given))) is not None:
        given = read  # type: ignore[assignment]
    if isinstance(given, RangeTable):
        return _text_digest({name: list(given.range(name)) for name in given}), ()
    if isinstance(given, Statistics):
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            path = Path(folder) / "lock.qcal"
            write_qcal(given, path)
            return hashlib.sha256(path.read_bytes()).hexdigest()[:32], ()
    feeds = _feeds(source, options)
    if feeds is None:
        return "", ()
    together = hashlib.sha256()
    each: list[str] = []
    for feed in feeds:
        each.append(feed_digest(feed))
        together.update(each[-1].encode())
    return together.hexdigest()[:32], tuple(each) if len(each) <= _MOST_FEEDS else ()


def _feeds(source: ModelSource, options: Options) -> FeedSource | None:
    """Return the calibration feeds as a compilation reads them."""
    model = import_model(source, shapes=options.fixed_shapes)
    inputs = OrtEngine().load(model, EngineOptions(optimize=False)).inputs
    given = options.calibration
    if given is not None and not isinstance(given, Statistics):
        return as_feed_source(given, inputs, options.sources)
    return open_dataset(options.data, model, inputs).feeds


def _data_differences(lock: Lock, source: ModelSource, options: Options) -> list[str]:
    wanted = lock.digests.get("calibration", "")
    now, feeds = _calibration_digest(source, options)
    if now == wanted:
        return []
    if not wanted:
        return ["there is calibration data, locked without"]
    if not now:
        return ["there is no calibration data, locked with some: give --calibration SRC"]
    if lock.feeds and feeds:
        return [f"the calibration data differs: {_first_difference(lock.feeds, feeds)}"]
    return [f"the calibration data differs: digest {now[:12]}, locked with {wanted[:12]}"]


def _first_difference(locked: Sequence[str], now: Sequence[str]) -> str:
    if len(locked) != len(now):
        return f"{len(now)} feeds, locked with {len(locked)}"
    changed = [i for i, (a, b) in enumerate(zip(locked, now, strict=True)) if a != b]
    return f"{len(changed)} of {len(now)} feeds, the first is number {changed[0]}"
