"""Write files and folders that get their names together: all of them, or none and what was there before stays."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

_LONGEST = 40
"""Characters of a file's name in its temporary name: a long one would be refused by the file system."""


@dataclass(frozen=True)
class _Step:
    """A file or folder on its way.

    Attributes:
        temporary: where it lies.
        final: where it goes.
        backup: where what was there waits.
        fresh: whether nothing was there.
    """

    temporary: Path
    final: Path
    backup: Path
    fresh: bool


class Staging:
    """Files and folders under temporary names beside their places, until `commit` gives them their names.

    Leaving the ``with`` block removes what was not committed. Two stagings never share a temporary name, in one process
    or in several.
    """

    def __init__(self) -> None:
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = count()
        self._staged: list[tuple[Path, Path]] = []
        self._scratches: list[Path] = []
        self._made: list[Path] = []

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()

    def make_folder(self, folder: Path) -> None:
        """Make a folder if it is not there; without a commit it is removed again.

        Raises:
            OSError: it cannot be made, or a file is there.
        """
        if not folder.is_dir():
            folder.mkdir()
            self._made.append(folder)

    def stage(self, final: Path) -> Path:
        """Return the temporary path of a file or folder that the caller writes; nothing is there yet.

        Raises:
            OSError: ``final`` cannot be replaced, see `move`.
        """
        temporary = self._name(final, "part")
        self.move(temporary, final)
        return temporary

    def stage_file(self, final: Path) -> Path:
        """Return the temporary path of a file that the caller writes.

        Raises:
            IsADirectoryError: ``final`` is a folder.
        """
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        return self.stage(final)

    def scratch(self, folder: Path) -> Path:
        """Return a new folder in another one, for what insists on names of its own; `move` says which are kept.

        Raises:
            OSError: it cannot be made.
        """
        made = self._name(folder / "scratch", "part")
        made.mkdir()
        self._scratches.append(made)
        return made

    def move(self, made: Path, final: Path) -> None:
        """Let `commit` give a file or folder its name; in the order of these calls."""
        self._staged.append((made, final))

    def commit(self) -> None:
        """Give all files and folders their names; on any error nothing changes.

        A file that is replaced keeps its name until then. The last file needs no way back: it is replaced in one step.

        Raises:
            OSError: one cannot have its name; a folder and a file never replace one another.
        """
        done: list[_Step] = []
        try:
            for index, (temporary, final) in enumerate(self._staged):
                step = _Step(temporary, final, self._name(final, "old"), not os.path.lexists(final))
                _check_kinds(step)
                done.append(step)
                if not step.fresh and (index < len(self._staged) - 1 or temporary.is_dir()):
                    _set_aside(step)
                os.replace(temporary, final)
        except BaseException as error:
            kept = [str(step.backup) for step in reversed(done) if not _undo(step)]
            if kept and isinstance(error, OSError):
                raise OSError(f"{error.strerror or error}; what was there is now {', '.join(kept)}") from error
            raise
        for step in done:
            _remove(step.backup)
        self._staged.clear()
        self._made.clear()

    def discard(self) -> None:
        """Remove what was not committed."""
        for path in (*(temporary for temporary, _ in self._staged), *self._scratches):
            _remove(path)
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()
        self._staged.clear()
        self._scratches.clear()
        self._made.clear()

    def _name(self, final: Path, kind: str) -> Path:
        return final.with_name(f".{final.name[:_LONGEST]}.{self._token}-{next(self._numbers)}.{kind}")


def _check_kinds(step: _Step) -> None:
    """Refuse to replace a folder by a file, a file by a folder, and a folder by one that shares no file with it."""
    if step.fresh:
        return
    if not step.temporary.is_dir():
        if step.final.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{step.final.name} is a folder")
        return
    if not step.final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{step.final.name} is a file")
    if not {p.name for p in step.temporary.iterdir()} & {p.name for p in step.final.iterdir()}:
        raise FileExistsError(errno.EEXIST, f"{step.final.name} is a folder of another kind; remove it first")


def _set_aside(step: _Step) -> None:
    """Give what is there a second name, or another name where the system has no links."""
    if step.final.is_file() and not step.final.is_symlink():
        with suppress(OSError):
            os.link(step.final, step.backup)
            return
    os.replace(step.final, step.backup)


def _undo(step: _Step) -> bool:
    """Bring a place back to what it was, and return whether that worked."""
    placed = not os.path.lexists(step.temporary)
    try:
        if step.fresh:
            if placed:
                os.replace(step.final, step.temporary)  # which `discard` removes
        elif os.path.lexists(step.backup):
            if os.path.lexists(step.final) and not placed:  # a link: the file itself never left
                step.backup.unlink()
                return True
            if placed and step.final.is_dir():
                os.replace(step.final, step.temporary)
            os.replace(step.backup, step.final)
            _remove(step.backup)  # a link to the file that is there stays when it should replace it
    except OSError:
        return not os.path.lexists(step.backup)
    return True


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)
