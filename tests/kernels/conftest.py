"""The kernels' tests, in three tiers.

- Contracts, references and tables need NumPy only and run everywhere: ``python -m pytest tests/kernels``.
- ``interpreter`` runs every kernel on the CPU in Triton's interpreter, in a process of its own, since Triton reads the
  variable when it is imported: ``TRITON_INTERPRET=1 python -m pytest tests/kernels -m interpreter``.
- ``aot`` compiles every shipped configuration for its architectures without a GPU, in a process that does not
  interpret: ``python -m pytest tests/kernels -m aot``. ``QCOMPILER_KERNELS=all`` adds the cases marked ``full``.

The last two need ``pip install qcompiler[triton]``; elsewhere they are skipped with that reason.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import pytest

HAS_TRITON = all(importlib.util.find_spec(name) is not None for name in ("triton", "torch"))
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def reason_to_skip(marker: str) -> str | None:
    """Return why tests of a tier cannot run in this process, None if they can."""
    if not HAS_TRITON:
        return "needs pip install qcompiler[triton]"
    if marker == "interpreter" and not INTERPRETING:
        return "needs a process with TRITON_INTERPRET=1"
    if marker == "aot" and INTERPRETING:
        return "needs a process without TRITON_INTERPRET=1"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of a tier that this process cannot run."""
    for item in items:
        for marker in ("interpreter", "aot"):
            if item.get_closest_marker(marker) is not None:
                reason = reason_to_skip(marker)
                if reason is not None:
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def interpreter() -> ModuleType:
    """Return tests.kernels.interpreter, which only a process that interprets can import."""
    from tests.kernels import interpreter

    return interpreter
