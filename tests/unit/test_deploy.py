# SPDX-License-Identifier: Apache-2.0
"""What deploy/ and the Dockerfile promise: settings that load, a user that is not root, an end that loses nothing."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loracache import CacheClient, Namespace, chunk_keys
from loracache.config import Config, load_config
from loracache.memory_limit import BESIDE_THE_ARENA

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTING = re.compile(r"^#?([a-z_]+):", re.MULTILINE)
UNIT = DEPLOY / "loracache.service"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LORACACHE_"):
            monkeypatch.delenv(name)


# -- the example configuration ----------


def test_the_example_loads_and_is_the_defaults_but_for_its_paths() -> None:
    shown = load_config({}, DEPLOY / "loracache.yaml").model_dump()
    defaults = load_config({"socket": shown["socket"]}).model_dump()
    assert {key for key in shown if shown[key] != defaults[key]} == {"disk_path"}


def test_the_example_has_every_setting_with_a_comment_above(tmp_path: Path) -> None:
    text = (DEPLOY / "loracache.yaml").read_text()
    assert sorted(SETTING.findall(text)) == sorted(Config.model_fields)
    for block in text.split("\n\n"):
        if SETTING.search(block):
            assert block.startswith("# "), block
    whole = tmp_path / "whole.yaml"
    whole.write_text(re.sub(r"^#(?=[a-z_]+:)", "", text, flags=re.MULTILINE))
    load_config({}, whole)


# -- the image ----------


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile's last stage."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    found = [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]
    last = max(number for number, (name, _) in enumerate(found) if name == "FROM")
    return found[last:]


def test_the_image_runs_the_daemon_itself_and_not_as_root() -> None:
    final = instructions((ROOT / "Dockerfile").read_text())
    by_name = dict(final)
    assert by_name["STOPSIGNAL"] == "SIGTERM"
    entrypoint, arguments = json.loads(by_name["ENTRYPOINT"]), json.loads(by_name["CMD"])  # no shell between
    assert entrypoint[1:] + arguments == ["serve", "--config", "/etc/loracache/loracache.yaml"]
    user = by_name["USER"].partition(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    after = [name for name, _ in final[[name for name, _ in final].index("USER") :]]
    assert not {"USER", "RUN", "COPY"} & set(after[1:])
    assert f"LORACACHE_SOCKET={load_config({}, DEPLOY / 'loracache.yaml').socket}" in by_name["ENV"].split()


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    text = (ROOT / "Dockerfile").read_text()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed, source


class Contained:
    """A daemon with a disk tier; where `apart`, the first process of a pid namespace of its own, as in a container."""

    OWN = ("unshare", "--pid", "--fork", "--kill-child")

    def __init__(self, folder: Path, apart: bool, eventually: Any) -> None:
        if apart and subprocess.run([*self.OWN, "true"], check=False, capture_output=True).returncode != 0:
            pytest.skip("no pid namespace can be made here")
        self.url = f"unix://{folder / 's'}"
        self.log = folder / "log"
        self._apart, self._eventually = apart, eventually
        options = ["--memory", "64MiB", "--page-size", "4KiB", "--disk-path", str(folder / "disk")]
        self._serve = [sys.executable, "-m", "loracache", "serve", "--socket", str(folder / "s"), *options]
        self.start()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
        command = [*(self.OWN if self._apart else ()), *self._serve]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stderr=file)
        self._eventually(lambda: "listening on" in self.log.read_text() or self.process.poll() is not None, "start", 30)

    def stop(self) -> int:
        """SIGTERM to the daemon, not to what holds its namespace; answers the exit code."""
        daemon = self.process.pid
        if self._apart:
            (daemon,) = map(int, Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split())
            assert re.search(r"^NSpid:.*\t1$", Path(f"/proc/{daemon}/status").read_text(), re.MULTILINE)
        os.kill(daemon, signal.SIGTERM)
        return self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def contained(short_tmp: Path, eventually: Any) -> Iterator[Callable[..., Contained]]:
    started: list[Contained] = []

    def start(*, apart: bool) -> Contained:
        started.append(Contained(short_tmp, apart, eventually))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.mark.parametrize("apart", [False, True])
def test_sigterm_ends_it_with_everything_written_as_process_1_too(apart: bool, contained: Any, eventually: Any) -> None:
    daemon = contained(apart=apart)
    with CacheClient(daemon.url) as client:
        root = client.register(Namespace("model", "float32", "layout", 16))
        keys = chunk_keys(root, range(200 * 16), 16)
        with client.reserve(root, keys, [100_000] * 200) as reservation:
            for position in range(200):
                reservation.write(position, bytes([position]) * 100_000)
    assert daemon.stop() == 0
    daemon.start()
    with CacheClient(daemon.url) as client:
        eventually(lambda: client.lookup(keys).hits == 200, "the disk has them")
    assert daemon.stop() == 0


@pytest.mark.skipif(tuple(map(int, os.uname().release.split(".")[:2])) < (6, 5), reason="needs Linux 6.5")
def test_a_writer_that_dies_in_another_container_is_noticed(
    contained: Any, client_process: Any, eventually: Any
) -> None:
    daemon = contained(apart=True)
    code = "with client.reserve(root, chunk_keys(root, range(16), 16), [100_000]): say('holds'), time.sleep(60)"
    writer = client_process(daemon.url, code)
    assert writer.line() == "holds"
    writer.kill()
    client: Any
    with CacheClient(daemon.url) as client:
        eventually(lambda: client.status()["quarantined_bytes"] > 0, "it is seen to be gone", 5)
        eventually(lambda: client.status()["quarantined_bytes"] == 0, "its pages are back", 10)


# -- compose ----------


def test_compose_gives_the_engine_the_daemons_socket_and_the_arena_fits_its_limit() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    daemon, engine = services["loracache"], services["engine"]
    settings = {key.removeprefix("LORACACHE_").lower(): value for key, value in daemon["environment"].items()}
    config = load_config(settings, DEPLOY / "loracache.yaml")
    assert config.memory + BESIDE_THE_ARENA < int(daemon["mem_limit"].removesuffix("g")) << 30
    assert int(daemon["stop_grace_period"].removesuffix("s")) > config.drain
    (socket,) = set(daemon["volumes"]) & set(engine["volumes"])
    assert socket.partition(":")[2] == str(config.socket.parent)
    transfer = json.loads(engine["command"][engine["command"].index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["server"] == f"unix://{config.socket}"
    assert transfer["kv_connector_module_path"] == "loracache.connectors.vllm"
    assert not [name for name, service in services.items() if "pid" in service or "ipc" in service]


# -- systemd ----------


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser["Service"]


def test_the_unit_runs_as_its_own_user_on_the_example_configuration() -> None:
    service, config = unit(), load_config({}, DEPLOY / "loracache.yaml")
    assert service["User"] == "loracache"
    assert shlex.split(service["ExecStart"])[1:] == ["serve", "--config", "/etc/loracache/loracache.yaml"]
    assert config.socket.parent == Path("/run") / service["RuntimeDirectory"]
    assert config.disk_path == Path("/var/cache") / service["CacheDirectory"]
    assert int(service["TimeoutStopSec"]) > config.drain
    assert service["RestartPreventExitStatus"] == "2"
    assert service["RuntimeDirectoryPreserve"] == "yes"  # or a restart would revoke all tokens of REST


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_the_unit_correct_and_little_exposed() -> None:
    tool = "systemd-analyze"
    verify = subprocess.run([tool, "verify", UNIT], capture_output=True, text=True, timeout=50, check=False)
    wrong = [line for line in verify.stderr.splitlines() if UNIT.name in line and "is not executable" not in line]
    assert not wrong
    options = ("security", "--offline=true", "--threshold=20")  # tenths
    done = subprocess.run([tool, *options, UNIT], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
