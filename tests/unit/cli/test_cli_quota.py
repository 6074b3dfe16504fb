# SPDX-License-Identifier: Apache-2.0
"""`loracache quota`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from loracache.keys import salt_digest


def test_quotas_are_set_listed_and_removed(cli: Callable[..., Any]) -> None:
    done = cli("quota", "set", "--salt", "-", "--soft", "2MiB", "--hard", "4MiB", stdin="acme\n")
    assert done.code == 0, done
    assert "2097152 bytes of cpu, at most 4194304" in done.out
    assert cli("quota", "set", "--tenant", "*", "--tier", "disk", "--hard", "1GiB").code == 0
    listed = json.loads(cli("quota", "list", "--json").out)
    assert [(row["name"], row["tier"], row["soft"], row["hard"]) for row in listed] == [
        (salt_digest("acme"), "cpu", 2 << 20, 4 << 20),
        ("*", "disk", 0, 1 << 30),
    ]
    table = cli("quota", "list").out
    assert "2.0 MiB" in table
    assert salt_digest("acme") in table
    assert cli("quota", "remove", "--salt", "acme").code == 0
    assert cli("quota", "remove", "--salt", "acme").code == 3
    assert cli("quota", "remove", "--tenant", "*", "--tier", "disk").code == 0
    assert json.loads(cli("quota", "list", "--json").out) == []


def test_what_cannot_be_meant_is_wrong_usage(refused: Callable[..., str]) -> None:
    assert "a quota is of one" in refused("quota", "set", "--soft", "1")
    assert "a quota is of one" in refused("quota", "set", "--salt", "a", "--model", "b")
    assert "--soft" in refused("quota", "set", "--model", "b", "--soft", "much")


def test_what_the_daemon_refuses_is_said(cli: Callable[..., Any]) -> None:
    done = cli("quota", "set", "--model", "b", "--soft", "1TiB")
    assert done.code == 1
    assert "add up to" in done.err
    assert cli("quota", "set", "--adapter", "nobody", "--soft", "1").code == 3
