"""MkDocs calls this: it adds the generated pages and their place in the navigation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of passes and rules into the navigation."""
    # The folder of the checkout comes last: in front it would hide the installed qcompiler.passes.
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from docs.generator.pages import pass_names, rule_families

    lists: dict[str, list[Any]] = {
        "<passes>": _entries("passes", pass_names()),
        "<rules>": _entries("rules", list(rule_families())),
    }
    config.nav = _filled(config.nav, lists)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those that lie outside ``docs/``."""
    from docs.generator.links import OUTSIDE
    from docs.generator.pages import all_pages

    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))

    for path, text in all_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the site's pages."""
    from docs.generator.links import on_site

    return on_site(markdown, page.file.src_uri)


def _entries(folder: str, names: list[str]) -> list[Any]:
    return [f"reference/{folder}/index.md", *({name: f"reference/{folder}/{name}.md"} for name in names)]


def _filled(nav: Any, lists: dict[str, list[Any]]) -> Any:
    if isinstance(nav, list):
        return [_filled(entry, lists) for entry in nav]
    if isinstance(nav, dict):
        return {title: _filled(entry, lists) for title, entry in nav.items()}
    return lists.get(nav, nav)
