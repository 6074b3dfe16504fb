# SPDX-License-Identifier: Apache-2.0
"""A line of candidates: in the order of ranks whatever comes and goes, in parts none of which grows at length."""

from __future__ import annotations

import random

import pytest

from loracache.cache.policy import line as module
from loracache.cache.policy.line import Front, Line
from loracache.cache.state.node import Node
from loracache.storage_backends.base import Kind


def node() -> Node:
    return Node(bytes(32), Kind.KV, None)


def test_a_line_in_parts_is_in_the_order_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 4)
    chance = random.Random(0)
    line: Line[int] = Line()
    model: dict[int, Node] = {}
    for step in range(3_000):
        what = chance.random()
        if what < 0.5 or not model:
            rank = step if chance.random() < 0.9 else chance.randrange(step + 1)
            if rank not in model:
                model[rank] = node()
                line.put(rank, model[rank])
        elif what < 0.9:
            rank = chance.choice(list(model))
            line.take(rank)
            del model[rank]
        else:
            front = Front(line)
            found: list[tuple[int, Node]] = []
            while front.first() is not None and len(found) < 10:
                found.append(front.pop())
            assert found == sorted(model.items())[:10]
        assert line.first() == min(model, default=None)
        assert len(line) == len(model)
    assert line.all() == model
    assert all(1 <= len(part) <= 4 for part in line._recent)


def test_no_dict_of_very_many_grows() -> None:
    """One with 175,000 entries takes 10 ms for the next."""
    line: Line[int] = Line()
    each = node()
    for rank in range(20_000):
        line.put(rank, each)
    assert max(map(len, line._recent)) <= 8192
    assert not line._line
