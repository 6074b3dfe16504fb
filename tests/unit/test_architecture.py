# SPDX-License-Identifier: Apache-2.0
"""The arrows of the design, read from the source: who may import whom, how long things get, what is never called."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import rooms  # scripts/rooms.py

ROOT = Path(__file__).parents[2]
CODE = ("loracache", "connectors", "storage_backends", "kernels", "examples", "benchmarks", "scripts", "tests")
FILE_LINES, FUNCTION_LINES = 400, 60
GPU_LIBRARIES = {"torch", "vllm", "cupy", "cupyx", "triton", "transformers", "lmcache"}
BANNED_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec"}

# All that each room may lead to, through any number of modules; no more and no less. "vllm" is connectors.vllm. A new
# arrow is a decision: write it here, and in the "May import" line of the room's __init__.
REACHES = {
    "loracache": "backoff client errors groups keys mapping results tiers wire",
    "accepting": "",
    "adapters": "errors folder groups keys",
    "audit": (
        "adapters backoff client config errors folder groups keys logs mapping results storage_backends "
        "storage_backends.disk storage_backends.redis tiers wire"
    ),
    "backoff": "",
    "batch": "backoff client errors groups keys mapping results tiers wire",
    "cache": (
        "backoff cache.policy cache.state cache.tier errors free_pages mapping memory_limit results storage_backends "
        "tiers tracing transfer_times"
    ),
    "cache.policy": "cache.state errors free_pages mapping memory_limit results storage_backends tiers",
    "cache.swap": (
        "backoff cache.policy cache.state errors free_pages mapping memory_limit results storage_backends tiers"
    ),
    "cache.state": "errors free_pages mapping memory_limit storage_backends tiers",
    "cache.tier": (
        "backoff cache.policy cache.state errors free_pages mapping memory_limit results storage_backends tiers "
        "tracing transfer_times"
    ),
    "cli": (
        "accepting adapters audit backoff batch cache cache.policy cache.state cache.swap cache.tier client config "
        "control daemon errors folder free_pages groups keys logs loracache mapping memory_limit namespaces rest "
        "results simulator storage_backends storage_backends.disk storage_backends.redis tiers tracing transfer_times "
        "wire"
    ),
    "client": "backoff errors groups keys mapping results tiers wire",
    "config": "errors groups keys logs",
    "connectors": "",
    "vllm": (
        "adapters backoff client config errors free_pages groups kernels kernels.page_copy keys logs mapping results "
        "s3_fifo tiers transfer_times vllm.common vllm.frontend vllm.identity vllm.link vllm.lora vllm.scheduler "
        "vllm.scheduler.lora vllm.worker vllm.worker.lora wire"
    ),
    "vllm.common": "adapters backoff client config errors groups kernels keys logs mapping vllm.lora wire",
    "vllm.frontend": "adapters backoff client config errors groups keys logs mapping vllm.common vllm.lora wire",
    "vllm.identity": "errors vllm.common",
    "vllm.link": "backoff client errors groups keys mapping tiers wire",
    "vllm.lora": "adapters errors kernels",
    "vllm.scheduler": (
        "adapters backoff client config errors groups kernels keys logs mapping results s3_fifo tiers transfer_times "
        "vllm.common vllm.link vllm.lora vllm.scheduler.lora wire"
    ),
    "vllm.scheduler.lora": (
        "adapters backoff client errors groups kernels keys mapping results s3_fifo tiers vllm.common vllm.link "
        "vllm.lora wire"
    ),
    "vllm.worker": (
        "adapters backoff client config errors free_pages groups kernels kernels.page_copy keys logs mapping results "
        "tiers vllm.common vllm.link vllm.lora vllm.worker.lora wire"
    ),
    "vllm.worker.lora": (
        "adapters backoff client config errors free_pages groups kernels keys logs mapping results vllm.common "
        "vllm.link vllm.lora wire"
    ),
    "control": (
        "adapters backoff cache cache.policy cache.state cache.tier errors folder free_pages groups keys logs mapping "
        "memory_limit namespaces results storage_backends tiers tracing transfer_times wire"
    ),
    "daemon": (
        "accepting adapters backoff cache cache.policy cache.state cache.swap cache.tier client config control errors "
        "folder free_pages groups keys logs loracache mapping memory_limit namespaces rest results storage_backends "
        "storage_backends.disk storage_backends.redis tiers tracing transfer_times wire"
    ),
    "errors": "",
    "folder": "",
    "free_pages": "",
    "kernels": "",
    "kernels.page_copy": "",
    "groups": "errors",
    "keys": "errors groups",
    "logs": "",
    "mapping": "",
    "memory_limit": "",
    "namespaces": "errors folder groups keys",
    "rest": (
        "accepting adapters backoff client config errors folder groups keys logs loracache mapping results tiers "
        "tracing wire"
    ),
    "results": "",
    "simulator": (
        "backoff cache.policy cache.state cache.swap errors free_pages mapping memory_limit results storage_backends "
        "tiers"
    ),
    "s3_fifo": "",
    "storage_backends": "errors",
    "storage_backends.disk": "errors folder storage_backends",
    "storage_backends.redis": "adapters backoff errors folder groups keys storage_backends",
    "tiers": "errors",
    "tracing": "errors",
    "transfer_times": "",
    "wire": "errors groups keys",
}


house = rooms.House.read(ROOT)
parse = rooms.parse


def modules_of(room: str) -> list[str]:
    return [module for module in house.sources if house.room(module) == room]


def top(module: str) -> str:
    """The part after "loracache."."""
    return module.partition(".")[2].partition(".")[0]


def short(room: str) -> str:
    return room.replace("connectors.vllm", "vllm") or "loracache"


def everything() -> list[Path]:
    found = [path for top in CODE for path in sorted((ROOT / top).rglob("*.py"))]
    return sorted({path.resolve() for path in found})


@pytest.mark.parametrize("room", sorted({house.room(module) for module in house.sources}))
def test_a_room_leads_where_the_list_says_and_nowhere_else(room: str) -> None:
    if room == "__main__":
        return
    found: dict[str, str] = {}
    for module in modules_of(room):
        for target in house.reach(module):
            found.setdefault(short(house.room(target)), f"{module} -> ... -> {target}")
    found.pop(short(room), None)
    allowed = set(REACHES.get(short(room), "").split())
    assert not (wrong := {name: way for name, way in found.items() if name not in allowed}), f"{room} leads to {wrong}"
    assert not allowed - found.keys(), f"{room} no longer leads to {allowed - found.keys()}: take that off the list"


def test_every_room_says_what_it_is_for_what_it_may_import_and_its_threads() -> None:
    ground = rooms.ground(house)
    for room, targets in house.rooms.items():
        if room in ground or not room:
            continue
        lines = (ast.get_docstring(parse(house.sources[f"loracache.{room}"])) or "").splitlines()
        text = " ".join(" ".join(lines).split())
        assert len(lines) <= 10, f"{room}: say it shorter"
        said = re.search(r"May import: ([\w., ]+?)(?: Threads:|$)", text)
        assert said, f"{room}/__init__.py does not say what it may import"
        listed = set() if said[1] == "nothing of ours" else set(said[1].rstrip(".").split(", "))
        assert listed == targets - {""}, f"{room}/__init__.py: it imports {sorted(targets - {''})}"
        assert "Threads: " in text or room == "connectors", f"{room}/__init__.py does not say which threads come there"


def test_no_room_and_no_module_leads_to_itself() -> None:
    assert rooms.circles(house.rooms) == []
    assert rooms.circles(house.arrows) == []


def test_arrows_are_read_from_functions_type_checking_and_relative_imports(tmp_path: Path) -> None:
    (tmp_path / "loracache" / "one").mkdir(parents=True)
    for name in ("loracache/__init__.py", "loracache/one/__init__.py"):
        (tmp_path / name).touch()
    (tmp_path / "loracache" / "one" / "a.py").write_text("def f():\n    from loracache.two import b\n")
    (tmp_path / "loracache" / "two.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import a\n"
    )
    small = rooms.House.read(tmp_path)
    assert rooms.circles(small.arrows) == [["loracache.one.a", "loracache.two"]]
    assert small.rooms["two"] == {"one"}


def test_kernels_import_nothing_of_ours() -> None:
    for module in house.sources:
        if top(module) == "kernels":
            ours = [name for name in house.imports(module) if name.split(".")[0] == "loracache"]
            wrong = [name for name in ours if top(name) != "kernels"]
            assert not wrong, f"{module} imports {wrong}"


def test_loracache_itself_knows_neither_connectors_nor_kernels_nor_gpu_libraries() -> None:
    for module in house.sources:
        if top(module) in {"connectors", "kernels"}:
            continue
        for name in house.imports(module):
            assert top(name) not in {"connectors", "kernels"} or not name.startswith("loracache."), f"{module}: {name}"
            if top(module) != "storage_backends":
                assert name.split(".")[0] not in GPU_LIBRARIES, f"{module} imports {name}"


def test_our_code_is_imported_under_loracache_only() -> None:
    for module in house.sources:
        wrong = [name for name in house.imports(module) if name.split(".")[0] in rooms.HOUSES]
        assert not wrong, f"{module} imports {wrong}; write loracache.{wrong[0] if wrong else ''}"


def test_files_stay_readable_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in everything()}
    long = {name: lines for name, lines in lengths.items() if lines > FILE_LINES}
    assert not long, f"over {FILE_LINES} lines: {long}"


def test_functions_stay_on_one_screen() -> None:
    long = {}
    for path in everything():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert not long, f"over {FUNCTION_LINES} lines: {long}"


def test_a_property_changes_nothing() -> None:
    for module, path in house.sources.items():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(each) == "property" for each in node.decorator_list
            ):
                stored = [each for each in ast.walk(node) if isinstance(getattr(each, "ctx", None), ast.Store)]
                wrong = [ast.unparse(each) for each in stored if isinstance(each, ast.Attribute | ast.Subscript)]
                assert not wrong, f"{module}.{node.name} sets {wrong}; make it a method"


def test_nothing_unpickles_or_evaluates() -> None:
    for path in everything():
        for node in ast.walk(parse(path)):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & BANNED_IMPORTS, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in BANNED_IMPORTS, where
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in BANNED_CALLS, where
