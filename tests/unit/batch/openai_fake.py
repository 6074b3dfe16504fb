# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server that answers as vLLM does, without a model: for what a batch does when a server refuses, ends or is
slow. An answer says which prompt it is to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from loracache.cli.app import app

KV_BLOCKS, BLOCK = 64, 16


class Fake:
    """asked: bodies of requests in the order they came. refuse(body): (status, error body) or None. held: the most
    tokens that requests under way had at once."""

    def __init__(self, port: int = 0) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.refuse: Callable[[dict[str, Any]], tuple[int, Any] | None] = lambda body: None
        self.tokenizes = self.healthy = self.lists = True
        self.hang_ups = 0
        """How often /tokenize ends the connection in place of an answer."""
        self.tokens: Any = None
        """What /tokenize answers whatever it is asked; None for tokens of the prompt."""
        self.key = ""
        self.seconds = 0.0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._closed = False
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._server.shutdown()
        self._thread.join()
        self._server.cut()
        self._server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.asked.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.seconds)
            refused = self.refuse(body)
            if refused is not None:
                return refused
            said = said_to(path, body)
            with self.lock:
                self.answered[said] += 1
            usage = {
                "prompt_tokens": len(said),
                "completion_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 3},
            }
            return 200, {"object": "answer", "model": body.get("model"), "text": said, "usage": usage}
        finally:
            with self.lock:
                self.at_once -= 1


def said_to(path: str, body: dict[str, Any]) -> str:
    prompt = body.get("messages") or body.get("prompt") or body.get("input")
    return f"{path} {json.dumps(prompt)}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *arguments: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed here; that is no news."""

    def cut(self) -> None:
        """End the connections that are kept, as the end of a process does."""
        for each in list(self.open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                self._send(401, {"error": "Unauthorized"})
            elif self.path == "/metrics":
                labels = f'block_size="{BLOCK}",engine="0",num_gpu_blocks="{KV_BLOCKS + 1}"'
                self._send(200, f"# HELP\nvllm:cache_config_info{{{labels}}} 1.0\n")
            elif (self.path == "/health" and not fake.healthy) or (self.path == "/v1/models" and not fake.lists):
                self._send(503, "")
            elif self.path in ("/v1/models", "/health"):
                self._send(200, {"data": [{"id": "base"}]})
            else:
                self._send(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/tokenize":
                self._send(*fake.answer(self.path, body))
            elif fake.hang_ups > 0:
                fake.hang_ups -= 1
                self.close_connection = True
            elif fake.tokens is not None:
                self._send(200, {"tokens": fake.tokens})
            elif fake.tokenizes:
                text = json.dumps(body.get("messages", body.get("prompt")))
                self._send(200, {"tokens": list(text.encode())})
            else:
                self._send(404, {"detail": "Not Found"})

        def _send(self, status: int, body: Any) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def request(number: int, **body: Any) -> dict[str, Any]:
    """Of ten groups that share their beginning."""
    prompt = f"{number % 10}" * 100 + f" question {number}"
    return {
        "custom_id": f"id-{number}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "base", "prompt": prompt, "max_tokens": 8} | body,
    }


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def run(*words: object, verb: str = "run", stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(app, ["batch", verb, *map(str, words)], input=stdin)


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
