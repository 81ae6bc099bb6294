"""The cache: whole entries or none, one writer at a time, and nothing left that cannot be cleared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qcompiler.dropin import store
from qcompiler.dropin.store import Cache, Entry, open_cache
from qcompiler.errors import ModelError

KEY, OTHER = "a" * 40, "b" * 40


def put(cache: Cache, key: str = KEY, data: bytes = b"model", samples: int = 3) -> None:
    with cache.locked(key, 1) as mine:
        assert mine
        with cache.staging(key) as files:
            (files / store.MODEL).write_bytes(data)
            cache.store(key, files, {"name": "net.onnx", "samples": samples, "build": {"speedup": 2.0}})


@pytest.fixture
def there(tmp_path: Path) -> Cache:
    made = open_cache(tmp_path / "c")
    put(made)
    return made


def test_an_entry_comes_back_as_it_was(there: Cache) -> None:
    assert there.load(KEY) == Entry(KEY, b"model", 3, {"speedup": 2.0})
    assert there.load(OTHER) is None


def test_a_later_entry_replaces_an_older_one(there: Cache) -> None:
    put(there, data=b"better", samples=9)
    found = there.load(KEY)
    assert found is not None
    assert (found.source, found.samples) == (b"better", 9)
    assert sorted(p.name for p in there.folder.iterdir()) == [KEY, f"{KEY}.lock"]


def test_weights_beside_the_model_are_loaded_by_path_and_checked(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    with cache.staging(KEY) as files:
        (files / store.MODEL).write_bytes(b"graph")
        (files / "model.onnx.data").write_bytes(b"weights")
        cache.store(KEY, files, {})
    found = cache.load(KEY)
    assert found is not None
    assert found.source == tmp_path / KEY / store.MODEL
    (tmp_path / KEY / "model.onnx.data").write_bytes(b"weighty")
    assert cache.load(KEY) is None


@pytest.mark.parametrize("name", [store.MODEL, store.NOTE])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_a_damaged_entry_is_found_and_removed(there: Cache, name: str, damage: str) -> None:
    path = there.folder / KEY / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
        path.write_bytes({"cut": data[:-1], "flip": flipped, "empty": b""}[damage])
    assert there.load(KEY) is None
    assert not (there.folder / KEY).exists()
    put(there, data=b"new")
    found = there.load(KEY)
    assert found is not None
    assert found.source == b"new"


def test_an_entry_under_another_name_is_not_taken(there: Cache) -> None:
    (there.folder / KEY).rename(there.folder / OTHER)
    assert there.load(OTHER) is None


KILLED = """
import os, signal, sys
from pathlib import Path
from qcompiler.dropin import store
cache, moment = store.Cache(Path(sys.argv[1])), sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before-rename":
    Path.replace = die
elif moment == "before-note":
    store.file_digest = die
with cache.locked("a" * 40, 1) as mine:
    with cache.staging("a" * 40) as files:
        with open(files / "model.onnx", "wb") as file:
            file.write(b"mod")
            file.flush()
            if moment == "mid-file":
                die()
            file.write(b"el")
        cache.store("a" * 40, files, {"samples": 1})
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a signal")
@pytest.mark.parametrize("moment", ["mid-file", "before-note", "before-rename"])
def test_a_writer_that_is_killed_leaves_no_entry_and_no_lock(tmp_path: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(tmp_path), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    cache = Cache(tmp_path)
    assert cache.load(KEY) is None
    assert not cache.busy(KEY)
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()] == [".part"]  # it died with half an entry on disk
    put(cache)
    found = cache.load(KEY)
    assert found is not None
    assert found.source == b"model"
    assert sorted(p.name for p in tmp_path.iterdir()) == [KEY, f"{KEY}.lock"]  # its rest is gone


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert not cache.busy(KEY)
    with cache.locked(KEY, 1) as mine:
        assert mine
        assert cache.busy(KEY)
        assert not cache.wait(KEY, 0.05)
        with cache.locked(KEY, 0) as second:
            assert not second
        with cache.locked(OTHER, 0) as other:
            assert other
    assert not cache.busy(KEY)
    assert cache.wait(KEY, 0)


def test_who_waits_goes_on_when_the_holder_is_done(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    held, waited = threading.Event(), []

    def hold() -> None:
        with cache.locked(KEY, 1):
            held.set()
            while not waited:
                time.sleep(0.001)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    waited.append("about to wait")
    assert cache.wait(KEY, 30)
    thread.join()


def test_a_refusal_holds_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tmp_path)
    cache.refuse(KEY, "no such operator", "net.onnx")
    assert cache.load(KEY) == Entry(KEY, refused="no such operator")
    assert [e.refused for e in cache.entries()] == ["no such operator"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + store.REFUSAL_SECONDS + 1)
    assert cache.load(KEY) is None
    assert cache.entries() == []


def test_entries_are_listed_and_measured(there: Cache) -> None:
    put(there, OTHER, b"x" * 1000)
    os.utime(there.folder / KEY / store.NOTE, (1, 2_000_000_000))
    first, second = there.entries()
    assert (first.key, first.name, first.used) == (KEY, "net.onnx", 2_000_000_000.0)
    assert second.key == OTHER
    assert second.size > 1000
    assert there.size() == first.size + second.size


def test_clearing_leaves_what_is_being_made_or_was_used(there: Cache) -> None:
    put(there, OTHER)
    os.utime(there.folder / KEY / store.NOTE, (1, 1))
    assert there.clear(unused_seconds=3600) == 1
    assert [e.key for e in there.entries()] == [OTHER]
    with there.locked(OTHER, 1), there.staging(OTHER) as files:
        assert there.clear() == 0
        assert files.exists()
    (there.folder / f".{KEY}.1-2.part").mkdir()
    (there.folder / "notes.txt").write_text("mine")
    assert there.clear() == 1
    assert [p.name for p in there.folder.iterdir()] == ["notes.txt"]


def test_loading_counts_as_use(there: Cache) -> None:
    os.utime(there.folder / KEY / store.NOTE, (1, 1))
    there.load(KEY)
    assert there.entries()[0].used > 1


def test_the_folder_is_private(there: Cache) -> None:
    if os.name == "posix":
        assert there.folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot use the cache .*set QCOMPILER_CACHE"):
        open_cache(tmp_path / "file" / "cache")


def test_the_note_says_what_is_there(there: Cache) -> None:
    _, body = (there.folder / KEY / store.NOTE).read_text().split("\n")
    note = json.loads(body)
    assert note["files"]["model.onnx"]["bytes"] == 5
    assert note["key"] == KEY
