# SPDX-License-Identifier: Apache-2.0
"""Traces: a collector that is named gets spans of REST requests and of the tiers' threads; else nothing happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loracache import CacheClient, Namespace
from loracache.tracing import span


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(endpoint, [(service, span's name)] as they come)"""
    found: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {item.key: item.value.string_value for item in resource.resource.attributes}
                spans = [each.name for scope in resource.scope_spans for each in scope.spans]
                found.extend((names["service.name"], name) for name in spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", found
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_requests_and_tiers_are_traced(
    daemon: Callable[..., Any], collector: tuple[str, list[tuple[str, str]]], short_tmp: Path, eventually: Any
) -> None:
    endpoint, found = collector
    config = short_tmp / "config.yaml"
    config.write_text(f"traces: {endpoint}\n")
    running = daemon(http="127.0.0.1:0", config=config, disk_path=short_tmp / "disk")

    def answers() -> bool:
        try:
            return httpx.get(f"{running.http}/v1/stats").status_code == 200
        except httpx.TransportError:
            return False

    eventually(answers, "REST answers")
    with CacheClient(running.url) as client:
        root = client.register(Namespace("model", "float32", "layout", 16))
        with client.reserve(root, [bytes(32)], [10]) as reservation:
            reservation.write(0, bytes(10))
        client.flush()
    assert running.stop() == 0  # what is left is sent at the end
    wanted = {("loracache-rest", "GET /v1/stats"), ("loracache-rest", "daemon status"), ("loracache", "disk store")}
    eventually(lambda: wanted <= set(found), "the spans have come")


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://x", "http://a b"])
def test_an_endpoint_that_is_none_is_refused(serve_fails: Callable[..., tuple[int, str]], endpoint: str) -> None:
    for how in ({"environment": {"LORACACHE_TRACES": endpoint}}, {"traces": endpoint}):
        code, said = serve_fails(**how)
        assert code == 2
        assert "traces=" in said


def test_a_span_costs_nothing_where_nobody_asked() -> None:
    with span("nothing", objects=1) as each:
        assert each is None
