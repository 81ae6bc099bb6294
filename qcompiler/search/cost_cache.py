"""Measured costs that outlive a compilation: one file per engine, processor and number of threads.

Any number of processes may read and write at once: a file is replaced as a whole, by whoever holds its lock. It begins
with the digest of the rest, so that what a crash, a full disk or another program left is seen and made anew.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qcompiler.search.signatures import SCHEME, digest

_FOLDER = "costs"
_SUFFIX, _LOCK, _PART = ".json", ".lock", ".part"
_LOCK_SECONDS = 10.0
_MAGIC = "qcompiler costs"


@dataclass(frozen=True)
class EngineKey:
    """What a measured time holds for.

    Attributes:
        engine: the engine's name.
        version: its version.
        processor: architecture and model of the processor.
        threads: threads inside one operator.
        scheme: version of what signatures hold.
    """

    engine: str
    version: str
    processor: str
    threads: int
    scheme: int = SCHEME

    @property
    def name(self) -> str:
        """Return the name of the file for this key, without suffix."""
        return digest(asdict(self))

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return f"{self.engine} {self.version}, {self.processor}, {self.threads} thread{plural}"


@dataclass(frozen=True)
class Remembered:
    """One remembered cost.

    Attributes:
        us: least microseconds per run of all measurements.
        count: number of measurements.
        date: day of the last one (ISO 8601, UTC).
        what: what was measured, for people.
    """

    us: float
    count: int = 1
    date: str = ""
    what: str = ""

    def with_measurement(self, other: Remembered) -> Remembered:
        """Return both taken together: the least time, since whatever disturbs a measurement makes it slower."""
        return Remembered(min(self.us, other.us), self.count + other.count, max(self.date, other.date), other.what)


@dataclass
class CostCache:
    """The costs of one engine on one machine.

    Attributes:
        folder: of the files, as `cost_folder` gives it.
        key: what the costs hold for.
        warnings: what a user should know: at most one line, of a file that could not be read or written.
        today: the date that measurements are stored under (ISO 8601); the day they are stored on if empty.
    """

    folder: Path
    key: EngineKey
    warnings: list[str] = field(default_factory=list)
    today: str = ""
    _known: dict[str, Remembered] | None = field(default=None, repr=False)

    @property
    def path(self) -> Path:
        """Return the file of this key."""
        return self.folder / f"{self.key.name}{_SUFFIX}"

    def get(self, signature: str) -> Remembered | None:
        """Return what is known of a signature, None if nothing is. The file is read once."""
        if self._known is None:
            self._known = self._load()
        return self._known.get(signature)

    def store(self, costs: Mapping[str, float], what: Mapping[str, str] | None = None) -> None:
        """Add measurements to the file; those of other processes stay. A folder that cannot be written is no error.

        Args:
            costs: microseconds by signature; what is no finite number is left out.
            what: what was measured by signature, for people.
        """
        day = self.today or datetime.datetime.now(datetime.UTC).date().isoformat()
        new = {
            name: Remembered(us, 1, day, (what or {}).get(name, ""))
            for name, us in costs.items()
            if math.isfinite(us) and us >= 0
        }
        if not new:
            return
        try:
            with self._locked():
                known = self._load()
                for name, entry in new.items():
                    known[name] = known[name].with_measurement(entry) if name in known else entry
                self._write(known)
        except (OSError, Timeout) as error:
            self._warn(f"measured costs were not kept: {self.path} cannot be written: {error}")
            known = {**(self._known or {}), **new}
        self._known = known

    def _load(self) -> dict[str, Remembered]:
        try:
            return dict(_read(self.path, self.key))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn(f"the measured costs in {self.path} are ignored and will be measured anew: {error}")
            return {}

    def _write(self, known: Mapping[str, Remembered]) -> None:
        data = {
            "format": _MAGIC,
            "key": asdict(self.key),
            "costs": {name: asdict(entry) for name, entry in sorted(known.items())},
        }
        body = json.dumps(data, sort_keys=True)
        part = self.folder / f".{self.key.name}.{os.getpid()}-{secrets.token_hex(4)}{_PART}"
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.write(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(self.folder / f"{self.key.name}{_LOCK}", timeout=_LOCK_SECONDS, thread_local=False):
            yield

    def _warn(self, text: str) -> None:
        if not self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True)
class ListedCosts:
    """One file of costs: what for, how many, bytes, and the day of the last measurement."""

    key: EngineKey
    count: int
    size: int
    date: str


def cost_folder(root: Path) -> Path:
    """Return the folder of measured costs in a cache folder, which the drop-in may share."""
    return root / _FOLDER


def list_costs(root: Path) -> list[ListedCosts]:
    """Return the files of costs in a cache folder, the last measured first; damaged ones are left out."""
    found = []
    for path in _files(root):
        try:
            data = _parse(path)
            costs = [Remembered(**entry) for entry in data["costs"].values()]
            key = EngineKey(**data["key"])
            size = path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        found.append(ListedCosts(key, len(costs), size, max((c.date for c in costs), default="")))
    return sorted(sorted(found, key=lambda item: str(item.key)), key=lambda item: item.date, reverse=True)


def clear_costs(root: Path, before: str = "") -> int:
    """Remove files of costs, damaged ones too, and what killed processes left; return how many files of costs.

    Args:
        root: the cache folder.
        before: only files whose last measurement is older than this day (ISO 8601); all if empty.
    """
    kept = {item.key.name for item in list_costs(root) if before and item.date >= before}
    removed = 0
    for path in _files(root):
        if path.stem in kept:
            continue
        with suppress(OSError, Timeout), FileLock(path.with_suffix(_LOCK), timeout=1, thread_local=False):
            path.unlink(missing_ok=True)
            removed += 1
    for left in cost_folder(root).glob(f".*{_PART}"):
        left.unlink(missing_ok=True)
    for lock in cost_folder(root).glob(f"*{_LOCK}"):
        if not lock.with_suffix(_SUFFIX).exists():
            lock.unlink(missing_ok=True)
    return removed


def _files(root: Path) -> Iterable[Path]:
    folder = cost_folder(root)
    return sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []


def _read(path: Path, key: EngineKey) -> Iterator[tuple[str, Remembered]]:
    data = _parse(path)
    if EngineKey(**data["key"]) != key:
        raise ValueError(f"it is of {EngineKey(**data['key'])}")
    for name, entry in data["costs"].items():
        made = Remembered(**entry)
        if not (isinstance(made.us, int | float) and math.isfinite(made.us) and made.us >= 0):
            raise ValueError(f"{made.us!r} is no time")
        yield name, made


def _parse(path: Path) -> dict[str, Any]:
    """Read a file of costs.

    Raises:
        ValueError: it is damaged, or another program's.
    """
    head, _, body = path.read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != head:
        raise ValueError("it is damaged, or another program's")
    data: dict[str, Any] = json.loads(body)
    if data.get("format") != _MAGIC:
        raise ValueError("it is another program's")
    return data
