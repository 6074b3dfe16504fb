# SPDX-License-Identifier: Apache-2.0
"""The dashboard's files, without a browser: what is served, with which headers, and what must not stand in them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from loracache.rest import dashboard

FOLDER = Path(dashboard.__file__).with_name("dashboard")
FILES = sorted(FOLDER.iterdir())
POLICY = {
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
}  # fmt: skip
BANNED = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\b|new Function|localStorage|"
    r"document\.cookie|setAttribute\(\"style|\bimport\("
)


@pytest.mark.parametrize("path", ["/", "/assets/main.js", "/assets/style.css", "/assets/nothing"])
def test_whatever_comes_may_run_and_load_nothing_foreign(anybody: httpx.Client, path: str) -> None:
    answer = anybody.get(path)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    if answer.status_code == 200:
        assert set(answer.headers["content-security-policy"].split("; ")) == POLICY
        assert answer.headers["cache-control"] == "no-cache"
    else:
        assert answer.status_code == 404


def test_everybody_gets_the_page_and_every_part_of_it(anybody: httpx.Client) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    for file in FILES:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            path = "/" if file.name == "index.html" else f"/assets/{file.name}"
            answer = anybody.get(path, headers=headers)
            assert (answer.status_code, answer.content) == (200, file.read_bytes()), file.name
            assert answer.headers["content-type"] == f"{types[file.suffix]}; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "/assets/", "/assets/index.html", "/assets/../app.py", "/assets/..%2Fapp.py", "/assets/%2e%2e/%2e%2e/app.py",
        "/assets/..%5capp.py", "/assets/main.js%00", "/assets/main.js/", "/assets//etc/passwd",
        "/assets/%2Fetc%2Fpasswd", "/assets/MAIN.JS", "/assets/.", "/index.html", "/main.js",
    ],
)  # fmt: skip
def test_nothing_else_is_served(anybody: httpx.Client, path: str) -> None:
    raw = urlsplit(str(anybody.base_url))
    request = anybody.build_request("GET", "/", extensions={})
    request.url = httpx.URL(scheme=raw.scheme, host=raw.hostname, port=raw.port, raw_path=path.encode())
    answer = anybody.send(request)
    assert answer.status_code in (404, 307)
    assert b"import" not in answer.content


def test_a_change_of_the_page_by_a_request_is_refused(anybody: httpx.Client) -> None:
    for path in ("/", "/assets/main.js"):
        assert anybody.post(path, content=b"x").status_code == 405


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_asks_for_nothing_from_outside_and_makes_no_markup(file: Path) -> None:
    text = file.read_text()
    assert set(re.findall(r"\w+://[^\s\"'`)]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""(src|href)=["']//""", text)
    assert "@import" not in text
    if file.suffix == ".js":
        assert BANNED.findall(text) == []
    if file.suffix == ".html":
        assert not re.search(r"\s(style|on\w+)=", text)
        assert re.findall(r"<script[^>]*>", text) == ['<script type="module" src="assets/main.js">']


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_stays_readable_in_one_sitting(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 400
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 120] == []
