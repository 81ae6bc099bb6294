"""docs/targets.md holds what the tables say."""

from __future__ import annotations

from qcompiler.targets.target import target_names
from tests.targets.targets_page import PAGE, tables, with_tables


def test_the_page_is_written_from_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run: python -m tests.targets.targets_page"


def test_every_target_has_a_section_and_a_line() -> None:
    made = tables().splitlines()
    for name in target_names():
        assert f"### `{name}`" in made
        assert sum(line.startswith(f"| `{name}` |") for line in made) == 1
