# SPDX-License-Identifier: Apache-2.0
"""The page at /docs: whole without a network, under the dashboard's policy, from files that are what was published."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache.rest import api_page

SWAGGER = Path(api_page.__file__).with_name("api_page") / "swagger_ui"
PARTS = ("/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css")


@pytest.mark.timeout(120)
def test_the_page_shows_every_route_and_asks_nobody_else(page: Any, anybody: httpx.Client) -> None:
    """`page` fails for a request to another place, and for a line on the browser's console: what its policy refuses is
    one."""
    paths = anybody.get("/openapi.json").json()["paths"]
    page.driver.get(f"{page.url}/docs")
    wanted = sum(len(methods) for methods in paths.values())
    page.wait(lambda: len(page.all(".opblock")) == wanted, "every operation is there")
    page.click("#operations-objects-lookup_v1_lookup_post .opblock-summary-control")
    page.wait(lambda: "selector" in page.text("#operations-objects-lookup_v1_lookup_post"), "one is shown whole")
    page.click("#operations-health-healthz_healthz_get .opblock-summary-control")
    page.click("#operations-health-healthz_healthz_get .try-out__btn")
    page.click("#operations-health-healthz_healthz_get .execute")
    page.says("#operations-health-healthz_healthz_get .live-responses-table", '"status": "ok"')
    assert {path for _, path in page.requests() if not path.startswith("data:")} == {
        *PARTS,
        "/openapi.json",
        "/healthz",
    }


@pytest.mark.parametrize("path", PARTS)
def test_what_is_served_has_the_dashboards_policy(anybody: httpx.Client, path: str) -> None:
    answer = anybody.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == anybody.get("/").headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect", "/docs/LICENSE", "/docs/..%2Fapp.py"])
def test_nothing_else_is_served(anybody: httpx.Client, path: str) -> None:
    assert anybody.get(path).status_code == 404


def test_the_files_of_others_are_as_they_were_published_and_have_their_licences() -> None:
    sums = dict(line.split()[::-1] for line in (SWAGGER / "SHA256SUMS").read_text().splitlines())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in SWAGGER.iterdir()}
    assert {name: found[name] for name in sums} == sums
    assert found.keys() - sums.keys() == {"README.md", "SHA256SUMS"}
    assert {"LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"} <= sums.keys()
    assert "Apache License" in (SWAGGER / "LICENSE").read_text()
