"""The arrows of the design, read from the source: who may import whom, how long things get, what is never called."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSES = ("connectors", "storage_backends", "kernels")
CODE = ("loracache", *HOUSES, "examples", "benchmarks", "tests")
FILE_LINES, FUNCTION_LINES = 400, 60
COMMON = {"errors", "config", "keys"}
GPU_LIBRARIES = {"torch", "vllm", "cupy", "cupyx", "triton", "transformers", "lmcache"}
BANNED_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec"}

# Whatever the importer reaches, through any number of modules, is never one of these rooms.
NEVER_REACHES = {
    "storage_backends": {"index", "cache", "arena", "policy", "client", "server", "cli"},
    "client": {"index", "cache", "arena", "policy", "server", "cli", "storage_backends"},
    "cache": {"client", "server", "cli"},
    "index": {"cache", "client", "server", "cli"},
    "arena": {"cache", "index", "policy", "client", "server", "cli"},
    "policy": {"cache", "client", "server", "cli"},
    "server": {"cli"},
}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@functools.cache
def sources() -> dict[str, Path]:
    """Our modules by dotted name, each once: the symlinks in loracache/ are not followed."""
    found = {}
    for top in ("loracache", *HOUSES):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if top == "loracache" and relative.parts[1] in HOUSES:
                continue
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            found[name if top == "loracache" else f"loracache.{name}"] = path
    return found


def room(module: str) -> str:
    """The part after "loracache.": "server" for loracache.server.rest, "" for loracache itself."""
    return module.partition(".")[2].partition(".")[0]


def absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if sources()[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def imports(module: str) -> Iterator[str]:
    """Dotted names that `module` imports anywhere, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(parse(sources()[module])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(module, node)
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if name in sources() else origin


@functools.cache
def arrows() -> dict[str, frozenset[str]]:
    """Module -> modules of ours that it imports."""
    return {module: frozenset(set(imports(module)) & sources().keys() - {module}) for module in sources()}


def reached(start: str) -> dict[str, str]:
    """Every module that `start` leads to, and through which one it was found."""
    found, waiting = {start: ""}, [start]
    while waiting:
        current = waiting.pop()
        for target in arrows()[current]:
            if target not in found:
                found[target] = current
                waiting.append(target)
    return found


def everything() -> list[Path]:
    found = [path for top in CODE for path in sorted((ROOT / top).rglob("*.py"))]
    return sorted({path.resolve() for path in found})


@pytest.mark.parametrize("importer", sorted(NEVER_REACHES))
def test_arrows_run_one_way(importer: str) -> None:
    for module in sources():
        if room(module) != importer:
            continue
        found = reached(module)
        wrong = [f"{name} (through {by})" for name, by in found.items() if room(name) in NEVER_REACHES[importer]]
        assert not wrong, f"{module} reaches {wrong}"


def test_connectors_use_the_client_and_the_kernels_only() -> None:
    # The client's side of the socket, what reads adapters, and the allocator: nothing that holds cached state.
    client_side = {"client", "connection", "protocol", "mapping", "tiers", "adapters", "peft", "free_pages"}
    allowed = {"", "kernels", "connectors", *client_side, *COMMON}
    for module in sources():
        if room(module) == "connectors":
            wrong = [target for target in arrows()[module] if room(target) not in allowed]
            assert not wrong, f"{module} imports {wrong}; connectors talk to the daemon as its clients"


def test_kernels_import_nothing_of_ours() -> None:
    for module in sources():
        if room(module) == "kernels":
            wrong = [name for name in imports(module) if name.split(".")[0] == "loracache" and room(name) != "kernels"]
            assert not wrong, f"{module} imports {wrong}"


def test_loracache_itself_knows_neither_connectors_nor_kernels_nor_gpu_libraries() -> None:
    for module in sources():
        if room(module) in {"connectors", "kernels"}:
            continue
        for name in imports(module):
            assert room(name) not in {"connectors", "kernels"} or not name.startswith("loracache."), f"{module}: {name}"
            if room(module) != "storage_backends":
                assert name.split(".")[0] not in GPU_LIBRARIES, f"{module} imports {name}"


def test_our_code_is_imported_under_loracache_only() -> None:
    for module in sources():
        wrong = [name for name in imports(module) if name.split(".")[0] in HOUSES]
        assert not wrong, f"{module} imports {wrong}; write loracache.{wrong[0] if wrong else ''}"


def test_no_room_imports_itself_through_another() -> None:
    for module in sources():
        for target in arrows()[module]:
            if room(target) == room(module) or not room(module):
                continue
            back = [name for name in reached(target) if room(name) == room(module)]
            assert not back, f"{module} -> {target} -> ... -> {back[0] if back else ''}"


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
