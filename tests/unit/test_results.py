# SPDX-License-Identifier: Apache-2.0
"""Results are types: what code compares has a name, and every outcome of a tier has its cause."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from loracache.results import Cause, NodeKind, OperationState
from loracache.storage_backends.base import Outcome

ROOT = Path(__file__).parents[2]
VALUES = {str(value) for kind in (Cause, OperationState, NodeKind) for value in kind if value}


def strings_compared(source: str) -> Iterator[str]:
    """String constants on either side of a comparison, alone or in a tuple, list or set."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                parts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
                yield from (
                    part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )


def test_no_result_is_compared_as_a_string() -> None:
    for top in ("loracache", "connectors"):
        for path in sorted((ROOT / top).rglob("*.py")):
            compared = VALUES.intersection(strings_compared(path.read_text()))
            assert not compared, f"{path.relative_to(ROOT)} compares {compared}; results.py names them"


def test_that_test_sees_comparisons() -> None:
    source = 'x == "busy" or "full" != x or x in ("absent", "held") or {"stays"}.isdisjoint(x) or x == Cause.EXISTS'
    assert set(strings_compared(source)) == {"busy", "full", "absent", "held"}


@pytest.mark.parametrize("tier", ["disk", "redis"])
@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_every_outcome_of_a_tier_is_a_cause(tier: str, outcome: Outcome) -> None:
    assert Cause(f"{tier}_{outcome.value}")
    assert outcome is Outcome.MISS or Cause(outcome.value)


def test_results_travel_as_their_values() -> None:
    for value in (Cause.NO_PARENT, OperationState.DONE, NodeKind.BASE):
        assert msgpack.unpackb(msgpack.packb(value)) == json.loads(json.dumps(value)) == f"{value}" == value.value
    assert not Cause.NONE
