"""Test the installed package: the checkout's own folder ``qcompiler`` lacks the packages that lie beside it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the working folder in front, where it would hide an installed copy.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep measured costs and compiled models of tests out of the user's cache, and the user's out of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
