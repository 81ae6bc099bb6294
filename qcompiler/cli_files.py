"""Make sure, before the long work, that the results can be written where they are wanted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qcompiler.errors import ModelError


def check_outputs(files: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Check that files can be written and that none is another one or would overwrite an input.

    Args:
        files: what is to be written, by what it is called in messages; None is not written.
        inputs: files that are read and must stay.

    Raises:
        ModelError: names the file and the reason.
    """
    taken = {_identity(path): what for what, path in inputs.items() if path is not None}
    for what, path in files.items():
        if path is None:
            continue
        if (other := taken.setdefault(_identity(path), what)) != what:
            raise ModelError(f"cannot write the {what} {path}: the {other} is the same file; choose another name")
        if path.is_dir():
            raise ModelError(f"cannot write the {what} {path}: it is a folder; give the name of a file")
        check_folder(path.parent, f"the {what} {path}")


def check_folder(folder: Path, what: str) -> None:
    """Check that a file can be made in a folder, by making one without a name.

    Raises:
        ModelError: the folder does not exist or refuses new files.
    """
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist; make it first"
        raise ModelError(f"cannot write {what}: the folder {folder} {reason}")
    try:
        # Asking for permission bits says nothing on read-only mounts and full disks.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ModelError(f"cannot write {what}: {error.strerror or error}") from error


def check_new_folder(folder: Path | None, what: str) -> None:
    """Check that a folder is there or can be made, without making it.

    Raises:
        ModelError: names what stands in the way.
    """
    if folder is None:
        return
    present = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not present.is_dir():
        raise ModelError(f"cannot write {what} {folder}: {present} is a file")
    check_folder(present, f"{what} {folder}")


def _identity(path: Path) -> str:
    return os.path.realpath(path)
