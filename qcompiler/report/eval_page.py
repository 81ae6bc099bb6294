"""One self-contained HTML page of sections: figures, tables that sort and search, and every number as text.

A page is a list of sections, which any command may put together: `Summary` and `Table` here, the drawings in
`qcompiler.report.eval_page_figures` and `qcompiler.report.eval_page_histograms`. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Protocol

from qcompiler.errors import ModelError


class Section(Protocol):
    """A part of the page."""

    @property
    def title(self) -> str:
        """Return its heading."""
        ...

    def body(self) -> str:
        """Return what stands under the heading, as HTML."""
        ...


@dataclass(frozen=True)
class Fact:
    """One line of a summary; ``mood`` is ``good``, ``bad`` or empty."""

    name: str
    text: str
    mood: str = ""


@dataclass(frozen=True)
class Summary:
    """Facts, one per line, and what a user should know.

    Attributes:
        facts: the lines.
        notes: sentences under them.
        title: heading.
    """

    facts: tuple[Fact, ...]
    notes: tuple[str, ...] = ()
    title: str = "Summary"

    def body(self) -> str:
        """Return a list of definitions."""
        rows = "".join(
            f'<dt>{escape(f.name)}</dt><dd class="{escape(f.mood)}">{escape(f.text)}</dd>' for f in self.facts
        )
        return f"<dl>{rows}</dl>" + "".join(f'<p class="note">{escape(n)}</p>' for n in self.notes)


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the number to sort by, a mood as in `Fact`."""

    text: str
    value: float | None = None
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """A table that sorts by any column and searches.

    Attributes:
        title: heading.
        columns: heads of the columns.
        rows: one cell per column.
        about: a sentence in front.
        numbers: columns that hold numbers.
        key: rows can be linked to as ``#KEY-NUMBER``, by their place in ``rows``; empty for none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    about: str = ""
    numbers: frozenset[str] = frozenset()
    key: str = ""

    def body(self) -> str:
        """Return the table with its search field."""
        if not self.rows:
            return f"<p>{escape(self.about)}</p><p>Nothing to show.</p>"
        heads = "".join(
            f'<th class="{"n" if c in self.numbers else ""}"><button type="button">{escape(c)}</button></th>'
            for c in self.columns
        )
        rows = "\n".join(self._row(number, row) for number, row in enumerate(self.rows))
        about = f"<p>{escape(self.about)}</p>" if self.about else ""
        return (
            f'{about}<div class="table"><div class="tools"><input type="search" placeholder="find in this table" '
            f'aria-label="find in {escape(self.title)}"><span class="shown" aria-live="polite">{len(self.rows)} of '
            f'{len(self.rows)}</span></div><div class="scroll"><table><thead><tr>{heads}</tr></thead>\n'
            f"<tbody>{rows}</tbody></table></div></div>"
        )

    def _row(self, number: int, row: Sequence[Cell]) -> str:
        cells = []
        for place, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
            kinds = [cell.mood, "n" if column in self.numbers else "name" if place == 0 else ""]
            data = (
                f' data-v="{"" if cell.value is None else repr(float(cell.value))}"' if column in self.numbers else ""
            )
            cells.append(f'<td class="{escape(" ".join(k for k in kinds if k))}"{data}>{escape(cell.text)}</td>')
        anchor = f' id="{escape(self.key)}-{number}"' if self.key else ""
        return f"<tr{anchor}>{''.join(cells)}</tr>"


def write_page(path: str | Path, sections: Sequence[Section], *, title: str = "Evaluation") -> Path:
    """Write a page and return where it is.

    Args:
        path: an .html file; its folder is made.
        sections: in the order to show them in.
        title: of the page.

    Raises:
        ModelError: the file cannot be written.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(sections, title), encoding="utf-8", newline="\n")
    except OSError as error:
        raise ModelError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def page(sections: Sequence[Section], title: str) -> str:
    """Return a page as HTML."""
    keys = _keys([s.title for s in sections])
    links = "".join(f'<a href="#{k}">{escape(s.title)}</a>' for k, s in zip(keys, sections, strict=True))
    parts = "\n".join(
        f'<section id="{k}"><h2>{escape(s.title)}</h2>\n{s.body()}\n</section>'
        for k, s in zip(keys, sections, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} - qcompiler</title>\n<style>\n{_asset('style.css')}</style></head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><nav>{links}</nav><button id="theme" type="button" '
        f'title="light or dark" aria-label="light or dark">&#9680;</button></header>\n<main>\n{parts}\n</main>\n'
        f"<script>\n{_asset('script.js')}</script>\n</body></html>\n"
    )


def _keys(titles: Sequence[str]) -> list[str]:
    """Return an anchor per title, all different."""
    made: list[str] = []
    for title in titles:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        key, number = base, 2
        while key in made:
            key, number = f"{base}-{number}", number + 1
        made.append(key)
    return made


def _asset(name: str) -> str:
    return (resources.files("qcompiler.report") / "eval-page" / name).read_text(encoding="utf-8")
