# SPDX-License-Identifier: Apache-2.0
"""Who writes index and arena: the documents name every module that does, and what it calls."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from loracache.cache.state.arena import Arena
from loracache.cache.state.index import Index, Node

ROOT = Path(__file__).parents[2]
CLASSES = {"index": Index, "arena": Arena}
READS = {
    "index": {"get", "knows", "evictable", "stays", "leaf_below", "below"},
    "arena": {"free_bytes", "rounded", "buffers", "audit", "populate"},  # bytes and page tables, not who has a page
}
SETTINGS = {"adapters", "on_change", "retained", "retaining_tier"}  # of the index, assigned or filled by others
CHANGES = {"add", "update", "discard", "remove", "clear", "pop"}


def last_name(node: ast.expr) -> str:
    """`index` of `self._cache.index`, `self._index` and `index`."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.lstrip("_")


def writes(source: str) -> set[str]:
    """What a module writes: `index.enter`, `node.stored`, ..."""
    wrote = set()
    for each in ast.walk(ast.parse(source)):
        if not isinstance(each, ast.Attribute):
            continue
        above, name = last_name(each.value), each.attr
        if above in CLASSES and hasattr(CLASSES[above], name) and name not in READS[above]:
            wrote.add(f"{above}.{name}")  # called, or handed to somebody who will
        elif isinstance(each.ctx, ast.Store) and above == "index":
            wrote.add(f"index.{name}")
        elif isinstance(each.ctx, ast.Store) and name in Node.__slots__ and above != "self":
            wrote.add(f"node.{name}")
        elif name in CHANGES and isinstance(each.value, ast.Attribute) and above in SETTINGS:
            wrote.add(f"index.{above}")
    return wrote


def documented() -> dict[str, set[str]]:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("| writer | what it writes |")[2]
    rows = re.findall(r"^\| `([\w/.]+)` \| (.+) \|$", text.partition("\n\n")[0], re.MULTILINE)
    return {writer: set(re.findall(r"`([\w.]+)`", what)) for writer, what in rows}


def test_the_documents_name_every_writer_of_index_and_arena_and_what_it_writes() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "loracache").rglob("*.py")):
        module = str(path.relative_to(ROOT / "loracache"))
        if module not in ("cache/state/index.py", "cache/state/arena.py", "cache/state/node.py"):
            writer = module if module.startswith("cache/") else module.partition("/")[0]
            found.setdefault(writer, set()).update(writes(path.read_text()))
    assert {writer: wrote for writer, wrote in found.items() if wrote} == documented()


def test_what_only_reads_is_there() -> None:
    """Any other method counts as one that writes, a new one too."""
    for name, kind in CLASSES.items():
        assert not [each for each in READS[name] if not hasattr(kind, each)]


@pytest.mark.parametrize(
    ("source", "wrote"),
    [
        ("def f(self):\n    self._cache.index.enter(node, tier)", {"index.enter"}),
        ("index.unhold(node)", {"index.unhold"}),
        ("Leases(self._arena.free)", {"arena.free"}),
        ("map(index.get, keys)", set()),
        ("cache.index.adapters.add(key)", {"index.adapters"}),
        ("self.index.retaining_tier = None", {"index.retaining_tier"}),
        ("parent.dirty |= 1", {"node.dirty"}),
        ("a, node.extents = node.extents, ()", {"node.extents"}),
    ],
)
def test_writes_are_seen(source: str, wrote: set[str]) -> None:
    assert writes(source) == wrote
