# SPDX-License-Identifier: Apache-2.0
"""Calls of REST made up from its OpenAPI document and mutated: parameters, bodies, types, bytes, methods, heads.

No answer may be a 5xx that the document does not have, and no traceback may stand in the log of the daemon or of its
REST process. (test_rest_fuzz.py makes fewer calls and checks every answer against the document's schemas.)
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from house import Daemon, eventually
from mutants import KEYS, NUMBERS, TEXTS, anything
from pulse import HANG_S

from loracache import CacheClient, Namespace

__all__ = ["fuzz_calls"]

_CALL_S = 15.0
_ENDLESS = "/v1/events"  # a stream without an end
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
_HEADS = (
    "",
    "\x00",
    "Bearer",
    "Bearer x",
    "é",
    "x" * 5000,
    "gzip",
    "chunked",
    "text/html",
    "-1",
    "*/*",
    "a/b; charset=x",
)


class Calls:
    """Makes one after the other from the OpenAPI document."""

    def __init__(self, document: dict[str, Any], seed: str) -> None:
        self._numbers = random.Random(seed)
        self._schemas = document.get("components", {}).get("schemas", {})
        self.documented: set[str] = set()
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in document["paths"].items()
            if path != _ENDLESS
            for method, operation in methods.items()
            if method.upper() in _METHODS
        ]

    def next(self) -> tuple[str, str, bytes, dict[str, str]]:
        """(method, path, body, heads). `documented` are then the statuses that the document has for it."""
        numbers = self._numbers
        method, path, operation = numbers.choice(self._operations)
        self.documented = set(operation.get("responses", ()))
        query = []
        for parameter in operation.get("parameters", []):
            value = self._text(self._value(parameter.get("schema", {})))
            if parameter["name"] == "wait":
                value = numbers.choice(("0", "0", "-1", "x", "1e400"))
            if parameter["in"] == "path":
                path = path.replace(f"{{{parameter['name']}}}", quote(value[:300], safe="") or "x")
            elif parameter["in"] == "query" and (parameter["name"] == "wait" or numbers.random() < 0.5):
                query.append(f"{quote(parameter['name'])}={quote(value[:3000])}")
        if query:
            path += "?" + "&".join(query)
        heads = {"content-type": "application/json"}
        content = operation.get("requestBody", {}).get("content", {})
        body = b""
        if "application/json" in content:
            body = json.dumps(self._value(content["application/json"].get("schema", {}))).encode()
        elif content:
            heads["content-type"] = "multipart/form-data; boundary=b"
            part = b'content-disposition: form-data; name="f"; filename="adapter_config.json"\r\n\r\n{}'
            body = b"--b\r\n" + part + b"\r\n--b--\r\n"
        return self._mutated(method, path, body, heads)

    def _mutated(
        self, method: str, path: str, body: bytes, heads: dict[str, str]
    ) -> tuple[str, str, bytes, dict[str, str]]:
        numbers = self._numbers
        match numbers.randrange(12):
            case 0 if body:
                changed = bytearray(body)
                for _ in range(numbers.choice((1, 1, 3))):
                    changed[numbers.randrange(len(changed))] ^= 1 << numbers.randrange(8)
                body = bytes(changed)
            case 1:
                body = body[: numbers.randrange(len(body) + 1)]
            case 2:
                body = numbers.choice(
                    (b"[" * 5000, b'{"a":' * 2000, numbers.randbytes(300), b"null", b"1e999", b"\xff")
                )
            case 3:
                method = numbers.choice(_METHODS)
            case 4:
                name = numbers.choice(
                    ("content-type", "accept", "authorization", "x-request-id", "origin", "if-none-match")
                )
                heads[name] = numbers.choice(_HEADS).replace("\x00", "")
            case 5:
                path = path + quote(numbers.choice(TEXTS)[:200])
            case 6:
                path = path.replace("/v1", numbers.choice(("/v1/", "//v1", "/v1/..", "/V1", "/v1%00")), 1)
        return method, path, body, heads

    def _text(self, value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    def _value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """What fits the schema, or sometimes not."""
        numbers = self._numbers
        if "$ref" in schema:
            schema = self._schemas.get(schema["$ref"].rpartition("/")[2], {})
        if numbers.random() < 0.08 or depth > 6:
            return self._plain()
        if "anyOf" in schema:
            return self._value(numbers.choice(schema["anyOf"]), depth + 1)
        if "enum" in schema:
            return numbers.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                properties = schema.get("properties", {})
                wanted = set(schema.get("required", ()))
                return {
                    name: self._value(inner, depth + 1)
                    for name, inner in properties.items()
                    if name in wanted or numbers.random() < 0.4
                }
            case "array":
                return [self._value(schema.get("items", {}), depth + 1) for _ in range(numbers.choice((0, 1, 2, 5)))]
            case "integer":
                return numbers.choice((0, 1, 5, 100, numbers.choice(NUMBERS)))
            case "number":
                return numbers.choice((0, 0.5, 1, 30, 1e9))
            case "boolean":
                return numbers.random() < 0.5
            case "null":
                return None
            case _:
                return numbers.choice((numbers.choice(KEYS).hex(), "model", "cpu", numbers.choice(TEXTS)[:2000]))

    def _plain(self) -> Any:
        """Anything that JSON can say."""
        return json.loads(json.dumps(anything(self._numbers), default=bytes.hex))


def fuzz_calls(folder: Path, seed: str, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """(figures, what must never be) of so many seconds."""
    daemon = Daemon(
        folder / "daemon.log",
        folder / "s",
        memory="8MiB",
        page_size="4KiB",
        disk_path=folder / "disk",
        disk="64MiB",
        http="127.0.0.1:0",
    )
    found: list[str] = []
    answers: Counter[str] = Counter()
    longest = 0.0
    try:
        daemon.ready()
        _store(daemon)
        port = int(daemon.log.read_text().partition("REST on port ")[2].split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_CALL_S)
        token = Path(f"{daemon.socket}.token")
        eventually(lambda: token.exists() and _healthy(port), 30.0)
        authorized = {"authorization": f"Bearer {token.read_text().strip()}"}
        connection.request("GET", "/openapi.json", headers=authorized)
        calls = Calls(json.loads(connection.getresponse().read()), seed)
        until = time.monotonic() + seconds
        while time.monotonic() < until and daemon.process.poll() is None:
            method, path, body, heads = calls.next()
            began = time.monotonic()
            status, text = _call(connection, method, path, body, authorized | heads)
            longest = max(longest, time.monotonic() - began)
            answers[status] += 1
            if (status.startswith("5") and status not in calls.documented) or status == "silent":
                found.append(f"{method} {path[:300]} {body[:200]!r} {heads} is answered {status}: {text[:300]!r}")
        connection.close()
        if not _healthy(port):
            found.append("REST does not answer any more")
        if daemon.end(20.0) != 0:
            found.append(f"the daemon ended with {daemon.process.poll()} after the calls")
    finally:
        daemon.kill()
    found += daemon.tracebacks()
    if longest > _CALL_S + HANG_S:
        found.append(f"HANG: a call took {longest:.1f} s")
    figures = {
        "calls": sum(answers.values()),
        "answers": dict(sorted(answers.items())),
        "longest call in seconds": round(longest, 3),
    }
    return figures, found


def _call(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, heads: dict[str, str]
) -> tuple[str, bytes]:
    """(status, body); "hung up" where the server did, which it may on nonsense; "silent" where nothing came."""
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (heads | {"content-length": str(len(body))}).items():
            connection.putheader(name, value.encode("utf-8", "replace"))
        connection.endheaders(body)
        answer = connection.getresponse()
        return str(answer.status), answer.read()
    except TimeoutError:
        connection.close()
        return "silent", b""
    except (OSError, http.client.HTTPException):
        connection.close()
        return "hung up", b""


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_CALL_S)
    try:
        return _call(connection, "GET", "/readyz", b"", {})[0] == "200"
    finally:
        connection.close()


def _store(daemon: Daemon) -> None:
    """Something that is there, so that not everything asked for is absent."""
    with CacheClient(f"unix://{daemon.socket}") as client:
        root = client.register(Namespace("ab" * 32, "float32", "layout", 16), ["model"])
        with client.reserve(root, KEYS, [1000] * len(KEYS)) as reservation:
            for position in range(len(KEYS)):
                reservation.write(position, bytes(1000))
