# SPDX-License-Identifier: Apache-2.0
"""Quotas over REST, by the command line and in the configuration: given, listed, kept over a restart, enforced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from loracache import CacheClient, Namespace
from loracache.config import Config, load_config
from loracache.errors import ConfigError, Rejected, UsageError
from loracache.keys import salt_digest
from loracache.rest.tokens import add_token, tokens_path

MIB = 1 << 20


def space(salt: str) -> Namespace:
    return Namespace("cd" * 32, "float32", "layout", 16, salt=salt_digest(salt))


def store(client: CacheClient, salt: str, count: int, size: int = MIB) -> int:
    """Store objects of their own; how many were taken."""
    root = client.register(space(salt), ["quota/model"])
    keys, parents = [os.urandom(32) for _ in range(count)], [b""] * count
    with client.reserve(root, keys, [size] * count, parents=parents) as reservation:
        taken = [position for position, slot in enumerate(reservation.slots) if slot is not None]
        for position in taken:
            reservation.write(position, bytes(size))
    return len(taken)


def rows(http: httpx.Client, **values: Any) -> list[dict[str, Any]]:
    answer = http.get("/v1/quotas")
    assert answer.status_code == 200, answer.text
    return [each for each in answer.json()["quotas"] if values.items() <= each.items()]


def test_a_quota_is_given_listed_enforced_counted_and_ended(client: CacheClient, operator: httpx.Client) -> None:
    salt = os.urandom(4).hex()
    given = operator.put("/v1/quotas", json={"kind": "tenant", "salt": salt, "soft": "1MiB", "hard": 2 * MIB})
    assert given.status_code == 200, given.text
    name = salt_digest(salt)
    assert given.json() | {"names": []} == {
        "kind": "tenant", "name": name, "names": [], "tier": "cpu", "soft": MIB, "hard": 2 * MIB, "bytes": 0,
        "refused": 0, "evicted": 0,
    }  # fmt: skip
    assert store(client, salt, 3) == 2
    (row,) = rows(operator, name=name)
    assert (row["bytes"], row["refused"]) == (2 * MIB, 1)
    counters: dict[str, int] = client.status()["counters"]  # type: ignore[assignment]
    assert counters["store.refused.over_quota"] >= 1
    text = operator.get("/metrics").text
    labels = f'{{kind="tenant",name="{name}",tier="cpu"}}'
    for what in ("used_bytes", "soft_bytes", "hard_bytes"):
        assert f"loracache_quota_{what}{labels} " in text
    assert f"loracache_quota_refused_total{labels} 1.0" in text
    assert client.check_index()["faults"] == 0
    ended = operator.delete("/v1/quotas", params={"kind": "tenant", "name": name})
    assert ended.status_code == 200, ended.text
    assert rows(operator, name=name) == []
    assert operator.delete("/v1/quotas", params={"kind": "tenant", "name": name}).status_code == 404
    assert store(client, salt, 3) == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "tenant"}, "give name, or the salt"),
        ({"kind": "model", "salt": "x"}, "give name, or the salt"),
        ({"kind": "engine", "name": "x"}, "kind"),
        ({"kind": "model", "name": "x", "soft": "1 parsec"}, "is not a size"),
        ({"kind": "model", "name": "x", "soft": -1}, "greater than or equal"),
        ({"kind": "model", "name": "x", "tier": "redis"}, "cpu"),
        ({"kind": "model", "name": "x", "limit": 3}, "limit"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_words(operator: httpx.Client, body: dict[str, Any], words: str) -> None:
    answer = operator.put("/v1/quotas", json=body)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "model", "name": "x", "soft": 2, "hard": 1}, "hard=1 is less than soft=2"),
        ({"kind": "model", "name": "x", "soft": "1TiB"}, "add up to"),
        ({"kind": "tenant", "name": "acme"}, "not the digest of a salt"),
    ],
)
def test_what_cannot_be_kept_is_a_conflict(operator: httpx.Client, body: dict[str, Any], words: str) -> None:
    answer = operator.put("/v1/quotas", json=body)
    assert answer.status_code == 409, answer.text
    assert words in answer.json()["detail"]


def test_an_adapter_is_named_and_an_unknown_one_is_404(
    operator: httpx.Client, adapter: Callable[[str], SimpleNamespace]
) -> None:
    adapter("quota/one")
    given = operator.put("/v1/quotas", json={"kind": "adapter", "name": "quota/one", "soft": "1MiB"})
    assert given.status_code == 200, given.text
    (row,) = rows(operator, kind="adapter")
    assert row["names"] == ["quota/one"]
    assert row["bytes"] > 0  # its weights
    assert operator.put("/v1/quotas", json={"kind": "adapter", "name": "nobody"}).status_code == 404
    gone = operator.delete("/v1/quotas", params={"kind": "adapter", "name": "quota/one"})
    assert gone.status_code == 200, gone.text


def test_who_may_change_them_and_a_tenant_sees_its_own(
    running: Any, client: CacheClient, operator: httpx.Client, anybody: httpx.Client, eventually: Any
) -> None:
    salt, other = os.urandom(4).hex(), os.urandom(4).hex()
    for each in (salt, other):
        client.set_quota("tenant", salt_digest(each), soft=1000)
    assert anybody.put("/v1/quotas", json={"kind": "model", "name": "x"}).status_code == 401
    token = add_token(tokens_path(running.socket), os.urandom(4).hex(), "operate", salt_digest(salt))
    with httpx.Client(base_url=running.http, headers={"authorization": f"Bearer {token}"}) as own:
        eventually(lambda: own.get("/v1/quotas").status_code == 200, "the token is known")
        assert [each["name"] for each in rows(own)] == [salt_digest(salt)]
        assert own.put("/v1/quotas", json={"kind": "model", "name": "x"}).status_code == 403
        assert own.delete("/v1/quotas", params={"kind": "model", "name": "x"}).status_code == 403
    for each in (salt, other):
        assert client.remove_quota("tenant", salt_digest(each))


def test_python_says_what_is_wrong(client: CacheClient) -> None:
    with pytest.raises(UsageError, match="kind must be tenant, adapter or model"):
        client.set_quota("user", "x")
    with pytest.raises(Rejected, match="redis_max_bytes"):
        client.set_quota("model", "x", tier="redis")
    assert not client.remove_quota("model", "x")


def test_the_configuration_gives_some_and_what_was_set_since_wins_after_a_restart(daemon: Any, tmp_path: Path) -> None:
    quotas = [
        {"tier": "cpu", "salt": "acme", "soft": "2MiB"},
        {"tier": "disk", "tenant": "*", "hard": "3MiB"},
        {"tier": "cpu", "model": "quota/model", "soft": 5},
    ]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"quotas": quotas}))
    options = {"memory": "16MiB", "disk_path": tmp_path / "disk", "disk": "64MiB", "config": file}
    acme = salt_digest("acme")
    first = daemon(**options)
    with first.client() as client:
        found = {(row["kind"], row["name"], row["tier"]): (row["soft"], row["hard"]) for row in client.quotas()}
        assert found == {
            ("tenant", acme, "cpu"): (2 * MIB, None),
            ("tenant", "*", "disk"): (0, 3 * MIB),
            ("model", "quota/model", "cpu"): (5, None),
        }
        client.set_quota("tenant", acme, soft=3 * MIB)
        client.set_quota("tenant", "ab" * 32, tier="disk", soft=1)
        assert client.remove_quota("model", "quota/model")
        store(client, "acme", 2)
    first.stop()
    with daemon(**options).client() as client:
        found = {(row["kind"], row["name"], row["tier"]): (row["soft"], row["hard"]) for row in client.quotas()}
        assert found == {
            ("tenant", acme, "cpu"): (3 * MIB, None),
            ("tenant", "*", "disk"): (0, 3 * MIB),
            ("tenant", "ab" * 32, "disk"): (1, None),
        }
        assert client.check_index()["faults"] == 0  # what the scan found is counted


@pytest.mark.parametrize(
    ("quota", "words"),
    [
        ({"tier": "redis", "model": "x"}, "tier"),
        ({"tier": "cpu"}, "give tenant"),
        ({"tier": "cpu", "tenant": "*", "model": "x"}, "give tenant"),
        ({"tier": "cpu", "tenant": "acme"}, "is not a digest"),
        ({"tier": "cpu", "salt": ""}, "salt"),
        ({"tier": "cpu", "model": "x", "soft": "much"}, "is not a size"),
    ],
)
def test_a_quota_that_cannot_be_meant_ends_the_start(tmp_path: Path, quota: dict[str, str], words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"socket": "/x", "quotas": [quota]}))
    with pytest.raises(ConfigError, match=words):
        load_config({}, file)


def test_a_salt_is_kept_as_its_digest() -> None:
    config = Config(socket="/x", quotas=[{"tier": "cpu", "salt": "secret"}])  # type: ignore[arg-type]
    assert config.quotas[0].subject == ("tenant", salt_digest("secret"))
    assert "secret" not in repr(config)
