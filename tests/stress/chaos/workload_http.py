# SPDX-License-Identifier: Apache-2.0
"""A process that uses REST in random order: reads, and changes that take nothing away that is acknowledged."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
import traceback
from pathlib import Path
from urllib.parse import quote

from contents import Chain
from workload import Place

__all__ = ["run_http"]

_CALL_S = 15.0  # beyond what the REST process waits for a daemon that is stopped
_PAUSE_S = 0.01  # a machine of two cores has others to serve
_READS = (
    "/healthz", "/readyz", "/metrics", "/v1/stats", "/v1/config", "/v1/objects?limit=20", "/v1/tree", "/v1/adapters",
    "/v1/operations", "/openapi.json", "/",
)  # fmt: skip
_GONE = (502, 503, 504, 507)


def run_http(place: Place, number: int, generation: int, seed: str) -> None:
    """Work until told to end."""
    try:
        HttpUser(place, number, f"{seed}.{number}.{generation}").run()
    except Exception:  # noqa: BLE001 - top of a process
        place.say(f"http {number}: {traceback.format_exc()}")


class HttpUser:
    """One process's work."""

    def __init__(self, place: Place, number: int, seed: str) -> None:
        self._place = place
        self._random = random.Random(seed)
        self._pulse = place.pulse(number)
        self._pulse.begin()
        self._others = [place.pulse(other) for other in range(place.owners)]
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Until told to end."""
        while not self._pulse.ends:
            try:
                self._step()
                self._pulse.count("done")
                time.sleep(_PAUSE_S)
            except (OSError, http.client.HTTPException, ValueError):  # ValueError: no port or token written yet
                self._pulse.count("unavailable")
                self._hang_up()
                time.sleep(0.1)
        self._hang_up()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _step(self) -> None:
        if self._random.random() < 0.5:
            self._call("rest_read", "GET", self._random.choice(_READS))
            return
        keys = [key.hex() for key in self._chain().keys]
        match self._random.randrange(6):
            case 0 | 1:
                self._call("rest_read", "POST", "/v1/lookup", {"selector": {"keys": keys}})
            case 2:
                self._call("rest_change", "POST", "/v1/pin?wait=1", {"selector": {"keys": keys}, "ttl": 1.5})
            case 3:
                self._call("rest_change", "POST", "/v1/evict?wait=1", {"selector": {"keys": keys}, "tiers": ["cpu"]})
            case 4:
                self._upload()
            case _:
                name = f"uploaded-{self._random.randrange(3)}"
                self._call("rest_change", "DELETE", f"/v1/adapters/{quote(name)}")

    def _chain(self) -> Chain:
        owner = self._random.randrange(self._place.owners)
        return Chain(owner, self._others[owner].last - self._random.randrange(80))

    def _upload(self) -> None:
        number = self._random.randrange(self._place.owners, len(self._place.adapters))
        folder, mark = Path(self._place.adapters[number][0]), "chaos-boundary"
        body = b""
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            body += f'--{mark}\r\ncontent-disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode()
            body += (folder / name).read_bytes() + b"\r\n"
        body += f"--{mark}--\r\n".encode()
        kind = f"multipart/form-data; boundary={mark}"
        self._call("rest_change", "PUT", f"/v1/adapters/uploaded-{number % 3}", body, kind)

    def _call(
        self, name: str, method: str, path: str, body: dict[str, object] | bytes = b"", kind: str = "application/json"
    ) -> None:
        if self._connection is None:
            port = int((self._place.folder / "port").read_text())
            self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_CALL_S)
        token = Path(f"{self._place.folder}/s.token").read_text().strip()
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self._pulse.call(name, 2 * _CALL_S), contextlib.ExitStack() as stack:
            stack.push(self._closed_by_the_server)
            self._connection.request(method, path, sent, {"authorization": f"Bearer {token}", "content-type": kind})
            answer = self._connection.getresponse()
            text = answer.read()
        if answer.status in _GONE:
            self._pulse.count("rest_5xx")
        elif answer.status >= 500:
            self._place.say(f"{method} {path} is answered {answer.status}: {text[:300]!r}")

    def _closed_by_the_server(self, *error: object) -> bool:
        if error[0] is not None:
            self._hang_up()
        return False
