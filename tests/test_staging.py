"""Files and folders get their names together; whatever breaks on the way, what was there stays and nothing else is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from qcompiler.staging import Staging

Tree = dict[str, bytes]


def tree(folder: Path) -> Tree:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, names: list[str], text: bytes) -> None:
    """Stage and commit some files, and some folders (named ``.qc``) that hold a file."""
    with Staging() as staging:
        for name in names:
            if name.endswith(".qc"):
                made = staging.stage(folder / name)
                made.mkdir()
                (made / "plan.json").write_bytes(text)
                (made / text.decode()).write_bytes(text)
            else:
                staging.stage_file(folder / name).write_bytes(text)
        staging.commit()


def break_at(monkeypatch: pytest.MonkeyPatch, number: int, *, links: bool) -> None:
    """Let the n-th file that gets its name fail, as on a full disk; or take hard links away as well."""
    real, seen = os.replace, [0]

    def replace(source: Path, target: Path) -> None:
        if source.suffix == ".part":
            seen[0] += 1
            if seen[0] == number:
                raise OSError(28, "No space left on device")
        real(source, target)

    def link(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("older", [[], ["a"], ["b", "c.qc"], ["a", "b", "c.qc", "d"]])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_whichever_file_fails_all_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, older: list[str], links: bool
) -> None:
    write(tmp_path, older, b"old")
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        break_at(patch, number, links=links)
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path, ["a", "b", "c.qc", "d"], b"new")
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == older
    write(tmp_path, ["a", "b", "c.qc", "d"], b"new")
    assert tree(tmp_path) == {"a": b"new", "b": b"new", "c.qc/plan.json": b"new", "c.qc/new": b"new", "d": b"new"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c.qc", "d"]


@pytest.mark.parametrize("links", [True, False])
def test_where_even_the_way_back_fails_the_error_says_where_the_older_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    write(tmp_path, ["a", "b"], b"old")
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if (target.name == "b" and source.suffix == ".part") or source.suffix == ".old":
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "nothing"))
    with pytest.raises(OSError, match=r"Input/output error; what was there is now .*\.a\..*\.old") as caught:
        write(tmp_path, ["a", "b", "c"], b"new")
    kept = [Path(text) for text in str(caught.value).rpartition(" now ")[2].split(", ")]
    assert [path.name[:2] for path in kept] == ([".a"] if links else [".b", ".a"])
    assert {path.read_bytes() for path in kept} == {b"old"}


def test_what_is_not_committed_goes_with_its_folder(tmp_path: Path) -> None:
    with Staging() as staging:
        staging.make_folder(tmp_path / "out")
        staging.stage_file(tmp_path / "out" / "a").write_bytes(b"half")
        (staging.scratch(tmp_path / "out") / "b").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []


def test_of_a_scratch_folder_only_what_is_moved_is_kept(tmp_path: Path) -> None:
    with Staging() as staging:
        staging.make_folder(tmp_path / "out")
        folder = staging.scratch(tmp_path / "out")
        (folder / "m.xml").write_bytes(b"x")
        (folder / "m.log").write_bytes(b"y")
        staging.move(folder / "m.xml", tmp_path / "out" / "n.xml")
        staging.commit()
    assert tree(tmp_path) == {"out/n.xml": b"x"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["n.xml"]


@pytest.mark.parametrize(
    ("there", "staged", "text"),
    [
        ("file.qc", "file.qc", "file.qc is a file"),
        ("folder/notes", "folder", "it is a folder"),
        ("mine.qc/notes", "mine.qc", "mine.qc is a folder of another kind; remove it first"),
    ],
)
def test_a_file_and_a_folder_never_replace_one_another(tmp_path: Path, there: str, staged: str, text: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(b"mine")
    with pytest.raises(OSError, match=text):
        write(tmp_path, ["a", staged], b"new")
    assert tree(tmp_path) == {there: b"mine"}


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "target")
    write(tmp_path, ["a", "b"], b"new")
    assert tree(tmp_path) == {"a": b"new", "b": b"new", "target": b"mine"}


def test_a_name_as_long_as_the_file_system_takes_can_be_staged(tmp_path: Path) -> None:
    name = "n" * 255
    write(tmp_path, [name], b"new")
    assert tree(tmp_path) == {name: b"new"}


def test_threads_that_write_one_file_never_meet(tmp_path: Path) -> None:
    ready = threading.Barrier(4)
    failed: list[BaseException] = []

    def work(mark: int) -> None:
        try:
            for _ in range(20):
                with Staging() as staging:
                    made = staging.stage_file(tmp_path / "a")
                    ready.wait(10)
                    with open(made, "xb") as file:
                        file.write(bytes([mark]) * 1000)
                    staging.commit()
        except BaseException as error:
            failed.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 1000
    assert len(set(content)) == 1
