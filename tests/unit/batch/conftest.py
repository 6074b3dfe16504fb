# SPDX-License-Identifier: Apache-2.0
"""Small batches, as hypothesis makes them up, the benchmark's sets, and servers of OpenAI's API."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from loracache.batch import driver
from loracache.batch.prompts import PromptHasher, Prompts
from tests.unit.batch.openai_fake import Fake

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request."""

    tokens: list[int]
    adapter: str = ""
    salt: str = ""
    decode: int = 0


def prompts_of(batch: Sequence[Asked], block: int) -> Prompts:
    """As a plan takes them in."""
    hasher = PromptHasher(block)
    for each in batch:
        hasher.add(each.tokens, adapter=each.adapter, salt=each.salt, decode=each.decode)
    return hasher.prompts()


def shared(one: Asked, other: Asked, block: int) -> int:
    """Leading blocks that two requests have in common, by comparing tokens."""
    if (one.adapter, one.salt) != (other.adapter, other.salt):
        return 0
    count = 0
    least = min(len(one.tokens), len(other.tokens)) // block
    while count < least and one.tokens[: (count + 1) * block] == other.tokens[: (count + 1) * block]:
        count += 1
    return count


def batches(most: int = 12, tokens: int = 12) -> st.SearchStrategy[list[Asked]]:
    """Of few different tokens, so that much is shared."""
    each = st.builds(
        Asked,
        st.lists(st.integers(0, 1), max_size=tokens),
        st.sampled_from(["", "a"]),
        st.sampled_from(["", "", "s"]),
        st.integers(0, 5),
    )
    return st.lists(each, max_size=most)


@pytest.fixture(scope="session")
def sets() -> Any:
    """benchmarks/batch_sets.py."""
    spec = importlib.util.spec_from_file_location("batch_sets", BENCHMARKS / "batch_sets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is tried again after a short pause."""
    monkeypatch.setattr(driver, "_PAUSES_S", (0.01, 0.05))


@pytest.fixture
def servers() -> Iterator[Callable[..., Fake]]:
    running: list[Fake] = []

    def start(port: int = 0) -> Fake:
        running.append(Fake(port))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def server(servers: Callable[..., Fake]) -> Fake:
    return servers()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
