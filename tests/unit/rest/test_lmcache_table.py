# SPDX-License-Identifier: Apache-2.0
"""docs/lmcache.md: what it says stands beside LMCache's endpoints does what it says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache import CacheClient, Namespace

DOCUMENT = Path(__file__).parents[3] / "docs" / "lmcache.md"
TOKENS = list(range(64))
CALL = re.compile(r"`(GET|POST|PUT|DELETE) (/[^ `]*)(?: (\{[^`]*\}))?`")


def rows() -> list[list[str]]:
    lines = DOCUMENT.read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "|---" not in line]


def calls() -> list[tuple[str, str, str]]:
    """(method, path, body) of the second column."""
    found = [CALL.findall(cells[1]) for cells in rows() if cells[0] != "LMCache"]
    return sorted({call for row in found for call in row})


def test_every_endpoint_there_is_answered_for_once() -> None:
    for cells in rows():
        assert len(cells) == 2, cells
        assert cells[1] == "here" or cells[1].startswith("none") or CALL.match(cells[1]), cells
    controller = " ".join(cells[0] for cells in rows())
    for name in ("lookup", "clear", "pin", "compress", "decompress", "move", "health", "check_finish"):
        assert f"`POST /{name}`" in controller


@pytest.fixture
def stored(client: CacheClient, adapter: Callable[[str], Any]) -> dict[str, str]:
    """What the words in capitals stand for."""
    namespace = Namespace("cd" * 32, "float32", "layout", 16)
    root = client.register(namespace, ["served/model"])
    keys = namespace.object_keys(TOKENS)
    with client.reserve(root, keys, [1000] * len(keys)) as reservation:
        for position, slot in enumerate(reservation.slots):
            if slot is not None:
                reservation.write(position, os.urandom(1000))
    client.flush()
    adapter("team/table")
    operation = client.admit(keys)
    return {
        "MODEL": "served/model", "TOKENS": json.dumps(TOKENS), "KEY": keys[0].hex(), "ADAPTER": "team/table",
        "OPERATION": operation.id,
    }  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), calls())
def test_ours_answers(operator: httpx.Client, stored: dict[str, str], method: str, path: str, body: str) -> None:
    for word, meaning in stored.items():
        path, body = path.replace(word, meaning), body.replace(word, meaning)
    if path == "/v1/events":
        with operator.stream(method, path) as answer:
            assert answer.status_code == 200
            assert next(answer.iter_lines()).startswith(":")
        return
    answer = operator.request(method, path, json=json.loads(body) if body else None)
    assert answer.status_code in (200, 202), answer.text
    if path == "/v1/lookup" and "tokens" in body:
        assert answer.json()["tokens"] == len(TOKENS)
    elif path.startswith(("/v1/compress", "/v1/pin", "/v1/move")):
        assert answer.json()["state"] in ("running", "done")
