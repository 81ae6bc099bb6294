"""Run the console blocks of the pages and write what they print: ``python -m docs.generator.console [PAGE ...]``.

A fenced block of the language ``console`` holds commands (``$ ...``, continued behind a backslash or by ``> ...``)
and what they print. A fenced block with ``title="NAME"`` is a file. The blocks of a page run in order in one empty
folder, in which ``examples`` is the folder of the demo models. A command that fails shows its code as
``[exit code N]``.

Figures depend on the machine, so two outputs are compared without their digits, and lines that a measurement words are
compared by their first word alone: a comment ``<!-- varies: groups, chosen -->`` names those first words for its page.
A word behind which stands a question mark (``float?``) names lines that may be missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^```(?P<language>\w*)\s*(?:title=\"(?P<title>[^\"]+)\")?\s*$")
_VARIES = re.compile(r"<!-- varies: (?P<words>.+?) -->")
_WIDTH = "150"
_MISSING = "\0"


@dataclass(frozen=True)
class Command:
    """A command and what it prints; ``lines`` are the command's own lines as the page shows them."""

    lines: tuple[str, ...]
    output: tuple[str, ...]

    @property
    def text(self) -> str:
        """The command as the shell gets it."""
        return "\n".join((self.lines[0].removeprefix("$ "), *(line.removeprefix("> ") for line in self.lines[1:])))


@dataclass(frozen=True)
class Block:
    """A fenced block: its lines ``start`` to ``stop`` (fences apart), and the name of the file that it is."""

    language: str
    title: str | None
    start: int
    stop: int


def blocks(lines: Sequence[str]) -> Iterator[Block]:
    """Yield the fenced blocks of a page.

    Raises:
        ValueError: a block does not end.
    """
    at = 0
    while at < len(lines):
        opened = _FENCE.match(lines[at])
        if opened is None:
            at += 1
            continue
        stop = next((n for n in range(at + 1, len(lines)) if lines[n] == "```"), None)
        if stop is None:
            raise ValueError(f"line {at + 1}: the block does not end")
        yield Block(opened["language"], opened["title"], at + 1, stop)
        at = stop + 1


def commands(lines: Sequence[str]) -> tuple[Command, ...]:
    """Return the commands of a console block.

    Raises:
        ValueError: the block does not start with a command.
    """
    made: list[Command] = []
    at = 0
    while at < len(lines):
        if not lines[at].startswith("$ "):
            raise ValueError(f"expected a command behind '$ ', found {lines[at]!r}")
        end = at + 1
        while lines[end - 1].endswith("\\") or (end < len(lines) and lines[end].startswith("> ")):
            end += 1
        stop = next((n for n in range(end, len(lines)) if lines[n].startswith("$ ")), len(lines))
        made.append(Command(tuple(lines[at:end]), tuple(lines[end:stop])))
        at = stop
    return tuple(made)


def has_commands(page: Path) -> bool:
    """Tell whether a page has console blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return any(block.language == "console" for block in blocks(lines))


def rerun(text: str, folder: Path) -> str:
    """Run a page's commands in an empty folder and return the page with what they print now."""
    lines = text.splitlines()
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    made: list[str] = []
    end = 0
    for block in blocks(lines):
        made += lines[end : block.start]
        body = lines[block.start : block.stop]
        if block.title is not None:
            (folder / block.title).write_text("\n".join(body) + "\n", encoding="utf-8")
        if block.language == "console":
            body = [line for command in commands(body) for line in (*command.lines, *_run(command, folder))]
        made += body
        end = block.stop
    return "\n".join([*made, *lines[end:]]) + "\n"


def _run(command: Command, folder: Path) -> list[str]:
    home = folder.with_name(folder.name + "-home")
    environment = {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        "HOME": str(home), "XDG_CACHE_HOME": str(home), "COLUMNS": _WIDTH, "NO_COLOR": "1", "TERM": "dumb",
        "LC_ALL": "C.UTF-8", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command.text], cwd=folder, env=environment, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    shown = [line.rstrip() for line in done.stdout.splitlines()]
    return [*shown, f"[exit code {done.returncode}]"] if done.returncode else shown


_PROCESSOR = re.compile(r"(?<=this machine \().*(?=\): )|(?<=^host: ).*(?= -> )")
"""Where commands name the processor they run on: a page is printed on one and tested on others."""


def shape(text: str) -> list[str]:
    """Return what of a page must not drift: its lines without digits, and the varying ones as their first word."""
    lines = text.splitlines()
    words = {word.strip() for found in _VARIES.finditer(text) for word in found["words"].split(",")}
    printed = {n for block in blocks(lines) if block.language == "console" for n in range(block.start, block.stop)}
    shapes = [_shape(line, words) if n in printed else line for n, line in enumerate(lines)]
    return [line for n, line in enumerate(shapes) if n not in printed or line != _MISSING]


def _shape(line: str, words: set[str]) -> str:
    first = line.split(maxsplit=1)[0] if line.strip() else ""
    if f"{first}?" in words:
        return _MISSING
    if first in words:
        return f"{first} ..."
    line = _PROCESSOR.sub("a processor", line)
    plain = re.sub(r"-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", "0", line)
    plain = re.sub(r"\b0 (?:us|ms|s)\b", "0 s", re.sub(r"\b0 (?:B|kB|MB)\b", "0 B", plain))
    return " ".join(re.sub(r"[─━]+", "─", plain).split())


def pages() -> list[Path]:
    """Return the pages that have console blocks."""
    return [page for page in sorted(DOCS.rglob("*.md")) if has_commands(page)]


def main(names: Sequence[str]) -> None:
    """Rewrite the pages with what their commands print now."""
    for page in [Path(name).resolve() for name in names] or pages():
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "work"
            work.mkdir()
            before = page.read_text(encoding="utf-8")
            after = rerun(before, work)
        page.write_text(after, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'same shape' if shape(before) == shape(after) else 'changed'}")


if __name__ == "__main__":
    main(sys.argv[1:])
