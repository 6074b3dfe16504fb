# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: offline, vLLM small enough for a shared machine, marks by folder.

Real parts for whoever needs them: `daemon` starts `loracache serve` processes, `redis_server` real Redis servers,
`client_process` clients that can be stopped and killed, `module_shell` shells for what the documents show; `eventually`
waits, for a bounded time, until something holds; `quickest` measures again where the machine may have stalled.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis as redis_client
from hypothesis import HealthCheck, settings

from loracache import CacheClient
from tests import waiting

TESTS = Path(__file__).parent
E2E_SECONDS = 900

# Read by vLLM and transformers when they are imported, and inherited by the processes that tests start.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# Left alone, vLLM computes on one core in some configurations and on two in others.
_CORES = sorted(os.sched_getaffinity(0))[:2]
if len(_CORES) == 2:
    _ENVIRONMENT["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, _CORES))
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        room = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if room == "e2e":
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(E2E_SECONDS))
        elif room == "stress":
            item.add_marker(pytest.mark.stress)


# Shared machines stall for seconds: what hypothesis finds slow says nothing about the code.
settings.register_profile("loracache", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("loracache")

_START_S, _END_S = 30.0, 30.0


def _environment(**more: str) -> dict[str, str]:
    """Ours for a child that finds the same modules, without the settings of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LORACACHE_")}
    return kept | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))} | more


def _serve(options: dict[str, object]) -> list[str]:
    """The command line of a daemon. Options are settings of `Config`; True is a flag without a value."""
    arguments = [sys.executable, "-m", "loracache", "serve"]
    for name, value in ({"memory": "16MiB"} | options).items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return arguments


class RunningDaemon:
    """A `loracache serve` process. Its socket (unless given) and its log lie in `folder`."""

    def __init__(self, folder: Path, number: int, options: dict[str, object]) -> None:
        self.socket = Path(str(options.setdefault("socket", folder / f"{number}.sock")))
        self.url = f"unix://{self.socket}"
        self.log_file = folder / f"daemon-{number}.log"
        self._clients: list[CacheClient] = []
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(_serve(options), cwd=folder, env=_environment(), stdout=log, stderr=log)

    def client(self, **options: Any) -> CacheClient:
        """A client of this daemon, closed at the end of the test."""
        client = CacheClient(self.url, **options)
        self._clients.append(client)
        return client

    def status(self) -> dict[str, Any]:
        with CacheClient(self.url, name="status") as client:
            return client.status()

    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def http(self) -> str:
        """Base URL of its REST process."""
        return f"http://127.0.0.1:{self.log().partition('REST on port ')[2].split()[0]}"

    def listens(self) -> bool:
        assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}: {self.log()}"
        return "listening on" in self.log()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = _END_S) -> int:
        """Signal, wait for the end, answer the exit code."""
        self.send(number)
        return self.process.wait(seconds)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()  # ends a stopped process too
        self.process.wait(_END_S)
        print(f"--- {self.log_file}\n{self.log()[-8000:]}")  # noqa: T201 - shown where the test failed


class RedisServer:
    """A real Redis on a unix socket, with nothing kept on disk."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self.socket = folder / f"redis-{number}.sock"
        self.url = f"unix://{self.socket}"
        self.start()

    def start(self) -> None:
        """Start, or start again with nothing in it."""
        arguments = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(["redis-server", *arguments], cwd=self._folder, stdout=subprocess.DEVNULL)
        self.redis = redis_client.Redis(unix_socket_path=str(self.socket))
        waiting.eventually(self._answers, "redis-server answers")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.redis.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(_END_S)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"redis-server ended with {self.process.returncode}"
        try:
            return bool(self.redis.ping())
        except redis_client.ConnectionError:
            return False


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    return waiting.eventually


@pytest.fixture
def quickest() -> Callable[[Callable[[], float], float], float]:
    return waiting.quickest


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a name short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        yield Path(folder)


def _daemons(folder: Path) -> Iterator[Callable[..., RunningDaemon]]:
    started: list[RunningDaemon] = []
    numbers = itertools.count()

    def start(**options: object) -> RunningDaemon:
        running = RunningDaemon(folder, next(numbers), options)
        started.append(running)
        waiting.eventually(running.listens, "the daemon listens", _START_S)
        return running

    try:
        yield start
    finally:
        for running in started:
            running.close()


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """daemon(memory="16MiB", disk_path=..., ...) starts one and answers when it listens; all end with the test."""
    yield from _daemons(short_tmp)


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """file_system(MiB) mounts one of that size, where this machine allows it."""
    mounted: list[Path] = []

    def mount(mib: int) -> Path:
        point = tmp_path / f"file-system-{len(mounted)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "loracache-test", str(point)]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("needs to be root and to mount a file system")
        mounted.append(point)
        return point

    yield mount
    for point in mounted:
        subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[Callable[..., RunningDaemon]]:
    """As `daemon`, for daemons that the tests of a module share."""
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        yield from _daemons(Path(folder))


def _redis_servers(folder: Path) -> Iterator[Callable[[], RedisServer]]:
    started: list[RedisServer] = []

    def start() -> RedisServer:
        server = RedisServer(folder, len(started))
        started.append(server)
        return server

    try:
        yield start
    finally:
        for server in started:
            server.kill()


@pytest.fixture(scope="module")
def module_redis() -> Iterator[Callable[[], RedisServer]]:
    """As `redis_server`, for servers that the tests of a module share."""
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        yield from _redis_servers(Path(folder))


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def done() -> type[Done]:
    return Done


@pytest.fixture(scope="session")
def loracache() -> Callable[..., Done]:
    """loracache("evict", "--key", ..., socket=path, stdin="", NAME=value) runs a command in this process: a tenth of
    what one of its own takes. Without a terminal, and without settings of whoever runs the tests."""
    from typer.testing import CliRunner

    from loracache.cli.app import app

    def run(*arguments: object, socket: object = None, stdin: str | bytes = "", **environment: str) -> Done:
        given: dict[str, str | None] = {name: None for name in os.environ if name.startswith("LORACACHE_")}
        given |= {"COLUMNS": "200"} | ({"LORACACHE_SOCKET": str(socket)} if socket else {}) | environment
        done = CliRunner().invoke(app, list(map(str, arguments)), input=stdin, env=given, prog_name="loracache")
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        return Done(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def serve_fails(
    short_tmp: Path, loracache: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """serve_fails(environment={}, **options) starts a daemon, in this process, that should not start; answers exit code
    and messages."""
    from loracache.daemon.daemon import Daemon

    async def started(self: Daemon) -> None:
        raise AssertionError(f"it started: {self.config}")

    monkeypatch.setattr(Daemon, "run", started)

    def run(environment: dict[str, str] | None = None, **options: object) -> tuple[int, str]:
        with contextlib.chdir(short_tmp):
            done = loracache(*_serve({"socket": short_tmp / "lc.sock"} | options)[3:], **(environment or {}))
        return done.code, done.err

    return run


class ClientProcess:
    """A process of its own that runs `code` with `url`, a connected `client`, and `say`; lines go both ways."""

    _PREAMBLE = """
import os, signal, sys, time
from loracache import CacheClient, Namespace, chunk_keys
url = sys.argv[1]
client = CacheClient(url, name="child")
root = client.register(Namespace("model", "float32", "layout", 16))
def say(*words): print(*words, flush=True)
"""

    def __init__(self, url: str, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._PREAMBLE + code, url, *arguments],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """The next line it says; empty where it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(_END_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@pytest.fixture
def client_process() -> Iterator[Callable[..., ClientProcess]]:
    """client_process(url, code, ...) starts one; all end with the test."""
    started: list[ClientProcess] = []

    def start(url: str, code: str, *arguments: str) -> ClientProcess:
        started.append(ClientProcess(url, code, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def redis_server(short_tmp: Path) -> Iterator[Callable[[], RedisServer]]:
    """redis_server() starts one; all end with the test."""
    yield from _redis_servers(short_tmp)


@pytest.fixture(scope="session")
def documented() -> Any:
    """The module documented.py."""
    sys.path.append(str(TESTS))
    return importlib.import_module("documented")


@pytest.fixture(scope="module")
def module_shell(documented: Any) -> Iterator[Callable[..., Any]]:
    """module_shell(redis=URL, model=FOLDER) makes a Shell of documented.py; what it started ends with the module."""
    shells: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:

        def make(**options: Any) -> Any:
            place = Path(folder) / str(len(shells))
            place.mkdir()
            shells.append(documented.Shell(place, **options))
            return shells[-1]

        yield make
        for shell in shells:
            shell.close()
