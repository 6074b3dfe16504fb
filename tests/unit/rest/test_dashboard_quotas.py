# SPDX-License-Identifier: Apache-2.0
"""The dashboard shows quotas, gives one and ends one; what the daemon refuses is said."""

from __future__ import annotations

from typing import Any

import httpx


def test_a_quota_is_given_shown_and_ended(page: Any, token: str, operator: httpx.Client) -> None:
    page.open(token)
    page.says("#quotas-note", "none")
    page.find("#quota-form select[name=kind]").send_keys("model")
    page.find("#quota-form input[name=name]").send_keys("dashboard/model")
    page.find("#quota-form input[name=soft]").send_keys("1MiB")
    page.find("#quota-form input[name=hard]").send_keys("2MiB")
    page.click("#quota-form button")
    page.says("#quota-result", "given to model")
    page.says("#quotas tbody", "1.00 MiB")
    page.says("#quotas tbody", "2.00 MiB")
    (row,) = operator.get("/v1/quotas").json()["quotas"]
    assert (row["kind"], row["name"], row["soft"], row["hard"]) == ("model", "dashboard/model", 1 << 20, 2 << 20)
    page.click("#quotas tbody button")
    page.says("#quota-result", "ended for model")
    page.says("#quotas-note", "none")
    assert operator.get("/v1/quotas").json()["quotas"] == []


def test_what_the_daemon_refuses_is_said_and_a_name_is_no_markup(page: Any, token: str, operator: httpx.Client) -> None:
    page.allowed = ["409", "422"]
    page.open(token)
    name = "<img src=x>"
    given = operator.put("/v1/quotas", json={"kind": "model", "name": name, "soft": 1})
    assert given.status_code == 200, given.text
    page.says("#quotas tbody", "<img src=x>")
    page.find("#quota-form input[name=name]").send_keys("acme")
    page.click("#quota-form button")
    page.says("#quota-result", "Not done: ")
    page.says("#quota-result", "not the digest of a salt")
    operator.delete("/v1/quotas", params={"kind": "model", "name": name})
