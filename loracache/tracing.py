# SPDX-License-Identifier: Apache-2.0
"""Traces by OpenTelemetry, where they are asked for: of what the tiers' threads do, and of REST requests.

Without an endpoint nothing is imported and a span costs nothing. Threading: any thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from loracache.errors import ConfigError

__all__ = ["start_traces", "span", "stop_traces"]

_provider: Any = None
_tracer: Any = None


def start_traces(endpoint: str, service: str, version: str) -> None:
    """Send spans to the OTLP/HTTP collector at `endpoint` (http://host:4318) from now on, as those of a service and its
    version. Raises ConfigError where OpenTelemetry is not installed."""
    global _provider, _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("traces needs OpenTelemetry; install loracache[otel], or leave traces out") from None
    _provider = TracerProvider(resource=Resource.create({"service.name": service, "service.version": version}))
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("loracache", version)


def stop_traces() -> None:
    """Send what is left, in bounded time."""
    global _provider, _tracer
    if _provider is not None:
        _provider.shutdown()
    _provider = _tracer = None


@contextlib.contextmanager
def _traced(name: str, attributes: dict[str, Any]) -> Iterator[Any]:
    with _tracer.start_as_current_span(name, attributes=attributes) as each:
        yield each


def span(name: str, **attributes: Any) -> Any:
    """A context manager around what is traced; answers the span, or None where nothing is traced."""
    return contextlib.nullcontext() if _tracer is None else _traced(name, attributes)
