"""The cache of compiled models: entries that are whole or not there, and a lock per entry."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qcompiler.dropin.digests import file_digest
from qcompiler.errors import ModelError

MODEL, NOTE = "model.onnx", "entry.json"
_PART, _TRASH, _LOCK = ".part", ".trash", ".lock"
_FORMAT = 1
REFUSAL_SECONDS = 86_400.0
"""How long a compilation that failed is not tried again."""
_POLL = 0.05
_IN_MEMORY_BYTES = 1_900_000_000
"""Models beyond this have a weights file, and are loaded by their path."""


@dataclass(frozen=True)
class Entry:
    """A compiled model in the cache, checked against its digests.

    Attributes:
        key: its name.
        source: the model's bytes, or its path where the weights lie in a file of their own.
        samples: feeds that it was calibrated with.
        build: the report of its compilation.
        refused: why there is no compiled model; empty if there is one.
    """

    key: str
    source: bytes | Path = b""
    samples: int = 0
    build: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Listed:
    """One line of `Cache.entries`: name, model's file name, bytes, and seconds since 1970 of making and of last use."""

    key: str
    name: str
    size: int
    made: float
    used: float
    refused: str = ""


@dataclass(frozen=True)
class Cache:
    """A folder of entries; any number of processes may use it at once.

    An entry is a folder that is written under a temporary name and renamed. Its note (``entry.json``) holds the digest
    of each file and of itself, so that what a crash or a full disk left behind is seen, and removed.
    """

    folder: Path

    def load(self, key: str) -> Entry | None:
        """Return an entry whose every byte was checked; None if there is none. A damaged one is removed."""
        place = self.folder / key
        for _ in range(2):  # another process may replace the entry between our looks at two of its files
            if not place.is_dir():
                return None
            try:
                entry = _read(place, key)
            except (OSError, ValueError, KeyError, TypeError):
                continue
            with suppress(OSError):
                os.utime(place / NOTE)
            return entry
        self._discard(place)
        return None

    def store(self, key: str, files: Path, note: Mapping[str, Any]) -> None:
        """Publish the files of a folder, which `staging` gave, as an entry; an older one of that name is replaced.

        Raises:
            OSError: the disk is full or the folder refuses it.
        """
        listed = {p.name: {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in sorted(files.iterdir())}
        made = {"samples": 0, "build": {}, **note, "format": _FORMAT, "key": key, "made": time.time(), "files": listed}
        body = json.dumps(made, sort_keys=True, default=str)
        (files / NOTE).write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}", encoding="utf-8")
        for path in files.iterdir():
            _flush(path)
        place = self.folder / key
        if place.exists():
            self._discard(place)
        files.replace(place)

    def refuse(self, key: str, reason: str, name: str = "") -> None:
        """Note that a model does not compile, so that the next starts do not try again for a day."""
        with self.staging(key) as files:
            self.store(key, files, {"refused": reason, "name": name, "pid": os.getpid()})

    @contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        """Give an empty folder of this key's; what is left of it after the block is removed. Hold the lock."""
        for left in self.folder.glob(f".{key}.*{_PART}"):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: the lock is ours
        folder = self.folder / f".{key}.{os.getpid()}-{secrets.token_hex(4)}{_PART}"
        folder.mkdir(mode=0o700, parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def locked(self, key: str, seconds: float) -> Iterator[bool]:
        """Hold the lock of a key, and give whether it was had within so many seconds."""
        lock = self._lock(key)
        try:
            lock.acquire(timeout=max(0.0, seconds), poll_interval=_POLL)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def busy(self, key: str) -> bool:
        """Return whether some process compiles this entry now."""
        if not (self.folder / f"{key}{_LOCK}").exists():
            return False
        with self.locked(key, 0) as mine:
            return not mine

    def wait(self, key: str, seconds: float) -> bool:
        """Wait until nobody compiles an entry; return whether that came within so many seconds."""
        with self.locked(key, seconds) as mine:
            return mine

    def entries(self) -> list[Listed]:
        """Return the entries, latest used first; damaged ones are left out."""
        found = []
        for place in self._entries():
            try:
                note, used = _read_note(place / NOTE, place.name), (place / NOTE).stat().st_mtime
                size = sum(p.stat().st_size for p in place.iterdir())
                made, name = float(note["made"]), str(note.get("name", ""))
            except (OSError, ValueError, KeyError):
                continue
            found.append(Listed(place.name, name, size, made, used, str(note.get("refused", ""))))
        return sorted(found, key=lambda e: (-e.used, e.key))

    def size(self) -> int:
        """Return the bytes of everything in the folder that the cache made."""
        places = [*self._entries(), *self._leftovers()]
        return sum(p.stat().st_size for place in places for p in place.rglob("*") if p.is_file())

    def clear(self, unused_seconds: float = 0.0) -> int:
        """Remove entries that were not used for so long, and what killed processes left; return how many entries.

        Entries that are being compiled stay.
        """
        now, removed = time.time(), 0
        for place in self._entries():
            note = place / NOTE
            if unused_seconds and note.exists() and now - note.stat().st_mtime < unused_seconds:
                continue
            with self.locked(place.name, 0) as mine:
                if mine:
                    self._discard(place)
                    removed += 1
        for left in self._leftovers():
            if left.suffix == _TRASH or not self.busy(left.name.split(".")[1]):
                shutil.rmtree(left, ignore_errors=True)
        for lock in self.folder.glob(f"*{_LOCK}"):
            if not (self.folder / lock.stem).exists() and not self.busy(lock.stem):
                lock.unlink(missing_ok=True)
        return removed

    def _entries(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".") and _is_key(p.name))

    def _leftovers(self) -> list[Path]:
        return [p for p in self.folder.glob(".*") if p.is_dir() and p.suffix in (_PART, _TRASH)]

    def _lock(self, key: str) -> FileLock:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileLock(self.folder / f"{key}{_LOCK}", thread_local=False)

    def _discard(self, place: Path) -> None:
        """Remove a folder in one step: nobody sees half of it."""
        trash = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}{_TRASH}")
        with suppress(OSError):
            place.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _is_key(name: str) -> bool:
    return len(name) == 40 and all(c in "0123456789abcdef" for c in name)


def _read(place: Path, key: str) -> Entry:
    """Read and check an entry.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what was written, or the entry is a refusal that is too old.
    """
    note = _read_note(place / NOTE, key)
    if note.get("refused"):
        if time.time() - float(note["made"]) >= REFUSAL_SECONDS:
            raise ValueError("an old refusal")
        return Entry(key, refused=str(note["refused"]))
    return Entry(key, _read_files(place, note["files"]), int(note["samples"]), note["build"])


def _read_note(path: Path, key: str) -> dict[str, Any]:
    digest, _, body = path.read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ValueError("the note is damaged")
    note: dict[str, Any] = json.loads(body)
    if note["format"] != _FORMAT or note["key"] != key:
        raise ValueError("the note is of another entry")
    return note


def _read_files(place: Path, listed: Mapping[str, Mapping[str, Any]]) -> bytes | Path:
    """Check every file; return the model as it was checked, so that no later change of the file matters."""
    model = b""
    for name, known in listed.items():
        if name == MODEL and known["bytes"] < _IN_MEMORY_BYTES:
            model = (place / name).read_bytes()
            digest = hashlib.sha256(model).hexdigest()
        else:
            digest = file_digest(place / name)
        if digest != known["sha256"]:
            raise ValueError(f"{name} is damaged")
    if MODEL not in listed:
        raise ValueError("the entry has no model")
    return place / MODEL if any(name.endswith(".data") for name in listed) else model


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def open_cache(folder: str | Path) -> Cache:
    """Return the cache in a folder, which is made if need be.

    Raises:
        ModelError: the folder cannot be made or written.
    """
    path = Path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise ModelError(f"cannot use the cache {path}: {error.strerror or error}; set QCOMPILER_CACHE") from error
    return Cache(path)
