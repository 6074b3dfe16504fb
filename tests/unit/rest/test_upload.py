# SPDX-License-Identifier: Apache-2.0
"""Adapters uploaded over HTTP: what is taken in is what was sent, and nothing else ever lands anywhere."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from loracache import CacheClient

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = dict[str, bytes]


def files(seed: int = 1, **more: bytes) -> Files:
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.q_proj.lora_{part}.weight": rng.standard_normal(shape, np.float32)
        for part, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors)} | more


def put(operator: httpx.Client, name: str, content: Files) -> httpx.Response:
    return operator.put(f"/v1/adapters/{name}", files=[("files", item) for item in content.items()])


def left_behind(running: Any) -> list[Path]:
    return list((Path(running.disk) / "uploads").glob("*"))


@pytest.fixture
def unchanged(client: CacheClient, running: Any) -> Callable[[], bool]:
    """Whether nothing is there that was not there before, and nothing is left of an upload."""
    before = [adapter.name for adapter in client.adapters()]
    return lambda: [adapter.name for adapter in client.adapters()] == before and not left_behind(running)


def test_an_uploaded_folder_is_served_under_its_name(
    operator: httpx.Client, client: CacheClient, running: Any, tmp_path: Path
) -> None:
    content = files(1, **{"README.md": b"about it", "tokenizer.json": b"{}"})
    answer = put(operator, "team/up:1", content)
    assert answer.status_code == 200, answer.text
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes(content[name])
    assert answer.json()["digest"] == client.add_adapter(str(tmp_path), "the-same")
    assert answer.json()["tiers"][0] == "cpu"
    assert client.find_adapter("team/up:1") == answer.json()["digest"]
    assert not left_behind(running)


def test_a_name_is_pointed_at_the_new_upload(operator: httpx.Client, client: CacheClient) -> None:
    first, second = (put(operator, "again", files(seed)).json()["digest"] for seed in (2, 3))
    assert first != second
    assert client.find_adapter("again") == second


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({CONFIG: b"{}"}, "adapter_model.safetensors not among the files"),
        ({WEIGHTS: b""}, "adapter_config.json not among the files"),
        ({CONFIG: b"{}", "adapter_model.bin": b""}, "python -m loracache.connectors.vllm.lora.pickled FOLDER"),
        (files() | {"../../evil": b"x"}, "not a file's name"),
        (files() | {"a/b": b"x"}, "not a file's name"),
        (files() | {"..": b"x"}, "not a file's name"),
        (files() | {"a\\b": b"x"}, "not a file's name"),
        (files() | {str(n): b"" for n in range(80)}, "more than 64 files"),
    ],
)
def test_a_folder_that_is_none_is_refused(
    operator: httpx.Client, unchanged: Callable[[], bool], content: Files, said: str
) -> None:
    answer = put(operator, "wrong", content)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    assert unchanged()


@pytest.mark.parametrize(
    "content",
    [
        files() | {CONFIG: b"not JSON"},
        files() | {WEIGHTS: b"not safetensors"},
        files() | {WEIGHTS: files()[WEIGHTS][:-100]},
        files() | {CONFIG: json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}).encode()},
        files() | {WEIGHTS: save({f"q_proj.lora_{each}.weight": np.full((4, 4), np.inf, np.float32) for each in "AB"})},
        files() | {CONFIG: b"{" * 100_000},
        files() | {CONFIG: b""},
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_with_its_reason(
    operator: httpx.Client, unchanged: Callable[[], bool], running: Any, content: Files
) -> None:
    answer = put(operator, "wrong", content)
    assert answer.status_code == 422
    assert "the upload" in answer.json()["detail"]
    assert str(running.disk) not in answer.text
    assert unchanged()


@pytest.mark.parametrize(
    "name", ["a%2F..%2Fb", "%2e%2e%2Fx", ".hidden", "-x", "a b", "x" * 201, "é", "a%00b", "ab" * 32]
)
def test_names_that_cannot_be_are_refused(operator: httpx.Client, unchanged: Callable[[], bool], name: str) -> None:
    path = name if "%" in name else quote(name, safe="")
    answer = put(operator, path, files())
    assert answer.status_code == 422, answer.text
    assert unchanged()


def test_other_bodies_are_refused(operator: httpx.Client, unchanged: Callable[[], bool]) -> None:
    assert operator.put("/v1/adapters/x", json={"files": []}).status_code == 415
    assert operator.put("/v1/adapters/x").status_code == 415
    typed = {"content-type": "multipart/form-data; boundary=b"}
    for body in (b"", b"nothing", b"--b\r\n", b"--b--\r\n", b"--b\r\n\r\nno header\r\n--b--\r\n"):
        assert operator.put("/v1/adapters/x", content=body, headers=typed).status_code == 422, body
    assert (
        operator.put("/v1/adapters/x", content=b"", headers={"content-type": "multipart/form-data"}).status_code == 422
    )
    twice = [("files", (CONFIG, b"{}")), ("files", (CONFIG, b"{}"))]
    assert operator.put("/v1/adapters/x", files=twice).status_code == 422
    assert unchanged()


def test_an_upload_that_breaks_off_leaves_nothing(
    running: Any, operator: httpx.Client, unchanged: Callable[[], bool], eventually: Callable[..., Any]
) -> None:
    request = operator.build_request("PUT", "/v1/adapters/broken", files=[("files", item) for item in files().items()])
    body = request.read()
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    place = urlsplit(running.http)
    with socket.create_connection((place.hostname, place.port)) as sock:
        sock.sendall("\r\n".join(["PUT /v1/adapters/broken HTTP/1.1", *lines, "", ""]).encode() + body[:-500])
        eventually(lambda: left_behind(running), "the upload begins")
    eventually(unchanged, "it is removed")


def test_an_upload_needs_an_admin(anybody: httpx.Client, unchanged: Callable[[], bool]) -> None:
    assert put(anybody, "stranger", files()).status_code == 401
    assert unchanged()


def test_a_name_gets_its_priority_with_the_upload_or_later(
    operator: httpx.Client, anybody: httpx.Client, client: CacheClient
) -> None:
    parts = [("files", item) for item in files(7).items()]
    answer = operator.put("/v1/adapters/ranked", params={"priority": "high"}, files=parts)
    assert (answer.status_code, answer.json()["priority"]) == (200, "high")
    assert put(operator, "ranked", files(8)).json()["priority"] == "high"
    answer = operator.post("/v1/adapters/ranked", json={"priority": "low"})
    assert (answer.status_code, answer.json()["priority"]) == (200, "low")
    shown = client.show_adapter("ranked")
    assert shown is not None
    assert shown.priority == "low"
    assert operator.post("/v1/adapters/nobody", json={"priority": "low"}).status_code == 404
    assert operator.post("/v1/adapters/ranked", json={"priority": "highest"}).status_code == 422
    assert operator.put("/v1/adapters/ranked", params={"priority": "x"}, files=parts).status_code == 422
    assert anybody.post("/v1/adapters/ranked", json={"priority": "low"}).status_code == 401
    client.remove_adapter("ranked")
