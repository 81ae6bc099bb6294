"""Pages of the site that lie outside ``docs/``, and links that lead there.

In the repository every link is relative to the file that holds it, so that it works where the files are read. On the
site the pages of `OUTSIDE` have a place of their own; a link to any other file outside ``docs/`` becomes plain text.
"""

from __future__ import annotations

import posixpath
import re

OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "examples/README.md": "project/demo-models.md",
    "benchmarks/results/cpu.md": "benchmarks/cpu.md",
    "benchmarks/results/openvino.md": "benchmarks/openvino.md",
    "benchmarks/results/tensorrt.md": "benchmarks/tensorrt.md",
    "benchmarks/results/triton.md": "benchmarks/triton.md",
    "benchmarks/results/calibration.md": "benchmarks/calibration.md",
}
"""Place on the site by path in the repository."""

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_site(markdown: str, page: str) -> str:
    """Return a page with its links as they are on the site.

    Args:
        markdown: the page's text; links in code are left alone.
        page: the page's place on the site.
    """
    inside = {place: path for path, place in OUTSIDE.items()}
    source = inside.get(page, f"docs/{page}")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["to"]))
        if target in OUTSIDE:
            place = OUTSIDE[target]
        elif target.startswith("docs/"):
            place = target.removeprefix("docs/")
        else:
            return found["text"]
        to = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{found['image']}[{found['text']}]({to}{found['anchor'] or ''})"

    # A link's text may be code, so only whole code blocks and code outside of links are kept apart.
    pieces = re.split(r"(^```.*?^```[ \t]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if index % 2 else _LINK.sub(link, piece) for index, piece in enumerate(pieces))
