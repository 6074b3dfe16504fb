# SPDX-License-Identifier: Apache-2.0
"""What schemathesis makes of the OpenAPI document, sent to a real daemon: no 5xx, and no answer outside of its schema.

LORACACHE_FUZZ_CALLS says how many calls; `make fuzz` makes 20,000.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loracache import CacheClient, Namespace

CALLS = int(os.environ.get("LORACACHE_FUZZ_CALLS", "1500"))
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
ENDLESS = "/v1/events"  # a stream without an end; it has tests of its own
_WAITS = {"/v1/flush": 20}  # 504 where it may not wait
KEYS = [bytes([number]) * 32 for number in range(40)]


@pytest.fixture(scope="module")
def running(module_daemon: Any, eventually: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon that holds something, so that not everything asked for is absent."""
    made = module_daemon(
        http="127.0.0.1:0", memory="16MiB", page_size="4KiB", disk_path=tmp_path_factory.mktemp("disk"), disk="64MiB"
    )

    def up() -> bool:
        try:
            return httpx.get(f"{made.http}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    eventually(up, "REST answers")
    with CacheClient(made.url) as client:
        root = client.register(Namespace("ab" * 32, "float32", "layout", 16), ["model"])
        with client.reserve(root, KEYS, [1000] * len(KEYS)) as reservation:
            for position in range(len(KEYS)):
                reservation.write(position, bytes(1000))
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_call_is_answered_by_an_error_of_ours_or_outside_of_the_schema(running: Any, mode: GenerationMode) -> None:
    token = Path(f"{running.socket}.token").read_text().strip()
    headers = {"authorization": f"Bearer {token}"}
    document = httpx.get(f"{running.http}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=running.http)
    operations = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    each = max(1, CALLS // 2 // len(operations))
    answers: Counter[str] = Counter()
    for operation in operations:
        if operation.path != ENDLESS:
            fuzz(operation, mode, each, headers, answers)
    print(json.dumps(answers, indent=1))  # noqa: T201 - what was reached
    assert httpx.get(f"{running.http}/readyz").status_code == 200
    assert "Traceback" not in running.log()  # its REST process writes there, too


def fuzz(operation: Any, mode: GenerationMode, calls: int, headers: dict[str, str], answers: Counter[str]) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=calls,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def call(case: Any) -> None:
        if "wait" in (case.query or {}):
            case.query["wait"] = _WAITS.get(operation.path, 0)  # what waits proves nothing here
        response = case.call(headers=headers, timeout=30)
        answers[f"{operation.method.upper()} {operation.path} {response.status_code}"] += 1
        case.validate_response(response, checks=CHECKS)

    try:
        call()
    except BaseException as error:
        if "Unsatisfiable" not in type(error).__name__:  # nothing can be wrong in a call without parameters
            raise
