"""Installed packages for one test, and a way to call the command line."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qcompiler.cli import app
from tests.extend.packages import install


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


Call = Callable[..., Outcome]


@pytest.fixture
def call() -> Call:
    def run(*arguments: object) -> Outcome:
        done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "240"})
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run


Installer = Callable[..., Path]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Install packages into a folder of the search path; their modules are forgotten behind the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def add(distribution: str, files: dict[str, str], points: dict[str, dict[str, str]], version: str = "1.0") -> Path:
        return install(folder, distribution, files, points, version)

    yield add
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
