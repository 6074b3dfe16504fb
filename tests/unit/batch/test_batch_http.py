# SPDX-License-Identifier: Apache-2.0
"""The client of OpenAI servers: answers however HTTP frames them, and what is no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from loracache.batch.http import Answer, Server
from loracache.errors import ConfigError, ProtocolError, Unavailable

JSON = b'{"a":1}'


def talk(
    path: Path, answers: list[bytes], calls: Callable[[Server], Awaitable[Any]], *, close: bool = False
) -> tuple[Any, int]:
    """(what `calls` gives on a server that answers each request with the next of `answers`, connections made)"""

    async def main_task() -> tuple[Any, int]:
        made = 0
        open_ones: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal made
            made += 1
            open_ones.append(writer)
            while answers:
                try:
                    await reader.readuntil(b"\r\n\r\n{}")
                except asyncio.IncompleteReadError:
                    break
                writer.write(answers.pop(0))
                await writer.drain()
                if close:
                    break
            writer.close()

        listening = await asyncio.start_unix_server(serve, path / "s")
        server = Server(f"unix://{path / 's'}", timeout=5.0)
        try:
            return await calls(server), made
        finally:
            await server.close()
            listening.close()
            for each in open_ones:
                each.close()
            await asyncio.sleep(0.01)  # in which what was waiting for a request notices

    return asyncio.run(main_task())


def whole(status: int = 200, body: bytes = JSON, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), more, body)


async def twice(server: Server) -> list[Answer]:
    return [await server.post("/x", {}), await server.post("/x", {})]


def test_a_connection_is_kept_for_the_next_request(tmp_path: Path) -> None:
    found, made = talk(tmp_path, [whole(), whole(503, b"busy")], twice)
    assert found == [Answer(200, {"a": 1}), Answer(503, "busy")]
    assert made == 1


def test_an_answer_in_chunks_or_up_to_the_connections_end(tmp_path: Path) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\n" + JSON[:3] + b"\r\n4\r\n" + JSON[3:]
    found, made = talk(tmp_path, [chunked + b"\r\n0\r\n\r\n", whole()], twice)
    assert (found, made) == ([Answer(200, {"a": 1})] * 2, 1)
    found, made = talk(tmp_path, [b"HTTP/1.1 200 OK\r\n\r\n" + JSON] * 2, twice, close=True)
    assert (found, made) == ([Answer(200, {"a": 1})] * 2, 2)


def test_a_kept_connection_that_the_server_has_closed_is_made_again(tmp_path: Path) -> None:
    found, made = talk(tmp_path, [whole(), whole()], twice, close=True)
    assert (found, made) == ([Answer(200, {"a": 1})] * 2, 2)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", Unavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", Unavailable),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ProtocolError),
    ],
)
def test_what_is_no_answer_is_said(tmp_path: Path, answer: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match="unix://"):
        talk(tmp_path, [answer], lambda server: server.post("/x", {}), close=True)


def test_nobody_there_and_no_answer_in_time(tmp_path: Path) -> None:
    async def nobody() -> Answer:
        server = Server(f"unix://{tmp_path}/none")
        try:
            return await server.get("/x")
        finally:
            await server.close()

    with pytest.raises(Unavailable, match=r"no server answers at unix://.* \(No such file or directory\)"):
        asyncio.run(nobody())

    async def late(server: Server) -> Answer:
        return await server.get("/x", 0.05)  # which serve never sees as a request

    with pytest.raises(Unavailable, match=r"did not answer within 0\.05 s"):
        talk(tmp_path, [whole()], late)


@pytest.mark.parametrize("url", ["", "localhost:8000", "http://", "unix://", "http://h:0", "http://h:x", "http://h/ v"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="write it like http"):
        Server(url)


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="set VLLM_API_KEY") as told:
        Server("http://user:secret@host")
    assert "secret" not in str(told.value)


def test_an_answer_that_trickles_in_has_its_time_in_all(tmp_path: Path) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            while not writer.is_closing():
                writer.write(b" ")
                await asyncio.sleep(0.05)
        finally:
            writer.close()

    async def asked() -> Answer:
        listening = await asyncio.start_unix_server(trickle, tmp_path / "s")
        server = Server(f"unix://{tmp_path / 's'}")
        try:
            return await server.post("/x", {}, 0.3)
        finally:
            await server.close()
            listening.close()

    with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s"):
        asyncio.run(asked())


def test_a_path_before_v1_is_kept_and_redirects_are_answers(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(whole(307, b"", b"Location: /elsewhere\r\n"))
        await writer.drain()
        writer.close()

    async def asked() -> Answer:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        server = Server(f"http://127.0.0.1:{port}/one/v1", "key")
        try:
            return await server.get("/v1/models")
        finally:
            await server.close()
            listening.close()

    assert asyncio.run(asked()) == Answer(307, "")
    assert seen[0].startswith(b"GET /one/v1/models HTTP/1.1\r\n")
    assert b"authorization: bearer key" in seen[0].lower()
