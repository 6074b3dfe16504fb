# SPDX-License-Identifier: Apache-2.0
"""check_site.py FOLDER: fails where a page of the built documentation loads anything from another host.

Links that a reader follows may lead anywhere. What the theme's script would fetch by itself is looked for by what makes
it do so: diagrams of mermaid, and the address of a repository.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

_LOADS = {"src", "srcset", "poster", "data"}
_FETCHING = {"mermaid", "md-source"}
_ELSEWHERE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
_STYLE = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what this tag loads from elsewhere."""
        for name, value in attrs:
            text = value or ""
            loads = name in _LOADS or (tag == "link" and name == "href")
            if (loads and any(_ELSEWHERE.match(part) for part in text.split(","))) or (
                name == "class" and _FETCHING & set(text.split())
            ):
                self.loaded.append(f"<{tag} {name}={text!r}>")
            if name == "style":
                self.loaded += _STYLE.findall(text)

    def handle_data(self, data: str) -> None:
        """Collect what a stylesheet in the page loads."""
        if self.get_starttag_text() == "<style>":
            self.loaded += _STYLE.findall(data)


def loaded_from_elsewhere(site: Path) -> list[str]:
    """What pages and stylesheets under `site` load from other hosts, each as "FILE: what"."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            page = _Page()
            page.feed(path.read_text())
            found += [f"{path.relative_to(site)}: {what}" for what in page.loaded]
        elif path.suffix == ".css":
            found += [f"{path.relative_to(site)}: {what}" for what in _STYLE.findall(path.read_text())]
    return found


if __name__ == "__main__":
    _site = Path(sys.argv[1])
    if not (_site / "index.html").exists():
        sys.exit(f"{_site} holds no site")
    _found = loaded_from_elsewhere(_site)
    if _found:
        sys.exit("The site loads from other hosts:\n" + "\n".join(_found))
