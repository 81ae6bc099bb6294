"""The commands of the tutorial and the cookbook still print what the pages say, digits apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from docs.generator.console import ROOT, Block, blocks, commands, pages, rerun, shape
from qcompiler.targets.host import detect, host_target_name

PAGES = pages()
QUICK = ("deploy", "memory", "two-engines", "yolo")
"""Pages that are printed anew in the default run; QCOMPILER_DOCS=all, as in CI, takes all of them (some minutes)."""


def test_a_page_is_taken_apart() -> None:
    text = '```console\n$ a \\\n  b\nout\n$ c "\n> d"\n```\n```python title="x.py"\npass\n```\n'
    lines = text.splitlines()
    assert list(blocks(lines)) == [Block("console", None, 1, 6), Block("python", "x.py", 8, 9)]
    first, second = commands(lines[1:6])
    assert (first.text, first.output) == ("a \\\n  b", ("out",))
    assert (second.text, second.output) == ('c "\nd"', ())


def test_a_block_without_an_end_and_output_without_a_command_are_errors() -> None:
    with pytest.raises(ValueError, match="line 1: the block does not end"):
        list(blocks(["```console", "$ a"]))
    with pytest.raises(ValueError, match="expected a command"):
        commands(["out"])


def test_commands_run_in_order_and_show_how_they_fail(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    page = '```text title="a.txt"\nhello\n```\n\n```console\n$ cat a.txt\nold\n$ false\n```\n'
    assert rerun(page, folder) == page.replace("old\n$ false\n", "hello\n$ false\n[exit code 1]\n")


def test_a_shape_keeps_words_and_drops_figures() -> None:
    page = "<!-- varies: speed -->\n```console\n$ a 1\nspeed {}x of\nsize {} {} ({}%)\n{}\n```\n2.5\n"
    one, other = page.format(3.1, 2.4, "MB", 26, "left"), page.format("none 1", 41, "kB", 3, "left")
    assert shape(one) == shape(other)
    assert shape(one) != shape(page.format(3.1, 2.4, "MB", 26, "right"))
    assert shape(one) != shape(one.replace("2.5\n", "2.6\n"))
    named = "```console\n$ a\nhost: {0} -> ort-x86\nnot this machine ({0}): nothing\n```\n"
    assert shape(named.format("Xeon(R)")) == shape(named.format("Xeon(R) @ 2.50GHz"))
    may_miss = one.replace("varies: speed", "varies: speed, left?")
    assert shape(may_miss) == shape(may_miss.replace("left\n", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_a_page_still_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    if page.stem not in QUICK and os.environ.get("QCOMPILER_DOCS") != "all":
        pytest.skip("takes long: QCOMPILER_DOCS=all prints it anew")
    if host_target_name(detect())[0] != "ort-x86":
        pytest.skip("the pages were printed on an x86-64 with VNNI: other processors have other formats")
    folder = tmp_path / "work"
    folder.mkdir()
    text = page.read_text(encoding="utf-8")
    again = f"python -m docs.generator.console {page.relative_to(ROOT)} prints the page anew"
    assert shape(rerun(text, folder)) == shape(text), again
