# SPDX-License-Identifier: Apache-2.0
"""A prompt looked up through an engine's tokenizer. The engine is an HTTP server that answers as vLLM does, or not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient
from loracache.cli.engine_tokens import Engine
from loracache.errors import ProtocolError, Unavailable


class Engines:
    """What the server knows and was asked. answers[path], where there is one, writes another answer than vLLM's."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [{"id": "served", "parent": None}, {"id": "second", "parent": None}]
        self.tokens: list[int] = []
        self.key = ""
        self.asked: list[dict[str, Any]] = []
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], object]] = {}
        self.url = ""


def send(handler: BaseHTTPRequestHandler, body: object, status: int = 200, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def handler_of(engines: Engines) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({"object": "list", "data": engines.models})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            engines.asked.append(request)
            self._answer({"count": len(engines.tokens), "max_model_len": 4096, "tokens": engines.tokens})

        def _answer(self, body: object) -> None:
            if engines.key and self.headers["Authorization"] != f"Bearer {engines.key}":
                send(self, {"error": "Unauthorized"}, 401)
            elif self.path in engines.answers:
                engines.answers[self.path](self)
            else:
                send(self, body)

    return Handler


@pytest.fixture
def engine() -> Iterator[Engines]:
    engines = Engines()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(engines))
    server.daemon_threads = True
    engines.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield engines
    server.shutdown()
    thread.join()
    server.server_close()


# -- what it finds -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_looked_up_under_the_first_model(cli: Any, engine: Engines, prompt: Any) -> None:
    engine.tokens, _ = prompt(2, model="served")
    for model in ([], ["--model", "*"], ["--model", "served"]):
        found = cli("lookup", "--engine", engine.url, "--prompt", "Hello", *model, "--json")
        assert (found.code, found.json["tokens"]) == (0, 8), found
    assert engine.asked == [{"model": "served", "prompt": "Hello", "add_special_tokens": True}] * 3
    assert cli("lookup", "--engine", f"{engine.url}/v1/", "--prompt", "-", stdin="größer\n").code == 0
    assert engine.asked[-1]["prompt"] == "größer\n"


def test_another_model_is_asked_by_its_name(cli: Any, engine: Engines, prompt: Any) -> None:
    engine.tokens, _ = prompt(2, model="served")
    prompt(1, model="second")
    missed = cli("lookup", "--engine", engine.url, "--prompt", "Hello", "--model", "second")
    assert (missed.code, engine.asked[-1]["model"]) == (3, "second")


@pytest.mark.parametrize("parent", ["served", "org/the-base-on-disk"])
def test_an_adapters_served_name_selects_its_base_model_and_itself(
    cli: Any, engine: Engines, prompt: Any, client: CacheClient, peft: Path, parent: str
) -> None:
    digest = client.add_adapter(str(peft), "team/assistant")
    engine.models.append({"id": "team/assistant", "parent": parent, "root": "/somewhere"})
    engine.tokens, _ = prompt(3, model="served", adapter=digest)
    asked = ["lookup", "--engine", engine.url, "--prompt", "Hello", "--json"]
    assert cli(*asked).code == 3  # not of the base model
    for more in ([], ["--adapter", "team/assistant"]):
        found = cli(*asked, "--model", "team/assistant", *more)
        assert (found.code, found.json["tokens"]) == (0, 12), found
    assert engine.asked[-1]["model"] == "team/assistant"
    assert cli(*asked, "--model", "served", "--adapter", "team/assistant").json["tokens"] == 12
    other = cli(*asked, "--model", "team/assistant", "--adapter", "team/other")
    assert (other.code, "--adapter says 'team/other'; leave one out" in other.err) == (2, True)


def test_a_chat_is_tokenized_with_the_engines_template(cli: Any, engine: Engines, prompt: Any, tmp_path: Path) -> None:
    engine.tokens, _ = prompt(1, model="served")
    chat = [{"role": "user", "content": "Hello"}]
    path = tmp_path / "chat.json"
    for body in (chat, {"messages": chat, "tools": [], "model": "ignored", "temperature": 1}):
        path.write_text(json.dumps(body))
        assert cli("lookup", "--engine", engine.url, "--messages", path).code == 0
    assert engine.asked == [{"model": "served", "messages": chat}, {"model": "served", "messages": chat, "tools": []}]
    for text, said in (("[]", "holds no messages"), ("{", "is not JSON"), ("7", "holds no messages")):
        path.write_text(text)
        done = cli("lookup", "--engine", engine.url, "--messages", path)
        assert (done.code, said in done.err) == (2, True)


def test_a_prompt_can_be_evicted_too(cli: Any, engine: Engines, prompt: Any, client: CacheClient) -> None:
    engine.tokens, keys = prompt(2, model="served")
    assert cli("evict", "--engine", engine.url, "--prompt", "Hello").code == 0
    assert client.lookup(keys).hits == 0


def test_the_key_comes_from_the_environment_or_a_file(
    cli: Any, engine: Engines, prompt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.tokens, _ = prompt(1, model="served")
    engine.key = "hidden-key"
    asked = ["lookup", "--engine", engine.url, "--prompt", "Hello"]
    without = cli(*asked)
    assert (without.code, without.out) == (1, "")
    assert "wants an API key (401); set VLLM_API_KEY or give --engine-key-file" in without.err
    (tmp_path / "key").write_text("hidden-key\n")
    assert cli(*asked, "--engine-key-file", tmp_path / "key").code == 0
    monkeypatch.setenv("VLLM_API_KEY", "hidden-key")
    assert cli(*asked).code == 0
    (tmp_path / "key").write_text("wrong-key")
    wrong = cli(*asked, "--engine-key-file", tmp_path / "key")
    assert (wrong.code, "does not take the key it was given" in wrong.err) == (1, True)
    assert "wrong-key" not in wrong.err
    for text in ("", "two\nlines", "größer"):
        (tmp_path / "key").write_text(text)
        assert cli(*asked, "--engine-key-file", tmp_path / "key").code == 2


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_served_is_exit_code_3(cli: Any, engine: Engines) -> None:
    done = cli("lookup", "--engine", engine.url, "--prompt", "Hello", "--model", "mine")
    assert done.code == 3
    assert "serves no model 'mine'; it serves 'served', 'second'" in done.err
    assert engine.asked == []


def test_nobody_at_the_address_is_exit_code_1(cli: Any, engine: Engines) -> None:
    for url in ("http://127.0.0.1:1", f"http://{'a' * 70}.invalid"):
        done = cli("lookup", "--engine", url, "--prompt", "Hello")
        assert (done.code, done.out) == (1, "")
        assert f"no engine answers at {url} (" in done.err


ANSWERS: dict[str, tuple[str, Callable[[BaseHTTPRequestHandler], object], str]] = {
    "no JSON": ("/tokenize", lambda handler: send(handler, b"<html>"), "answered no JSON object"),
    "deep JSON": ("/tokenize", lambda handler: send(handler, b"[" * 100_000), "answered no JSON object"),
    "a list": ("/v1/models", lambda handler: send(handler, [1]), "answered no JSON object"),
    "no models": ("/v1/models", lambda handler: send(handler, {"data": []}), "lists no base model"),
    "odd models": ("/v1/models", lambda handler: send(handler, {"data": [{"id": 1}]}), "no list of models"),
    "odd parent": ("/v1/models", lambda handler: send(handler, {"data": [{"id": "a", "parent": [1]}]}), "no list of"),
    "no tokens": ("/tokenize", lambda handler: send(handler, {"count": 2}), "answered no list of token ids"),
    "odd tokens": ("/tokenize", lambda handler: send(handler, {"tokens": [1, True]}), "answered no list of token ids"),
    "wide tokens": ("/tokenize", lambda handler: send(handler, {"tokens": [2**40]}), "1099511627776"),
    "empty prompt": ("/tokenize", lambda handler: send(handler, {"tokens": []}), "the prompt holds no token ids"),
    "refusal": (
        "/tokenize", lambda handler: send(handler, {"error": {"message": "too\nlong"}}, 400), "with 400: too long",
    ),
    "failure": ("/tokenize", lambda handler: send(handler, b"boom", 500), "refused with 500: boom"),
    "not there": ("/v1/models", lambda handler: send(handler, b"", 404), "/v1/models is not there (404"),
    "redirect": ("/v1/models", lambda handler: send(handler, b"", 302, Location="http://elsewhere/"), "with 302"),
    "no HTTP": ("/v1/models", lambda handler: handler.wfile.write(b"\x00\x01 hello\r\n\r\n") and None, "in HTTP"),
    "silence": ("/tokenize", lambda handler: time.sleep(1.5), "did not answer within 0.5 s; --engine-timeout"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_what_vllm_does_not_answer_is_one_line_and_no_lookup(cli: Any, engine: Engines, case: str) -> None:
    path, answer, said = ANSWERS[case]
    engine.answers[path] = answer
    engine.tokens = [1, 2, 3, 4]
    seconds = 0.5 if case == "silence" else 30
    done = cli("lookup", "--engine", engine.url, "--prompt", "Hello", "--engine-timeout", seconds)
    assert done.code in ((2,) if case == "empty prompt" else (1,))
    assert (done.out, len(done.err.splitlines())) == ("", 1), done
    assert said in done.err


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(300):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return
        time.sleep(0.1)


def test_an_answer_that_drips_ends_with_the_timeout(engine: Engines) -> None:
    engine.answers["/tokenize"] = drip
    began = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer within"):
        Engine(engine.url, timeout=0.5).tokenize({"prompt": "Hello"})
    assert time.monotonic() - began < 20  # of thirty


def test_an_endless_answer_is_not_kept(engine: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracache.cli.engine_tokens._MOST_BYTES", 1000)
    engine.answers["/tokenize"] = lambda handler: send(handler, b" " * 2000)
    with pytest.raises(ProtocolError, match="more than"):
        Engine(engine.url).tokenize({"prompt": "Hello"})
