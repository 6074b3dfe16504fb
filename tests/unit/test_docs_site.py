# SPDX-License-Identifier: Apache-2.0
"""The documentation's site loads nothing from other hosts: what `make docs` checks that with finds every way to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "scripts" / "check_site.py"


def check(site: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, CHECK, site], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="assets/main.css"><script src="assets/bundle.js"></script>'
        '<img src="images/a.png"><a href="https://example.org">elsewhere</a><p>https://example.org</p>'
    )
    (tmp_path / "main.css").write_text("a{background:url(data:image/svg+xml;base64,PHN2Zy8+)} b{background:url(b.png)}")
    return tmp_path


def test_what_is_local_and_links_to_elsewhere_pass(site: Path) -> None:
    assert check(site) == (0, "")


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example.org/a.js"></script>',
        '<link rel="stylesheet" href="http://fonts.example.org/a.css">',
        '<link rel="preconnect" href="//fonts.example.org">',
        '<img src="HTTPS://img.example.org/badge.svg">',
        '<img srcset="a.png 1x, https://img.example.org/b.png 2x">',
        '<iframe src="https://video.example.org"></iframe>',
        "<div style=\"background:url('https://img.example.org/a.png')\"></div>",
        '<style>@import "https://fonts.example.org/a.css";</style>',
        '<pre class="mermaid">graph</pre>',
        '<a class="md-source" href="https://forge.example.org/x"></a>',
    ],
)
def test_each_way_to_load_from_elsewhere_is_found(page: str, site: Path) -> None:
    (site / "deep").mkdir()
    (site / "deep" / "page.html").write_text(page)
    code, said = check(site)
    assert code == 1
    assert "deep/page.html" in said


def test_stylesheets_are_looked_through(site: Path) -> None:
    (site / "fonts.css").write_text("@font-face{src:url('https://fonts.example.org/a.woff2')}")
    code, said = check(site)
    assert code == 1
    assert "fonts.css: https://fonts.example.org/a.woff2" in said


def test_no_site_is_no_success(tmp_path: Path) -> None:
    assert check(tmp_path)[0] == 1
